"""The graph over labels, from which labels occur together: Chen et al. (ML-GCN, CVPR 2019)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlfast.sparse_targets import SparseTargets

THRESHOLD = 0.4
NEIGHBOUR_SHARE = 0.25
_CHUNK = 1 << 24  # elements that exist at once while counting; exact in float32 too, as no count in a chunk exceeds it
_MOST_NAMES = 20


class LabelCounts(NamedTuple):
    """How many images carry which labels.

    Attributes:
        together: [K, K] int64, images with both i and j; on the diagonal, images with i.
        known: [K, K] int64, images with i in which it is known whether j is there. ``together`` divided by it is
            P(j | i). Where no label is unknown, all of row i is the number of images with i.
    """

    together: Tensor
    known: Tensor


@dataclass(frozen=True)
class LabelGraph:
    """A label graph, normalised for graph convolutions.

    Attributes:
        matrix: Z, [K, K] float32. ``Z[j, i] > 0`` for an edge i -> j: the effect j aggregates from the cause i.
    """

    matrix: Tensor

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Cause and effect of every edge, without self-loops, ascending."""
        loops = torch.eye(len(self.matrix), dtype=torch.bool, device=self.matrix.device)
        pairs = ((self.matrix > 0) & ~loops).t().nonzero().tolist()
        return [(i, j) for i, j in pairs]

    @property
    def isolated(self) -> list[int]:
        """The labels that no edge leaves or enters."""
        linked = {label for edge in self.edges for label in edge}
        return [label for label in range(len(self.matrix)) if label not in linked]


# ---------------------------------------------------------------------------------------------------------- counting


