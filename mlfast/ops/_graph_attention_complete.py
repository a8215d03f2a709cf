"""Attention over a complete graph in O(K log K + K F), exactly: docs/graph_attention_complete.md has the derivation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlfast.backends import _native, choose_kernels
from mlfast.ops._dispatch import is_recorded, needs_dispatcher, refuse_batches
from mlfast.ops._dtypes import CODES, computing_dtype
from mlfast.ops._memory import address, in_memory
from mlfast.ops._second_derivative import NoSecondDerivative, without_second_derivative

SERVED = ("cpu", "triton")  # a sort and a few reads of memory: CUDA C++ would bring nothing over Triton
MOST_NODES = 2**29  # rows and sources are numbered together in int32


# -------------------------------------------------------------------------------------------------- kernel launches


class Merged(NamedTuple):
    """Rows and sources of each head in one descending order, and the two weights of each (csrc/cpu has the details).

    Attributes:
        order: [H, 2 K] int32; i < K is row i, K + j is source j.
        weights: [2, H, 2 K] float64: before, after. A row and a source attend with after[the first] *
            before[the second].
    """

    order: Tensor
    weights: Tensor


def new_merged(value: Tensor) -> Merged:
    """Uninitialised, for values [K, H, F]."""
    nodes, heads, _ = value.shape
    order = value.new_empty(heads, 2 * nodes, dtype=torch.int32)
    return Merged(order, value.new_empty(2, heads, 2 * nodes, dtype=torch.float64))


def launch(
    backend: str, value: Tensor, score_src: Tensor, score_dst: Tensor, negative_slope: float
) -> tuple[Tensor, Merged, Tensor | None]:
    """The attended values, what backward needs besides ``value``, and what spares it work where there is any."""
    value, score_src, score_dst = (in_memory(t) for t in (value, score_src, score_dst))
    out, merged, sums = torch.empty_like(value), new_merged(value), None
    if out.numel() > 0:
        sums = LAUNCH[backend](negative_slope, value, score_src, score_dst, out, *merged)
    return out, merged, sums


def launch_backward(
    backend: str,
    grad_out: Tensor,
    value: Tensor,
    merged: Merged,
    sums: Tensor | None,
    score_dtype: torch.dtype,
    negative_slope: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by value, score_src and score_dst, those that are needed."""
    grad_out, value = (in_memory(t) for t in (grad_out, value))
    shapes = (value.shape, value.dtype), (value.shape[:2], score_dtype), (value.shape[:2], score_dtype)
    grads = [
        value.new_empty(shape, dtype=dtype) if need else None
        for (shape, dtype), need in zip(shapes, needs, strict=True)
    ]
    if value.numel() > 0:
        LAUNCH_BACKWARD[backend](negative_slope, score_dtype, sums, grad_out, value, *merged, *grads)
    else:  # also F = 0, where the scores are there and have no effect
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return tuple(grads)


def _launch_cpu(negative_slope: float, value: Tensor, score_src: Tensor, *tensors: Tensor) -> None:
    types = CODES[value.dtype], CODES[score_src.dtype]
    addresses = map(address, (value, score_src, *tensors))
    _native.graph_attention_complete_cpu(*value.shape, *types, negative_slope, *addresses)


def _launch_backward_cpu(
    negative_slope: float, score_dtype: torch.dtype, _: Tensor | None, grad_out: Tensor, *tensors: Tensor | None
) -> None:
    types = CODES[grad_out.dtype], CODES[score_dtype]
    addresses = map(address, (grad_out, *tensors))
    _native.graph_attention_complete_backward_cpu(*grad_out.shape, *types, negative_slope, *addresses)


def sorted_together(score_src: Tensor, score_dst: Tensor) -> Tensor:
    """The merged order [H, 2 K], int64, in plain PyTorch."""
    keys = torch.cat((-score_dst, score_src)).to(computing_dtype(score_src.dtype)).t()
    # Rows come first, and the sort is stable: a source that ties with a row stands behind it.
    return keys.argsort(dim=1, descending=True, stable=True)


def _new_sums(value: Tensor, width: int) -> Tensor:
    from mlfast.kernels.graph_attention_complete import num_chunks

    return value.new_empty(2, value.shape[1], num_chunks(value.shape[0]), width, dtype=torch.float64)


def _launch_triton(
    negative_slope: float, value: Tensor, score_src: Tensor, score_dst: Tensor, out: Tensor, *merged: Tensor
) -> Tensor:
    """Returns the sums over the sources, an eighth of a float32 value's memory."""
    from mlfast.kernels.graph_attention_complete import graph_attention_complete as kernel
    from mlfast.kernels.graph_attention_complete import merged_weights

    order, normalised = merged
    weights = torch.empty_like(normalised)
    in_order = sorted_together(score_src, score_dst).contiguous()
    merged_weights(in_order, score_src, score_dst, score_src.amax(dim=0), negative_slope, order, weights)
    sums = _new_sums(value, value.shape[2] + 1)
    kernel(value, order, weights, sums, out, normalised)
    return sums


def _launch_backward_triton(
    negative_slope: float,
    _: torch.dtype,
    sums: Tensor | None,
    grad_out: Tensor,
    value: Tensor,
    order: Tensor,
    weights: Tensor,
    *grads: Tensor | None,
) -> None:
    from mlfast.kernels.graph_attention_complete import spans, sum_and_scan
    from mlfast.kernels.graph_attention_complete_backward import graph_attention_complete_backward as kernel

    if sums is None:
        sums = _new_sums(value, value.shape[2] + 1)
        sum_and_scan(value, order, weights, sums, True)
    all_sums = torch.empty_like(sums), sums, _new_sums(value, 1)
    parts = weights.new_empty(spans(value)[0], *weights.shape)
    kernel(grad_out, value, order, weights, all_sums, parts, torch.empty_like(weights), negative_slope, *grads)


