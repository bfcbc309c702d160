"""Measurements of a model: BPC, what it forgets, what it recalls, what its thinking does; and their plots.

Nothing here trains, and nothing here imports the trainer: `docs/diagnostics.md` says what every number means.
"""

from model.evaluation.ablation import attention_reach, without_memory
from model.evaluation.associative import PairsReport, pair_accuracy
from model.evaluation.bpc import BPCResult, bits_per_byte
from model.evaluation.convexity import convexity_gap, hull_radii
from model.evaluation.inspection import inspect_layers
from model.evaluation.inspection_plots import plot_inspection
from model.evaluation.layer_report import InspectionReport
from model.evaluation.plots import plot_curriculum, plot_recall
from model.evaluation.reasoning import ReasoningReport, measure_reasoning
from model.evaluation.recall import RecallReport, needle_accuracy
from model.evaluation.retention import Retention, retention_matrix

__all__ = [
    "BPCResult",
    "InspectionReport",
    "PairsReport",
    "ReasoningReport",
    "RecallReport",
    "Retention",
    "attention_reach",
    "bits_per_byte",
    "convexity_gap",
    "hull_radii",
    "inspect_layers",
    "measure_reasoning",
    "needle_accuracy",
    "pair_accuracy",
    "plot_curriculum",
    "plot_inspection",
    "plot_recall",
    "retention_matrix",
    "without_memory",
]
