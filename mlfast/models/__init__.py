"""Backbone, head and graph branch, put together to one multi-label classifier; graph and vectors of its labels."""

from mlfast.models.classifier import MultilabelClassifier, create_model
from mlfast.models.label_graph import (
    LabelCounts,
    LabelGraph,
    conditional_probabilities,
    count_labels,
    create_label_graph,
)
from mlfast.models.label_vectors import cooccurrence_vectors, read_word_vectors

__all__ = [
    "LabelCounts",
    "LabelGraph",
    "MultilabelClassifier",
    "conditional_probabilities",
    "cooccurrence_vectors",
    "count_labels",
    "create_label_graph",
    "create_model",
    "read_word_vectors",
]
