"""What the Triton kernels of the elementwise losses share: tiles, labels, focus, the reduction, and the launch.

A loss supplies a kernel that names its numbers and calls :func:`loss_of_tiles` with its formula, two jit functions that
describe an element by sides. A side is a tuple of five: the logarithm that makes the loss, its derivative, the focusing
base, its logarithm, and the derivative of that logarithm, where derivatives are per unit of u = scale * score.

    own_side(score, positive, *numbers)  the side of hard labels: the positive or the negative one
    both_sides(score, *numbers)          the positive side and the negative one, for labels in between

One launch does everything, without allocation, autograd or autotuning. Tensors are read as flat. Arithmetic is float32,
or float64 for float64 scores. Results are bit-equal from run to run: the grid and the order of every addition depend on
the number of elements alone.

These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were
tested on an H200.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mlfast.kernels.elementary import integer_power, log_positive
from mlfast.kernels.launch import cdiv, launch_kernel

# Four elements a thread: 16-byte accesses in float32, and few enough registers for half of an SM's threads or more.
# With eight warps the compiler spills in a few variants.
BLOCK = 512
NUM_WARPS = 4
MAX_PROGRAMS = 1024
# A 16-byte header with the ticket, then for every program a float64 loss and an int64 number of known labels.
WORKSPACE_BYTES = 16 + MAX_PROGRAMS * 16


# --------------------------------------------------------------------------------------------------------- one element


@triton.jit
def choose(positive, pos, neg):
    """The own side, element by element, of two sides."""
    return (
        tl.where(positive, pos[0], neg[0]),
        tl.where(positive, pos[1], neg[1]),
        tl.where(positive, pos[2], neg[2]),
        tl.where(positive, pos[3], neg[3]),
        tl.where(positive, pos[4], neg[4]),
    )


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
    side, positive, weight_pos, weight_neg, gamma_pos, gamma_neg,
    POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr, DETACHED: tl.constexpr,
):  # fmt: skip
    """Minus the loss times scale, and minus the gradient, of hard labels."""
    log_own, slope, base, log_base, log_base_slope = side
    weight = tl.where(positive, weight_pos, weight_neg)
    if POWER_POS != 0 or POWER_NEG != 0:
        gamma = tl.where(positive, gamma_pos, gamma_neg)
        weight *= _focus(base, log_base, positive, gamma, POWER_POS, POWER_NEG)
        if not DETACHED:
            slope += gamma * log_base_slope * log_own
    return weight * log_own, weight * slope


@triton.jit
def _soft(
    pos, neg, y, weight_pos, weight_neg, gamma_pos, gamma_neg,
    FOCUSED: tl.constexpr, DETACHED: tl.constexpr,
):  # fmt: skip
    """The same for any label in [0, 1]: both terms, with a blend of the gammas over a blend of the bases."""
    log_own_pos, slope_pos, base_pos, log_base_pos, log_base_slope_pos = pos
    log_own_neg, slope_neg, base_neg, log_base_neg, log_base_slope_neg = neg
    not_y = 1.0 - y
    weight_pos *= y
    weight_neg *= not_y
    terms = weight_pos * log_own_pos + weight_neg * log_own_neg
    slope = weight_pos * slope_pos + weight_neg * slope_neg
    if FOCUSED:
        gamma = gamma_pos * y + gamma_neg * not_y
        base_pos *= y
        base_neg *= not_y
        mixed = base_pos + base_neg
        base = tl.where(mixed < 1e-37, 1e-37, mixed)
        # At 0 and 1 the base is one sigmoid, whose logarithm stays exact where the sigmoid itself underflows.
        log_base = tl.where(y == 1.0, log_base_pos, tl.where(y == 0.0, log_base_neg, log_positive(base)))
        if not DETACHED:
            log_base_slope = (base_pos * log_base_slope_pos + base_neg * log_base_slope_neg) / base
            log_base_slope = tl.where(y == 0.0, log_base_slope_neg, log_base_slope)
            log_base_slope = tl.where(y == 1.0, log_base_slope_pos, log_base_slope)
            slope += gamma * log_base_slope * terms
        focus = tl.exp(gamma * log_base)
        slope *= focus
        terms *= focus
    return terms, slope


@triton.jit
def _minus_loss_and_grad(
    score, target, numbers, smoothing, weight_pos, weight_neg, gamma_pos, gamma_neg,
    own_side: tl.constexpr, both_sides: tl.constexpr, SMOOTHED: tl.constexpr,
    POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr, DETACHED: tl.constexpr,
):  # fmt: skip
    """Minus the loss times scale, and minus the gradient, of any labels."""
    positive = target > 0
    soft = SMOOTHED
    if not SMOOTHED and target.dtype.is_floating():
        # Most targets are hard though they are floats, and a tile of them takes the cheaper formula; NaN must show.
        between = (positive & (target != 1.0)) | (target != target)
        soft = tl.max(between.to(tl.int32)) != 0
    if soft:  # for integers known when the kernel is compiled, which then holds one formula
        y = tl.where(positive, 1.0, 0.0).to(score.dtype)
        if target.dtype.is_floating():
            y = tl.where(target < 0, 0.0, target)  # the formula may overflow beyond [0, 1]
        if SMOOTHED:
            y = tl.where(y == 0.0, smoothing, y * (1.0 - smoothing))
        FOCUSED: tl.constexpr = POWER_POS != 0 or POWER_NEG != 0
        pos, neg = both_sides(score, *numbers)
        terms, slope = _soft(pos, neg, y, weight_pos, weight_neg, gamma_pos, gamma_neg, FOCUSED, DETACHED)
    else:
        side = own_side(score, positive, *numbers)
        terms, slope = _hard(
            side, positive, weight_pos, weight_neg, gamma_pos, gamma_neg, POWER_POS, POWER_NEG, DETACHED
        )
    return terms, slope


# ------------------------------------------------------------------------------------------------------ sparse targets


@triton.jit
def _sparse_labels(indices, indptr, start, lane, inside, classes):
    """The labels of a tile, 1 or 0, or -1 outside: every lane looks itself up among the positives of its row.

    A binary search, of as many steps as the longest row of the tile needs: none where no row has a positive.
    """
    column = (start % classes).to(tl.int32) + lane
    row = start // classes + column // classes
    column = column % classes
    first = tl.load(indptr + row, mask=inside, other=0)
    end = tl.load(indptr + row + 1, mask=inside, other=0)
    last = end
    longest = tl.max(end - first)
    while longest > 0:
        middle = (first + last) // 2
        searching = first < last
        below = searching & (tl.load(indices + middle, mask=searching, other=0) < column)
        last = tl.where(below, last, middle)
        first = tl.where(below, middle + 1, first)
        longest = longest // 2
    found = tl.load(indices + first, mask=first < end, other=-1) == column
    return tl.where(inside, found.to(tl.int8), -1)


# ----------------------------------------------------------------------------------------------------------- all tiles


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


@triton.jit
def loss_of_tiles(
    scores, target, indptr, class_weight, loss, grad, inv_known, workspace, n, classes,
    scale, weight_pos, weight_neg, gamma_pos, gamma_neg, smoothing, numbers,
    own_side: tl.constexpr, both_sides: tl.constexpr, ELEMENTWISE: tl.constexpr, SMOOTHED: tl.constexpr,
    POWER_POS: tl.constexpr, POWER_NEG: tl.constexpr, DETACHED: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A loss of n elements, its gradient, and the sum or mean of the loss: the body of every loss's kernel.

    Args:
        scores: Pointer to the scores, [n], float32, float16, bfloat16 or float64.
        target: Pointer to the targets, [n], any signed integer or float type; < 0 is unknown. Integers are hard: > 0 is
            positive. Floats are anything in [0, 1]. With indptr: pointer to the classes of the positives, [nnz], int32
            or int64, ascending in each row.
        indptr: Pointer to where the positives of each row begin, [n / classes + 1], int64; None for dense targets.
        class_weight: Pointer to weights, [classes], in the computing type, or None.
        loss: Pointer to the result in the computing type: [n] if ELEMENTWISE, otherwise one value.
        grad: Pointer to the gradient, [n], in the type of scores, or None.
        inv_known: Pointer to one value in the computing type, which receives 1 / max(number of known labels, 1), by
            which the loss (and not grad) is multiplied; or None. Not for ELEMENTWISE.
        workspace: Pointer to WORKSPACE_BYTES bytes, 16-byte aligned; the first four are zero before and after.
        n: Number of elements, int64.
        classes: Number of classes, int32 and below 2^31 - BLOCK; read with class_weight or indptr only.
        scale: What the loss is divided by: its slopes are per unit of scale * score.
        weight_pos, weight_neg: Weights of the two sides, which contain the constants of the reduction.
        gamma_pos, gamma_neg: Their focusing exponents.
        smoothing: The label smoothing. These six arrive as float64, for float64 scores, and are rounded once.
        numbers: The tuple of what else the formula takes; it rounds them itself.
        own_side, both_sides: The formula, see the top of this file.
        ELEMENTWISE: Whether to store the loss of every element instead of reducing it.
        SMOOTHED: Whether smoothing is greater than 0.
        POWER_POS, POWER_NEG: The gammas where both are integers in 0..7 (products instead of exp), otherwise -1.
        DETACHED: Whether the gradient leaves out the focusing weight's derivative.
        MAX_PROGRAMS: The most programs that the workspace holds.
        BLOCK: Elements per tile.
    """
    T: tl.constexpr = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    scale, smoothing = tl.full((), scale, T), tl.full((), smoothing, T)
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
                x = tl.load(scores + start + lane, mask=inside, other=0.0).to(T)
            else:
                x = tl.load(scores + start + lane).to(T)
            if indptr is not None:
                y = _sparse_labels(target, indptr, start, lane, inside, classes)
            elif MASKED:
                y = tl.load(target + start + lane, mask=inside, other=-1.0)
            else:
                y = tl.load(target + start + lane)
            if y.dtype.is_floating():
                y = y.to(T)
            terms, slopes = _minus_loss_and_grad(
                x, y, numbers, smoothing, weight_pos, weight_neg, gamma_pos, gamma_neg,
                own_side, both_sides, SMOOTHED, POWER_POS, POWER_NEG, DETACHED,
            )  # fmt: skip
            unknown = y < 0
            values = tl.where(unknown, 0.0, terms * (-1.0 / scale))
            slopes = tl.where(unknown, 0.0, -slopes)
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
                known_sum += tl.where(unknown, 0, 1)
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


