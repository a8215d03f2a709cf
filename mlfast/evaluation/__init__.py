"""Exact metrics of multi-label classification."""

from mlfast.evaluation.metrics import MultilabelMetrics, average_precision, multilabel_metrics

__all__ = ["MultilabelMetrics", "average_precision", "multilabel_metrics"]
