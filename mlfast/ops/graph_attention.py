"""Graph attention over labels: docs/graph_attention.md has the derivation, the routes, cost and measurements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from mlfast.backends import choose, is_exporting
from mlfast.graph import MOST_NODES, Graph
from mlfast.ops._autocast import without_autocast
from mlfast.ops._checks import check_device, check_float_tensor, check_number
from mlfast.ops._dtypes import computing_dtype
from mlfast.ops._graph_attention_complete import complete_attention
from mlfast.ops._graph_attention_dense import dense_attention
from mlfast.ops._graph_attention_sparse import SERVED, sparse_attention

# Below, the dozen launches of the other route take longer than K x K weights. Measured on an H200.
FEWEST_COMPLETE_ON_A_GPU = 1000

# ------------------------------------------------------------------------------------------------------- reference


def reference(
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    mask: Tensor | None,
    negative_slope: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The op in plain PyTorch, dense: the definition, the fallback for every device, in float64 the tests' truth."""
    out_dtype, dtype = value.dtype, computing_dtype(value.dtype)
    value, dst, src = value.to(dtype), score_dst.to(dtype).t(), score_src.to(dtype).t()
    logits = leaky_relu(dst[:, :, None] + src[:, None, :], negative_slope)  # [H, K, K]
    if mask is not None:
        nobody = ~mask.any(dim=1, keepdim=True)  # softmax over no logits would be NaN
        logits = logits.masked_fill(~mask, -torch.inf).masked_fill(nobody, 0)
    weights = logits.softmax(dim=2)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    if seed is not None:
        weights = weights * keep_factors(weights.shape, dropout, seed, dtype)
    with without_autocast(value.device.type):
        return torch.bmm(weights, value.transpose(0, 1)).transpose(0, 1).to(out_dtype)


