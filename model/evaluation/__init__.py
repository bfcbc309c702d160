"""Measurements of a model: BPC, what it forgets, what it recalls, what its thinking does; and their plots.

Nothing here trains, and nothing here imports the trainer: `docs/diagnostics.md` says what every number means.
"""

from model.evaluation.bpc import BPCResult, bits_per_byte
from model.evaluation.convexity import convexity_gap, hull_radii
from model.evaluation.plots import plot_curriculum
from model.evaluation.reasoning import ReasoningReport, measure_reasoning
from model.evaluation.recall import RecallReport, needle_accuracy
from model.evaluation.retention import Retention, retention_matrix

__all__ = [
    "BPCResult",
    "ReasoningReport",
    "RecallReport",
    "Retention",
    "bits_per_byte",
    "convexity_gap",
    "hull_radii",
    "measure_reasoning",
    "needle_accuracy",
    "plot_curriculum",
    "retention_matrix",
]
