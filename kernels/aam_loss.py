"""Triton kernels of aam_loss: loss, gradient and reduction in one launch, without allocation, autograd or autotuning.

The formulas are those of csrc/math/aam_loss.h, where they are explained; docs/aam_loss.md derives them. Tensors are
read as flat. Arithmetic is float32, or float64 for float64 scores. Results are bit-equal from run to run: the grid and
the order of every addition depend on the number of elements alone.

These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were not
tested on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mlfast.kernels.elementary import integer_power, log_positive, sigmoid

# Four elements a thread: 16-byte accesses in float32, and few enough registers for half of an SM's threads or more.
# With eight warps the compiler spills in a few variants.
BLOCK = 512
NUM_WARPS = 4
MAX_PROGRAMS = 1024
# A 16-byte header with the ticket, then for every program a float64 loss and an int64 number of known labels.
WORKSPACE_BYTES = 16 + MAX_PROGRAMS * 16


class Options(NamedTuple):
    """What aam_loss computes; weight_pos and weight_neg contain k, 1 - k and the constants of the reduction."""

    scale: float
    margin: float
    weight_pos: float
    weight_neg: float
    gamma_pos: float
    gamma_neg: float
    prob_shift: float
    label_smoothing: float
    elementwise: bool


@triton.jit
def _focus(base, log_base, positive, gamma, POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr):
    """base^gamma; the powers are the two gammas as integers, or -1 where one is not an integer in 0..7."""
    if POWER_POS < 0:
        result = tl.exp(gamma * log_base)
    elif POWER_POS == POWER_NEG:
        result = integer_power(base, POWER_POS)
    else:
        result = tl.where(positive, integer_power(base, POWER_POS), integer_power(base, POWER_NEG))
    return result


@triton.jit
def _hard(
    cos, positive, scale, margin, weight, gamma,
    MARGIN: tl.constexpr, POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr,
):  # fmt: skip
    """Minus the loss times scale, and minus the gradient, of hard targets without a probability shift."""
    sign = tl.where(positive, 1.0, -1.0).to(cos.dtype)
    p, complement, log_p, log_complement = sigmoid(scale * (sign * cos - margin))
    slope = complement
    if POWER_POS != 0 or POWER_NEG != 0:
        if MARGIN:
            base, base_complement, log_base, _ = sigmoid(-scale * (sign * cos + margin))
        else:
            base, base_complement, log_base = complement, p, log_complement
        weight *= _focus(base, log_base, positive, gamma, POWER_POS, POWER_NEG)
        slope -= gamma * base_complement * log_p
    return weight * log_p, sign * weight * slope


@triton.jit
def _both_sides(cos, scale, margin, shift, MARGIN: tl.constexpr, SHIFTED: tl.constexpr):
    """p+, q and their logarithms, each logarithm with its derivative per unit of u."""
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
    return p, log_p, complement, q, log_q, log_q_slope


@triton.jit
def _shifted(
    cos, positive, scale, margin, shift, weight, gamma,
    MARGIN: tl.constexpr, POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr,
):  # fmt: skip
    """The same as _hard with a probability shift."""
    p, log_p, log_p_slope, q, log_q, log_q_slope = _both_sides(cos, scale, margin, shift, MARGIN, True)
    log_own = tl.where(positive, log_p, log_q)
    slope = tl.where(positive, log_p_slope, log_q_slope)
    if POWER_POS != 0 or POWER_NEG != 0:
        base, log_base = tl.where(positive, q, p), tl.where(positive, log_q, log_p)
        weight *= _focus(base, log_base, positive, gamma, POWER_POS, POWER_NEG)
        slope += gamma * tl.where(positive, log_q_slope, log_p_slope) * log_own
    return weight * log_own, weight * slope


@triton.jit
def _soft(
    cos, y, scale, margin, shift, weight_pos, weight_neg, gamma_pos, gamma_neg,
    MARGIN: tl.constexpr, SHIFTED: tl.constexpr, FOCUSED: tl.constexpr,
):  # fmt: skip
    """The same for any target in [0, 1]: both terms, with a blend of the gammas over a blend of the bases."""
    p, log_p, log_p_slope, q, log_q, log_q_slope = _both_sides(cos, scale, margin, shift, MARGIN, SHIFTED)
    not_y = 1.0 - y
    pos, neg = weight_pos * y, weight_neg * not_y
    terms = pos * log_p + neg * log_q
    slope = pos * log_p_slope + neg * log_q_slope
    if FOCUSED:
        gamma = gamma_pos * y + gamma_neg * not_y
        mixed = q * y + p * not_y
        base = tl.where(mixed < 1e-37, 1e-37, mixed)
        log_base = log_positive(base)
        log_base_slope = (q * y * log_q_slope + p * not_y * log_p_slope) / base
        # At 0 and 1 the base is one sigmoid, whose logarithm stays exact where the sigmoid itself underflows.
        log_base = tl.where(y == 1.0, log_q, tl.where(y == 0.0, log_p, log_base))
        log_base_slope = tl.where(y == 1.0, log_q_slope, tl.where(y == 0.0, log_p_slope, log_base_slope))
        focus = tl.exp(gamma * log_base)
        slope = focus * (slope + gamma * log_base_slope * terms)
        terms *= focus
    return terms, slope


@triton.jit
def _loss_and_grad(
    cos, target, scale, margin, shift, smoothing, weight_pos, weight_neg, gamma_pos, gamma_neg,
    SOFT: tl.constexpr, MARGIN: tl.constexpr, SHIFTED: tl.constexpr,
    POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of elements in the computing type, and 1 where the label is known, else 0."""
    if SOFT:
        y = target
        if not target.dtype.is_floating():
            y = tl.where(target > 0, 1.0, 0.0).to(cos.dtype)
        y = tl.where(target < 0, 0.0, y)  # the formula may overflow beyond [0, 1]
        y = tl.where(y == 0.0, smoothing, y * (1.0 - smoothing))
        FOCUSED: tl.constexpr = POWER_POS != 0 or POWER_NEG != 0
        minus_loss, minus_grad = _soft(
            cos, y, scale, margin, shift, weight_pos, weight_neg, gamma_pos, gamma_neg, MARGIN, SHIFTED, FOCUSED
        )
    else:
        positive = target > 0
        weight = tl.where(positive, weight_pos, weight_neg)
        gamma = tl.where(positive, gamma_pos, gamma_neg)
        if SHIFTED:
            minus_loss, minus_grad = _shifted(
                cos, positive, scale, margin, shift, weight, gamma, MARGIN, POWER_POS, POWER_NEG
            )
        else:
            minus_loss, minus_grad = _hard(cos, positive, scale, margin, weight, gamma, MARGIN, POWER_POS, POWER_NEG)
    unknown = target < 0
    loss = tl.where(unknown, 0.0, minus_loss * (-1.0 / scale))
    return loss, tl.where(unknown, 0.0, -minus_grad), tl.where(unknown, 0, 1)