def keep_factors(shape: torch.Size, dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies the weights [H, K, K] by: 0, or 1 / (1 - dropout), as a function of the place alone."""
    heads, rows, columns = (torch.arange(n, device=seed.device) for n in shape)
    seed = seed.reshape(())
    word = philox(seed, columns, rows[:, None], heads[:, None, None], torch.zeros_like(seed))
    return (word >= int(dropout * 2**32)).to(dtype) / (1 - dropout)


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The first word of Philox 4x32-10 (Salmon et al., 2011) for a key of 64 bits and a counter of 4 x 32, in int64."""
    low = 0xFFFFFFFF
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # these wrap, which leaves all 64 bits right
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


# ------------------------------------------------------------------------------------------------------- functional


def graph_attention(
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    graph: Tensor | Graph | None = None,
    *,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Attention over the neighbours of a graph (Velickovic et al., 2018, equations 1 to 5).

    .. math:: out_{ih} = \sum_j P_{ijh} v_{jh}, \quad P_{i \cdot h} = softmax_j LeakyReLU(dst_{ih} + src_{jh})

    over the neighbours j of i. A row without neighbours gives zeros, and gets none but zero gradients.

    Args:
        value: [K, H, F], bfloat16, half, float32 or float64: K nodes, H heads, F features.
        score_src: [K, H] floating point, what a node is as a neighbour.
        score_dst: [K, H] floating point, what a node is when it attends.
        graph: who attends to whom. None: all to all, themselves included. A tensor [K, K], bool, integer or float: i
            to j where ``graph[i, j] > 0``. A :class:`mlfast.Graph`: the fastest where there are few edges, and without
            any tensor of size K * K.
        negative_slope: of the LeakyReLU, at least 0.
        dropout: the probability, in [0, 1), that an attention weight is dropped; those kept are divided by
            ``1 - dropout``. Pass 0 outside training.
        seed: of dropout: one int64 number, on the device of ``value``. The mask is a function of the seed, head, i and
            j alone. None draws one from PyTorch's generator of that device.

    Returns:
        [K, H, F] in the dtype of ``value``. Arithmetic, the scores' too, is float32, or float64 for float64 values.

    Raises:
        TypeError, ValueError: an argument is not as above.
        mlfast.backends.BackendError: the backend that was asked for cannot serve; there is no CUDA C++ kernel.
    """
    check_arguments(value, score_src, score_dst, graph, negative_slope, dropout, seed)
    negative_slope, dropout = float(negative_slope), float(dropout)  # NumPy's numbers are no arguments of operators
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=value.device)
    backend = "reference" if is_exporting() else choose(value.device, SERVED)
    if backend == "reference":
        return reference(value, score_src, score_dst, as_mask(graph), negative_slope, dropout, seed)
    small = value.device.type == "cuda" and value.shape[0] < FEWEST_COMPLETE_ON_A_GPU
    if graph is None and seed is None and negative_slope <= 1 and not small:
        return complete_attention(backend, value, score_src, score_dst, negative_slope)
    if isinstance(graph, Graph) and graph.mask is None:
        return sparse_attention(backend, value, score_src, score_dst, graph, negative_slope, dropout, seed)
    return dense_attention(backend, value, score_src, score_dst, as_mask(graph), negative_slope, dropout, seed)


def as_mask(graph: Tensor | Graph | None) -> Tensor | None:
    """True at [i, j] where i attends to j; None for a complete graph."""
    if isinstance(graph, Graph):
        return graph.to_dense() if graph.mask is None else graph.mask
    return graph if graph is None or graph.dtype == torch.bool else graph > 0


def check_arguments(
    value: Any, score_src: Any, score_dst: Any, graph: Any, negative_slope: Any, dropout: Any, seed: Any
) -> None:
    """Raises TypeError or ValueError unless these are what graph_attention takes."""
    tensors = {"value": value, "score_src": score_src, "score_dst": score_dst}
    for name, tensor in tensors.items():
        check_float_tensor("graph_attention", name, tensor)
    if value.dim() != 3 or value.shape[0] > MOST_NODES:
        raise ValueError(
            f"graph_attention: value must be [K, H, F], at most {MOST_NODES} nodes, got {list(value.shape)}; "
            "for a single head pass value[:, None]"
        )
    for name in ("score_src", "score_dst"):
        if tensors[name].shape != value.shape[:2]:
            raise ValueError(
                f"graph_attention: {name} must be [K, H], {list(value.shape[:2])}, got {list(tensors[name].shape)}"
            )
        check_device("graph_attention", name, tensors[name], "value", value)
    check_graph(graph, value)
    check_number("graph_attention", "negative_slope", negative_slope, "at least 0", lambda x: x >= 0)
    check_number("graph_attention", "dropout", dropout, "in [0, 1)", lambda x: 0 <= x < 1)
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"graph_attention: seed must be an int64 tensor of one element, got {seed!r}")
        check_device("graph_attention", "seed", seed, "value", value)


def check_graph(graph: Any, value: Tensor) -> None:
    """Raises TypeError or ValueError unless it is a graph over the nodes of ``value``."""
    nodes = value.shape[0]
    if isinstance(graph, Graph):
        if graph.num_nodes != nodes:
            raise ValueError(f"graph_attention: graph must have the {nodes} nodes of value, got {graph!r}")
        check_device("graph_attention", "graph", graph, "value", value)
    elif isinstance(graph, Tensor):
        if graph.is_complex():
            raise TypeError(f"graph_attention: graph must be bool, integer or float, got {graph.dtype}")
        if graph.layout != torch.strided:
            raise TypeError(
                f"graph_attention: graph must be a dense tensor, got {graph.layout}; pass mlfast.Graph.from_edges("
                "graph.t().to_sparse_coo().coalesce().indices(), num_nodes)"
            )
        if graph.shape != (nodes, nodes):
            raise ValueError(
                f"graph_attention: graph must be [K, K], {[nodes, nodes]}, got {list(graph.shape)}; "
                "for an edge list pass mlfast.Graph.from_edges(edge_index, num_nodes)"
            )
        check_device("graph_attention", "graph", graph, "value", value)
    elif graph is not None:
        raise TypeError(f"graph_attention: graph must be None, a tensor or an mlfast.Graph, got {type(graph).__name__}")
