"""The asymmetric angular-margin (AAM) loss: docs/aam_loss.md has the derivation, the cost and the measurements."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlfast import backends
from mlfast.backends import _native
from mlfast.ops.checks import check_number, check_reduction, check_tensors
from mlfast.ops.dtypes import CODES, computing_dtype
from mlfast.ops.workspace import workspace_for


class Options(NamedTuple):
    """The numbers of one loss, checked; see :func:`aam_loss` for their meaning."""

    scale: float
    margin: float
    k: float
    gamma_neg: float
    gamma_pos: float
    prob_shift: float
    label_smoothing: float
    reduction: str


# ------------------------------------------------------------------------------------------------------- reference


def reference(cos: Tensor, target: Tensor, class_weight: Tensor | None, options: Options) -> Tensor:
    """The loss in plain PyTorch: the definition, the fallback for every device, in float64 the truth of the tests."""
    scale, margin, k, gamma_neg, gamma_pos, shift, smoothing, reduction = options
    cos = cos.to(computing_dtype(cos.dtype))
    y, known = _labels(target, cos.dtype)
    if smoothing:
        y = torch.where(y == 0, smoothing, y * (1 - smoothing))
    u, v = scale * (cos - margin), -scale * (cos + margin)
    log_p = F.logsigmoid(u)
    q = (torch.sigmoid(v) + shift).clamp(max=1)
    log_q = torch.log(q) if shift else F.logsigmoid(v)
    loss = -(k / scale * y * log_p + (1 - k) / scale * (1 - y) * log_q)
    if gamma_neg or gamma_pos:
        # At y = 0 and y = 1 the focusing base is one sigmoid; its own logarithm is exact where the sigmoid underflows.
        mixed = torch.log((q * y + torch.sigmoid(u) * (1 - y)).clamp(min=1e-37))
        log_base = torch.where(y == 1, log_q, torch.where(y == 0, log_p, mixed))
        loss = loss * torch.exp((gamma_pos * y + gamma_neg * (1 - y)) * log_base)
    loss = torch.where(known, loss, 0)
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)
    return _reduce(loss, known, reduction)


def _labels(target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Targets as numbers in [0, 1], and where they are known. Integers say present (> 0), absent (0), unknown (< 0)."""
    if target.dtype == torch.uint8:
        target = target.view(torch.int8)  # 255, which is what -1 becomes in uint8, is unknown
    if target.is_floating_point():
        known = ~(target < 0)
        return torch.where(known, target, 0).to(dtype), known
    return (target > 0).to(dtype), target >= 0