@triton.jit
def _reduce(loss_sum, known, loss, inv_known, workspace, MAX_PROGRAMS: tl.constexpr):
    """Adds the sums of all programs in float64; the last program to arrive does it, so one launch is enough.

    Why the last program sees every partial: a program writes its partials, passes the barrier and only then draws its
    ticket with acq_rel, whose release half (with the barrier before it, cumulative) publishes the writes of all its
    threads at GPU scope. The tickets are read-modify-writes of one word, so the last one reads from a chain that holds
    every earlier release, and its acquire half, with the barrier Triton puts where the ticket is handed to the other
    threads, orders the loads below after all of them. Those loads bypass L1 (.cg), which may not be coherent. The order
    of arrival decides who adds, never in which order.
    """
    ticket = workspace.to(tl.pointer_type(tl.int32))
    losses = (workspace + 16).to(tl.pointer_type(tl.float64))
    counts = (workspace + 16 + 8 * MAX_PROGRAMS).to(tl.pointer_type(tl.int64))
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(losses + program, loss_sum)
    if inv_known is not None:
        tl.store(counts + program, known)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1:
        lane = tl.arange(0, MAX_PROGRAMS)
        total = tl.sum(tl.load(losses + lane, mask=lane < programs, other=0.0, cache_modifier=".cg"))
        if inv_known is not None:
            count = tl.sum(tl.load(counts + lane, mask=lane < programs, other=0, cache_modifier=".cg"))
            factor = 1.0 / tl.maximum(count, 1).to(tl.float64)
            tl.store(inv_known, factor.to(inv_known.dtype.element_ty))
            total *= factor
        tl.store(loss, total.to(loss.dtype.element_ty))
        tl.store(ticket, 0)  # the next launch on this stream begins with a fresh ticket


