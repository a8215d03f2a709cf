"""What graph layers know of the labels, vectors and a graph: made of the training labels, or of a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mlfast.models.label_graph import LabelCounts, LabelGraph, create_label_graph
from mlfast.models.label_vectors import as_label_vectors, cooccurrence_vectors
from mlfast.nn.graph_branch import GraphBranch

REWEIGHTING = {"gat_reweight": "gat", "gcn_reweight": "gcn"}  # graphs before any head
LABEL_HEADS = ("ml_gcn", "gatn")  # graphs that make the classifiers, and so are heads
_COUNTED = "cooccurrence=mlfast.models.count_labels(targets), with the targets [N, K] of the training images"


def needs_label_inputs(head: str, graph: Any) -> bool:
    """Whether a model of these arguments of `mlfast.create_model` takes label vectors, and perhaps a graph."""
    return head in LABEL_HEADS or (isinstance(graph, str) and graph in (*REWEIGHTING, *LABEL_HEADS))


@dataclass(frozen=True)
class LabelInputs:
    """Vectors and a graph for K classes, from two arguments of `mlfast.create_model`, made when they are asked for."""

    num_classes: int
    label_vectors: Any
    cooccurrence: LabelCounts | LabelGraph | Tensor | None

    @cached_property
    def graph(self) -> Tensor:
        """Z, [K, K].

        Raises:
            TypeError, ValueError: the co-occurrence is missing or does not fit the classes.
        """
        if self.cooccurrence is None:
            raise ValueError(f"a graph over labels is made of their co-occurrence, which is missing: pass {_COUNTED}")
        given = self.cooccurrence
        matrix = (given if isinstance(given, LabelGraph) else create_label_graph(given)).matrix
        if len(matrix) != self.num_classes:
            raise ValueError(
                f"cooccurrence is of {len(matrix)} labels, but num_classes is {self.num_classes}; count the labels of "
                "the same classes"
            )
        return matrix

    @cached_property
    def vectors(self) -> Tensor:
        """[K, N]: the given ones, or those of the co-occurrence.

        Raises:
            TypeError, ValueError: they are missing or do not fit the classes.
        """
        if self.label_vectors is not None:
            return as_label_vectors(self.label_vectors, self.num_classes)
        if self.cooccurrence is None:
            raise ValueError(f"label vectors are missing: pass label_vectors=, an array [K, N], or {_COUNTED}")
        if isinstance(self.cooccurrence, LabelGraph):
            raise ValueError(
                "label_vectors are missing: a LabelGraph has no counts to make them of; pass "
                "mlfast.models.cooccurrence_vectors(counts), or word vectors"
            )
        return as_label_vectors(cooccurrence_vectors(self.cooccurrence), self.num_classes)

    def of_head(self, head: str) -> dict[str, Tensor]:
        """The arguments that one of `LABEL_HEADS` takes; none for another head."""
        wanted = {"ml_gcn": ("graph", "vectors"), "gatn": ("vectors",)}.get(head, ())
        return {name: getattr(self, name) for name in wanted}


def create_branch(name: str, labels: LabelInputs, channels: int, arguments: Mapping[str, Any]) -> GraphBranch:
    """The re-weighting branch of a name.

    Raises:
        ValueError: there is none of that name, or it does not take these arguments.
    """
    if name not in REWEIGHTING:
        known = ", ".join(map(repr, (*REWEIGHTING, *LABEL_HEADS)))
        raise ValueError(f"unknown graph {name!r}; available: {known}, or a module")
    if "kind" in arguments:
        raise ValueError(
            f"graph_args: got kind={arguments['kind']!r}, which the graph {name!r} itself says; leave it out"
        )
    matrix = labels.graph
    try:
        return GraphBranch(labels.vectors, matrix, channels, kind=REWEIGHTING[name], **arguments)
    except TypeError as error:
        raise ValueError(f"graph {name!r} does not take these arguments {sorted(arguments)}: {error}") from error


def saved_label_inputs(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments ``label_vectors`` and ``cooccurrence`` that build a model anew for its ``state_dict``.

    Empty where the model has no graph layers; without co-occurrence where only GATN is told about the labels.
    """
    edges = next((name for name in state if name.endswith(".edge_index")), None)
    if edges is None:
        vectors = state.get("classifier.vectors")
        return {} if vectors is None else {"label_vectors": vectors}
    prefix = edges.removesuffix("edge_index")
    vectors, (source, target) = state[f"{prefix}vectors"], state[edges]
    weight = state.get(f"{prefix}edge_weight", torch.ones(len(source)))
    matrix = torch.zeros(len(vectors), len(vectors)).index_put((target, source), weight.float())
    return {"label_vectors": vectors, "cooccurrence": LabelGraph(matrix)}