LAUNCH: dict[str, Any] = {"cpu": _launch_cpu, "triton": _launch_triton}
LAUNCH_BACKWARD: dict[str, Any] = {"cpu": _launch_backward_cpu, "triton": _launch_backward_triton}


# ------------------------------------------------------------------------------------------------ autograd.Function


class CompleteAttentionFunction(torch.autograd.Function):
    """Keeps the value, O(K) numbers per head and what ``launch`` has; backward sweeps again."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, score_src: Tensor, score_dst: Tensor, negative_slope: float, backend: str
    ) -> Tensor:
        """Value [K, H, F] and scores [K, H] to [K, H, F]."""
        out, merged, sums = launch(backend, value, score_src, score_dst, negative_slope)
        ctx.save_for_backward(value, *merged, sums)
        ctx.call = backend, score_src.dtype, negative_slope
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by value, score_src and score_dst."""
        refuse_batches(grad_out)
        backend, score_dtype, negative_slope = ctx.call
        value, order, weights, sums = saved = ctx.saved_tensors
        merged, needs = Merged(order, weights), ctx.needs_input_grad[:3]
        grads = launch_backward(backend, grad_out, value, merged, sums, score_dtype, negative_slope, needs)
        return *without_second_derivative(saved, grads, grad_out), None, None


# ---------------------------------------------------------------------------------------------- under torch.compile

torch.library.define(
    "mlfast::graph_attention_complete",
    "(Tensor value, Tensor score_src, Tensor score_dst, float negative_slope) "
    "-> (Tensor out, Tensor order, Tensor weights)",
)
torch.library.define(
    "mlfast::graph_attention_complete_backward",
    "(Tensor grad_out, Tensor value, Tensor order, Tensor weights, ScalarType score_dtype, float negative_slope) "
    "-> (Tensor grad_value, Tensor grad_src, Tensor grad_dst)",
)


@torch.library.impl("mlfast::graph_attention_complete", ["CPU", "CUDA"])
def _run(value: Tensor, score_src: Tensor, score_dst: Tensor, negative_slope: float) -> tuple[Tensor, Tensor, Tensor]:
    out, merged, _ = launch(choose_kernels(value.device, SERVED), value, score_src, score_dst, negative_slope)
    return out, *merged


@torch.library.register_fake("mlfast::graph_attention_complete")
def _fake(value: Tensor, score_src: Tensor, score_dst: Tensor, negative_slope: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value, memory_format=torch.contiguous_format), *new_merged(value)


@torch.library.impl("mlfast::graph_attention_complete_backward", ["CPU", "CUDA"])
def _run_backward(
    grad_out: Tensor, value: Tensor, order: Tensor, weights: Tensor, score_dtype: torch.dtype, negative_slope: float
) -> tuple[Tensor | None, ...]:
    backend = choose_kernels(value.device, SERVED)
    merged = Merged(order, weights)
    return launch_backward(backend, grad_out, value, merged, None, score_dtype, negative_slope, (True, True, True))


@torch.library.register_fake("mlfast::graph_attention_complete_backward")
def _fake_backward(
    grad_out: Tensor, value: Tensor, order: Tensor, weights: Tensor, score_dtype: torch.dtype, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    grads = [value.new_empty(value.shape[:2], dtype=score_dtype) for _ in range(2)]
    return grad_value, grads[0], grads[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    value, score_src, _, negative_slope = inputs
    ctx.save_for_backward(value, *output[1:])
    ctx.call = score_src.dtype, negative_slope


def _backward(ctx: Any, grad_out: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    return *torch.ops.mlfast.graph_attention_complete_backward(grad_out, *ctx.saved_tensors, *ctx.call), None


torch.library.register_autograd("mlfast::graph_attention_complete", _backward, setup_context=_save)
torch.library.register_autograd("mlfast::graph_attention_complete_backward", NoSecondDerivative.backward)


# ------------------------------------------------------------------------------------------------------------ route


def complete_attention(
    backend: str, value: Tensor, score_src: Tensor, score_dst: Tensor, negative_slope: float
) -> Tensor:
    """graph_attention on a kernel backend where every node attends to all, itself included: exact, without pairs.

    The arguments have been checked, and ``negative_slope`` is in [0, 1]: elsewhere the algorithm's weights would not be
    bounded. Finite scores of any size neither overflow nor give NaN; others give what they give in softmax.

    Raises:
        ValueError: K is above 2^29.
    """
    if value.shape[0] > MOST_NODES:
        raise ValueError(
            f"graph_attention: value must have at most {MOST_NODES} nodes without a graph, got {list(value.shape)}"
        )
    if score_src.dtype != score_dst.dtype:
        common = torch.promote_types(score_src.dtype, score_dst.dtype)
        score_src, score_dst = score_src.to(common), score_dst.to(common)
    tensors = value, score_src, score_dst
    if needs_dispatcher(*tensors):
        return torch.ops.mlfast.graph_attention_complete(*tensors, negative_slope)[0]
    if is_recorded(*tensors):
        return CompleteAttentionFunction.apply(*tensors, negative_slope, backend)
    return launch(backend, *tensors, negative_slope)[0]
