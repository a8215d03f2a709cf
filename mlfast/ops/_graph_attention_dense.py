"""graph_attention for a mask: products of whole matrices, a block of rows of the attention weights at a time.

On the CPU, where to look at a mask costs next to nothing, one with few edges goes the sparse route.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlfast.backends import _native, choose_kernels
from mlfast.graph import dense_from
from mlfast.ops import _graph_attention_sparse as sparse
from mlfast.ops._dispatch import is_recorded, needs_dispatcher, refuse_batches
from mlfast.ops._dtypes import CODES, computing_dtype
from mlfast.ops._memory import address, in_memory
from mlfast.ops._second_derivative import NoSecondDerivative, without_second_derivative
from mlfast.ops._triton import triton_kernel

BLOCK = 2**21  # attention weights that exist at a time: in float32 8 MB, and backward as much again


# -------------------------------------------------------------------------------------------------- kernel launches


def row_blocks(nodes: int, heads: int) -> Iterator[slice]:
    """Rows whose attention weights are computed together."""
    rows = max(1, BLOCK // max(nodes * heads, 1))
    return (slice(first, min(first + rows, nodes)) for first in range(0, nodes, rows))


def launch(
    backend: str,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    mask: Tensor | None,
    negative_slope: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The result, and the attention weights where they are one block and backward can use them.

    Products with ``out=`` stay in the computing type under autocast.
    """
    nodes, heads, features = value.shape
    dtype = computing_dtype(value.dtype)
    by_head, src, dst = (by_heads(t, dtype) for t in (value, score_src, score_dst))
    mask = None if mask is None else mask.contiguous()
    out, weights = src.new_empty(heads, nodes, features), None
    blocks = list(row_blocks(nodes, heads)) if value.numel() > 0 else []
    for rows in blocks:
        weights = src.new_empty(heads, rows.stop - rows.start, nodes)
        WEIGHTS[backend](src, dst, (negative_slope, dropout), seed, rows.start, mask, weights)
        torch.bmm(weights, by_head, out=out[:, rows])
    kept = len(blocks) == 1 and seed is None  # dropout is in them
    return by_nodes(out, value), weights if kept else None