def count_labels(targets: Tensor | SparseTargets) -> LabelCounts:
    """Count the images, never the objects, that carry each pair of labels.

    Args:
        targets: [N, K], bool, integer or float: positive above 1/2, unknown below 0 (in uint8: 255), else negative. Or
            `mlfast.SparseTargets`, which are counted at the cost of their pairs.

    Raises:
        TypeError, ValueError: ``targets`` are not as above.
    """
    if isinstance(targets, SparseTargets):
        return _count_sparse(targets.to("cpu"))
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise TypeError(f"targets must be a tensor [N, K] or mlfast.SparseTargets, got {type(targets).__name__}")
    if targets.dim() != 2:
        raise ValueError(f"targets must be [N, K], a row per image, got {list(targets.shape)}")
    num_classes = targets.shape[1]
    targets = targets.view(torch.int8) if targets.dtype == torch.uint8 else targets
    together, known = (torch.zeros(num_classes, num_classes, dtype=torch.int64) for _ in range(2))
    for chunk in targets.split(max(1, _CHUNK // max(1, num_classes))):
        if chunk.is_floating_point() and chunk.isnan().any():
            raise ValueError("targets must be numbers, got NaN; write -1 for unknown")
        positive = (chunk > 0.5).float()
        together += (positive.t() @ positive).long().cpu()
        known += (positive.t() @ (chunk >= 0).float()).long().cpu()
    return LabelCounts(together, known)


def _count_sparse(targets: SparseTargets) -> LabelCounts:
    """Every ordered pair of positives of a row, as one number, is counted by `torch.bincount`."""
    num_classes = targets.num_classes
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    lengths = targets.indptr.diff()
    rows_at_once = max(1, _CHUNK // max(1, int(lengths.max()) ** 2)) if len(lengths) else 1
    for start in range(0, len(lengths), rows_at_once):
        length = lengths[start : start + rows_at_once]
        begin = targets.indptr[start : start + len(length)]
        indices = targets.indices[begin[0] : targets.indptr[start + len(length)]].long()
        partners = length.repeat_interleave(length)  # of each positive: as many as its row has
        first = torch.arange(len(indices)).repeat_interleave(partners)
        within = torch.arange(len(first)) - (partners.cumsum(0) - partners).repeat_interleave(partners)
        second = (begin - begin[0]).repeat_interleave(length).repeat_interleave(partners) + within
        counts += torch.bincount(indices[first] * num_classes + indices[second], minlength=len(counts))
    together = counts.view(num_classes, num_classes)
    return LabelCounts(together, together.diagonal()[:, None].expand_as(together))


def as_counts(value: LabelCounts | Tensor) -> LabelCounts:
    """Label counts from themselves, or from a matrix [K, K] whose diagonal counts the images of each label.

    Raises:
        TypeError, ValueError: the matrix is not square, not symmetric, or counts more pairs than labels.
    """
    if isinstance(value, LabelCounts):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"co-occurrence must be LabelCounts or a tensor [K, K], got {type(value).__name__}")
    if value.dim() != 2 or value.shape[0] != value.shape[1]:
        raise ValueError(
            f"co-occurrence must be [K, K], got {list(value.shape)}; for targets [N, K] pass count_labels(targets)"
        )
    counts = value.diagonal()
    if bool((value != value.t()).any()) or bool((value < 0).any()) or bool((value > counts[:, None]).any()):
        raise ValueError(
            "co-occurrence must be numbers of images: symmetric, at least 0, the number of images with label i at "
            "[i, i], and nowhere more in row i; for targets [N, K] pass count_labels(targets)"
        )
    return LabelCounts(value, counts[:, None].expand_as(value))


# ------------------------------------------------------------------------------------------------- from counts to Z


def conditional_probabilities(counts: LabelCounts | Tensor) -> Tensor:
    """P(j | i) at [i, j], float64 [K, K], with a zero diagonal; zeros where label i has no image.

    Args:
        counts: what `count_labels` gives, or [K, K] images with both labels, with the counts of labels on the diagonal.
    """
    together, known = (part.double() for part in as_counts(counts))
    return torch.where(known > 0, together / known.clamp(min=1), 0).fill_diagonal_(0)


def create_label_graph(
    counts: LabelCounts | Tensor,
    names: Sequence[str] | None = None,
    *,
    threshold: float = THRESHOLD,
    neighbour_share: float = NEIGHBOUR_SHARE,
) -> LabelGraph:
    """The label graph of the paper's branch and of ML-GCN.

    An edge i -> j stands where P(j | i) reaches the threshold. The edges into a label share the weight
    ``neighbour_share``, its self-loop weighs 1, and `normalise` makes Z of that. Labels that no edge touches are named
    in a warning: with a high threshold, or few images, these can be most of them.

    Args:
        counts: what `count_labels` gives, or [K, K] images with both labels, with the counts of labels on the diagonal.
        names: of the labels, for the warning.
        threshold: tau, in (0, 1].
        neighbour_share: p, in (0, 1].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    for name, value in (("threshold", threshold), ("neighbour_share", neighbour_share)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    edges = (conditional_probabilities(counts) >= threshold).double()
    adjacency = edges * neighbour_share / (edges.sum(0) + 1e-6) + torch.eye(len(edges), dtype=edges.dtype)
    graph = LabelGraph(normalise(adjacency).float())
    _warn_of_isolated(graph, names)
    return graph


def normalise(adjacency: Tensor) -> Tensor:
    """``Z = (A D)^T D`` with ``D = diag(rowsum(A) ** -1/2)``, [K, K]: what lets every effect aggregate its causes."""
    scale = adjacency.sum(1).rsqrt()
    return (adjacency * scale).t() * scale


def _warn_of_isolated(graph: LabelGraph, names: Sequence[str] | None) -> None:
    isolated = graph.isolated
    if isolated:
        listed = ", ".join(str(i if names is None else names[i]) for i in isolated[:_MOST_NAMES])
        more = f" and {len(isolated) - _MOST_NAMES} more" if len(isolated) > _MOST_NAMES else ""
        warnings.warn(
            f"{len(isolated)} of {len(graph.matrix)} labels have no neighbour in the label graph: {listed}{more}; a "
            "lower threshold adds edges",
            stacklevel=3,
        )
