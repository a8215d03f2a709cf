"""What graph layers know of the labels, vectors and a graph: made of the training labels, or of a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlfast.models.label_graph import LabelCounts, LabelGraph, create_label_graph
from mlfast.models.label_vectors import as_label_vectors, cooccurrence_vectors
from mlfast.nn.graph_branch import GraphBranch

GRAPHS = {"gat_reweight": "gat", "gcn_reweight": "gcn"}


class LabelInputs(NamedTuple):
    """Vectors [K, N] and the matrix Z [K, K] of the label graph."""

    vectors: Tensor
    graph: Tensor


def create_label_inputs(
    num_classes: int, label_vectors: Any, cooccurrence: LabelCounts | LabelGraph | Tensor | None
) -> LabelInputs:
    """The inputs for K classes, from two arguments of `mlfast.create_model`, which describes them.

    Raises:
        TypeError, ValueError: they are missing or do not fit the classes.
    """
    if cooccurrence is None:
        raise ValueError(
            "a graph over labels is made of their co-occurrence, which is missing: pass "
            "cooccurrence=mlfast.models.count_labels(targets), with the targets [N, K] of the training images"
        )
    graph = cooccurrence if isinstance(cooccurrence, LabelGraph) else create_label_graph(cooccurrence)
    if len(graph.matrix) != num_classes:
        raise ValueError(
            f"cooccurrence is of {len(graph.matrix)} labels, but num_classes is {num_classes}; count the labels of the "
            "same classes"
        )
    if label_vectors is None:
        if isinstance(cooccurrence, LabelGraph):
            raise ValueError(
                "label_vectors are missing: a LabelGraph has no counts to make them of; pass "
                "mlfast.models.cooccurrence_vectors(counts), or word vectors"
            )
        label_vectors = cooccurrence_vectors(cooccurrence)
    return LabelInputs(as_label_vectors(label_vectors, num_classes), graph.matrix)


def create_branch(name: str, labels: LabelInputs, channels: int) -> GraphBranch:
    """The re-weighting branch of a name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in GRAPHS:
        raise ValueError(f"unknown graph {name!r}; available: {', '.join(map(repr, GRAPHS))}, or a module")
    return GraphBranch(*labels, channels, kind=GRAPHS[name])


def saved_label_inputs(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments ``label_vectors`` and ``cooccurrence`` that build a model anew for its ``state_dict``.

    Empty where the model has no graph layers.
    """
    prefix = next((name.removesuffix("edge_index") for name in state if name.endswith(".edge_index")), None)
    if prefix is None:
        return {}
    vectors, (source, target) = state[f"{prefix}vectors"], state[f"{prefix}edge_index"]
    weight = state.get(f"{prefix}edge_weight", torch.ones(len(source)))
    matrix = torch.zeros(len(vectors), len(vectors)).index_put((target, source), weight.float())
    return {"label_vectors": vectors, "cooccurrence": LabelGraph(matrix)}
