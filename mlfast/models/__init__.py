"""Backbone, head and graph branch, put together to one multi-label classifier."""

from mlfast.models.classifier import MultilabelClassifier, create_model

__all__ = ["MultilabelClassifier", "create_model"]
