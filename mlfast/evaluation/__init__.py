"""Exact metrics of multi-label classification, and thresholds."""

from mlfast.evaluation.metrics import MultilabelMetrics, average_precision, multilabel_metrics
from mlfast.evaluation.predictions import Predictions
from mlfast.evaluation.thresholds import Thresholds, fold_thresholds, tune_thresholds

__all__ = [
    "MultilabelMetrics",
    "Predictions",
    "Thresholds",
    "average_precision",
    "fold_thresholds",
    "multilabel_metrics",
    "tune_thresholds",
]
