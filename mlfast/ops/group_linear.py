"""A linear layer per group of classes, or its cosines: docs/group_linear.md has the derivation, cost, measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mlfast.backends import _native, choose, choose_kernels, is_exporting
from mlfast.integers import integer
from mlfast.ops import _group_linear_triton
from mlfast.ops._autocast import autocast_enabled, without_autocast
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

SERVED = ("cpu", "triton")  # memory bounds this op, so CUDA C++ would bring little over Triton
MOST = 2**30  # sizes are int32 in the Triton kernels, and a tile may reach beyond the last row


# ------------------------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_classes: int, cosine: bool = False
) -> Tensor:
    """The op in plain PyTorch: the definition, the fallback for every device, in float64 the truth of the tests."""
    dtype = output_dtype(x, weight, cosine)
    with without_autocast(x.device.type):
        x, weight = x.to(dtype), weight.to(dtype)
        if cosine:
            x, weight = F.normalize(x, dim=2), F.normalize(weight, dim=1)
        out = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).flatten(1)[:, :num_classes]
        return out if bias is None else out + bias.to(dtype)


def output_dtype(x: Tensor, weight: Tensor, cosine: bool) -> torch.dtype:
    """What torch's linear would return; cosines are float32 at least, since a scale of 20 or more multiplies them."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if cosine:
        return computing_dtype(dtype)
    if dtype != torch.float64 and autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


# -------------------------------------------------------------------------------------------------- kernel launches


class Sizes(NamedTuple):
    """The sizes of a call as the kernels take them."""

    batch: int
    groups: int
    features: int
    slots: int
    classes: int
    cosine: bool


# Of the forward pass: the output, and what the gradient of cosines needs.
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def sizes_of(x: Tensor, weight: Tensor, num_classes: int, cosine: bool) -> Sizes:
    """The sizes of a call with these tensors."""
    batch, groups, features = x.shape
    return Sizes(batch, groups, features, weight.shape[2], num_classes, cosine)


def launch(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int,
    cosine: bool,
    out_dtype: torch.dtype,
    *,
    needs_grad: bool,
) -> Outputs:
    """The output [B, K], and for the gradient of cosines: these [B, K], 1 / \\|x\\| [B, L] and 1 / \\|w\\| [L, f].

    The cosines are None where there is no bias: they are the output.
    """
    keeps = cosine and (needs_grad or backend == "cpu")  # whose kernels keep lengths for themselves
    outputs = allocate(x, weight, bias, num_classes, out_dtype, keeps)
    if x.shape[0] > 0:
        sizes = sizes_of(x, weight, num_classes, cosine)
        bias = None if bias is None else in_memory(bias.to(computing_type(x, weight)))
        LAUNCH[backend](sizes, with_contiguous_rows(x), in_memory(weight), bias, *outputs)
    elif outputs[3] is not None:
        outputs[3].zero_()
    return outputs


def computing_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the kernels compute in, and keep."""
    return computing_dtype(torch.promote_types(x.dtype, weight.dtype))


def allocate(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int, out_dtype: torch.dtype, keeps: bool
) -> Outputs:
    """Uninitialised tensors for what :func:`launch` returns; ``keeps``: also what the gradient of cosines needs."""
    batch, groups, slots = *x.shape[:2], weight.shape[2]
    out = x.new_empty((batch, num_classes), dtype=out_dtype)
    if not keeps:
        return out, None, None, None
    computing = computing_type(x, weight)
    cosines = None if bias is None else x.new_empty((batch, num_classes), dtype=computing)
    return out, cosines, x.new_empty((batch, groups), dtype=computing), x.new_empty((groups, slots), dtype=computing)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """``x`` with the features of a row next to each other; rows may lie in any order."""
    x = evaluated(x)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


@torch.no_grad()  # products with out= refuse where a graph is built, as for create_graph=True
def launch_backward(
    backend: str,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Sequence[Tensor | None],
    cosine: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by x and weight, those that are needed. ``saved``: the cosines, 1 / \\|x\\| and 1 / \\|w\\|."""
    grad_x = empty_rows_like(x) if needs[0] else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    if x.shape[0] > 0:
        sizes = sizes_of(x, weight, grad_out.shape[1], cosine)
        inputs = in_memory(grad_out), with_contiguous_rows(x), in_memory(weight)
        LAUNCH_BACKWARD[backend](sizes, *inputs, *saved, grad_x, grad_weight)
    elif grad_weight is not None:
        grad_weight.zero_()
    return grad_x, grad_weight


