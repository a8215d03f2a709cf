"""Triton kernels of group_linear: products and lengths in one pass forward, products and rank-1 corrections backward.

docs/group_linear.md derives the formulas. No allocation, autograd or autotuning. Arithmetic is float32. Results are
bit-equal from run to run: the order of every addition depends on the shape alone.

These are the kernels of many slots per group where x and weight both have 16 bits: a `tl.dot` with slots padded to 16,
in TF32, in which their values are exact, and rounding those of the incoming gradient costs less than rounding the
result. Other products of matrices are the matrix library's; see group_linear_products.py. What all kernels of the op
share stands here too.

These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were
tested on an H200.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.launch import cdiv, launch_kernel, next_power_of_2

# 1 / length of every vector shorter than 1e-12, as in torch.nn.functional.normalize. Stored as it is, not divided: the
# backward pass knows it again by its bits, however a device rounds divisions.
MOST_INVERSE = tl.constexpr(1e12)


@triton.jit
def inverse_length(square):
    """1 / length of vectors, of their squared lengths."""
    length = tl.sqrt(square)
    most = tl.full((), MOST_INVERSE, tl.float64).to(square.dtype)
    clamped = length * most < 1
    return tl.where(clamped, most, 1.0 / tl.where(clamped, 1.0, length))  # a NaN stays one


@triton.jit
def square_unless_clamped(inverse):
    """What the derivative of 1 / length is multiplied by: 0 where the length was clamped, and so constant."""
    clamped = inverse == tl.full((), MOST_INVERSE, tl.float64).to(inverse.dtype)
    return tl.where(clamped, 0.0, inverse * inverse)


@triton.jit
def factors_of(
    grad_out, cosines, inv_x, inv_weight, group, row, slot, batch, groups, slots, classes,
    T: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """The derivative by the products <x, w> of a block [rows, slots], and its product with the cosines."""
    label = group * slots + slot
    inside = (row < batch)[:, None] & ((slot < slots) & (label < classes))[None, :]
    at = row[:, None] * classes + label[None, :]
    factor = tl.load(grad_out + at, mask=inside, other=0.0).to(T)
    along = factor
    if COSINE:
        along *= tl.load(cosines + at, mask=inside, other=0.0)
        factor *= tl.load(inv_x + row * groups + group, mask=row < batch, other=0.0)[:, None]
        factor *= tl.load(inv_weight + group * slots + slot, mask=slot < slots, other=0.0)[None, :]
    return factor, along


@triton.jit(do_not_specialize=["batch", "groups", "slots", "classes"])
def group_linear_kernel(
    x, weight, bias, out, cosines, inv_x, inv_weight,
    batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32, classes: tl.int32,
    x_batch_stride: tl.int64, x_group_stride: tl.int64,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Products or cosines; a program has BLOCK_ROWS images and BLOCK_SLOTS slots of one group.

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
        BLOCK_ROWS, BLOCK_SLOTS, BLOCK_FEATURES: The tile.
    """
    row_blocks, slot_blocks = tl.cdiv(batch, BLOCK_ROWS), tl.cdiv(slots, BLOCK_SLOTS)
    row_block = tl.program_id(0) % row_blocks
    slot_block = tl.program_id(0) // row_blocks % slot_blocks
    group = (tl.program_id(0) // row_blocks // slot_blocks).to(tl.int64)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot = slot_block * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    product = tl.zeros((BLOCK_ROWS, BLOCK_SLOTS), tl.float32)
    square_x = tl.zeros((BLOCK_ROWS,), tl.float32)
    square_weight = tl.zeros((BLOCK_SLOTS,), tl.float32)
    for start in range(0, features, BLOCK_FEATURES):
        d = start + tl.arange(0, BLOCK_FEATURES)
        at = x + (row * x_batch_stride + group * x_group_stride)[:, None] + d[None, :]
        a = tl.load(at, mask=(row < batch)[:, None] & (d < features)[None, :], other=0.0).to(tl.float32)
        at = weight + (group * features + d)[:, None] * slots + slot[None, :]
        w = tl.load(at, mask=(d < features)[:, None] & (slot < slots)[None, :], other=0.0).to(tl.float32)
        product = tl.dot(a, w, product, input_precision="tf32")
        if COSINE:
            square_x += tl.sum(a * a, axis=1)
            square_weight += tl.sum(w * w, axis=0)
    if COSINE:
        inverse_x, inverse_weight = inverse_length(square_x), inverse_length(square_weight)
        product *= inverse_x[:, None] * inverse_weight[None, :]
        if inv_x is not None:
            tl.store(inv_x + row * groups + group, inverse_x, mask=(row < batch) & (slot_block == 0))
            tl.store(inv_weight + group * slots + slot, inverse_weight, mask=(slot < slots) & (row_block == 0))
    label = group * slots + slot
    known = (slot < slots) & (label < classes)
    inside = (row < batch)[:, None] & known[None, :]
    at = row[:, None] * classes + label[None, :]
    if cosines is not None:
        tl.store(cosines + at, product, mask=inside)
    if bias is not None:
        product += tl.load(bias + label, mask=known, other=0.0)[None, :]
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "groups", "slots", "classes"])
def grad_x_kernel(
    grad_out, x, weight, cosines, inv_x, inv_weight, grad_x,
    batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32, classes: tl.int32,
    x_batch_stride: tl.int64, x_group_stride: tl.int64, grad_batch_stride: tl.int64, grad_group_stride: tl.int64,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """factors @ weight^T - shrink * x; a program has BLOCK_ROWS images and BLOCK_FEATURES features of one group.

    Args:
        grad_out: Pointer to [batch, classes], any float type.
        x, weight, cosines, inv_x, inv_weight: As in group_linear_kernel; the latter three only if COSINE.
        grad_x: Pointer to the result, of the shape of x with strides of its own, any float type.
        batch, groups, features, slots, classes: Sizes.
        x_batch_stride, x_group_stride, grad_batch_stride, grad_group_stride: Strides.
        COSINE, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_FEATURES: As in group_linear_kernel.
    """
    row_blocks, blocks = tl.cdiv(batch, BLOCK_ROWS), tl.cdiv(features, BLOCK_FEATURES)
    group = (tl.program_id(0) // blocks // row_blocks).to(tl.int64)
    row = (tl.program_id(0) // blocks % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(0) % blocks * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    grad = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), tl.float32)
    along_x = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        factor, along = factors_of(
            grad_out, cosines, inv_x, inv_weight, group, row, slot, batch, groups, slots, classes, tl.float32, COSINE
        )
        at = weight + (group * features + d)[None, :] * slots + slot[:, None]
        w = tl.load(at, mask=(slot < slots)[:, None] & (d < features)[None, :], other=0.0).to(tl.float32)
        grad = tl.dot(factor, w, grad, input_precision="tf32")
        along_x += tl.sum(along, axis=1)
    inside = (row < batch)[:, None] & (d < features)[None, :]
    if COSINE:
        inverse = tl.load(inv_x + row * groups + group, mask=row < batch, other=0.0)
        at = x + (row * x_batch_stride + group * x_group_stride)[:, None] + d[None, :]
        shrink = along_x * square_unless_clamped(inverse)
        grad -= shrink[:, None] * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = grad_x + (row * grad_batch_stride + group * grad_group_stride)[:, None] + d[None, :]
    tl.store(at, grad.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "groups", "slots", "classes"])
def grad_weight_kernel(
    grad_out, x, weight, cosines, inv_x, inv_weight, grad_weight,
    batch: tl.int32, groups: tl.int32, features: tl.int32, slots: tl.int32, classes: tl.int32,
    x_batch_stride: tl.int64, x_group_stride: tl.int64,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """x^T @ factors - shrink * weight; a program has BLOCK_FEATURES features and BLOCK_SLOTS slots of one group.

    Args:
        grad_out, x, weight, cosines, inv_x, inv_weight: As in grad_x_kernel.
        grad_weight: Pointer to the result, of the shape of weight, any float type.
        batch, groups, features, slots, classes: Sizes.
        x_batch_stride, x_group_stride: Strides.
        COSINE, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_FEATURES: As in group_linear_kernel.
    """
    slot_blocks, blocks = tl.cdiv(slots, BLOCK_SLOTS), tl.cdiv(features, BLOCK_FEATURES)
    group = (tl.program_id(0) // blocks // slot_blocks).to(tl.int64)
    slot = tl.program_id(0) // blocks % slot_blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    d = tl.program_id(0) % blocks * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    grad = tl.zeros((BLOCK_FEATURES, BLOCK_SLOTS), tl.float32)
    along_weight = tl.zeros((BLOCK_SLOTS,), tl.float32)
    for start in range(0, batch, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        factor, along = factors_of(
            grad_out, cosines, inv_x, inv_weight, group, row, slot, batch, groups, slots, classes, tl.float32, COSINE
        )
        at = x + (row * x_batch_stride + group * x_group_stride)[None, :] + d[:, None]
        a = tl.load(at, mask=(d < features)[:, None] & (row < batch)[None, :], other=0.0).to(tl.float32)
        grad = tl.dot(a, factor, grad, input_precision="tf32")
        along_weight += tl.sum(along, axis=0)
    inside = (d < features)[:, None] & (slot < slots)[None, :]
    at = (group * features + d)[:, None] * slots + slot[None, :]
    if COSINE:
        inverse = tl.load(inv_weight + group * slots + slot, mask=slot < slots, other=0.0)
        shrink = along_weight * square_unless_clamped(inverse)
        grad -= shrink[None, :] * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_weight + at, grad.to(grad_weight.dtype.element_ty), mask=inside)


Sizes = tuple[int, int, int, int, int, bool]  # batch, groups, features, slots, classes, cosine


def tile(slots: int, forward: bool) -> dict[str, int]:
    """A program's tile and its warps, as they were the fastest on an H200."""
    padded = min(max(next_power_of_2(slots), 16), 32)
    return {"BLOCK_ROWS": 32 if forward else 16, "BLOCK_SLOTS": padded, "BLOCK_FEATURES": 64, "num_warps": 4}


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
    """Launches group_linear_kernel, which documents the tensors."""
    batch, groups, _, slots, _, cosine = sizes
    chosen = {"COSINE": cosine} | tile(slots, True)
    programs = groups * cdiv(batch, chosen["BLOCK_ROWS"]) * cdiv(slots, chosen["BLOCK_SLOTS"])
    tensors = x, weight, bias, out, cosines, inv_x, inv_weight
    numbers = *sizes[:5], x.stride(0), x.stride(1)
    launch_kernel(group_linear_kernel, (programs,), tensors, numbers, **chosen)


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
    """Launches grad_x_kernel and grad_weight_kernel, each where its result is wanted."""
    batch, groups, features, slots, _, cosine = sizes
    chosen = {"COSINE": cosine} | tile(slots, False)
    of_features = groups * cdiv(features, chosen["BLOCK_FEATURES"])
    inputs = grad_out, x, weight, cosines, inv_x, inv_weight
    numbers = *sizes[:5], x.stride(0), x.stride(1)
    if grad_x is not None:
        programs = of_features * cdiv(batch, chosen["BLOCK_ROWS"])
        strides = grad_x.stride(0), grad_x.stride(1)
        launch_kernel(grad_x_kernel, (programs,), (*inputs, grad_x), (*numbers, *strides), **chosen)
    if grad_weight is not None:
        programs = of_features * cdiv(slots, chosen["BLOCK_SLOTS"])
        launch_kernel(grad_weight_kernel, (programs,), (*inputs, grad_weight), numbers, **chosen)
