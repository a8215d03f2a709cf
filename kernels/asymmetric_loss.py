"""Triton kernel of asymmetric_loss, over the frame of kernels/elementwise_loss.py.

The formulas are those of csrc/math/asymmetric_loss.h, where they are explained; docs/asymmetric_loss.md derives them.
Like the frame, they were tested on an H200.
"""

from typing import Any

import triton
import triton.language as tl

from mlfast.kernels.elementary import log_positive, sigmoid
from mlfast.kernels.elementwise_loss import WORKSPACE_BYTES, choose, launch, loss_of_tiles

__all__ = ["WORKSPACE_BYTES", "asymmetric_loss"]


@triton.jit
def _both_sides(logit, clip, CLIPPED: tl.constexpr):
    """A positive has log p over the base 1 - p; a negative has log q over the base 1 - q."""
    p, complement, log_p, log_complement = sigmoid(logit)
    neg = log_complement, -p, p, log_p, complement
    if CLIPPED:
        clip = tl.full((), clip, logit.dtype)
        base = p - clip
        closed = base <= 1e-37  # there a negative has exactly zero loss and gradient; NaN is not closed
        base = tl.where(closed, 1e-37, base)
        q = tl.where(closed | (complement + clip > 1.0), 1.0, complement + clip)
        # One division for the variance over q and over base. They add up to 1, so their product does not underflow.
        ratio = tl.where(closed, 0.0, p * complement / (q * base))
        neg = log_positive(q), -ratio * base, base, log_positive(base), ratio * q
    return (log_p, complement, complement, log_complement, -p), neg


@triton.jit
def _own_side(logit, positive, clip, CLIPPED: tl.constexpr):
    """Without a clip both sides are one expression of the logit with its sign flipped for negatives."""
    if CLIPPED:
        pos, neg = _both_sides(logit, clip, CLIPPED)
        side = choose(positive, pos, neg)
    else:
        sign = tl.where(positive, 1.0, -1.0).to(logit.dtype)
        p, complement, log_p, log_complement = sigmoid(sign * logit)
        side = log_p, sign * complement, complement, log_complement, -sign * p
    return side


@triton.jit(do_not_specialize=["n", "classes"])
def asymmetric_loss_kernel(
    scores, target, indptr, class_weight, loss, grad, inv_known, workspace, n: tl.int64, classes: tl.int32,
    weight_pos: tl.float64, weight_neg: tl.float64, gamma_pos: tl.float64, gamma_neg: tl.float64,
    clip: tl.float64, label_smoothing: tl.float64, DETACHED: tl.constexpr,
    ELEMENTWISE: tl.constexpr, SMOOTHED: tl.constexpr, POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr,
    CLIPPED: tl.constexpr, MAX_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Asymmetric loss of logits; loss_of_tiles documents the tensors and what is not listed here.

    Args:
        weight_pos, weight_neg, gamma_pos, gamma_neg, clip, label_smoothing, DETACHED, ELEMENTWISE: The KernelNumbers of
            mlfast/ops/asymmetric_loss.py. The weights are the constants of the reduction.
        CLIPPED: Whether clip is greater than 0.
    """
    loss_of_tiles(
        scores, target, indptr, class_weight, loss, grad, inv_known, workspace, n, classes,
        1.0, weight_pos, weight_neg, gamma_pos, gamma_neg, label_smoothing,
        (clip, CLIPPED), _own_side, _both_sides,
        ELEMENTWISE, SMOOTHED, POWER_POS, POWER_NEG, DETACHED, MAX_PROGRAMS, BLOCK,
    )  # fmt: skip


def asymmetric_loss(*arguments: Any) -> None:
    """Launches asymmetric_loss_kernel; the arguments are those of elementwise_loss.launch after the kernel."""
    launch(asymmetric_loss_kernel, *arguments, CLIPPED=arguments[-1].clip > 0)
