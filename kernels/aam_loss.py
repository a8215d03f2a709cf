"""Triton kernel of aam_loss, over the frame of kernels/elementwise_loss.py.

The formulas are those of csrc/math/aam_loss.h, where they are explained; docs/aam_loss.md derives them. Like the frame,
they were tested on an H200.
"""

from typing import Any

import triton
import triton.language as tl

from mlfast.kernels.elementary import log_positive, sigmoid
from mlfast.kernels.elementwise_loss import WORKSPACE_BYTES, choose, launch, loss_of_tiles

__all__ = ["WORKSPACE_BYTES", "aam_loss"]


@triton.jit
def _both_sides(cos, scale, margin, shift, MARGIN: tl.constexpr, SHIFTED: tl.constexpr):
    """A positive has log p+ over the base q; a negative has log q over the base p+."""
    scale, margin, shift = tl.full((), scale, cos.dtype), tl.full((), margin, cos.dtype), tl.full((), shift, cos.dtype)
    p, complement, log_p, log_complement = sigmoid(scale * (cos - margin))
    if MARGIN:
        q, q_complement, log_q, _ = sigmoid(-scale * (cos + margin))
    else:
        q, q_complement, log_q = complement, p, log_complement
    log_q_slope = -q_complement
    if SHIFTED:
        raised = q + shift
        closed = raised >= 1.0  # there a negative has exactly zero loss and gradient; NaN is not closed
        log_q_slope = tl.where(closed, 0.0, log_q_slope * q / raised)
        q = tl.where(closed, 1.0, raised)
        log_q = log_positive(q)
    return (log_p, complement, q, log_q, log_q_slope), (log_q, log_q_slope, p, log_p, complement)


@triton.jit
def _own_side(cos, positive, scale, margin, shift, MARGIN: tl.constexpr, SHIFTED: tl.constexpr):
    """Without a shift both sides are one expression of the cosine with its sign flipped for negatives."""
    if SHIFTED:
        pos, neg = _both_sides(cos, scale, margin, shift, MARGIN, SHIFTED)
        side = choose(positive, pos, neg)
    else:
        scale, margin = tl.full((), scale, cos.dtype), tl.full((), margin, cos.dtype)
        sign = tl.where(positive, 1.0, -1.0).to(cos.dtype)
        p, complement, log_p, log_complement = sigmoid(scale * (sign * cos - margin))
        base, base_complement, log_base = complement, p, log_complement
        if MARGIN:
            base, base_complement, log_base, _ = sigmoid(-scale * (sign * cos + margin))
        side = log_p, sign * complement, base, log_base, -sign * base_complement
    return side


@triton.jit(do_not_specialize=["n", "classes"])
def aam_loss_kernel(
    scores, target, indptr, class_weight, loss, grad, inv_known, workspace, n: tl.int64, classes: tl.int32,
    scale: tl.float64, margin: tl.float64, weight_pos: tl.float64, weight_neg: tl.float64,
    gamma_pos: tl.float64, gamma_neg: tl.float64, prob_shift: tl.float64, label_smoothing: tl.float64,
    ELEMENTWISE: tl.constexpr, SMOOTHED: tl.constexpr, POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr,
    MARGIN: tl.constexpr, SHIFTED: tl.constexpr, MAX_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AAM loss of cosines; loss_of_tiles documents the tensors and what is not listed here.

    Args:
        scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift, label_smoothing, ELEMENTWISE: The
            KernelNumbers of mlfast/ops/aam_loss.py. The weights contain k, 1 - k and the constants of the reduction.
        MARGIN: Whether margin is not 0: a second exponential is needed.
        SHIFTED: Whether prob_shift is greater than 0.
    """
    loss_of_tiles(
        scores, target, indptr, class_weight, loss, grad, inv_known, workspace, n, classes,
        scale, weight_pos, weight_neg, gamma_pos, gamma_neg, label_smoothing,
        (scale, margin, prob_shift, MARGIN, SHIFTED), _own_side, _both_sides,
        ELEMENTWISE, SMOOTHED, POWER_POS, POWER_NEG, False, MAX_PROGRAMS, BLOCK,
    )  # fmt: skip


def aam_loss(*arguments: Any) -> None:
    """Launches aam_loss_kernel; the arguments are those of elementwise_loss.launch after the kernel."""
    numbers = arguments[-1]
    launch(aam_loss_kernel, *arguments, MARGIN=numbers.margin != 0, SHIFTED=numbers.prob_shift > 0)
