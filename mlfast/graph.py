"""A graph over labels, as graph attention reads it: neighbours in CSR, and the transpose for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlfast.integers import integer

MOST_NODES = 2**31 - 1  # indices are int32


def dense_from(num_nodes: int, listed: bool = True, device_type: str = "cpu") -> float:
    """The share of all pairs from which products of whole matrices are faster than gathering neighbours.

    Measured, see docs/graph_attention.md. On a CPU the nodes of a small graph are gathered from a near cache, and for a
    mask, whose edges have not been ``listed``, each pass lists them first.
    """
    if device_type == "cuda":
        return 0.1
    if num_nodes < 256:
        return 0.75
    return 0.5 if listed else 0.25


class Graph:
    """A directed graph whose node i attends to its neighbours j. Built once, then read by every pass; do not modify it.

    Make one by :meth:`from_edges`, :meth:`from_dense` or :meth:`from_csr`. Duplicate edges are merged. Building waits
    for the device; using the graph does not.

    Attributes:
        num_nodes: K.
        indptr, indices: row i has the neighbours ``indices[indptr[i]:indptr[i + 1]]``, ascending; int64 [K + 1] and
            int32 [E].
        indptr_t, indices_t: the transpose: the rows that attend to j, ascending.
        edges_t: int64 [E], where each edge of the transpose is in ``indices``.
        mask: bool [K, K], True at [i, j] for an edge, kept by graphs dense enough for products of matrices; else None.
    """

    num_nodes: int
    indptr: Tensor
    indices: Tensor
    indptr_t: Tensor
    indices_t: Tensor
    edges_t: Tensor
    mask: Tensor | None

    def __init__(self, *unused: Any, **also_unused: Any) -> None:
        raise TypeError("Graph: make one by Graph.from_edges, Graph.from_dense or Graph.from_csr")

    @classmethod
    def from_edges(cls, edge_index: Tensor, num_nodes: int, add_self_loops: bool = False) -> Graph:
        """A graph from a list of edges.

        Args:
            edge_index: [2, E] integers, as in torch_geometric: sources j, then targets i; i attends to j.
            num_nodes: K.
            add_self_loops: whether every node also attends to itself.

        Raises:
            TypeError, ValueError: an argument is not as above, or an index is outside [0, K).
        """
        num_nodes = _checked_size(num_nodes)
        _check_indices("edge_index", edge_index, num_nodes)
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(
                f"Graph: edge_index must be [2, E], sources and targets, got {list(edge_index.shape)}; "
                "pass edge_index.t() if it is [E, 2]"
            )
        columns, rows = edge_index.long()
        if add_self_loops:
            nodes = torch.arange(num_nodes, device=rows.device)
            rows, columns = torch.cat([rows, nodes]), torch.cat([columns, nodes])
        return cls._of(rows, columns, num_nodes)

    @classmethod
    def from_dense(cls, matrix: Tensor) -> Graph:
        """A graph with an edge, i attends to j, wherever ``matrix[i, j] > 0``.

        Args:
            matrix: [K, K] bool, integer or float, such as a thresholded co-occurrence matrix.

        Raises:
            TypeError, ValueError: ``matrix`` is not as above, or has a NaN, which is neither an edge nor none.
        """
        if not isinstance(matrix, Tensor) or matrix.is_complex():
            raise TypeError(f"Graph: matrix must be a bool, integer or float tensor, got {_kind(matrix)}")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Graph: matrix must be [K, K], got {list(matrix.shape)}")
        if matrix.is_floating_point() and bool((wrong := matrix.isnan()).any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"Graph: matrix must have numbers only, got NaN at [{row}, {column}], {int(wrong.sum())} in all; does "
                "it divide by the images of a label that has none? matrix.nan_to_num(0) makes no edges of them"
            )
        _checked_size(matrix.shape[0])
        rows, columns = (matrix > 0).nonzero().unbind(1)
        return cls._of(rows, columns, matrix.shape[0])

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor) -> Graph:
        """A graph whose row i has the neighbours ``indices[indptr[i]:indptr[i + 1]]``, in any order.

        Args:
            indptr: [K + 1] integers that start at 0, do not fall, and end at E.
            indices: [E] integers.

        Raises:
            TypeError, ValueError: an argument is not as above, or an index is outside [0, K).
        """
        for name, tensor in (("indptr", indptr), ("indices", indices)):
            _check_integers(name, tensor)
            if tensor.dim() != 1:
                raise ValueError(f"Graph: {name} must have one dimension, got {list(tensor.shape)}")
        if indptr.numel() == 0:
            raise ValueError("Graph: indptr must have K + 1 numbers, got none; a graph without nodes has [0]")
        if indptr.device != indices.device:
            raise ValueError(f"Graph: indptr and indices must be on one device, got {indptr.device}, {indices.device}")
        num_nodes, counts = indptr.numel() - 1, indptr.long().diff()
        _checked_size(num_nodes)
        if indptr[0] != 0 or indptr[-1] != indices.numel() or bool((counts < 0).any()):
            raise ValueError(
                f"Graph: indptr must start at 0, not fall, and end at the {indices.numel()} indices; is it the counts "
                "of neighbours? Then pass their cumulative sum with a 0 in front"
            )
        _check_indices("indices", indices, num_nodes)
        rows = torch.repeat_interleave(torch.arange(num_nodes, device=indices.device), counts)
        return cls._of(rows, indices.long(), num_nodes)

    @classmethod
    def _of(cls, rows: Tensor, columns: Tensor, num_nodes: int) -> Graph:
        """Edges as int64 pairs that were checked."""
        keys = torch.unique(rows * num_nodes + columns)  # sorted
        rows, columns = keys // max(num_nodes, 1), keys % max(num_nodes, 1)
        order = torch.argsort(columns, stable=True)
        graph = cls.__new__(cls)
        graph.num_nodes = num_nodes
        graph.indptr, graph.indices = _pointers(rows, num_nodes), columns.int()
        graph.indptr_t, graph.indices_t, graph.edges_t = _pointers(columns, num_nodes), rows[order].int(), order
        graph.mask = graph._mask_if_dense()
        return graph

    @property
    def num_edges(self) -> int:
        """The number E of edges, without duplicates."""
        return self.indices.numel()

    @property
    def density(self) -> float:
        """The share of all K * K pairs that are edges."""
        return self.num_edges / max(self.num_nodes**2, 1)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.indices.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Graph:
        """This graph on a device; itself if it is there already. It has no dtype: it serves values of any.

        Raises:
            TypeError: ``device`` is none.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"Graph.to takes a device, as 'cuda' or torch.device('cuda', 0), got {device!r}")
        moved = Graph.__new__(Graph)
        moved.num_nodes = self.num_nodes
        for name in ("indices", "indptr", "indptr_t", "indices_t", "edges_t"):
            setattr(moved, name, getattr(self, name).to(device, non_blocking=non_blocking))
            if moved.device == self.device:
                return self
        moved.mask = moved._mask_if_dense()
        return moved

    def _mask_if_dense(self) -> Tensor | None:
        dense = self.density >= dense_from(self.num_nodes, device_type=self.device.type)
        return self.to_dense() if dense else None

    def to_dense(self) -> Tensor:
        """A bool matrix [K, K], True at [i, j] where i attends to j."""
        nodes = torch.arange(self.num_nodes, device=self.device)
        rows = torch.repeat_interleave(nodes, self.indptr.diff(), output_size=self.num_edges)
        mask = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.bool, device=self.device)
        return mask.index_put((rows, self.indices.long()), torch.ones((), dtype=torch.bool, device=self.device))

    def __repr__(self) -> str:
        return f"Graph({self.num_nodes} nodes, {self.num_edges} edges, density {self.density:.3g}, {self.device})"


def _pointers(node_of_edge: Tensor, num_nodes: int) -> Tensor:
    """Where each node's edges begin and end, [num_nodes + 1]; the edges may be in any order."""
    counts = torch.bincount(node_of_edge, minlength=num_nodes)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _checked_size(num_nodes: Any) -> int:
    num_nodes = integer("Graph", "num_nodes", num_nodes)
    if not 0 <= num_nodes <= MOST_NODES:
        raise ValueError(f"Graph: num_nodes must be from 0 to {MOST_NODES}, got {num_nodes}")
    return num_nodes


def _check_integers(name: str, tensor: Any) -> None:
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
    ):
        raise TypeError(f"Graph: {name} must be an integer tensor, got {_kind(tensor)}")


def _check_indices(name: str, indices: Any, num_nodes: int) -> None:
    _check_integers(name, indices)
    if indices.numel() > 0:
        smallest, largest = (int(x) for x in indices.aminmax())
        if smallest < 0 or largest >= num_nodes:
            raise ValueError(
                f"Graph: {name} must be in [0, {num_nodes}), got {smallest if smallest < 0 else largest}; "
                "count nodes from 0, and pass the number of nodes of the whole graph"
            )
