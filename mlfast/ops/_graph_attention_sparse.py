"""graph_attention over the edges of a Graph: time and memory in proportion to the edges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlfast.backends import _native, choose_kernels
from mlfast.graph import Graph
from mlfast.ops._dispatch import is_recorded, needs_dispatcher, refuse_batches
from mlfast.ops._dtypes import CODES, computing_dtype
from mlfast.ops._memory import address, in_memory
from mlfast.ops._second_derivative import NoSecondDerivative, without_second_derivative
from mlfast.ops._triton import triton_kernel

SERVED = ("cpu", "triton")  # docs/graph_attention.md says why there is no CUDA C++
Numbers = tuple[float, float]  # negative slope, dropout
Edges = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a Graph: indptr, indices, and the three of the transpose


# -------------------------------------------------------------------------------------------------- kernel launches


def launch(
    backend: str,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    edges: Edges,
    numbers: Numbers,
    seed: Tensor | None,
    only_statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics [2, K, H]: each row's largest score_src, and 1 / sum of exp(logit - largest).

    With ``only_statistics``, which the CPU has, the result is empty.
    """
    value = in_memory(value)
    scores = computing_score(score_src, value), computing_score(score_dst, value)
    out = value.new_empty(0) if only_statistics else torch.empty_like(value)
    statistics = value.new_empty(2, *value.shape[:2], dtype=computing_dtype(value.dtype))
    if value.numel() > 0:
        LAUNCH[backend](value, *scores, edges, numbers, seed, out, statistics)
    return out, statistics


