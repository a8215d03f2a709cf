"""Triton kernels of group_linear with several slots: what surrounds the products, which a matrix library computes.

The library's products lie as [groups, batch, slots]. Forward, x and the weights are measured, and the products are put
in the place of their labels, divided by the lengths. Backward, the incoming gradient becomes factors in the layout of
the products; of the library's products with these, multiples of x and of the weights are taken away. What belongs to x
and what belongs to the weights share a launch: its first programs have the one, the others the other.

docs/group_linear.md derives the formulas. No allocation, autograd or autotuning. All tensors of a launch but x, the
weights, their gradients, out and grad_out have one type, float32 or float64. Results are bit-equal from run to run: the
order of every addition depends on the shape alone.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.elementary import narrowed
from mlfast.kernels.group_linear import Sizes, inverse_length, square_unless_clamped
from mlfast.kernels.launch import cdiv, launch_kernel

NUM_WARPS = 4
TILE = {"BLOCK_ROWS": 16, "BLOCK_SLOTS": 16, "num_warps": NUM_WARPS}
LENGTHS_TILE = {"BLOCK_ROWS": 8, "BLOCK_ROW": 128, "BLOCK_SLOTS": 16, "BLOCK_FEATURES": 64, "num_warps": NUM_WARPS}
BLOCK = 1024  # elements of a vector, or of the weights of a group


@triton.jit
def _rows_measured(
    x, inv_x, first, batch, groups, features, batch_stride, group_stride, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """1 / length of BLOCK_ROWS rows of x, from this one on."""
    T: tl.constexpr = inv_x.dtype.element_ty
    row = first.to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    inside = row < batch.to(tl.int64) * groups
    at = x + (row // groups * batch_stride + row % groups * group_stride)[:, None]
    square = tl.zeros((BLOCK_ROWS, BLOCK), T)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(at + d[None, :], mask=inside[:, None] & (d < features)[None, :], other=0.0).to(T)
        square += value * value
    tl.store(inv_x + row, inverse_length(tl.sum(square, axis=1)), mask=inside)


@triton.jit
def _slots_measured(
    weight, inv_weight, group, first, features, slots, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr
):
    """1 / length of BLOCK_SLOTS slots of one group, from this one on."""
    T: tl.constexpr = inv_weight.dtype.element_ty
    slot = first + tl.arange(0, BLOCK_SLOTS)
    square = tl.zeros((BLOCK_FEATURES, BLOCK_SLOTS), T)
    for start in range(0, features, BLOCK_FEATURES):
        d = start + tl.arange(0, BLOCK_FEATURES)
        at = weight + (group * features + d)[:, None] * slots + slot[None, :]
        value = tl.load(at, mask=(d < features)[:, None] & (slot < slots)[None, :], other=0.0).to(T)
        square += value * value
    tl.store(inv_weight + group * slots + slot, inverse_length(tl.sum(square, axis=0)), mask=slot < slots)


@triton.jit
def lengths_kernel(
    x, weight, inv_x, inv_weight, batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32,
    batch_stride: tl.int64, group_stride: tl.int64,
    BLOCK_ROWS: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """1 / length of every row of x and of every slot; the first programs have rows, the others slots.

    Args:
        x: Pointer to [batch, groups, features] with these strides, any float type.
        weight: Pointer to [groups, features, slots], any float type.
        inv_x, inv_weight: Pointers to the results, [batch, groups] and [groups, slots].
        batch, groups, features, slots, batch_stride, group_stride: Sizes and strides.
        BLOCK_ROWS, BLOCK_ROW: Rows of a program, and their elements that it reads at a time.
        BLOCK_SLOTS, BLOCK_FEATURES: Slots of a program, and their elements that it reads at a time.
    """
    program = tl.program_id(0)
    for_rows = ((batch.to(tl.int64) * groups + (BLOCK_ROWS - 1)) // BLOCK_ROWS).to(tl.int32)
    if program < for_rows:
        first = program.to(tl.int64) * BLOCK_ROWS
        _rows_measured(x, inv_x, first, batch, groups, features, batch_stride, group_stride, BLOCK_ROWS, BLOCK_ROW)
    else:
        slot_blocks = tl.cdiv(slots, BLOCK_SLOTS)
        group = ((program - for_rows) // slot_blocks).to(tl.int64)
        first_slot = (program - for_rows) % slot_blocks * BLOCK_SLOTS
        _slots_measured(weight, inv_weight, group, first_slot, features, slots, BLOCK_SLOTS, BLOCK_FEATURES)


@triton.jit
def place_kernel(
    products, inv_x, inv_weight, bias, out, cosines,
    batch: tl.int32, groups: tl.int32, slots: tl.int32, classes: tl.int32,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Products [groups, batch, slots] into out [batch, classes]; a program has a tile of one group.

    Args:
        products: Pointer to them.
        inv_x, inv_weight: Pointers to [batch, groups] and [groups, slots]. Only if COSINE.
        bias: Pointer to [classes], or None.
        out: Pointer to the result, any float type.
        cosines: Pointer to [batch, classes], receives the result without the bias; or None.
        batch, groups, slots, classes: Sizes.
        COSINE: Whether products are divided by lengths.
        BLOCK_ROWS, BLOCK_SLOTS: The tile.
    """
    row_blocks, slot_blocks = tl.cdiv(batch, BLOCK_ROWS), tl.cdiv(slots, BLOCK_SLOTS)
    group = (tl.program_id(0) // slot_blocks // row_blocks).to(tl.int64)
    row = (tl.program_id(0) // slot_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    slot = tl.program_id(0) % slot_blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    label = group * slots + slot
    known = (slot < slots) & (label < classes)
    inside = (row < batch)[:, None] & known[None, :]
    value = tl.load(products + (group * batch + row)[:, None] * slots + slot[None, :], mask=inside, other=0.0)
    if COSINE:
        value *= tl.load(inv_x + row * groups + group, mask=row < batch, other=0.0)[:, None]
        value *= tl.load(inv_weight + label, mask=known, other=0.0)[None, :]
    at = row[:, None] * classes + label[None, :]
    if cosines is not None:
        tl.store(cosines + at, value, mask=inside)
    if bias is not None:
        value += tl.load(bias + label, mask=known, other=0.0)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _factors_of_rows(
    grad_out, cosines, inv_x, inv_weight, factors, shrink_x, group, first, batch, groups, slots, classes,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The factors of BLOCK_ROWS rows and all slots of one group, and the multiples of these rows of x."""
    T: tl.constexpr = factors.dtype.element_ty
    row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inverse = tl.zeros((BLOCK_ROWS,), T)
    if COSINE:
        inverse = tl.load(inv_x + row * groups + group, mask=row < batch, other=0.0)
    along = tl.zeros((BLOCK_ROWS,), T)
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        label = group * slots + slot
        inside = (row < batch)[:, None] & ((slot < slots) & (label < classes))[None, :]
        at = row[:, None] * classes + label[None, :]
        factor = tl.load(grad_out + at, mask=inside, other=0.0).to(T)
        if COSINE:
            along += tl.sum(factor * tl.load(cosines + at, mask=inside, other=0.0).to(T), axis=1)
            factor *= inverse[:, None] * tl.load(inv_weight + label, mask=slot < slots, other=0.0)[None, :]
        to = factors + (group * batch + row)[:, None] * slots + slot[None, :]
        tl.store(to, factor, mask=(row < batch)[:, None] & (slot < slots)[None, :])
    if COSINE:
        tl.store(shrink_x + row * groups + group, along * square_unless_clamped(inverse), mask=row < batch)


@triton.jit
def _multiples_of_slots(
    grad_out, cosines, inv_weight, shrink_weight, group, first, batch, slots, classes,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The multiples of BLOCK_SLOTS slots of one group."""
    T: tl.constexpr = shrink_weight.dtype.element_ty
    slot = first + tl.arange(0, BLOCK_SLOTS)
    label = group * slots + slot
    along = tl.zeros((BLOCK_ROWS, BLOCK_SLOTS), T)
    for start in range(0, batch, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        inside = (row < batch)[:, None] & ((slot < slots) & (label < classes))[None, :]
        at = row[:, None] * classes + label[None, :]
        grad = tl.load(grad_out + at, mask=inside, other=0.0).to(T)
        along += grad * tl.load(cosines + at, mask=inside, other=0.0).to(T)
    inverse = tl.load(inv_weight + label, mask=slot < slots, other=0.0)
    tl.store(shrink_weight + label, tl.sum(along, axis=0) * square_unless_clamped(inverse), mask=slot < slots)


@triton.jit
def factors_kernel(
    grad_out, cosines, inv_x, inv_weight, factors, shrink_x, shrink_weight,
    batch: tl.int32, groups: tl.int32, slots: tl.int32, classes: tl.int32,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The derivative by the products, in their layout, and what is to be taken away of x and of the weights.

    The first programs of a group have blocks of rows, and for cosines the others blocks of slots.

    Args:
        grad_out: Pointer to [batch, classes], any float type.
        cosines: Pointer to [batch, classes], any float type. Only if COSINE, as what follows but the factors.
        inv_x, inv_weight: Pointers to [batch, groups] and [groups, slots].
        factors: Pointer to the result, [groups, batch, slots]: 0 where a slot has no class.
        shrink_x, shrink_weight: Pointers to [batch, groups] and [groups, slots]: receive the multiples.
        batch, groups, slots, classes: Sizes.
        COSINE: Whether products are divided by lengths.
        BLOCK_ROWS, BLOCK_SLOTS: The tile.
    """
    row_blocks = tl.cdiv(batch, BLOCK_ROWS)
    blocks = row_blocks
    if COSINE:
        blocks += tl.cdiv(slots, BLOCK_SLOTS)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    if block < row_blocks:
        first = block * BLOCK_ROWS
        _factors_of_rows(
            grad_out, cosines, inv_x, inv_weight, factors, shrink_x, group, first, batch, groups, slots, classes,
            COSINE, BLOCK_ROWS, BLOCK_SLOTS,
        )  # fmt: skip
    else:
        if COSINE:
            first = (block - row_blocks) * BLOCK_SLOTS
            _multiples_of_slots(
                grad_out, cosines, inv_weight, shrink_weight, group, first, batch, slots, classes,
                BLOCK_ROWS, BLOCK_SLOTS,
            )  # fmt: skip


@triton.jit
def _less(products, vectors, shrink, grad, mask):
    """grad = products - shrink * vectors."""
    product = tl.load(products, mask=mask)
    result = product - shrink * tl.load(vectors, mask=mask).to(product.dtype)
    tl.store(grad, narrowed(result, grad.dtype.element_ty), mask=mask)


@triton.jit
def take_kernel(
    products_x, x, shrink_x, grad_x, products_weight, weight, shrink_weight, grad_weight,
    batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32,
    products_batch_stride: tl.int64, products_group_stride: tl.int64,
    x_batch_stride: tl.int64, x_group_stride: tl.int64,
    grad_batch_stride: tl.int64, grad_group_stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of their products: less multiples of x, and of the weights.

    The first programs have BLOCK features of one row of x, the others BLOCK elements of one group's weights. Where
    grad_x or grad_weight is None, there are no programs for it.

    Args:
        products_x, x, grad_x: Pointers to [batch, groups, features] with strides of their own; grad_x may be the
            products.
        products_weight, weight, grad_weight: Pointers to [groups, features, slots]; grad_weight may be the products.
        shrink_x, shrink_weight: From factors_kernel.
        batch, groups, features, slots: Sizes.
        products_batch_stride, products_group_stride, x_batch_stride, x_group_stride, grad_batch_stride,
            grad_group_stride: Strides.
        BLOCK: Elements of a program.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(features, BLOCK)
    for_x = 0
    if grad_x is not None:
        for_x = batch * groups * blocks
    lane = tl.arange(0, BLOCK)
    if program < for_x:
        if grad_x is not None:
            row = (program // blocks).to(tl.int64)
            image, group = row // groups, row % groups
            d = program % blocks * BLOCK + lane
            of_products = products_x + image * products_batch_stride + group * products_group_stride + d
            of_x = x + image * x_batch_stride + group * x_group_stride + d
            to = grad_x + image * grad_batch_stride + group * grad_group_stride + d
            _less(of_products, of_x, tl.load(shrink_x + row), to, d < features)
    else:
        if grad_weight is not None:
            of_group = features.to(tl.int64) * slots
            weight_blocks = tl.cdiv(of_group, BLOCK)
            group = ((program - for_x) // weight_blocks).to(tl.int64)
            i = (program - for_x) % weight_blocks * BLOCK + lane  # int64, as the group's size
            at = group * of_group + i
            shrink = tl.load(shrink_weight + group * slots + i % slots, mask=i < of_group)
            _less(products_weight + at, weight + at, shrink, grad_weight + at, i < of_group)


# ------------------------------------------------------------------------------------------------------------ launches


def finish(
    sizes: Sizes,
    x: torch.Tensor,
    weight: torch.Tensor,
    products: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    cosines: torch.Tensor | None,
    inv_x: torch.Tensor | None,
    inv_weight: torch.Tensor | None,
) -> None:
    """What follows the products x @ weight. The lengths, of cosines, are written and then read."""
    batch, groups, features, slots, classes, cosine = sizes
    slot_blocks = cdiv(slots, TILE["BLOCK_SLOTS"])
    if cosine:
        programs = cdiv(batch * groups, LENGTHS_TILE["BLOCK_ROWS"]) + groups * slot_blocks
        numbers = batch, groups, features, slots, x.stride(0), x.stride(1)
        launch_kernel(lengths_kernel, (programs,), (x, weight, inv_x, inv_weight), numbers, **LENGTHS_TILE)
    grid = (groups * cdiv(batch, TILE["BLOCK_ROWS"]) * slot_blocks,)
    tensors = products, inv_x, inv_weight, bias, out, cosines
    launch_kernel(place_kernel, grid, tensors, (batch, groups, slots, classes), COSINE=cosine, **TILE)


def factors(
    sizes: Sizes,
    grad_out: torch.Tensor,
    cosines: torch.Tensor | None,
    inv_x: torch.Tensor | None,
    inv_weight: torch.Tensor | None,
    factors: torch.Tensor,
    shrink_x: torch.Tensor | None,
    shrink_weight: torch.Tensor | None,
) -> None:
    """What precedes the products of the gradient; the last two are written for cosines alone."""
    batch, groups, _, slots, classes, cosine = sizes
    blocks = cdiv(batch, TILE["BLOCK_ROWS"]) + (cdiv(slots, TILE["BLOCK_SLOTS"]) if cosine else 0)
    tensors = grad_out, cosines, inv_x, inv_weight, factors, shrink_x, shrink_weight
    launch_kernel(factors_kernel, (groups * blocks,), tensors, (batch, groups, slots, classes), COSINE=cosine, **TILE)


def take(
    sizes: Sizes,
    of_x: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None],
    of_weight: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> None:
    """Launches take_kernel; of each: products, vectors, multiples, gradient. Products and gradient may be None."""
    batch, groups, features, slots, _, _ = sizes
    products_x, x, _, grad_x = of_x
    for_x = 0 if grad_x is None else batch * groups * cdiv(features, BLOCK)
    for_weight = 0 if of_weight[3] is None else groups * cdiv(features * slots, BLOCK)
    strides = [0 if t is None else t.stride(dim) for t in (products_x, x, grad_x) for dim in (0, 1)]
    tensors, numbers = (*of_x, *of_weight), (batch, groups, features, slots, *strides)
    launch_kernel(take_kernel, (for_x + for_weight,), tensors, numbers, BLOCK=BLOCK, num_warps=NUM_WARPS)
