"""Triton kernels of group_linear with few slots per group, where memory bounds it.

Forward is one kernel and backward one: each reads x once. Sums stay within a warp. docs/group_linear.md derives the
formulas. No allocation, autograd or autotuning. Arithmetic is float32, or float64 if x or weight is. Results are
bit-equal from run to run: the order of every addition depends on the shape alone.

These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were
tested on an H200. That features are not among ``do_not_specialize`` lets multiples of 16 be read 16 bytes at a time.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.elementary import narrowed
from mlfast.kernels.group_linear import Sizes, factors_of, inverse_length, square_unless_clamped
from mlfast.kernels.launch import cdiv, launch_kernel, next_power_of_2


@triton.jit(do_not_specialize=["batch", "groups", "slots", "classes"])
def few_slots_kernel(
    x, weight, bias, out, cosines, inv_x, inv_weight,
    batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32, classes: tl.int32,
    x_batch_stride: tl.int64, x_group_stride: tl.int64,
    COSINE: tl.constexpr, DOUBLE: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Products or cosines; a program has BLOCK_ROWS images and all slots of one group.

    Args:
        x: Pointer to [batch, groups, features] with these strides, in elements; any float type.
        weight: Pointer to [groups, features, slots], any float type.
        bias: Pointer to [classes] in the computing type, or None.
        out: Pointer to [batch, classes]: receives the result, any float type.
        cosines: Pointer to [batch, classes] in the computing type: receives the result without the bias; or None.
        inv_x, inv_weight: Pointers to [batch, groups] and [groups, slots] in the computing type: receive 1 / length;
            or None.
        batch, groups, features, slots, classes: Sizes.
        x_batch_stride, x_group_stride: Strides.
        COSINE: Whether products are divided by lengths.
        DOUBLE: Whether the computing type is float64.
        UNROLL: Blocks of features whose loads are under way together.
        BLOCK_ROWS, BLOCK_SLOTS, BLOCK_FEATURES: The tile.
    """
    T: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row_blocks = tl.cdiv(batch, BLOCK_ROWS)
    row_block = tl.program_id(0) % row_blocks
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot = tl.arange(0, BLOCK_SLOTS)
    stride = 1 if BLOCK_SLOTS == 1 else slots
    at_x = x + (row * x_batch_stride + group * x_group_stride)[:, None]
    product = tl.zeros((BLOCK_ROWS, BLOCK_SLOTS, BLOCK_FEATURES), T)
    square_x = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), T)
    square_weight = tl.zeros((BLOCK_SLOTS, BLOCK_FEATURES), T)
    for start in range(0, features, BLOCK_FEATURES * UNROLL):
        for step in tl.static_range(UNROLL):
            d = start + step * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
            a = tl.load(at_x + d[None, :], mask=(row < batch)[:, None] & (d < features)[None, :], other=0.0).to(T)
            at = weight + (group * features + d)[None, :] * stride + slot[:, None]
            w = tl.load(at, mask=(slot < slots)[:, None] & (d < features)[None, :], other=0.0).to(T)
            product += a[:, None, :] * w[None, :, :]
            if COSINE:
                square_x += a * a
                square_weight += w * w
    result = tl.sum(product, axis=2)
    if COSINE:
        inverse_x, inverse_weight = inverse_length(tl.sum(square_x, 1)), inverse_length(tl.sum(square_weight, 1))
        result *= inverse_x[:, None] * inverse_weight[None, :]
        if inv_x is not None:
            tl.store(inv_x + row * groups + group, inverse_x, mask=row < batch)
            tl.store(inv_weight + group * slots + slot, inverse_weight, mask=(slot < slots) & (row_block == 0))
    label = group * slots + slot
    known = (slot < slots) & (label < classes)
    inside = (row < batch)[:, None] & known[None, :]
    at = row[:, None] * classes + label[None, :]
    if cosines is not None:
        tl.store(cosines + at, result, mask=inside)
    if bias is not None:
        result += tl.load(bias + label, mask=known, other=0.0)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "groups", "slots", "classes"])
