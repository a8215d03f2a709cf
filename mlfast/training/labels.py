"""What a model with graph layers is told about the labels of its training images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlfast.models import cooccurrence_vectors, create_label_graph, read_word_vectors
from mlfast.models.label_graph import LabelCounts
from mlfast.models.label_inputs import needs_label_inputs
from mlfast.training.config import TrainConfig
from mlfast.training.errors import ConfigError


def graph_arguments(
    config: TrainConfig, count_labels: Callable[[], LabelCounts], classes: Sequence[str]
) -> dict[str, Any]:
    """The arguments of `mlfast.create_model` that are about the labels, where they are needed.

    Raises:
        ConfigError: the label vectors cannot be read.
    """
    if not needs_label_inputs(config.head, config.graph):
        return {"graph_args": config.graph_args}  # which says so if there are any
    counts = count_labels()
    if config.label_vectors == "cooccurrence":
        vectors: Any = cooccurrence_vectors(counts)
    else:
        vectors = _read(config.label_vectors, classes)
    return {
        "graph": None if config.graph == "none" else config.graph,
        "graph_args": config.graph_args,
        "label_vectors": vectors,
        "cooccurrence": create_label_graph(counts, classes),
    }


def _read(path: str, classes: Sequence[str]) -> Any:
    path = os.path.expanduser(path)
    try:
        return np.load(path, allow_pickle=False) if path.endswith(".npy") else read_word_vectors(path, classes)
    except (OSError, ValueError) as error:
        raise ConfigError([f"label_vectors: got {path!r}, expected vectors of the labels: {error}"]) from error
