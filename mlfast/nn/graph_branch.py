"""Graph layers over labels: the paper's re-weighting branch, and what it shares with ML-GCN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, leaky_relu

from mlfast.graph import Graph
from mlfast.integers import sizes
from mlfast.nn.graph_attention import GraphAttention

KINDS = ("gat", "gcn")
POOLINGS = ("mean+max", "mean")


class GraphConvolution(nn.Module):
    """A graph convolution without bias, ``Z (X W)`` (Kipf & Welling, 2017); ``W`` is U(-1/sqrt(out), 1/sqrt(out)).

    Shape:
        x ``[K, in]`` and Z ``[K, K]`` -> ``[K, out]``. ``weight`` is W, ``[in, out]``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        in_features, out_features = sizes("GraphConvolution", in_features=in_features, out_features=out_features)
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        nn.init.uniform_(self.weight, -(out_features**-0.5), out_features**-0.5)

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Map ``[K, in]`` to ``[K, out]``."""
        return matrix @ (x @ self.weight)


class LabelNetwork(nn.Module):
    """Two graph layers that make a vector [S] of every label, from its given vector [N] and its neighbours.

    The given vectors and the edges are buffers: they move and are saved with the module, and are not trained.
    ``kind="gat"`` keeps the edges only, and the graph made of them; ``"gcn"`` also their weights, of which each call
    makes the matrix Z [K, K].

    Args:
        vectors: [K, N] floating point, such as word vectors.
        graph: Z, [K, K] floating point: label i attends to j, or convolves it, where ``Z[i, j] > 0``. With "gat" also
            an `mlfast.Graph`.
        hidden_features: width of the first layer's output.
        out_features: S.
        kind: "gat", graph attention with one head and ELU, or "gcn", graph convolution.
        dropout: of attention weights, in training.
        negative_slope: of the LeakyReLU.
        activate_output: whether the LeakyReLU follows the second layer as well as the first.

    Raises:
        ValueError: an unknown kind, or a graph that does not fit vectors or kind.
    """

    vectors: Tensor
    edge_index: Tensor
    edge_weight: Tensor | None
    kept_graph: Graph | None

    def __init__(
        self,
        vectors: Tensor,
        graph: Tensor | Graph,
        hidden_features: int,
        out_features: int,
        *,
        kind: str = "gat",
        dropout: float = 0.1,
        negative_slope: float = 0.2,
        activate_output: bool = True,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        check_vectors(vectors)
        edge_index, edge_weight = _edges_of(graph, vectors, kind)
        self.kind = kind
        self.negative_slope = negative_slope
        self.activate_output = activate_output
        self.register_buffer("vectors", vectors.detach().clone())
        self.register_buffer("edge_index", edge_index)  # sources j, targets i
        self.register_buffer("edge_weight", edge_weight)
        self.kept_graph = self._graph_of_edges()
        widths = ((vectors.shape[1], hidden_features), (hidden_features, out_features))
        layers = [
            GraphAttention(*width, dropout=dropout) if kind == "gat" else GraphConvolution(*width) for width in widths
        ]
        self.layers = nn.ModuleList(layers)

    def represent(self) -> Tensor:
        """The vector of every label, ``[K, S]``."""
        first, second = self.layers
        links = self.links()
        x = leaky_relu(self._activate(first(self.vectors, links)), self.negative_slope)
        x = self._activate(second(x, links))
        return leaky_relu(x, self.negative_slope) if self.activate_output else x

    def _activate(self, x: Tensor) -> Tensor:
        return elu(x) if self.kind == "gat" else x

    def links(self) -> Graph | Tensor:
        """What the layers take: "gat" the graph, "gcn" Z [K, K], made of the buffers."""
        if self.kept_graph is not None:
            return self.kept_graph
        num_nodes = len(self.vectors)
        source, target = self.edge_index
        assert self.edge_weight is not None
        return self.edge_weight.new_zeros(num_nodes, num_nodes).index_put((target, source), self.edge_weight)

    def _graph_of_edges(self) -> Graph | None:
        """For "gat"; kept, as it takes a sort to make. Only loading a state dict makes it anew."""
        return Graph.from_edges(self.edge_index, len(self.vectors)) if self.edge_weight is None else None

    def _apply(self, fn: Any, recurse: bool = True) -> LabelNetwork:  # moved or cast, as are parameters and buffers
        super()._apply(fn, recurse)
        if self.kept_graph is not None:
            self.kept_graph = self.kept_graph.to(self.vectors.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.kept_graph = self._graph_of_edges()

    def extra_repr(self) -> str:
        """Sizes and kind, for ``repr``."""
        return f"labels={len(self.vectors)}, edges={self.edge_index.shape[1]}, kind={self.kind!r}"


class GraphBranch(LabelNetwork):
    r"""A weight for every channel of an image model, from a graph over its labels (Prokofiev & Sovrasov).

    .. math:: w_s = \sigma(\max_k h_{ks}), \qquad
              h = \rho(\phi(Z, \rho(\phi(Z, X))))

    with a graph layer :math:`\phi` and :math:`\rho` = LeakyReLU after both. The weights are the same for every image:
    at inference they are a constant, which ``model.fold()`` puts in the place of the branch.

    The sigmoid is the released code's; the paper does not mention it. Without it weights can be negative and of any
    size.

    Args:
        vectors: [K, N] floating point, one per label, such as word vectors. Not trained.
        graph: Z, [K, K] floating point: label i learns from label j where ``Z[i, j] > 0``. "gat" uses this pattern
            only, and takes an `mlfast.Graph` as well.
        out_features: channels S of the image model.
        hidden_features: H; by default S.
        kind: "gat", graph attention (one head, then ELU), the paper's; or "gcn", graph convolution, which the released
            configuration files choose.
        dropout: of attention weights, in training.
        negative_slope: of the LeakyReLU.
        sigmoid: whether the weights are squashed into (0, 1).
        pooling: what a model with the head "gap" does behind the branch: "mean+max" as in the paper, or "mean". Other
            heads take the weighted map as it is.

    Raises:
        ValueError: an unknown kind or pooling, or a graph that does not fit vectors or kind.
    """

    def __init__(
        self,
        vectors: Tensor,
        graph: Tensor | Graph,
        out_features: int,
        hidden_features: int | None = None,
        *,
        kind: str = "gat",
        dropout: float = 0.1,
        negative_slope: float = 0.2,
        sigmoid: bool = True,
        pooling: str = "mean+max",
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        hidden_features = out_features if hidden_features is None else hidden_features
        super().__init__(
            vectors, graph, hidden_features, out_features, kind=kind, dropout=dropout, negative_slope=negative_slope
        )
        self.sigmoid = sigmoid
        self.pooling = pooling

    @classmethod
    def released(cls, vectors: Tensor, graph: Tensor, out_features: int, **options: Any) -> GraphBranch:
        """The branch of the paper's released configuration files, which is not that of the paper.

        Graph convolution where the paper has attention, the mean where it pools by mean plus maximum; and the sigmoid.
        """
        return cls(vectors, graph, out_features, **{"kind": "gcn", "sigmoid": True, "pooling": "mean", **options})

    def weight(self) -> Tensor:
        """The channel weights ``[S]``; random in training, if there is dropout."""
        largest = self.represent().amax(0)
        return torch.sigmoid(largest) if self.sigmoid else largest


def check_vectors(vectors: Any) -> None:
    """Raises ValueError unless these are vectors of labels."""
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
        got = f"{list(vectors.shape)} of {vectors.dtype}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f"vectors must be a floating point tensor [K, N], one row per label, got {got}")
    if vectors.device.type != "meta" and not vectors.isfinite().all():
        raise ValueError("vectors must be finite numbers, got NaN or infinity; look for a label without a vector")


def _edges_of(graph: Any, vectors: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Sources and targets of the edges, int64 [2, E], and for graph convolutions their weights [E].

    Raises:
        ValueError: the graph does not fit the vectors or the kind.
    """
    num_nodes = len(vectors)
    if isinstance(graph, Graph):
        if kind != "gat":
            raise ValueError("kind='gcn' needs the weights of edges: pass Z as a tensor [K, K], not an mlfast.Graph")
        if graph.num_nodes != num_nodes:
            raise ValueError(f"graph must be over the {num_nodes} labels of vectors, got {graph.num_nodes} nodes")
        rows = torch.repeat_interleave(torch.arange(num_nodes, device=graph.device), graph.indptr.diff())
        return torch.stack([graph.indices.long(), rows]).to(vectors.device), None
    if not isinstance(graph, Tensor) or graph.shape != (num_nodes, num_nodes):
        got = str(list(graph.shape)) if isinstance(graph, Tensor) else type(graph).__name__
        raise ValueError(f"graph must be [{num_nodes}, {num_nodes}], for the {num_nodes} labels of vectors, got {got}")
    graph = graph.detach().to(vectors.device)
    if graph.is_floating_point() and graph.isnan().any():
        raise ValueError("graph must be numbers, got NaN; look for counts divided by a label without images")
    target, source = (graph > 0).nonzero().unbind(1)
    weight = graph[target, source].to(vectors.dtype) if kind == "gcn" else None
    return torch.stack([source, target]), weight