def launch_backward(
    backend: str,
    grad_out: Tensor,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    statistics: Tensor,
    edges: Edges,
    numbers: Numbers,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by value and scores: one comes with the others, so all are computed whichever is needed."""
    value, grad_out = in_memory(value), in_memory(grad_out)
    scores = computing_score(score_src, value), computing_score(score_dst, value)
    grad_value = torch.empty_like(value)
    grad_src, grad_dst = (torch.empty_like(score) for score in scores)
    if value.numel() == 0:
        grad_src.zero_(), grad_dst.zero_()
    else:
        grad_logits = statistics.new_empty(edges[1].numel(), value.shape[1])
        grads = grad_value, grad_logits, grad_src, grad_dst
        LAUNCH_BACKWARD[backend](value, *scores, edges, numbers, seed, statistics, grad_out, *grads)
    return grad_value, grad_src.to(score_src.dtype), grad_dst.to(score_dst.dtype)


def computing_score(score: Tensor, value: Tensor) -> Tensor:
    """A score as the kernels for ``value`` take it."""
    return in_memory(score.to(computing_dtype(value.dtype)))


def _arguments(value: Tensor, score_src: Tensor, score_dst: Tensor, numbers: Numbers, seed: Tensor | None) -> tuple:
    return CODES[value.dtype], *value.shape, *numbers, address(seed), score_src.data_ptr(), score_dst.data_ptr()


def _launch_cpu(
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    edges: Edges,
    numbers: Numbers,
    seed: Tensor | None,
    *outs: Tensor,
) -> None:
    arguments = _arguments(value, score_src, score_dst, numbers, seed)
    _native.graph_attention_cpu(*arguments, *map(address, (*edges[:2], value, *outs)))


def _launch_backward_cpu(
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    edges: Edges,
    numbers: Numbers,
    seed: Tensor | None,
    *tensors: Tensor,
) -> None:
    arguments = _arguments(value, score_src, score_dst, numbers, seed)
    _native.graph_attention_backward_cpu(*arguments, *map(address, (*edges, value, *tensors)))


LAUNCH = {"cpu": _launch_cpu, "triton": triton_kernel("graph_attention", "graph_attention")}
LAUNCH_BACKWARD = {"cpu": _launch_backward_cpu, "triton": triton_kernel("graph_attention", "graph_attention_backward")}


# ------------------------------------------------------------------------------------------------ autograd.Function


class SparseAttentionFunction(torch.autograd.Function):
    """Keeps two numbers per row; backward computes the weights of the edges anew."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        score_src: Tensor,
        score_dst: Tensor,
        edges: Edges,
        numbers: Numbers,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Value [K, H, F] and scores [K, H] to [K, H, F]."""
        out, statistics = launch(backend, value, score_src, score_dst, edges, numbers, seed)
        ctx.save_for_backward(value, score_src, score_dst, statistics, *edges, seed)
        ctx.call = backend, numbers
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by value and scores."""
        refuse_batches(grad_out)
        backend, numbers = ctx.call
        value, score_src, score_dst, statistics, *edges, seed = saved = ctx.saved_tensors
        tensors = value, score_src, score_dst, statistics
        grads = launch_backward(backend, grad_out, *tensors, tuple(edges), numbers, seed)
        needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *without_second_derivative(saved, tuple(needed), grad_out), *[None] * 4


# ---------------------------------------------------------------------------------------------- under torch.compile

_EDGES = "Tensor indptr, Tensor indices, Tensor indptr_t, Tensor indices_t, Tensor edges_t"
_NUMBERS = "float negative_slope, float dropout, Tensor? seed"
torch.library.define(
    "mlfast::graph_attention",
    f"(Tensor value, Tensor score_src, Tensor score_dst, {_EDGES}, {_NUMBERS}) -> (Tensor out, Tensor statistics)",
)
torch.library.define(
    "mlfast::graph_attention_backward",
    f"(Tensor grad_out, Tensor value, Tensor score_src, Tensor score_dst, Tensor statistics, {_EDGES}, {_NUMBERS})"
    " -> (Tensor grad_value, Tensor grad_score_src, Tensor grad_score_dst)",
)


@torch.library.impl("mlfast::graph_attention", ["CPU", "CUDA"])
def _run(value: Tensor, score_src: Tensor, score_dst: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *edges, negative_slope, dropout, seed = rest
    backend = choose_kernels(value.device, SERVED)
    return launch(backend, value, score_src, score_dst, tuple(edges), (negative_slope, dropout), seed)


@torch.library.register_fake("mlfast::graph_attention")
def _fake(value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    statistics = value.new_empty(2, *value.shape[:2], dtype=computing_dtype(value.dtype))
    return value.new_empty(value.shape), statistics


@torch.library.impl("mlfast::graph_attention_backward", ["CPU", "CUDA"])
def _run_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    value, score_src, score_dst, statistics, *edges, negative_slope, dropout, seed = rest
    backend, numbers = choose_kernels(grad_out.device, SERVED), (negative_slope, dropout)
    tensors = value, score_src, score_dst, statistics
    return launch_backward(backend, grad_out, *tensors, tuple(edges), numbers, seed)


@torch.library.register_fake("mlfast::graph_attention_backward")
def _fake_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in rest[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.negative_slope, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors[:3], output[1], *tensors[3:], seed)


def _backward(ctx: Any, grad_out: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grads = torch.ops.mlfast.graph_attention_backward(grad_out, *tensors, ctx.negative_slope, ctx.dropout, seed)
    return *grads, *[None] * 8


torch.library.register_autograd("mlfast::graph_attention", _backward, setup_context=_save)
torch.library.register_autograd("mlfast::graph_attention_backward", NoSecondDerivative.backward)


# ------------------------------------------------------------------------------------------------------------ route


def sparse_attention(
    backend: str,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    graph: Graph,
    negative_slope: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """graph_attention on a kernel backend; the arguments have been checked."""
    edges = graph.indptr, graph.indices, graph.indptr_t, graph.indices_t, graph.edges_t
    if needs_dispatcher(value, score_src, score_dst):
        return torch.ops.mlfast.graph_attention(value, score_src, score_dst, *edges, negative_slope, dropout, seed)[0]
    return attend(backend, value, score_src, score_dst, edges, (negative_slope, dropout), seed)


def attend(
    backend: str,
    value: Tensor,
    score_src: Tensor,
    score_dst: Tensor,
    edges: Edges,
    numbers: Numbers,
    seed: Tensor | None,
) -> Tensor:
    """:func:`sparse_attention` where neither a compiler nor a subclass needs to see it."""
    if is_recorded(value, score_src, score_dst):
        return SparseAttentionFunction.apply(value, score_src, score_dst, edges, numbers, seed, backend)
    return launch(backend, value, score_src, score_dst, edges, numbers, seed)[0]