def empty_rows_like(x: Tensor) -> Tensor:
    """A tensor without gaps, whose rows are in the order of those of ``x``: by the batch, or by the group."""
    by_group = x.transpose(0, 1).is_contiguous() and not x.is_contiguous()
    order = (x.shape[1], x.shape[0], x.shape[2]) if by_group else x.shape
    rows = torch.empty(order, dtype=x.dtype, device=x.device)
    return rows.transpose(0, 1) if by_group else rows


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), CODES[x.dtype], x.stride(0), x.stride(1))


def _launch_cpu(
    sizes: Sizes, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *saved: Tensor | None
) -> None:
    _native.group_linear_cpu(
        (*sizes, CODES[computing_type(x, weight)]),
        _rows(x),
        weight.data_ptr(),
        CODES[weight.dtype],
        address(bias),
        out.data_ptr(),
        CODES[out.dtype],
        *map(address, saved),
    )


def _launch_backward_cpu(
    sizes: Sizes,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    cosines: Tensor | None,
    inv_x: Tensor | None,
    inv_weight: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    _native.group_linear_backward_cpu(
        (*sizes, CODES[computing_type(x, weight)]),
        grad_out.data_ptr(),
        CODES[grad_out.dtype],
        _rows(x),
        weight.data_ptr(),
        CODES[weight.dtype],
        *map(address, (cosines, inv_x, inv_weight)),
        _rows(grad_x),
        address(grad_weight),
    )


LAUNCH: dict[str, Callable[..., None]] = {"cpu": _launch_cpu, "triton": _group_linear_triton.launch}
LAUNCH_BACKWARD: dict[str, Callable[..., None]] = {
    "cpu": _launch_backward_cpu,
    "triton": _group_linear_triton.launch_backward,
}


# ------------------------------------------------------------------------------------------------ autograd.Function


class GroupLinearFunction(torch.autograd.Function):
    """Products and lengths in one pass; backward is products with rank-1 corrections. Nothing normalised is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *call: Any) -> Tensor:
        """x [B, L, D], weight [L, D, f] and bias [K] or None to [B, K]; ``call``: K, cosine, output dtype, backend."""
        *options, backend = call
        out, *saved = launch(backend, x, weight, bias, *options, needs_grad=True)
        _save_for_backward(ctx, (x, weight, bias, *options), (out, *saved))
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by x, weight and bias."""
        refuse_batches(grad_out)
        x, weight, *kept = saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_bias = _grad_bias(grad_out, ctx.bias_dtype) if needs[2] else None
        grads = launch_backward(ctx.backend, grad_out, x, weight, kept, ctx.cosine, needs[:2])
        return *without_second_derivative(saved, (*grads, grad_bias), grad_out), *[None] * 4


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    x, weight, bias, _, cosine, _ = inputs
    out, cosines, inv_x, inv_weight = output
    if cosine and bias is None:
        cosines = out
    ctx.save_for_backward(x, weight, cosines, inv_x, inv_weight)
    ctx.cosine = cosine
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grad_bias(grad_out: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_out.sum(0, dtype=computing_dtype(grad_out.dtype)).to(dtype)


# ---------------------------------------------------------------------------------------------- under torch.compile

torch.library.define(
    "mlfast::group_linear",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt num_classes, bool cosine, ScalarType out_dtype, bool needs_x, "
    "bool needs_weight) -> (Tensor out, Tensor cosines, Tensor inv_x, Tensor inv_weight)",
)
torch.library.define(
    "mlfast::group_linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor cosines, Tensor inv_x, Tensor inv_weight, bool cosine, "
    "bool needs_x, bool needs_weight) -> (Tensor grad_x, Tensor grad_weight)",
)


@torch.library.impl("mlfast::group_linear", ["CPU", "CUDA"])
def _run(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tensors_of(launch(choose_kernels(x.device, SERVED), x, *arguments[:-2], needs_grad=True), x)


@torch.library.register_fake("mlfast::group_linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    num_classes, cosine, out_dtype = call[:-2]
    return tensors_of(allocate(x, weight, bias, num_classes, out_dtype, cosine), x)


@torch.library.impl("mlfast::group_linear_backward", ["CPU", "CUDA"])
def _run_backward(grad_out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *saved, cosine = rest[:-2]
    needs = rest[-2:]
    return tensors_of(launch_backward(choose_kernels(x.device, SERVED), grad_out, x, weight, saved, cosine, needs), x)


@torch.library.register_fake("mlfast::group_linear_backward")
def _fake_backward(grad_out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-2:]
    grads = empty_rows_like(x), torch.empty_like(weight, memory_format=torch.contiguous_format)
    return tensors_of(needed(grads, needs), x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_for_backward(ctx, inputs[:-2], output)
    ctx.needs = inputs[-2:]


def _backward(ctx: Any, grad_out: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    check_traced(ctx.needs, ctx.needs_input_grad)
    grads = torch.ops.mlfast.group_linear_backward(grad_out, *ctx.saved_tensors, ctx.cosine, *ctx.needs)
    grad_bias = _grad_bias(grad_out, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return *needed(grads, ctx.needs), grad_bias, *[None] * 5


torch.library.register_autograd("mlfast::group_linear", _backward, setup_context=_save)
torch.library.register_autograd("mlfast::group_linear_backward", NoSecondDerivative.backward)


# ------------------------------------------------------------------------------------------------------- functional


def group_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_classes: int, cosine: bool = False
) -> Tensor:
    r"""A linear layer of its own for every group of classes: the last layer of ML-Decoder (Ridnik et al., 3.2).

    .. math:: out_{bc} = \langle x_{bl}, w_{l,:,j} \rangle + bias_c, \quad l = \lfloor c / f \rfloor, \; j = c \bmod f

    With ``cosine`` the product is divided by the lengths of both vectors before the bias is added, as Prokofiev &
    Sovrasov do for angular losses. Lengths below 1e-12 count as 1e-12, as in ``torch.nn.functional.normalize``: a zero
    vector has cosine 0 and a gradient that is finite except in float16. Nothing is clamped to [-1, 1].

    Args:
        x: [B, L, D], a vector per image and group; bfloat16, half, float32 or float64. Rows in any order are read as
            they are, as long as the features of a row are next to each other.
        weight: [L, D, f], of such a dtype, not necessarily that of ``x``. Where L * f is above K, the last slots belong
            to no class and get a gradient of zero.
        bias: [K] or None, of such a dtype.
        num_classes: K, from 1 to L * f.
        cosine: whether to divide by the lengths.

    Returns:
        [B, K]. Products have the dtype that x and weight promote to, or under autocast its dtype, as in
        ``torch.nn.functional.linear``; cosines are float32, or float64 for float64. Computed in float32 or float64.

    Raises:
        TypeError, ValueError: an argument is not as above.
        mlfast.backends.BackendError: the backend that was asked for cannot serve; there is no CUDA C++ kernel.
    """
    num_classes = integer("group_linear", "num_classes", num_classes)
    check_arguments(x, weight, bias, num_classes)
    backend = "reference" if is_exporting() else choose(x.device, SERVED)
    if backend == "reference":
        return reference(x, weight, bias, num_classes=num_classes, cosine=cosine)
    call = num_classes, cosine, output_dtype(x, weight, cosine)
    if needs_dispatcher(x, weight, bias):
        return torch.ops.mlfast.group_linear(x, weight, bias, *call, x.requires_grad, weight.requires_grad)[0]
    if is_recorded(x, weight, bias):
        return GroupLinearFunction.apply(x, weight, bias, *call, backend)
    return launch(backend, x, weight, bias, *call, needs_grad=False)[0]


def check_arguments(x: Any, weight: Any, bias: Any, num_classes: int) -> None:
    """Raises TypeError or ValueError unless these are what group_linear takes."""
    for name, tensor in (("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)])):
        check_float_tensor("group_linear", name, tensor)
        check_device("group_linear", name, tensor, "x", x)
    if x.dim() != 3 or not all(1 <= size <= MOST for size in x.shape[1:]):
        raise ValueError(f"group_linear: x must be [B, L, D] with L and D at least 1, got {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[:2] != x.shape[1:] or not 1 <= weight.shape[2] <= MOST:
        raise ValueError(
            f"group_linear: weight must be [{x.shape[1]}, {x.shape[2]}, f] for x of {list(x.shape)}, "
            f"with f at least 1, got {list(weight.shape)}"
        )
    if not 1 <= num_classes <= weight.shape[0] * weight.shape[2]:
        raise ValueError(
            f"group_linear: num_classes must be from 1 to L * f = {weight.shape[0] * weight.shape[2]}, "
            f"got {num_classes}"
        )
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(
            f"group_linear: bias must have one value per class, [{num_classes}], got {list(bias.shape)}; "
            "pass bias[:num_classes] if it has one per slot"
        )
