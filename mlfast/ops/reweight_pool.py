"""Channel re-weighting and pooling in one pass: docs/reweight_pool.md has the derivation, cost and measurements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlfast.backends import _native, choose, choose_kernels, is_exporting
from mlfast.ops._checks import check_device, check_float_tensor
from mlfast.ops._dispatch import (
    check_traced,
    is_recorded,
    needed,
    needs_dispatcher,
    refuse_batches,
    tensors_of,
)
from mlfast.ops._dtypes import CODES, computing_dtype
from mlfast.ops._memory import address, evaluated, in_memory
from mlfast.ops._second_derivative import NoSecondDerivative, without_second_derivative
from mlfast.ops._triton import triton_kernel

SERVED = ("cpu", "triton")  # memory bounds this op, so CUDA C++ would bring nothing over Triton
MOST_POSITIONS = 2**30  # positions are int32 in the kernels, and a tile may reach beyond the last one


# ------------------------------------------------------------------------------------------------------- reference


def reference(features: Tensor, weight: Tensor) -> Tensor:
    """The op in plain PyTorch: the definition, the fallback for every device, in float64 the truth of the tests."""
    dtype = computing_dtype(features.dtype)
    weighted = (features.to(dtype) * weight.to(dtype)[:, None, None]).flatten(2)
    return (weighted.mean(dim=2) + weighted.max(dim=2).values).to(features.dtype)


# -------------------------------------------------------------------------------------------------- kernel launches


def is_channels_last(features: Tensor) -> bool:
    """Whether the kernels read [B, h, w, S]. A single position is such a map, and is read faster as one."""
    return features.stride(1) == 1 and features.shape[1] > 1


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of features and of their gradient."""
    return torch.channels_last if channels_last else torch.contiguous_format


def launch(
    backend: str, features: Tensor, weight: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The pooled features, and for the gradient where the maxima are and what the weights are multiplied by.

    The latter two are [B, S]; without ``needs_grad`` they are None.
    """
    batch, channels, height, width = features.shape
    channels_last = is_channels_last(features)
    features = evaluated(features.contiguous(memory_format=memory_format(channels_last)))
    out = features.new_empty(batch, channels)
    argmax = weight_slope = None
    if needs_grad:
        argmax = torch.empty_like(out, dtype=torch.int32)
        weight_slope = torch.empty_like(out, dtype=computing_dtype(features.dtype))
    if out.numel() > 0:
        sizes = batch, channels, height * width, channels_last
        LAUNCH[backend](features, sizes, computing_weight(weight, features.dtype), out, argmax, weight_slope)
    return out, argmax, weight_slope


def launch_backward(
    backend: str,
    grad_out: Tensor,
    weight: Tensor,
    argmax: Tensor,
    weight_slope: Tensor,
    size: tuple[int, int, bool],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by features and weight, those that are needed. ``size`` is height, width, channels_last."""
    height, width, channels_last = size
    batch, channels = grad_out.shape
    grad_out = in_memory(grad_out)
    grad_features = grad_weight = None
    if needs[0]:
        shape, layout = (batch, channels, height, width), memory_format(channels_last)
        grad_features = torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=layout)
    if needs[1]:
        grad_weight = grad_out.new_empty(channels, dtype=computing_dtype(grad_out.dtype))
    if grad_out.numel() > 0:
        sizes = batch, channels, height * width, channels_last
        computing = computing_weight(weight, grad_out.dtype)
        LAUNCH_BACKWARD[backend](grad_out, sizes, computing, argmax, weight_slope, grad_features, grad_weight)
    elif grad_weight is not None:
        grad_weight.zero_()
    return grad_features, None if grad_weight is None else grad_weight.to(weight.dtype)


