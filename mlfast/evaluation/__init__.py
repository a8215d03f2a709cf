"""Exact metrics of multi-label classification, and thresholds."""

from mlfast.evaluation.metrics import MultilabelMetrics, average_precision, multilabel_metrics
from mlfast.evaluation.predictions import Predictions
from mlfast.evaluation.thresholds import Thresholds, tune_thresholds

__all__ = [
    "MultilabelMetrics",
    "Predictions",
    "Thresholds",
    "average_precision",
    "multilabel_metrics",
    "tune_thresholds",
]
