"""group_linear on Triton: its own products for few slots or 16 bits, else a matrix library's with kernels around."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlfast.ops._dtypes import computing_dtype

if TYPE_CHECKING:
    from mlfast.ops.group_linear import Sizes


MOST_SLOTS, MOST_SLOTS_OF_16_BITS = 16, 8  # that are few; measured on an H200


def library_multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the matrix library, which for many slots is faster, can be used: not where it would round to 16 bits."""
    return computing_dtype(torch.promote_types(x.dtype, weight.dtype)) in (x.dtype, weight.dtype)


def has_few_slots(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of matrices would bring nothing over sums within a warp."""
    return weight.shape[2] <= (MOST_SLOTS if library_multiplies(x, weight) else MOST_SLOTS_OF_16_BITS)


def launch(
    sizes: Sizes,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cosines: Tensor | None,
    inv_x: Tensor | None,
    inv_weight: Tensor | None,
) -> None:
    """As kernels/group_linear.py documents the tensors."""
    from mlfast.kernels import group_linear, group_linear_few_slots, group_linear_products

    if has_few_slots(x, weight):
        return group_linear_few_slots.group_linear(sizes, x, weight, bias, out, cosines, inv_x, inv_weight)
    if not library_multiplies(x, weight):
        return group_linear.group_linear(sizes, x, weight, bias, out, cosines, inv_x, inv_weight)
    dtype = computing_dtype(torch.promote_types(x.dtype, weight.dtype))
    if sizes.cosine and inv_x is None:
        inv_x = x.new_empty((sizes.batch, sizes.groups), dtype=dtype)
        inv_weight = x.new_empty((sizes.groups, sizes.slots), dtype=dtype)
    products = x.new_empty((sizes.groups, sizes.batch, sizes.slots), dtype=dtype)
    torch.bmm(x.transpose(0, 1).to(dtype), weight.to(dtype), out=products)  # what writes to `out` autocast leaves alone
    group_linear_products.finish(sizes, x, weight, products, bias, out, cosines, inv_x, inv_weight)


def launch_backward(
    sizes: Sizes,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    cosines: Tensor | None,
    inv_x: Tensor | None,
    inv_weight: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """As kernels/group_linear.py documents the tensors."""
    from mlfast.kernels import group_linear, group_linear_few_slots, group_linear_products

    saved = cosines, inv_x, inv_weight
    if has_few_slots(x, weight):
        few_slots = group_linear_few_slots.group_linear_backward
        return few_slots(sizes, grad_out, x, weight, *saved, grad_x, grad_weight)
    if not library_multiplies(x, weight):
        return group_linear.group_linear_backward(sizes, grad_out, x, weight, *saved, grad_x, grad_weight)
    dtype = computing_dtype(torch.promote_types(x.dtype, weight.dtype))
    factors = x.new_empty((sizes.groups, sizes.batch, sizes.slots), dtype=dtype)
    shrink_x, shrink_weight = (None if inverse is None else torch.empty_like(inverse) for inverse in saved[1:])
    group_linear_products.factors(sizes, grad_out, *saved, factors, shrink_x, shrink_weight)
    of_x = of_weight = None
    if grad_x is not None:
        of_x = _as_computed(grad_x, dtype)
        torch.bmm(factors, weight.to(dtype).transpose(1, 2), out=of_x.transpose(0, 1))
    if grad_weight is not None:
        of_weight = _as_computed(grad_weight, dtype)
        torch.bmm(x.to(dtype).permute(1, 2, 0), factors, out=of_weight)
    if sizes.cosine:
        group_linear_products.take(sizes, (of_x, x, shrink_x, grad_x), (of_weight, weight, shrink_weight, grad_weight))
        return
    for grad, products in ((grad_x, of_x), (grad_weight, of_weight)):
        if grad is not None and products is not None and grad is not products:
            grad.copy_(products)


def _as_computed(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the products of a gradient go: there at once, if it has the computing type."""
    return grad if grad.dtype == dtype else grad.new_empty(grad.shape, dtype=dtype)