def _reduce(loss: Tensor, known: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "mean":
        return total / known.sum().clamp(min=1)
    return total / max(loss.shape[0], 1) if reduction == "batchmean" else total


# -------------------------------------------------------------------------------------------------- kernel launches


class KernelOptions(NamedTuple):
    """What the kernels are told: the two sides' weights already hold k, 1 - k and the constant of the reduction."""

    scale: float
    margin: float
    weight_pos: float
    weight_neg: float
    gamma_pos: float
    gamma_neg: float
    prob_shift: float
    label_smoothing: float
    elementwise: bool


@functools.lru_cache(maxsize=256)
def _kernel_options(options: Options, batch: int) -> KernelOptions:
    factor = 1 / max(batch, 1) if options.reduction == "batchmean" else 1.0
    return KernelOptions(
        options.scale,
        options.margin,
        options.k * factor,
        (1 - options.k) * factor,
        options.gamma_pos,
        options.gamma_neg,
        options.prob_shift,
        options.label_smoothing,
        options.reduction == "none",
    )


def _launch(
    backend: str, cos: Tensor, target: Tensor, class_weight: Tensor | None, options: Options, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass: the loss, its gradient by ``cos`` where needed, and for "mean" the factor 1 / known labels.

    The gradient still lacks that factor and the incoming gradient; :func:`_finish_grad` applies both.
    """
    cos, target = cos.contiguous(), target.contiguous()
    dtype = computing_dtype(cos.dtype)
    elementwise = options.reduction == "none"
    loss = torch.empty(cos.shape if elementwise else (), dtype=dtype, device=cos.device)
    grad = torch.empty_like(cos) if needs_grad else None
    inv_known = torch.empty((), dtype=dtype, device=cos.device) if options.reduction == "mean" else None
    if class_weight is not None:
        class_weight = class_weight.to(dtype).contiguous()
    kernel_options = _kernel_options(options, cos.shape[0])
    if cos.numel() == 0:
        loss.zero_()
        if inv_known is not None:
            inv_known.fill_(1)
    else:
        _LAUNCH[backend](cos, target, class_weight, loss, grad, inv_known, kernel_options)
    return loss, grad, inv_known


def _arguments(
    cos: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    loss: Tensor,
    grad: Tensor | None,
    inv_known: Tensor | None,
    options: KernelOptions,
) -> tuple[Any, ...]:
    """What both compiled backends are called with: addresses, dtype codes, sizes, numbers."""
    classes = cos.shape[-1]
    return (
        cos.data_ptr(),
        CODES[cos.dtype],
        target.data_ptr(),
        CODES[target.dtype],
        0 if class_weight is None else class_weight.data_ptr(),
        loss.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if inv_known is None else inv_known.data_ptr(),
        cos.numel() // classes,
        classes,
        *options,
    )


def _launch_cpu(*arguments: Any) -> None:
    _native.aam_loss_cpu(*_arguments(*arguments))


def _launch_cuda(cos: Tensor, *arguments: Any) -> None:
    workspace = workspace_for(cos.device, _native.AAM_LOSS_WORKSPACE_BYTES)
    with torch.cuda.device(cos.device):
        stream = torch.cuda.current_stream().cuda_stream
        _native.aam_loss_cuda(*_arguments(cos, *arguments), workspace.data_ptr(), stream)


def _launch_triton(cos: Tensor, target: Tensor, *arguments: Any) -> None:
    from mlfast.kernels import aam_loss as kernel

    target = target.view(torch.int8) if target.dtype in (torch.uint8, torch.bool) else target
    *tensors, options = arguments
    kernel.aam_loss(cos, target, *tensors, workspace_for(cos.device, kernel.WORKSPACE_BYTES), options)


_LAUNCH = {"cpu": _launch_cpu, "triton": _launch_triton, "cuda": _launch_cuda}


def _finish_grad(backend: str, grad: Tensor, grad_loss: Tensor, inv_known: Tensor | None) -> Tensor:
    """Applies the incoming gradient, in place: ``grad`` is a private buffer that is given away once."""
    if grad_loss.dim() > 0:
        return grad.mul_(grad_loss)
    factor = grad_loss if inv_known is None else grad_loss * inv_known
    if backend == "cpu":
        _native.scale_grad_cpu(grad.data_ptr(), CODES[grad.dtype], factor.data_ptr(), CODES[factor.dtype], grad.numel())
    elif backend == "triton":
        from mlfast.kernels import aam_loss as kernel

        kernel.scale_grad(grad, factor)
    else:
        with torch.cuda.device(grad.device):
            stream = torch.cuda.current_stream().cuda_stream
            _native.scale_grad_cuda(
                grad.data_ptr(), CODES[grad.dtype], factor.data_ptr(), CODES[factor.dtype], grad.numel(), stream
            )
    return grad


# ------------------------------------------------------------------------------------------------ autograd.Function


class AAMLossFunction(torch.autograd.Function):
    """One pass forward leaves the gradient; backward only applies the incoming gradient to it."""

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, target: Tensor, class_weight: Tensor | None, options: Options, backend: str
    ) -> Tensor:
        """The loss of ``cos`` [..., K] and ``target`` [..., K]."""
        loss, grad, inv_known = _launch(backend, cos, target, class_weight, options, ctx.needs_input_grad[0])
        ctx.save_for_backward(cos, target, class_weight)
        ctx.unscaled = grad, inv_known
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient by ``cos``."""
        unscaled, ctx.unscaled = ctx.unscaled, None
        if unscaled is None:  # a second backward through a retained graph: the first one gave the buffer away
            cos, target, class_weight = ctx.saved_tensors
            unscaled = _launch(ctx.backend, cos, target, class_weight, ctx.options, True)[1:]
        grad = _finish_grad(ctx.backend, unscaled[0], grad_loss, unscaled[1])
        if torch.is_grad_enabled():  # create_graph=True
            grad = NoSecondDerivative.apply(grad, torch.empty((), requires_grad=True))
        return grad, None, None, None, None


class NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on, and says what is missing if it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, requires_grad: Tensor) -> Tensor:
        """Returns ``grad``; the second argument makes the result require grad."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(
            "mlfast's fused losses have no second derivative; for double backward compute the loss inside "
            'mlfast.use_backend("reference")'
        )


# ---------------------------------------------------------------------------------------------- under torch.compile

# An op of its own schema is opaque to the compiler but traced through whole. In eager mode it is bypassed: the
# dispatcher would cost more than the loss of a small batch.
torch.library.define(
    "mlfast::aam_loss",
    "(Tensor cos, Tensor target, Tensor? class_weight, float scale, float margin, float k, float gamma_neg, "
    "float gamma_pos, float prob_shift, float label_smoothing, str reduction, bool needs_grad) "
    "-> (Tensor loss, Tensor grad, Tensor inv_known)",
)


@torch.library.impl("mlfast::aam_loss", ["CPU", "CUDA"])
def _op(cos: Tensor, target: Tensor, class_weight: Tensor | None, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    options, needs_grad = Options(*numbers[:-1]), numbers[-1]
    loss, grad, inv_known = _launch(backends.choose(cos.device), cos, target, class_weight, options, needs_grad)
    return loss, cos.new_empty(0) if grad is None else grad, loss.new_ones(()) if inv_known is None else inv_known


@torch.library.register_fake("mlfast::aam_loss")
def _op_fake(cos: Tensor, target: Tensor, class_weight: Tensor | None, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, needs_grad = numbers[-2:]
    dtype = computing_dtype(cos.dtype)
    loss = cos.new_empty(cos.shape if reduction == "none" else (), dtype=dtype)
    grad = torch.empty_like(cos, memory_format=torch.contiguous_format) if needs_grad else cos.new_empty(0)
    return loss, grad, cos.new_empty((), dtype=dtype)


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])


def _op_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, inv_known = ctx.saved_tensors
    return ((grad * (grad_loss * inv_known)).to(grad.dtype), *[None] * 11)


torch.library.register_autograd("mlfast::aam_loss", _op_backward, setup_context=_op_setup)


# ------------------------------------------------------------------------------------------------------- functional


def aam_loss(
    cos: Tensor,
    target: Tensor,
    *,
    scale: float = 23.0,
    margin: float = 0.0,
    k: float = 0.7,
    gamma_neg: float = 1.0,
    gamma_pos: float = 0.0,
    prob_shift: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    r"""Asymmetric angular-margin loss (Prokofiev & Sovrasov, section 3.2, equation 1).

    With :math:`p_+ = \sigma(s(\cos - m))`, :math:`p_- = \sigma(-s(\cos + m))`, :math:`q = \min(p_- + \delta, 1)`:

    .. math:: L = -\Big[\tfrac{k}{s}\, y\, q^{\gamma_{pos}} \log p_+ +
              \tfrac{1-k}{s}\,(1-y)\, p_+^{\gamma_{neg}} \log q\Big]

    ``gamma_neg`` focuses the negatives and ``gamma_pos`` the positives, as in ASL, the paper's text, its Table 8 and
    its released code. Equation (1) as printed has the two exponents swapped: to evaluate it literally, swap them.
    The gradient flows through the focusing weight. A soft ``y`` blends both terms, with the exponent
    ``gamma_pos * y + gamma_neg * (1 - y)`` over the base ``q * y + p_+ * (1 - y)``.

    Args:
        cos: cosines [..., K], bfloat16, half, float32 or float64; values outside [-1, 1] (a bias was added) are legal.
        target: [..., K], the shape of ``cos``, any real dtype. Integers and bool: > 0 present, 0 absent, < 0 unknown
            (in uint8: 255). Floats: in [0, 1], or < 0 for unknown. Unknown labels have no loss and no gradient.
        scale: s > 0, which multiplies the cosines.
        margin: m, subtracted from the cosine on the side of the label.
        k: weight of the positives, in [0, 1]; negatives get 1 - k.
        gamma_neg, gamma_pos: focusing exponents >= 0.
        prob_shift: delta in [0, 1), added to p_-: a negative with p_- >= 1 - delta has no loss at all.
        label_smoothing: epsilon in [0, 1): y becomes y * (1 - epsilon), and epsilon where it was 0.
        class_weight: [K] floating point, on the device of ``cos``; multiplies the loss of each class.
        reduction: "sum", "mean" (over known labels), "batchmean" (sum over the first dimension's size), "none".

    Returns:
        The loss, float64 for float64 ``cos``, otherwise float32 (a sum over many labels does not fit a half): a scalar,
        or the shape of ``cos`` for "none". No known label, or an empty batch, gives 0, which can be backpropagated.

    Raises:
        TypeError, ValueError: an argument is not as above.
        mlfast.backends.BackendError: the backend that was asked for cannot serve this device.
    """
    compiling = torch.compiler.is_compiling()
    check = check_options.__wrapped__ if compiling else check_options
    options = check(scale, margin, k, gamma_neg, gamma_pos, prob_shift, label_smoothing, reduction)
    check_tensors("aam_loss", "cos", cos, target, class_weight)
    backend = "reference" if backends.is_exporting() else backends.choose(cos.device)
    if backend == "reference":
        return reference(cos, target, class_weight, options)
    if compiling:
        needs_grad = torch.is_grad_enabled() and cos.requires_grad
        return torch.ops.mlfast.aam_loss(cos, target, class_weight, *options, needs_grad)[0]
    return AAMLossFunction.apply(cos, target, class_weight, options, backend)


@functools.lru_cache(maxsize=256, typed=True)
def check_options(
    scale: float,
    margin: float,
    k: float,
    gamma_neg: float,
    gamma_pos: float,
    prob_shift: float,
    label_smoothing: float,
    reduction: str,
) -> Options:
    """The numbers of a loss, checked once and remembered."""
    check_number("aam_loss", "scale", scale, "> 0", lambda x: x > 0)
    check_number("aam_loss", "margin", margin, "a finite number", lambda x: True)
    check_number("aam_loss", "k", k, "in [0, 1]", lambda x: 0 <= x <= 1)
    check_number("aam_loss", "gamma_neg", gamma_neg, ">= 0", lambda x: x >= 0)
    check_number("aam_loss", "gamma_pos", gamma_pos, ">= 0", lambda x: x >= 0)
    check_number("aam_loss", "prob_shift", prob_shift, "in [0, 1)", lambda x: 0 <= x < 1)
    check_number("aam_loss", "label_smoothing", label_smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
    check_reduction("aam_loss", reduction)
    return Options(scale, margin, k, gamma_neg, gamma_pos, prob_shift, label_smoothing, reduction)
