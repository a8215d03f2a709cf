"""Triton kernels of cosine_linear: what surrounds the matrix products, each in one pass over memory.

docs/cosine_linear.md derives the formulas. No allocation, autograd or autotuning. All tensors of a launch are
contiguous and of one type, float32 or float64. Results are bit-equal from run to run: the order of every addition
depends on the shape alone.

These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were
tested on an H200.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.launch import cdiv, launch_kernel

# The inverse norm of every vector shorter than 1e-12, as in torch.nn.functional.normalize.
MOST_INVERSE = tl.constexpr(1e12)
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _inverse_norm(vector, to, length, BLOCK: tl.constexpr):
    """Writes 1 / max(norm, 1e-12) of one vector."""
    T: tl.constexpr = to.dtype.element_ty
    squares = tl.zeros((BLOCK,), T)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(vector + at, mask=at < length, other=0.0)
        squares += v * v
    norm = tl.sqrt(tl.sum(squares.to(tl.float64), axis=0))
    most = tl.full((), MOST_INVERSE, tl.float64)
    tl.store(to, tl.where(norm * most < 1, most, 1 / norm).to(T))  # NaN stays NaN


@triton.jit
def inverse_norms_kernel(x, weight, inverse_x, inverse_w, batch: tl.int32, length: tl.int32, BLOCK: tl.constexpr):
    """1 / max(norm, 1e-12) of features and of weights; a program has one vector.

    Args:
        x, weight: Pointers to [batch, length] and [classes, length].
        inverse_x, inverse_w: Pointers to the results, [batch] and [classes].
        batch, length: Sizes.
        BLOCK: Elements that a program reads at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    if row < batch:
        _inverse_norm(x + row * length, inverse_x + row, length, BLOCK)
    else:
        row -= batch
        _inverse_norm(weight + row * length, inverse_w + row, length, BLOCK)


@triton.jit
def scale_kernel(values, inverse_x, inverse_w, out, classes: tl.int32, BLOCK: tl.constexpr):
    """values * inverse_x[row] * inverse_w[class]; a program has BLOCK classes of one row.

    Args:
        values: Pointer to [batch, classes].
        inverse_x, inverse_w: Pointers to [batch] and [classes].
        out: Pointer to the result, [batch, classes]; may be values.
        classes: Size.
        BLOCK: Classes of a program.
    """
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    value = tl.load(values + row * classes + column, mask=inside, other=0.0)
    value = value * tl.load(inverse_x + row) * tl.load(inverse_w + column, mask=inside, other=0.0)
    tl.store(out + row * classes + column, value, mask=inside)


@triton.jit
def _project(grad, vector, inverse, length, BLOCK: tl.constexpr):
    """grad -= <grad, v> v / |v|^2 in place, except where the norm was clamped, for one vector."""
    T: tl.constexpr = grad.dtype.element_ty
    scale = tl.load(inverse)
    products = tl.zeros((BLOCK,), T)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < length, other=0.0)
        products += g * tl.load(vector + at, mask=at < length, other=0.0)
    along = (tl.sum(products.to(tl.float64), axis=0) * scale.to(tl.float64)).to(T)
    clamped = scale == tl.full((), MOST_INVERSE, tl.float64).to(T)  # the norm was a constant: there is no part to take
    end = tl.where(clamped, 0, length)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < end, other=0.0)
        v = tl.load(vector + at, mask=at < end, other=0.0)
        tl.store(grad + at, g - along * (scale * v), mask=at < end)


@triton.jit
def project_kernel(
    x, weight, inverse_x, inverse_w, grad_x, grad_weight, batch: tl.int32, length: tl.int32, BLOCK: tl.constexpr
):
    """Takes from gradients, in place, their parts along the vectors; a program has one vector.

    Args:
        x, weight, inverse_x, inverse_w: As in inverse_norms_kernel.
        grad_x, grad_weight: Pointers to the gradients, or None, and then there are no programs for them.
        batch: Programs for grad_x, the first ones.
        length, BLOCK: As in inverse_norms_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    if row < batch:
        if grad_x is not None:
            _project(grad_x + row * length, x + row * length, inverse_x + row, length, BLOCK)
    else:
        row -= batch
        if grad_weight is not None:
            _project(grad_weight + row * length, weight + row * length, inverse_w + row, length, BLOCK)


# ------------------------------------------------------------------------------------------------------------ launches


def inverse_norms(x: torch.Tensor, weight: torch.Tensor, inverse_x: torch.Tensor, inverse_w: torch.Tensor) -> None:
    """Launches inverse_norms_kernel, which documents the tensors."""
    batch, length = x.shape
    grid, tensors = (batch + len(weight),), (x, weight, inverse_x, inverse_w)
    launch_kernel(inverse_norms_kernel, grid, tensors, (batch, length), BLOCK=BLOCK, num_warps=NUM_WARPS)


def scale(values: torch.Tensor, inverse_x: torch.Tensor, inverse_w: torch.Tensor, out: torch.Tensor) -> None:
    """Launches scale_kernel, which documents the tensors."""
    batch, classes = values.shape
    tensors = values, inverse_x, inverse_w, out
    launch_kernel(scale_kernel, (batch * cdiv(classes, BLOCK),), tensors, (classes,), BLOCK=BLOCK, num_warps=NUM_WARPS)


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_x: torch.Tensor,
    inverse_w: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Launches project_kernel, which documents the tensors."""
    batch = 0 if grad_x is None else len(x)
    grid = (batch + (0 if grad_weight is None else len(weight)),)
    tensors, numbers = (x, weight, inverse_x, inverse_w, grad_x, grad_weight), (batch, x.shape[1])
    launch_kernel(project_kernel, grid, tensors, numbers, BLOCK=BLOCK, num_warps=NUM_WARPS)
