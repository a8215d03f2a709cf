"""The graph attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.graph import Graph
from mlfast.integers import sizes
from mlfast.ops._autocast import without_autocast
from mlfast.ops._dtypes import computing_dtype
from mlfast.ops._graph_attention_scores import has_kernel, value_and_scores
from mlfast.ops.graph_attention import graph_attention


class GraphAttention(nn.Module):
    """A graph attention layer (Velickovic et al., 2018), as in the paper's graph branch, before its activation.

    With ``v = x W^T`` split into heads, the scores are ``src_jh = <a_src_h, v_jh>`` and ``dst_ih = <a_dst_h, v_ih>``,
    and every node gets the mean of its neighbours' ``v``, weighted by :func:`mlfast.functional.graph_attention`. The
    parameters are those of torch_geometric's ``GATConv`` (concat=True, add_self_loops=False) and have its names: load
    its state_dict. Self loops belong to the graph: ``Graph.from_edges(..., add_self_loops=True)``.

    On the CPU a kernel computes the scores in one pass over ``v``. Elsewhere, where there are more nodes than input
    features, they are computed as ``x (W^T a)``, which needs no pass over ``v``. They and the softmax are float32 under
    autocast too, and float64 in float64.

    Args:
        in_features: length N of a node's features.
        out_features: length F of a head's output.
        num_heads: number H of heads; their outputs stand side by side.
        negative_slope: of the LeakyReLU of the attention logits.
        dropout: the probability to drop an attention weight in training.
        bias: whether a bias is added.

    Shape:
        x ``[K, N]`` and a graph over K nodes -> ``[K, H * F]``. ``lin.weight`` is ``[H * F, N]``, ``att_src`` and
        ``att_dst`` are ``[1, H, F]``, all Xavier uniform with gain 1.414 as in the released code of the GAT paper.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size below 1, dropout outside [0, 1), a negative slope below 0, or x that is not [K, N].
    """

    initial_gain = 1.414

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int = 1,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        in_features, out_features, num_heads = sizes(
            "GraphAttention", in_features=in_features, out_features=out_features, num_heads=num_heads
        )
        if not 0 <= dropout < 1 or not negative_slope >= 0:
            raise ValueError(
                f"GraphAttention needs dropout in [0, 1) and a negative slope of at least 0, got {dropout=}, "
                f"{negative_slope=}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.num_heads = num_heads
        self.negative_slope = negative_slope
        self.dropout = dropout
        self.lin = nn.Linear(in_features, num_heads * out_features, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, num_heads, out_features))
        self.att_dst = nn.Parameter(torch.empty(1, num_heads, out_features))
        self.bias = nn.Parameter(torch.empty(num_heads * out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for weight in (self.lin.weight, self.att_src, self.att_dst):
            nn.init.xavier_uniform_(weight, self.initial_gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, graph: Tensor | Graph | None = None) -> Tensor:
        """Map ``[K, N]`` to ``[K, H * F]``; ``graph`` is what :func:`mlfast.functional.graph_attention` takes."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"GraphAttention expects [K, {self.in_features}], got {list(x.shape)}")
        value = self.lin(x).view(-1, self.num_heads, self.out_features)
        if has_kernel(value, self.att_src, self.att_dst):
            value, score_src, score_dst = value_and_scores(value, self.att_src, self.att_dst)
        else:
            score_src, score_dst = self.scores(x, value)
        dropout = self.dropout if self.training else 0.0
        out = graph_attention(
            value, score_src, score_dst, graph, negative_slope=self.negative_slope, dropout=dropout
        ).flatten(1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def scores(self, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The scores ``[K, H]`` of nodes as neighbours, and of nodes that attend."""
        dtype = computing_dtype(x.dtype)
        with without_autocast(x.device.type):
            attention = torch.cat([self.att_src, self.att_dst]).to(dtype)  # [2, H, F]
            if x.shape[0] <= self.in_features:
                src, dst = torch.einsum("khf,shf->skh", value.to(dtype), attention)
                return src, dst
            weight = self.lin.weight.to(dtype).view(self.num_heads, self.out_features, self.in_features)
            folded = torch.einsum("shf,hfn->shn", attention, weight).flatten(0, 1)
            src, dst = F.linear(x.to(dtype), folded).split(self.num_heads, dim=1)
            return src, dst

    def extra_repr(self) -> str:
        """The sizes and numbers, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_heads={self.num_heads}, "
            f"negative_slope={self.negative_slope}, dropout={self.dropout}"
        )
