"""The asymmetric loss (ASL), and binary cross-entropy as its case without focus: see docs/asymmetric_loss.md.

Its launches, its autograd.Function and its op for torch.compile are those of every elementwise loss, in
``mlfast/ops/elementwise_loss.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlfast.ops._checks import check_number, check_reduction, check_tensors, remembered
from mlfast.ops._dtypes import computing_dtype
from mlfast.ops.elementwise_loss import ElementwiseLoss, labels, register, weigh_and_reduce
from mlfast.sparse_targets import SparseTargets


class Options(NamedTuple):
    """The numbers of one loss, checked; see :func:`asymmetric_loss` for their meaning."""

    gamma_neg: float
    gamma_pos: float
    clip: float
    label_smoothing: float
    detach_focus: bool
    reduction: str


# ------------------------------------------------------------------------------------------------------- reference


def reference(logits: Tensor, target: Tensor, class_weight: Tensor | None, options: Options) -> Tensor:
    """The loss in plain PyTorch: the definition, the fallback for every device, in float64 the truth of the tests."""
    gamma_neg, gamma_pos, clip, smoothing, detach_focus, reduction = options
    logits = logits.to(computing_dtype(logits.dtype))
    y, known = labels(target, logits.dtype, smoothing)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    q = (torch.sigmoid(-logits) + clip).clamp(max=1)
    log_q = torch.log(q) if clip else log_not_p
    loss = -(y * log_p + (1 - y) * log_q)
    if gamma_neg or gamma_pos:
        # At y = 0 and y = 1 the focusing base is one sigmoid; its own logarithm is exact where the sigmoid underflows.
        base_neg = (torch.sigmoid(logits) - clip).clamp(min=1e-37)
        log_base_neg = torch.log(base_neg) if clip else log_p
        mixed = torch.log((torch.sigmoid(-logits) * y + base_neg * (1 - y)).clamp(min=1e-37))
        log_base = torch.where(y == 1, log_not_p, torch.where(y == 0, log_base_neg, mixed))
        focus = torch.exp((gamma_pos * y + gamma_neg * (1 - y)) * log_base)
        loss = loss * (focus.detach() if detach_focus else focus)
    return weigh_and_reduce(loss, known, class_weight, reduction)


# ----------------------------------------------------------------------------------------------------------- kernels


class KernelNumbers(NamedTuple):
    """What the kernels are told: the weights of the two sides are the constant of the reduction."""

    weight_pos: float
    weight_neg: float
    gamma_pos: float
    gamma_neg: float
    clip: float
    label_smoothing: float
    detach_focus: bool
    elementwise: bool


def kernel_numbers(o: Options, factor: float) -> KernelNumbers:
    """The numbers of a loss in the kernels' terms; ``factor`` is the constant of the reduction."""
    elementwise = o.reduction == "none"
    return KernelNumbers(
        factor, factor, o.gamma_pos, o.gamma_neg, o.clip, o.label_smoothing, o.detach_focus, elementwise
    )


SCHEMA = "float gamma_neg, float gamma_pos, float clip, float label_smoothing, bool detach_focus"
LOSS = register(ElementwiseLoss("asymmetric_loss", Options, SCHEMA, reference, kernel_numbers))


# ------------------------------------------------------------------------------------------------------- functional


def asymmetric_loss(
    logits: Tensor,
    target: Tensor | SparseTargets,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    clip: float = 0.05,
    detach_focus: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    r"""Asymmetric loss, ASL (Ben-Baruch et al., "Asymmetric Loss For Multi-Label Classification", equations 4 to 7).

    With :math:`p = \sigma(x)`, :math:`q = \min(1 - p + clip, 1)`:

    .. math:: L = -\Big[y\,(1 - p)^{\gamma_{pos}} \log p + (1-y)\,(1 - q)^{\gamma_{neg}} \log q\Big]

    Binary cross-entropy is the case ``gamma_neg=0, clip=0``. A soft ``y`` blends both terms, with the exponent
    ``gamma_pos * y + gamma_neg * (1 - y)`` over the base ``(1 - p) * y + (1 - q) * (1 - y)``. Logarithms are those of
    log-sigmoids in float32 at least: no finite logit gives NaN, where the public code, which clamps at 1e-8, needs
    float32.

    Args:
        logits: [..., K], bfloat16, half, float32 or float64.
        target: [..., K], the shape of ``logits``, any real dtype. Integers and bool: > 0 present, 0 absent, < 0 unknown
            (in uint8: 128 to 255). Floats: in [0, 1], or < 0 for unknown; not checked, as that would wait for the
            device: of NaN the loss is NaN; above 1 it means nothing, may be negative or huge, and differs between
            backends. Unknown labels have no loss and no gradient. Or
            :class:`mlfast.SparseTargets`, the positives of [B, K], all other labels being absent.
        gamma_neg, gamma_pos: focusing exponents >= 0.
        clip: in [0, 1), added to the probability that a negative is absent: below ``p = clip`` it has no loss at all.
        detach_focus: whether the gradient does not flow through the focusing weight ("disable_torch_grad_focal_loss").
        label_smoothing: epsilon in [0, 1): y becomes y * (1 - epsilon), and epsilon where it was 0.
        class_weight: [K] floating point, on the device of ``logits``; multiplies the loss of each class.
        reduction: "sum", "mean" (over known labels), "batchmean" (sum over the first dimension's size), "none".

    Returns:
        The loss, float64 for float64 ``logits``, otherwise float32: a scalar, or the shape of ``logits`` for "none". No
        known label, or an empty batch, gives 0, which can be backpropagated.

    Raises:
        TypeError, ValueError: an argument is not as above.
        mlfast.backends.BackendError: the backend that was asked for cannot serve this device.
    """
    options = check_options(gamma_neg, gamma_pos, clip, label_smoothing, detach_focus, reduction)
    check_tensors("asymmetric_loss", "logits", logits, target, class_weight)
    return LOSS(logits, target, class_weight, options)


@remembered
def check_options(
    gamma_neg: float, gamma_pos: float, clip: float, label_smoothing: float, detach_focus: bool, reduction: str
) -> Options:
    """The numbers of a loss, checked once and remembered."""
    gamma_neg = check_number("asymmetric_loss", "gamma_neg", gamma_neg, ">= 0", lambda x: x >= 0)
    gamma_pos = check_number("asymmetric_loss", "gamma_pos", gamma_pos, ">= 0", lambda x: x >= 0)
    clip = check_number("asymmetric_loss", "clip", clip, "in [0, 1)", lambda x: 0 <= x < 1)
    label_smoothing = check_number(
        "asymmetric_loss", "label_smoothing", label_smoothing, "in [0, 1)", lambda x: 0 <= x < 1
    )
    check_reduction("asymmetric_loss", reduction)
    return Options(gamma_neg, gamma_pos, clip, label_smoothing, bool(detach_focus), reduction)