@torch.no_grad()  # products with out= refuse where a graph is built, as for create_graph=True
def launch_backward(
    backend: str,
    grad_out: Tensor,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    mask: Tensor | None,
    negative_slope: float,
    dropout: float,
    seed: Tensor | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by value and scores. ``kept``: what :func:`launch` gave; other weights are computed anew."""
    nodes, heads, features = value.shape
    dtype, numbers = computing_dtype(value.dtype), (negative_slope, dropout)
    by_head, src, dst = (by_heads(t, dtype) for t in (value, score_src, score_dst))
    mask = None if mask is None else mask.contiguous()
    grad_out, grad_value = by_heads(grad_out, dtype), src.new_empty(heads, nodes, features)
    grad_src, grad_dst = torch.empty_like(src), torch.empty_like(dst)
    if value.numel() == 0:
        grad_src.zero_(), grad_dst.zero_()
    for rows in row_blocks(nodes, heads) if value.numel() > 0 else ():
        grad = src.new_empty(heads, rows.stop - rows.start, nodes)
        weights = torch.empty_like(grad) if kept is None else kept
        if kept is None:
            WEIGHTS[backend](src, dst, (negative_slope, 0.0), None, rows.start, mask, weights)
        torch.bmm(grad_out[:, rows], by_head.transpose(1, 2), out=grad)
        BACKWARD[backend](src, dst, numbers, seed, rows.start, weights, grad, grad_src, grad_dst)
        grad_value.baddbmm_(weights.transpose(1, 2), grad_out[:, rows], beta=int(rows.start > 0))  # 0 reads nothing
    return by_nodes(grad_value, value), by_nodes(grad_src, score_src), by_nodes(grad_dst, score_dst)


def few_edges(backend: str, mask: Tensor | None) -> sparse.Edges | None:
    """The edges of a mask on the CPU, if they are few enough for the sparse route."""
    if backend != "cpu" or mask is None:
        return None
    mask, nodes = mask.contiguous(), mask.shape[0]
    indptr, indptr_t = (torch.empty(nodes + 1, dtype=torch.int64, device=mask.device) for _ in range(2))
    count = _native.graph_attention_count_edges_cpu(mask.data_ptr(), nodes, indptr.data_ptr())
    if count >= dense_from(nodes, listed=False) * nodes**2:
        return None
    indices, indices_t = (torch.empty(count, dtype=torch.int32, device=mask.device) for _ in range(2))
    edges_t = torch.empty(count, dtype=torch.int64, device=mask.device)
    found = indices, indptr_t, indices_t, edges_t
    _native.graph_attention_list_edges_cpu(mask.data_ptr(), nodes, *map(address, found))
    return indptr, *found


def by_heads(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, H, ...] as the kernels and the products take it: [H, K, ...] in the computing type."""
    return in_memory(tensor.transpose(0, 1).to(dtype))


def by_nodes(tensor: Tensor, like: Tensor) -> Tensor:
    """The way back."""
    return tensor.transpose(0, 1).to(like.dtype).contiguous()


def _arguments(src: Tensor, dst: Tensor, numbers: tuple[float, float], seed: Tensor | None) -> tuple:
    heads, nodes = src.shape
    return CODES[src.dtype], nodes, heads, *numbers, address(seed), src.data_ptr(), dst.data_ptr()


def _weights_cpu(
    src: Tensor,
    dst: Tensor,
    numbers: tuple[float, float],
    seed: Tensor | None,
    first: int,
    mask: Tensor | None,
    weights: Tensor,
) -> None:
    arguments = *_arguments(src, dst, numbers, seed), first, weights.shape[1]
    _native.graph_attention_dense_weights_cpu(*arguments, address(mask), weights.data_ptr())


def _backward_cpu(
    src: Tensor,
    dst: Tensor,
    numbers: tuple[float, float],
    seed: Tensor | None,
    first: int,
    weights: Tensor,
    *grads: Tensor,
) -> None:
    arguments = *_arguments(src, dst, numbers, seed), first, weights.shape[1]
    _native.graph_attention_dense_backward_cpu(*arguments, weights.data_ptr(), *map(address, grads))


WEIGHTS = {"cpu": _weights_cpu, "triton": triton_kernel("graph_attention_dense", "dense_weights")}
BACKWARD = {"cpu": _backward_cpu, "triton": triton_kernel("graph_attention_dense", "dense_backward")}


# ------------------------------------------------------------------------------------------------ autograd.Function


class DenseAttentionFunction(torch.autograd.Function):
    """Keeps its inputs, and weights of one block; backward computes those of more blocks anew, one after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        score_src: Tensor,
        score_dst: Tensor,
        mask: Tensor | None,
        negative_slope: float,
        dropout: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Value [K, H, F] and scores [K, H] to [K, H, F]."""
        out, kept = launch(backend, value, score_src, score_dst, mask, negative_slope, dropout, seed)
        ctx.save_for_backward(value, score_src, score_dst, mask, seed, kept)
        ctx.call = backend, negative_slope, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by value and scores."""
        refuse_batches(grad_out)
        value, score_src, score_dst, mask, seed, kept = saved = ctx.saved_tensors
        backend, slope, dropout = ctx.call
        grads = launch_backward(backend, grad_out, value, score_src, score_dst, mask, slope, dropout, seed, kept)
        needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *without_second_derivative(saved, tuple(needed), grad_out), *[None] * 5


# ---------------------------------------------------------------------------------------------- under torch.compile

_INPUTS = (
    "Tensor value, Tensor score_src, Tensor score_dst, Tensor? mask, float negative_slope, float dropout, Tensor? seed"
)
torch.library.define("mlfast::graph_attention_dense", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "mlfast::graph_attention_dense_backward",
    f"(Tensor grad_out, {_INPUTS}) -> (Tensor grad_value, Tensor grad_score_src, Tensor grad_score_dst)",
)


@torch.library.impl("mlfast::graph_attention_dense", ["CPU", "CUDA"])
def _run(value: Tensor, *rest: Any) -> Tensor:
    backend = choose_kernels(value.device, sparse.SERVED)
    score_src, score_dst, mask, negative_slope, dropout, seed = rest
    if edges := few_edges(backend, mask):
        return sparse.launch(backend, value, score_src, score_dst, edges, (negative_slope, dropout), seed)[0]
    return launch(backend, value, *rest)[0]


@torch.library.register_fake("mlfast::graph_attention_dense")
def _fake(value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.impl("mlfast::graph_attention_dense_backward", ["CPU", "CUDA"])
def _run_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    backend = choose_kernels(grad_out.device, sparse.SERVED)
    value, score_src, score_dst, mask, negative_slope, dropout, seed = rest
    if edges := few_edges(backend, mask):
        scores, options = (value, score_src, score_dst), (edges, (negative_slope, dropout), seed)
        statistics = sparse.launch(backend, *scores, *options, only_statistics=True)[1]
        return sparse.launch_backward(backend, grad_out, *scores, statistics, *options)
    return launch_backward(backend, grad_out, *rest)


@torch.library.register_fake("mlfast::graph_attention_dense_backward")
def _fake_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in rest[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.negative_slope, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grads = torch.ops.mlfast.graph_attention_dense_backward(grad_out, *tensors, ctx.negative_slope, ctx.dropout, seed)
    return *grads, None, None, None, None


torch.library.register_autograd("mlfast::graph_attention_dense", _backward, setup_context=_save)
torch.library.register_autograd("mlfast::graph_attention_dense_backward", NoSecondDerivative.backward)


# ------------------------------------------------------------------------------------------------------------ route


def dense_attention(
    backend: str,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    mask: Tensor | None,
    negative_slope: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """graph_attention on a kernel backend; the arguments have been checked, ``mask`` is bool [K, K] or None."""
    arguments = value, score_src, score_dst, mask, negative_slope, dropout, seed
    if needs_dispatcher(value, score_src, score_dst, mask):
        return torch.ops.mlfast.graph_attention_dense(*arguments)
    if edges := few_edges(backend, mask):
        return sparse.attend(backend, value, score_src, score_dst, edges, (negative_slope, dropout), seed)
    if is_recorded(value, score_src, score_dst):
        return DenseAttentionFunction.apply(*arguments, backend)
    return launch(backend, *arguments)[0]
