"""Cosines of features with class weights: docs/cosine_linear.md has the derivation, cost and measurements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlfast.backends import _native, choose, choose_kernels, is_exporting
from mlfast.ops._autocast import without_autocast
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
from mlfast.ops._memory import in_memory
from mlfast.ops._second_derivative import NoSecondDerivative, without_second_derivative
from mlfast.ops._triton import triton_kernel

SERVED = ("cpu", "triton")  # the products are the vendor's; memory bounds the rest, so CUDA C++ would bring nothing


# ------------------------------------------------------------------------------------------------------- reference


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The op in plain PyTorch: the definition, the fallback for every device, in float64 the truth of the tests."""
    dtype = computing_dtype(x.dtype)
    with without_autocast(x.device.type):
        return F.linear(F.normalize(x.to(dtype), dim=-1), F.normalize(weight.to(dtype), dim=-1))


# -------------------------------------------------------------------------------------------------- kernel launches


def launch(backend: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cosines [..., K], and for the gradient the inverse norms of features [B] and weights [K]."""
    features, weights = _vectors(x, x.dtype), _vectors(weight, x.dtype)
    inverse_x, inverse_w = features.new_empty(len(features)), weights.new_empty(len(weights))
    if len(features) + len(weights) > 0:
        INVERSE_NORMS[backend](features, weights, inverse_x, inverse_w)
    cos = features.new_empty(*x.shape[:-1], len(weights))
    rows = cos.view(len(features), len(weights))
    torch.mm(features, weights.t(), out=rows)  # what writes to `out` is left alone by autocast
    _scale(backend, rows, inverse_x, inverse_w, rows)
    return cos, inverse_x, inverse_w


def launch_backward(
    backend: str,
    grad_cos: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_x: Tensor,
    inverse_w: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by x and weight, those that are needed."""
    features, weights = _vectors(x, x.dtype), _vectors(weight, x.dtype)
    grad_cos = in_memory(grad_cos.reshape(len(features), len(weights)))
    scaled = torch.empty_like(grad_cos)
    _scale(backend, grad_cos, inverse_x, inverse_w, scaled)
    grad_x = torch.mm(scaled, weights, out=_fresh(backend, features)) if needs[0] else None
    grad_weight = torch.mm(scaled.t(), features, out=_fresh(backend, weights)) if needs[1] else None
    if any(grad is not None and grad.numel() > 0 for grad in (grad_x, grad_weight)):
        PROJECT[backend](features, weights, inverse_x, inverse_w, grad_x, grad_weight)
    return (
        None if grad_x is None else grad_x.view(x.shape).to(x.dtype),
        None if grad_weight is None else grad_weight.to(weight.dtype),
    )


def _vectors(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] as the kernels for features of ``dtype`` take it: [rows, D]."""
    return in_memory(tensor.reshape(-1, tensor.shape[-1]).to(computing_dtype(dtype)))


def _fresh(backend: str, like: Tensor) -> Tensor:
    """Memory for a gradient. On a CPU the page faults of a large one would cost more than the product that fills it."""
    out = torch.empty_like(like)
    if backend == "cpu":
        _native.prefer_huge_pages_cpu(out.data_ptr(), out.nbytes)
    return out


def _scale(backend: str, values: Tensor, inverse_x: Tensor, inverse_w: Tensor, out: Tensor) -> None:
    """Writes values * inverse_x[:, None] * inverse_w to ``out``, which may be ``values``."""
    if values.numel() > 0:
        SCALE[backend](values, inverse_x, inverse_w, out)


def _inverse_norms_cpu(features: Tensor, weights: Tensor, inverse_x: Tensor, inverse_w: Tensor) -> None:
    for vectors, inverse in ((features, inverse_x), (weights, inverse_w)):
        call = vectors.data_ptr(), CODES[vectors.dtype], *vectors.shape, inverse.data_ptr()
        _native.cosine_linear_inverse_norms_cpu(*call)


def _scale_cpu(values: Tensor, inverse_x: Tensor, inverse_w: Tensor, out: Tensor) -> None:
    addresses = inverse_x.data_ptr(), inverse_w.data_ptr(), out.data_ptr()
    _native.cosine_linear_scale_cpu(values.data_ptr(), CODES[values.dtype], *values.shape, *addresses)


def _project_cpu(
    features: Tensor,
    weights: Tensor,
    inverse_x: Tensor,
    inverse_w: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    for grad, vectors, inverse in ((grad_x, features, inverse_x), (grad_weight, weights, inverse_w)):
        if grad is not None:
            addresses = vectors.data_ptr(), inverse.data_ptr()
            _native.cosine_linear_project_cpu(grad.data_ptr(), CODES[grad.dtype], *grad.shape, *addresses)


INVERSE_NORMS = {"cpu": _inverse_norms_cpu, "triton": triton_kernel("cosine_linear", "inverse_norms")}
SCALE = {"cpu": _scale_cpu, "triton": triton_kernel("cosine_linear", "scale")}
PROJECT = {"cpu": _project_cpu, "triton": triton_kernel("cosine_linear", "project")}


# ------------------------------------------------------------------------------------------------ autograd.Function


class CosineLinearFunction(torch.autograd.Function):
    """Three matrix products, as in a linear layer, and no normalised copy of features or weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        """Features [..., D] and weights [K, D] to cosines [..., K]."""
        cos, inverse_x, inverse_w = launch(backend, x, weight)
        ctx.save_for_backward(x, weight, inverse_x, inverse_w)
        ctx.backend = backend
        return cos

    @staticmethod
    def backward(ctx: Any, grad_cos: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by features and weights."""
        refuse_batches(grad_cos)
        x, weight, inverse_x, inverse_w = saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        with torch.no_grad():  # a product that writes to `out` wants it, also under create_graph=True
            grads = launch_backward(ctx.backend, grad_cos, x, weight, inverse_x, inverse_w, needs)
        return *without_second_derivative(saved, grads, grad_cos), None


# ---------------------------------------------------------------------------------------------- under torch.compile

torch.library.define(
    "mlfast::cosine_linear",
    "(Tensor x, Tensor weight, bool needs_x, bool needs_weight) -> (Tensor cos, Tensor inverse_x, Tensor inverse_w)",
)
torch.library.define(
    "mlfast::cosine_linear_backward",
    "(Tensor grad_cos, Tensor x, Tensor weight, Tensor inverse_x, Tensor inverse_w, bool needs_x, "
    "bool needs_weight) -> (Tensor grad_x, Tensor grad_weight)",
)


@torch.library.impl("mlfast::cosine_linear", ["CPU", "CUDA"])
def _run(x: Tensor, weight: Tensor, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
    return launch(choose_kernels(x.device, SERVED), x, weight)


@torch.library.register_fake("mlfast::cosine_linear")
def _fake(x: Tensor, weight: Tensor, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
    cos = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=computing_dtype(x.dtype))
    return cos, cos.new_empty(math.prod(x.shape[:-1])), cos.new_empty(weight.shape[0])


@torch.library.impl("mlfast::cosine_linear_backward", ["CPU", "CUDA"])
def _run_backward(
    grad_cos: Tensor, x: Tensor, weight: Tensor, inverse_x: Tensor, inverse_w: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    grads = launch_backward(choose_kernels(x.device, SERVED), grad_cos, x, weight, inverse_x, inverse_w, needs)
    return tensors_of(grads, x)


@torch.library.register_fake("mlfast::cosine_linear_backward")
def _fake_backward(grad_cos: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-2:]
    return tensors_of(needed((x.new_empty(x.shape), weight.new_empty(weight.shape)), needs), x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, *ctx.needs = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(ctx: Any, grad_cos: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    check_traced(ctx.needs, ctx.needs_input_grad)
    grads = torch.ops.mlfast.cosine_linear_backward(grad_cos, *ctx.saved_tensors, *ctx.needs)
    return *needed(grads, ctx.needs), None, None


torch.library.register_autograd("mlfast::cosine_linear", _backward, setup_context=_save)
torch.library.register_autograd("mlfast::cosine_linear_backward", NoSecondDerivative.backward)


# ------------------------------------------------------------------------------------------------------- functional


def cosine_linear(x: Tensor, weight: Tensor) -> Tensor:
    r"""Cosine of the angle between each feature vector and each class weight: the head under an angular-margin loss.

    .. math:: \cos_{bk} = \frac{\langle x_b, w_k \rangle}{\max(|x_b|, \epsilon) \max(|w_k|, \epsilon)}

    with :math:`\epsilon = 10^{-12}`, as in ``torch.nn.functional.normalize``: a zero vector has cosine 0 and a
    gradient that is finite except in float16. No normalised copy is stored. The cosines are not clamped; rounding may
    give 1 + 1e-7.

    Args:
        x: [..., D], D at least 1; bfloat16, half, float32 or float64.
        weight: [K, D] on the device of ``x``, any of these dtypes.

    Returns:
        [..., K], float32, or float64 if ``x`` is float64. Everything is computed in that type, also under autocast.

    Raises:
        TypeError, ValueError: an argument is not as above.
        mlfast.backends.BackendError: the backend that was asked for cannot serve; there is no CUDA C++ kernel.
    """
    check_arguments(x, weight)
    backend = "reference" if is_exporting() else choose(x.device, SERVED)
    if backend == "reference":
        return reference(x, weight)
    if needs_dispatcher(x, weight):
        return torch.ops.mlfast.cosine_linear(x, weight, x.requires_grad, weight.requires_grad)[0]
    if is_recorded(x, weight):
        return CosineLinearFunction.apply(x, weight, backend)
    return launch(backend, x, weight)[0]


def check_arguments(x: Any, weight: Any) -> None:
    """Raises TypeError or ValueError unless the two are what cosine_linear takes."""
    check_float_tensor("cosine_linear", "x", x)
    check_float_tensor("cosine_linear", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"cosine_linear: weight must be [K, D], got {list(weight.shape)}; one row per class")
    if weight.shape[1] < 1:
        raise ValueError(f"cosine_linear: weight must have D of at least 1, got {list(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"cosine_linear: x must be [..., {weight.shape[1]}], as long as the rows of weight, got {list(x.shape)}; "
            "weight is [K, D], as in torch.nn.functional.linear"
        )
    check_device("cosine_linear", "weight", weight, "x", x)
