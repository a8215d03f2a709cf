"""Triton kernels of group_linear with several slots: what surrounds the products, which a matrix library computes.

The library's products lie as [groups, batch, slots]. Forward, x and the weights are measured, and the products are put
in the place of their labels, divided by the lengths. Backward, the incoming gradient becomes factors in the layout of
the products; of the library's products with these, multiples of x and of the weights are taken away.

docs/group_linear.md derives the formulas. No allocation, autograd or autotuning. All tensors of a launch but x, the
weights, out and grad_out have one type, float32 or float64. Results are bit-equal from run to run: the order of every
addition depends on the shape alone.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.group_linear import Sizes, inverse_length, square_unless_clamped
from mlfast.kernels.launch import cdiv, launch_kernel, next_power_of_2

BLOCK_FEATURES = 1024  # of a row
BLOCK_ROWS, BLOCK_SLOTS = 16, 16
TILE_FEATURES = 64  # of a weight's tile with BLOCK_SLOTS
NUM_WARPS = 4
TILE = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_SLOTS": BLOCK_SLOTS, "num_warps": NUM_WARPS}


@triton.jit
def inv_x_kernel(
    x, inv_x, groups: tl.int32, features: tl.int32, batch_stride: tl.int64, group_stride: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """1 / length of a row of x: [batch, groups, features] with these strides to [batch, groups]; a program has one."""
    T: tl.constexpr = inv_x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = x + row // groups * batch_stride + row % groups * group_stride
    square = tl.zeros((BLOCK,), T)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(at + d, mask=d < features, other=0.0).to(T)
        square += value * value
    tl.store(inv_x + row, inverse_length(tl.sum(square, axis=0)))


@triton.jit
def inv_weight_kernel(
    weight, inv_weight, features: tl.int32, slots: tl.int32, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr
):  # fmt: skip
    """1 / length of BLOCK_SLOTS slots of one group: weight [groups, features, slots] into [groups, slots]."""
    T: tl.constexpr = inv_weight.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    square = tl.zeros((BLOCK_FEATURES, BLOCK_SLOTS), T)
    for start in range(0, features, BLOCK_FEATURES):
        d = start + tl.arange(0, BLOCK_FEATURES)
        at = weight + (group * features + d)[:, None] * slots + slot[None, :]
        value = tl.load(at, mask=(d < features)[:, None] & (slot < slots)[None, :], other=0.0).to(T)
        square += value * value
    tl.store(inv_weight + group * slots + slot, inverse_length(tl.sum(square, axis=0)), mask=slot < slots)


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
    group = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    slot = tl.program_id(2) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
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
def factors_kernel(
    grad_out, cosines, inv_x, inv_weight, factors, shrink_x,
    batch: tl.int32, groups: tl.int32, slots: tl.int32, classes: tl.int32,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The derivative by the products, in their layout; a program has BLOCK_ROWS rows and all slots of one group.

    Args:
        grad_out: Pointer to [batch, classes], any float type.
        cosines: Pointer to [batch, classes], any float type. Only if COSINE, as the next two and the last.
        inv_x, inv_weight: Pointers to [batch, groups] and [groups, slots].
        factors: Pointer to the result, [groups, batch, slots]: 0 where a slot has no class.
        shrink_x: Pointer to [batch, groups]: receives the multiples of x that are to be taken away.
        batch, groups, slots, classes: Sizes.
        COSINE: Whether products are divided by lengths.
        BLOCK_ROWS, BLOCK_SLOTS: The tile.
    """
    T: tl.constexpr = factors.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
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
def shrink_weight_kernel(
    grad_out, cosines, inv_weight, shrink_weight, batch: tl.int32, slots: tl.int32, classes: tl.int32,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The multiples of the weights to be taken away, [groups, slots]; a program has BLOCK_SLOTS of one group."""
    T: tl.constexpr = shrink_weight.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
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
def take_x_kernel(
    products, x, shrink_x, grad_x, groups: tl.int32, features: tl.int32,
    products_batch_stride: tl.int64, products_group_stride: tl.int64,
    x_batch_stride: tl.int64, x_group_stride: tl.int64,
    grad_batch_stride: tl.int64, grad_group_stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x = products - shrink_x * x, each [batch, groups, features] with strides; a program has BLOCK of one row.

    grad_x may be the products.
    """
    T: tl.constexpr = products.dtype.element_ty
    blocks = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    image, group = row // groups, row % groups
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < features
    product = tl.load(products + image * products_batch_stride + group * products_group_stride + d, mask=inside)
    vector = tl.load(x + image * x_batch_stride + group * x_group_stride + d, mask=inside).to(T)
    result = product - tl.load(shrink_x + row) * vector
    to = grad_x + image * grad_batch_stride + group * grad_group_stride + d
    tl.store(to, result.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def take_weight_kernel(
    products, weight, shrink_weight, grad_weight, features: tl.int32, slots: tl.int32, BLOCK: tl.constexpr
):  # fmt: skip
    """grad_weight = products - shrink_weight * weight, all [groups, features, slots]; a program has BLOCK of one group.

    grad_weight may be the products.
    """
    T: tl.constexpr = products.dtype.element_ty
    of_group = features * slots
    blocks = tl.cdiv(of_group, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < of_group
    at = group * of_group + i
    shrink = tl.load(shrink_weight + group * slots + i % slots, mask=inside)
    result = tl.load(products + at, mask=inside) - shrink * tl.load(weight + at, mask=inside).to(T)
    tl.store(grad_weight + at, result.to(grad_weight.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------------ launches


def finish(
    sizes: Sizes,
    x: torch.Tensor,
    weight: torch.Tensor,
    products: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    cosines: torch.Tensor,
    inv_x: torch.Tensor,
    inv_weight: torch.Tensor,
) -> None:
    """What follows the products x @ weight; empty ``cosines`` are not written."""
    batch, groups, features, slots, classes, cosine = sizes
    slot_blocks = cdiv(slots, BLOCK_SLOTS)
    if cosine:
        numbers = groups, features, x.stride(0), x.stride(1)
        launch_kernel(inv_x_kernel, (batch * groups,), (x, inv_x), numbers, BLOCK=row_block(features), num_warps=1)
        tile = {"BLOCK_SLOTS": BLOCK_SLOTS, "BLOCK_FEATURES": TILE_FEATURES, "num_warps": NUM_WARPS}
        launch_kernel(inv_weight_kernel, (groups, slot_blocks), (weight, inv_weight), (features, slots), **tile)
    grid = groups, cdiv(batch, BLOCK_ROWS), slot_blocks
    tensors = products, inv_x, inv_weight, bias, out, cosines if cosines.numel() > 0 else None
    launch_kernel(place_kernel, grid, tensors, (batch, groups, slots, classes), COSINE=cosine, **TILE)


def factors(
    sizes: Sizes,
    grad_out: torch.Tensor,
    cosines: torch.Tensor,
    inv_x: torch.Tensor,
    inv_weight: torch.Tensor,
    factors: torch.Tensor,
    shrink_x: torch.Tensor,
    shrink_weight: torch.Tensor,
) -> None:
    """What precedes the products of the gradient; the last two are written for cosines alone."""
    batch, groups, _, slots, classes, cosine = sizes
    tensors = grad_out, cosines, inv_x, inv_weight, factors, shrink_x
    grid = groups, cdiv(batch, BLOCK_ROWS)
    launch_kernel(factors_kernel, grid, tensors, (batch, groups, slots, classes), COSINE=cosine, **TILE)
    if cosine:
        tensors = grad_out, cosines, inv_weight, shrink_weight
        launch_kernel(
            shrink_weight_kernel, (groups, cdiv(slots, BLOCK_SLOTS)), tensors, (batch, slots, classes), **TILE
        )


def take_x(products: torch.Tensor, x: torch.Tensor, shrink_x: torch.Tensor, grad_x: torch.Tensor) -> None:
    """Launches take_x_kernel, which documents the tensors."""
    batch, groups, features = x.shape
    block = row_block(features)
    strides = [stride for tensor in (products, x, grad_x) for stride in tensor.stride()[:2]]
    programs = batch * groups * cdiv(features, block)
    tensors, numbers = (products, x, shrink_x, grad_x), (groups, features, *strides)
    launch_kernel(take_x_kernel, (programs,), tensors, numbers, BLOCK=block, num_warps=1)


def take_weight(
    products: torch.Tensor, weight: torch.Tensor, shrink_weight: torch.Tensor, grad_weight: torch.Tensor
) -> None:
    """Launches take_weight_kernel, which documents the tensors."""
    groups, features, slots = weight.shape
    programs = groups * cdiv(features * slots, BLOCK_FEATURES)
    tensors, numbers = (products, weight, shrink_weight, grad_weight), (features, slots)
    launch_kernel(take_weight_kernel, (programs,), tensors, numbers, BLOCK=BLOCK_FEATURES, num_warps=NUM_WARPS)


def row_block(features: int) -> int:
    """Features that a program of one warp reads at a time."""
    return min(next_power_of_2(features), BLOCK_FEATURES)