@triton.jit(do_not_specialize=["n", "classes"])
def aam_loss_kernel(
    cos, target, class_weight, loss, grad, inv_known, workspace, n: tl.int64, classes: tl.int32,
    scale: tl.float64, margin: tl.float64, shift: tl.float64, smoothing: tl.float64,
    weight_pos: tl.float64, weight_neg: tl.float64, gamma_pos: tl.float64, gamma_neg: tl.float64,
    ELEMENTWISE: tl.constexpr, SOFT: tl.constexpr, MARGIN: tl.constexpr, SHIFTED: tl.constexpr,
    POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr, MAX_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AAM loss of n elements, its gradient, and the sum or mean of the loss.

    Args:
        cos: Pointer to the scores, [n], float32, float16, bfloat16 or float64.
        target: Pointer to the targets, [n], any signed integer or float type; < 0 is unknown. Integers are hard: > 0 is
            positive.
        class_weight: Pointer to weights, [classes], in the computing type, or None.
        loss: Pointer to the result in the computing type: [n] if ELEMENTWISE, otherwise one value.
        grad: Pointer to the gradient, [n], in the type of cos, or None.
        inv_known: Pointer to one value in the computing type, which receives 1 / max(number of known labels, 1), by
            which the loss (and not grad) is multiplied; or None. Not for ELEMENTWISE.
        workspace: Pointer to WORKSPACE_BYTES bytes, 16-byte aligned; the first four are zero before and after.
        n: Number of elements.
        classes: Number of classes, the length of class_weight.
        scale, margin, shift, smoothing, weight_pos, weight_neg, gamma_pos, gamma_neg: See Options. They arrive as
            float64, for float64 scores, and are rounded once.
        ELEMENTWISE: Whether to store the loss of every element instead of reducing it.
        SOFT: Whether targets are anything in [0, 1]: always for float targets, and with label smoothing.
        MARGIN: Whether margin is not 0: a second exponential is needed.
        SHIFTED: Whether shift is greater than 0.
        POWER_POS, POWER_NEG: The gammas where both are integers in 0..7 (products instead of exp), otherwise -1.
        MAX_PROGRAMS: The most programs that the workspace holds.
        BLOCK: Elements per tile.
    """
    T: tl.constexpr = tl.float64 if cos.dtype.element_ty == tl.float64 else tl.float32
    scale, margin = tl.full((), scale, T), tl.full((), margin, T)
    shift, smoothing = tl.full((), shift, T), tl.full((), smoothing, T)
    weight_pos, weight_neg = tl.full((), weight_pos, T), tl.full((), weight_neg, T)
    gamma_pos, gamma_neg = tl.full((), gamma_pos, T), tl.full((), gamma_neg, T)

    lane = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    full_tiles = n // BLOCK
    loss_sum = tl.zeros((BLOCK,), T)
    known_sum = tl.zeros((BLOCK,), tl.int32)
    # Full tiles come without masks, for with masks of unknown alignment Triton would not use 128-bit accesses. The last
    # tile is masked; what lies beyond the end is read as unknown.
    for MASKED in tl.static_range(2):
        if MASKED:
            first, last = full_tiles + program, tl.cdiv(n, BLOCK)
        else:
            first, last = program.to(tl.int64), full_tiles
        for tile in range(first, last, programs):
            start = tile * BLOCK
            inside = lane < n - start
            if MASKED:
                c = tl.load(cos + start + lane, mask=inside, other=0.0).to(T)
                y = tl.load(target + start + lane, mask=inside, other=-1.0)
            else:
                c = tl.load(cos + start + lane).to(T)
                y = tl.load(target + start + lane)
            if y.dtype.is_floating():
                y = y.to(T)
            values, slopes, known = _loss_and_grad(
                c, y, scale, margin, shift, smoothing, weight_pos, weight_neg, gamma_pos, gamma_neg,
                SOFT, MARGIN, SHIFTED, POWER_POS, POWER_NEG,
            )  # fmt: skip
            if class_weight is not None:
                w = tl.load(class_weight + ((start % classes).to(tl.int32) + lane) % classes)
                values *= w
                slopes *= w
            if grad is not None:
                slopes = slopes.to(grad.dtype.element_ty)
                if MASKED:
                    tl.store(grad + start + lane, slopes, mask=inside)
                else:
                    tl.store(grad + start + lane, slopes)
            if not ELEMENTWISE:
                loss_sum += values
                known_sum += known
            elif MASKED:
                tl.store(loss + start + lane, values, mask=inside)
            else:
                tl.store(loss + start + lane, values)
    if not ELEMENTWISE:
        _reduce(
            tl.sum(loss_sum.to(tl.float64)), tl.sum(known_sum.to(tl.int64)), loss, inv_known, workspace, MAX_PROGRAMS
        )


@triton.jit(do_not_specialize=["n"])
def scale_grad_kernel(grad, factor, n: tl.int64, BLOCK: tl.constexpr):
    """grad *= factor in place; nothing is read or written where the factor is 1, the usual case of loss.backward().

    Args:
        grad: Pointer to the gradient, [n], any float type.
        factor: Pointer to one float32, or float64 for a float64 gradient.
        n: Number of elements.
        BLOCK: Elements per tile.
    """
    by = tl.load(factor)
    if by != 1.0:
        lane = tl.arange(0, BLOCK)
        program = tl.program_id(0).to(tl.int64)
        programs = tl.num_programs(0)
        for tile in range(program, n // BLOCK, programs):
            at = grad + tile * BLOCK + lane
            tl.store(at, (tl.load(at).to(by.dtype) * by).to(grad.dtype.element_ty))
        if program == 0:
            start = n // BLOCK * BLOCK
            at = grad + start + lane
            inside = lane < n - start
            tl.store(at, (tl.load(at, mask=inside, other=0.0).to(by.dtype) * by).to(grad.dtype.element_ty), mask=inside)


def num_programs(n: int) -> int:
    """The grid for n elements: the same on every GPU, so that sums are too."""
    return min(max(triton.cdiv(n, BLOCK), 1), MAX_PROGRAMS)


def powers(gamma_pos: float, gamma_neg: float) -> tuple[int, int]:
    """The gammas as integers if both are integers in 0..7, otherwise (-1, -1)."""
    if all(gamma in range(8) for gamma in (gamma_pos, gamma_neg)):
        return int(gamma_pos), int(gamma_neg)
    return -1, -1


def aam_loss(
    cos: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    loss: torch.Tensor,
    grad: torch.Tensor | None,
    inv_known: torch.Tensor | None,
    workspace: torch.Tensor,
    options: Options,
) -> None:
    """Launches aam_loss_kernel, which documents the tensors; they are contiguous and on one device."""
    n = cos.numel()
    power_pos, power_neg = powers(options.gamma_pos, options.gamma_neg)
    with torch.cuda.device_of(cos):
        aam_loss_kernel[(num_programs(n),)](
            cos,
            target,
            class_weight,
            loss,
            grad,
            inv_known,
            workspace,
            n,
            1 if class_weight is None else class_weight.numel(),
            options.scale,
            options.margin,
            options.prob_shift,
            options.label_smoothing,
            options.weight_pos,
            options.weight_neg,
            options.gamma_pos,
            options.gamma_neg,
            ELEMENTWISE=options.elementwise,
            SOFT=target.is_floating_point() or options.label_smoothing > 0,
            MARGIN=options.margin != 0,
            SHIFTED=options.prob_shift > 0,
            POWER_POS=power_pos,
            POWER_NEG=power_neg,
            MAX_PROGRAMS=MAX_PROGRAMS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def scale_grad(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a contiguous gradient by a one-element tensor on the same device, in place."""
    n = grad.numel()
    with torch.cuda.device_of(grad):
        scale_grad_kernel[(num_programs(n),)](grad, factor, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
