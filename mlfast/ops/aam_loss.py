"""The asymmetric angular-margin (AAM) loss: docs/aam_loss.md has the derivation, the cost and the measurements.

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
    y, known = labels(target, cos.dtype, smoothing)
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
    return weigh_and_reduce(loss, known, class_weight, reduction)


# ----------------------------------------------------------------------------------------------------------- kernels


class KernelNumbers(NamedTuple):
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


def kernel_numbers(o: Options, factor: float) -> KernelNumbers:
    """The numbers of a loss in the kernels' terms; ``factor`` is the constant of the reduction."""
    return KernelNumbers(
        o.scale,
        o.margin,
        o.k * factor,
        (1 - o.k) * factor,
        o.gamma_pos,
        o.gamma_neg,
        o.prob_shift,
        o.label_smoothing,
        o.reduction == "none",
    )


SCHEMA = ", ".join(f"float {name}" for name in Options._fields[:-1])
LOSS = register(ElementwiseLoss("aam_loss", Options, SCHEMA, reference, kernel_numbers))


# ------------------------------------------------------------------------------------------------------- functional


def aam_loss(
    cos: Tensor,
    target: Tensor | SparseTargets,
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
            (in uint8: 128 to 255). Floats: in [0, 1], or < 0 for unknown; not checked, as that would wait for the
            device: of NaN the loss is NaN; above 1 it means nothing, may be negative or huge, and differs between
            backends. Unknown labels have no loss and no gradient. Or
            :class:`mlfast.SparseTargets`, the positives of [B, K], all other labels being absent.
        scale: s > 0, which multiplies the cosines.
        margin: m in [-1, 1], subtracted from the cosine on the side of the label. Beyond 1 no cosine is on the right
            side of it, and beyond -1 none on the wrong side. The paper's are in [0, 1); below 0 it loosens.
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
    options = check_options(scale, margin, k, gamma_neg, gamma_pos, prob_shift, label_smoothing, reduction)
    check_tensors("aam_loss", "cos", cos, target, class_weight)
    return LOSS(cos, target, class_weight, options)


@remembered
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
    scale = check_number("aam_loss", "scale", scale, "> 0", lambda x: x > 0)
    margin = check_number("aam_loss", "margin", margin, "in [-1, 1], a difference of cosines", lambda x: -1 <= x <= 1)
    k = check_number("aam_loss", "k", k, "in [0, 1]", lambda x: 0 <= x <= 1)
    gamma_neg = check_number("aam_loss", "gamma_neg", gamma_neg, ">= 0", lambda x: x >= 0)
    gamma_pos = check_number("aam_loss", "gamma_pos", gamma_pos, ">= 0", lambda x: x >= 0)
    prob_shift = check_number("aam_loss", "prob_shift", prob_shift, "in [0, 1)", lambda x: 0 <= x < 1)
    label_smoothing = check_number("aam_loss", "label_smoothing", label_smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
    check_reduction("aam_loss", reduction)
    return Options(scale, margin, k, gamma_neg, gamma_pos, prob_shift, label_smoothing, reduction)
