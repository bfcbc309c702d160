"""Petals (seed 003): what has been learned sets, freezes and makes room for more."""

from model.petals.crystallization import Crystallization, CrystallizationOptions, match_petals, petal_groups
from model.petals.growth import FreezingProcess, GrowthPolicy
from model.petals.viscoelastic import ViscoelasticAdamW, ViscoelasticOptions, Viscosity, viscoelastic_reference

__all__ = [
    "Crystallization",
    "CrystallizationOptions",
    "FreezingProcess",
    "GrowthPolicy",
    "ViscoelasticAdamW",
    "ViscoelasticOptions",
    "Viscosity",
    "match_petals",
    "petal_groups",
    "viscoelastic_reference",
]