def few_slots_backward_kernel(
    grad_out, x, weight, cosines, inv_x, inv_weight, grad_x, grad_weight,
    batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32, classes: tl.int32,
    x_batch_stride: tl.int64, x_group_stride: tl.int64, grad_batch_stride: tl.int64, grad_group_stride: tl.int64,
    COSINE: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Both gradients: products less multiples of x and of the weights; a program has some features of one group.

    Args:
        grad_out: Pointer to [batch, classes], any float type.
        x, weight, cosines, inv_x, inv_weight: As in few_slots_kernel; the latter three only if COSINE.
        grad_x: Pointer to the result, of the shape of x with strides of its own, any float type; or None.
        grad_weight: Pointer to the result, of the shape of weight, any float type; or None.
        batch, groups, features, slots, classes: Sizes.
        x_batch_stride, x_group_stride, grad_batch_stride, grad_group_stride: Strides.
        COSINE, DOUBLE, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_FEATURES: As in few_slots_kernel.
    """
    T: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    blocks = tl.cdiv(features, BLOCK_FEATURES)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    slot = tl.arange(0, BLOCK_SLOTS)
    stride = 1 if BLOCK_SLOTS == 1 else slots
    at_weight = (group * features + d)[None, :] * stride + slot[:, None]
    inside_weight = (slot < slots)[:, None] & (d < features)[None, :]
    w = tl.load(weight + at_weight, mask=inside_weight, other=0.0).to(T)
    by_weight = tl.zeros((BLOCK_SLOTS, BLOCK_FEATURES), T)
    along_weight = tl.zeros((BLOCK_ROWS, BLOCK_SLOTS), T)
    for start in range(0, batch, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        factor, along = factors_of(
            grad_out, cosines, inv_x, inv_weight, group, row, slot, batch, groups, slots, classes, T, COSINE
        )
        inside = (row < batch)[:, None] & (d < features)[None, :]
        at = x + (row * x_batch_stride + group * x_group_stride)[:, None] + d[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(T)
        if grad_x is not None:
            if BLOCK_SLOTS == 1:
                by_x, along_x = factor * w, along
            else:
                by_x, along_x = tl.sum(factor[:, :, None] * w[None, :, :], axis=1), tl.sum(along, axis=1)[:, None]
            if COSINE:
                inverse = tl.load(inv_x + row * groups + group, mask=row < batch, other=0.0)
                by_x -= along_x * square_unless_clamped(inverse)[:, None] * a
            at = grad_x + (row * grad_batch_stride + group * grad_group_stride)[:, None] + d[None, :]
            tl.store(at, narrowed(by_x, grad_x.dtype.element_ty), mask=inside)
        if grad_weight is not None:
            by_weight += tl.sum(factor[:, :, None] * a[:, None, :], axis=0)
            along_weight += along
    if grad_weight is not None:
        if COSINE:
            inverse = tl.load(inv_weight + group * slots + slot, mask=slot < slots, other=0.0)
            by_weight -= (tl.sum(along_weight, axis=0) * square_unless_clamped(inverse))[:, None] * w
        tl.store(grad_weight + at_weight, narrowed(by_weight, grad_weight.dtype.element_ty), mask=inside_weight)


def forward_tile(slots: int, element_size: int) -> dict[str, int]:
    """A program's tile and its warps, as they were the fastest on an H200; of several slots 128 bytes of a row."""
    padded = next_power_of_2(slots)
    names = "BLOCK_ROWS", "BLOCK_FEATURES", "UNROLL", "num_warps"
    unroll = 3 if element_size == 2 else 4  # with more ptxas spills
    chosen = (2, 128, 6, 1) if padded == 1 else (4, min(128 // element_size, 512 // padded), unroll, 1)
    return {"BLOCK_SLOTS": padded, **dict(zip(names, chosen, strict=True))}


def backward_tile(slots: int, double: bool) -> dict[str, int]:
    """Likewise. With 16 rows Triton would make the sum over slots a product of matrices in TF32."""
    padded = next_power_of_2(slots)
    names = "BLOCK_ROWS", "BLOCK_FEATURES", "num_warps"
    wide = 32 if double else 64  # with more ptxas spills
    rows = 8 if padded < 8 else 4
    chosen = (8, 128, 1) if padded == 1 else (rows, wide, 2 if padded == 16 else 1)
    return {"BLOCK_SLOTS": padded, **dict(zip(names, chosen, strict=True))}


def group_linear(
    sizes: Sizes,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    cosines: torch.Tensor | None,
    inv_x: torch.Tensor | None,
    inv_weight: torch.Tensor | None,
) -> None:
    """Launches few_slots_kernel, which documents the tensors."""
    batch, groups, _, slots, _, cosine = sizes
    chosen = forward_tile(slots, x.element_size())
    chosen |= {"COSINE": cosine, "DOUBLE": torch.float64 in (x.dtype, weight.dtype)}
    tensors = x, weight, bias, out, cosines, inv_x, inv_weight
    numbers = *sizes[:5], x.stride(0), x.stride(1)
    launch_kernel(few_slots_kernel, (groups * cdiv(batch, chosen["BLOCK_ROWS"]),), tensors, numbers, **chosen)


def group_linear_backward(
    sizes: Sizes,
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cosines: torch.Tensor | None,
    inv_x: torch.Tensor | None,
    inv_weight: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Launches few_slots_backward_kernel, which documents the tensors."""
    _, groups, features, slots, _, cosine = sizes
    double = torch.float64 in (x.dtype, weight.dtype)
    chosen = backward_tile(slots, double) | {"COSINE": cosine, "DOUBLE": double}
    tensors = grad_out, x, weight, cosines, inv_x, inv_weight, grad_x, grad_weight
    strides = (0, 0) if grad_x is None else (grad_x.stride(0), grad_x.stride(1))
    numbers = *sizes[:5], x.stride(0), x.stride(1), *strides
    programs = groups * cdiv(features, chosen["BLOCK_FEATURES"])
    launch_kernel(few_slots_backward_kernel, (programs,), tensors, numbers, **chosen)
