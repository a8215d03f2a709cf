"""`GraphAttention` behind the call of torch_geometric's ``GATConv``."""

from __future__ import annotations

import torch
from torch import Tensor

from mlfast.graph import Graph
from mlfast.nn.graph_attention import GraphAttention


class EdgeIndexAttention(GraphAttention):
    """A graph attention layer that is called, and named in its state dict, as torch_geometric's ``GATConv``.

    The graph is built from ``edge_index`` at the first call and kept for as long as the same tensor comes, unchanged
    (PyTorch counts changes in place; one through ``.data`` or NumPy is not seen). Another tensor, even of the same
    edges, is a graph to be built, which waits for the device: keep one tensor for a fixed graph.

    Args:
        in_features, out_features, num_heads, negative_slope, dropout, bias: as in `GraphAttention`.
        add_self_loops: whether every node also attends to itself, once, whatever loops the edges have.
    """

    initial_gain = 1.0  # GATConv's

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int = 1,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        bias: bool = True,
        add_self_loops: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, num_heads, negative_slope, dropout, bias)
        self.add_self_loops = add_self_loops
        self._built: tuple[Tensor, int, int, Graph] | None = None

    def forward(  # type: ignore[override]  # the call is that of GATConv
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor:
        """Map nodes ``[K, N]`` and edges ``[2, E]``, sources then targets, to ``[K, H * F]``.

        Args:
            edge_attr: ignored, as in a GATConv without ``edge_dim``.
            size: None or (K, K).
            return_attention_weights: must not be true: the weights are never stored.

        Raises:
            TypeError, ValueError: an argument is not as above, or an edge comes twice; GATConv would count it twice.
        """
        for name, tensor in (("x", x), ("edge_index", edge_index)):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise TypeError(
                    f"{name} must be a dense tensor, got {type(tensor).__name__}; use torch_geometric's GATConv"
                )
        if return_attention_weights:
            raise ValueError("the attention weights are never stored; use torch_geometric's GATConv to get them")
        if size is not None and tuple(size) != (x.shape[0], x.shape[0]):
            raise ValueError(f"size must be None or ({x.shape[0]}, {x.shape[0]}), the nodes of x, got {size}")
        return super().forward(x, self.graph_of(edge_index, x.shape[0]))

    def graph_of(self, edge_index: Tensor, num_nodes: int) -> Graph:
        """The graph of these edges: the one of the last call, if they are the same."""
        version = -1 if edge_index.is_inference() else edge_index._version  # which inference tensors do not count
        if self._built is not None and version >= 0:
            edges, known_version, known_nodes, graph = self._built
            if edges is edge_index and known_version == version and known_nodes == num_nodes:
                return graph
        graph = self._build(edge_index.as_subclass(Tensor), num_nodes)
        self._built = edge_index, version, num_nodes, graph
        return graph

    def _build(self, edge_index: Tensor, num_nodes: int) -> Graph:
        graph = Graph.from_edges(edge_index, num_nodes, self.add_self_loops)
        expected = edge_index.shape[1]
        if self.add_self_loops:
            expected = int((edge_index[0] != edge_index[1]).sum()) + num_nodes
        if graph.num_edges != expected:
            raise ValueError(
                f"edge_index has {expected - graph.num_edges} edges twice, which a Graph cannot hold; pass "
                "torch_geometric.utils.coalesce(edge_index), or keep GATConv if they shall count twice"
            )
        return graph

    def extra_repr(self) -> str:
        """The sizes and numbers, for ``repr``."""
        return f"{super().extra_repr()}, add_self_loops={self.add_self_loops}"