# ------------------------------------------------------------------------------------------------------------ launches


def num_programs(n: int) -> int:
    """The grid for n elements: the same on every GPU, so that sums are too."""
    return min(max(cdiv(n, BLOCK), 1), MAX_PROGRAMS)


def powers(gamma_pos: float, gamma_neg: float) -> tuple[int, int]:
    """The gammas as integers if both are integers in 0..7, otherwise (-1, -1)."""
    if all(gamma in range(8) for gamma in (gamma_pos, gamma_neg)):
        return int(gamma_pos), int(gamma_neg)
    return -1, -1


def launch(
    kernel: Any,
    scores: torch.Tensor,
    target: torch.Tensor,
    indptr: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    loss: torch.Tensor,
    grad: torch.Tensor | None,
    inv_known: torch.Tensor | None,
    workspace: torch.Tensor,
    numbers: Any,
    **variant: int,
) -> None:
    """Launches the kernel of a loss on tensors that are contiguous and on one device; loss_of_tiles documents them.

    ``numbers`` is a named tuple in the order of the kernel's arguments; ``variant`` are constants of this loss alone.
    """
    power_pos, power_neg = powers(numbers.gamma_pos, numbers.gamma_neg)
    n = scores.numel()
    if torch.version.hip is None:
        real_powers = -1 in (power_pos, power_neg)
        kind = scores.dtype == torch.float64, target.is_floating_point(), indptr is not None and real_powers
        variant |= register_limit(*kind)
    launch_kernel(
        kernel,
        (num_programs(n),),
        (scores, target, indptr, class_weight, loss, grad, inv_known, workspace),
        (n, 1 if class_weight is None and indptr is None else scores.shape[-1], *numbers),
        SMOOTHED=numbers.label_smoothing > 0,
        POWER_POS=power_pos,
        POWER_NEG=power_neg,
        MAX_PROGRAMS=MAX_PROGRAMS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **variant,
    )


def register_limit(double: bool, soft: bool, sparse_with_real_powers: bool) -> dict[str, int]:
    """An option of the launch on NVIDIA GPUs where ptxas, left to itself, aims at more threads and spills."""
    if double:
        return {"maxnreg": 255}
    if sparse_with_real_powers:
        return {"maxnreg": 128}
    return {"maxnreg": 96} if soft else {}  # soft labels need two formulas


def scale_grad(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a contiguous gradient by a one-element tensor on the same device, in place."""
    n = grad.numel()
    launch_kernel(scale_grad_kernel, (num_programs(n),), (grad, factor), (n,), BLOCK=BLOCK, num_warps=NUM_WARPS)
