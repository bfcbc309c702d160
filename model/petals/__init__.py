"""Petals (seed 003): what has been learned sets, freezes and makes room for more.

The public names are loaded when they are first asked for, so that reading options does not wait for PyTorch.
"""

from importlib import import_module

_HOMES = {
    "ViscoelasticAdamW": "model.petals.viscoelastic",
    "ViscoelasticOptions": "model.petals.viscoelastic",
    "Viscosity": "model.petals.viscoelastic",
    "viscoelastic_reference": "model.petals.viscoelastic",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