def computing_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the kernels for features of ``dtype`` take it."""
    return in_memory(weight.to(computing_dtype(dtype)))


def _launch_cpu(features: Tensor, sizes: tuple[int, int, int, bool], *tensors: Tensor | None) -> None:
    _native.reweight_pool_cpu(features.data_ptr(), CODES[features.dtype], *sizes, *map(address, tensors))


def _launch_backward_cpu(grad_out: Tensor, sizes: tuple[int, int, int, bool], *tensors: Tensor | None) -> None:
    _native.reweight_pool_backward_cpu(grad_out.data_ptr(), CODES[grad_out.dtype], *sizes, *map(address, tensors))


LAUNCH = {"cpu": _launch_cpu, "triton": triton_kernel("reweight_pool", "reweight_pool")}
LAUNCH_BACKWARD = {"cpu": _launch_backward_cpu, "triton": triton_kernel("reweight_pool", "reweight_pool_backward")}


# ------------------------------------------------------------------------------------------------ autograd.Function


class ReweightPoolFunction(torch.autograd.Function):
    """One read of the features forward; backward writes their gradient without them."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, backend: str) -> Tensor:
        """Features [B, S, h, w] and weight [S] to [B, S]."""
        out, argmax, weight_slope = launch(backend, features, weight, True)
        ctx.save_for_backward(weight, argmax, weight_slope)
        ctx.call = backend, (*features.shape[2:], is_channels_last(features))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by features and weight."""
        refuse_batches(grad_out)
        backend, size = ctx.call
        weight, argmax, slope = saved = ctx.saved_tensors
        grads = launch_backward(backend, grad_out, weight, argmax, slope, size, ctx.needs_input_grad[:2])
        return *without_second_derivative(saved, grads, grad_out), None


# ---------------------------------------------------------------------------------------------- under torch.compile

torch.library.define(
    "mlfast::reweight_pool",
    "(Tensor features, Tensor weight, bool needs_features, bool needs_weight) "
    "-> (Tensor out, Tensor argmax, Tensor weight_slope)",
)
torch.library.define(
    "mlfast::reweight_pool_backward",
    "(Tensor grad_out, Tensor weight, Tensor argmax, Tensor weight_slope, SymInt height, SymInt width, "
    "bool channels_last, bool needs_features, bool needs_weight) -> (Tensor grad_features, Tensor grad_weight)",
)


@torch.library.impl("mlfast::reweight_pool", ["CPU", "CUDA"])
def _run(features: Tensor, weight: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    return tensors_of(launch(choose_kernels(features.device, SERVED), features, weight, any(needs)), features)


@torch.library.register_fake("mlfast::reweight_pool")
def _fake(features: Tensor, weight: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    out = features.new_empty(features.shape[:2])
    if not any(needs):
        return tensors_of((out, None, None), features)
    slope = torch.empty_like(out, dtype=computing_dtype(features.dtype))
    return out, torch.empty_like(out, dtype=torch.int32), slope


@torch.library.impl("mlfast::reweight_pool_backward", ["CPU", "CUDA"])
def _run_backward(
    grad_out: Tensor, weight: Tensor, argmax: Tensor, weight_slope: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    size, needs = rest[:3], rest[3:]
    grads = launch_backward(
        choose_kernels(grad_out.device, SERVED), grad_out, weight, argmax, weight_slope, size, needs
    )
    return tensors_of(grads, grad_out)


@torch.library.register_fake("mlfast::reweight_pool_backward")
def _fake_backward(grad_out: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    height, width, channels_last, *needs = rest[-5:]
    shape, layout = (*grad_out.shape, height, width), memory_format(channels_last)
    grad = torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=layout)
    return tensors_of(needed((grad, torch.empty_like(weight, memory_format=torch.contiguous_format)), needs), grad_out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, *ctx.needs = inputs
    ctx.save_for_backward(weight, *output[1:])
    ctx.size = (*features.shape[2:], is_channels_last(features))


def _backward(ctx: Any, grad_out: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    check_traced(ctx.needs, ctx.needs_input_grad)
    grads = torch.ops.mlfast.reweight_pool_backward(grad_out, *ctx.saved_tensors, *ctx.size, *ctx.needs)
    return *needed(grads, ctx.needs), None, None


torch.library.register_autograd("mlfast::reweight_pool", _backward, setup_context=_save)
torch.library.register_autograd("mlfast::reweight_pool_backward", NoSecondDerivative.backward)


# ------------------------------------------------------------------------------------------------------- functional


def reweight_pool(features: Tensor, weight: Tensor) -> Tensor:
    r"""Re-weight channels, then add the mean and the maximum over positions (Prokofiev & Sovrasov, graph branch).

    .. math:: out_{bs} = \frac{1}{P} \sum_p w_s f_{bsp} + \max_p w_s f_{bsp}

    The weighted features are never stored, and the features are not kept for backward. Where several positions hold
    the maximum, the first in row-major order gets its gradient, as in ``torch.nn.functional.adaptive_max_pool2d``.
    A NaN is above every number, as in ``Tensor.max``. For a negative weight the maximum is the weighted minimum.

    Args:
        features: [B, S, h, w] with at least one position, bfloat16, half, float32 or float64; contiguous and
            channels_last maps are read as they are, others are copied first.
        weight: [S] floating point, on the device of ``features``, of any sign.

    Returns:
        [B, S] in the dtype of ``features``; computed in float32, or in float64 for float64.

    Raises:
        TypeError, ValueError: an argument is not as above.
        mlfast.backends.BackendError: the backend that was asked for cannot serve; there is no CUDA C++ kernel.
    """
    check_arguments(features, weight)
    backend = "reference" if is_exporting() else choose(features.device, SERVED)
    if backend == "reference":
        return reference(features, weight)
    needs_grad = is_recorded(features, weight)
    if needs_dispatcher(features, weight):
        needs = (needs_grad and tensor.requires_grad for tensor in (features, weight))
        return torch.ops.mlfast.reweight_pool(features, weight, *needs)[0]
    if not needs_grad:
        return launch(backend, features, weight, False)[0]
    return ReweightPoolFunction.apply(features, weight, backend)


def check_arguments(features: Any, weight: Any) -> None:
    """Raises TypeError or ValueError unless the two are what reweight_pool takes."""
    check_float_tensor("reweight_pool", "features", features)
    check_float_tensor("reweight_pool", "weight", weight)
    if features.dim() != 4:
        raise ValueError(
            f"reweight_pool: features must be [B, S, h, w], got {list(features.shape)}; add or merge dimensions"
        )
    positions = features.shape[2] * features.shape[3]
    if not 1 <= positions <= MOST_POSITIONS:
        raise ValueError(
            f"reweight_pool: features must have 1 to {MOST_POSITIONS} positions, got {list(features.shape)}; "
            "there is no maximum over none"
        )
    if weight.shape != features.shape[1:2]:
        remedy = "pass weight.flatten() if it has other dimensions of size 1"
        if weight.shape == features.shape[3:]:
            remedy = f"if features {list(features.shape)} are [B, h, w, S], pass features.permute(0, 3, 1, 2)"
        raise ValueError(
            f"reweight_pool: weight must have one value per channel, [{features.shape[1]}], got {list(weight.shape)}; "
            f"{remedy}"
        )
    check_device("reweight_pool", "weight", weight, "features", features)
