"""group_linear on Triton: its own product where memory bounds it, and a matrix library's with kernels around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlfast.ops._dtypes import computing_dtype

if TYPE_CHECKING:
    from mlfast.ops.group_linear import Sizes


def library_multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the matrix library, which is several times as fast, can be used: not where it would round to 16 bits.

    One slot is no product of matrices.
    """
    computing = computing_dtype(torch.promote_types(x.dtype, weight.dtype))
    return weight.shape[2] > 1 and computing in (x.dtype, weight.dtype)


def launch(sizes: Sizes, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *saved: Tensor) -> None:
    """As kernels/group_linear.py documents the tensors; ``saved``: cosines, inv_x, inv_weight."""
    if not library_multiplies(x, weight):
        from mlfast.kernels.group_linear import group_linear

        return group_linear(sizes, x, weight, bias, out, *saved)
    from mlfast.kernels.group_linear_products import finish

    dtype = saved[0].dtype
    products = x.new_empty((sizes.groups, sizes.batch, sizes.slots), dtype=dtype)
    torch.bmm(x.transpose(0, 1).to(dtype), weight.to(dtype), out=products)  # what writes to `out` autocast leaves alone
    finish(sizes, x, weight, products, bias, out, *saved)


def launch_backward(
    sizes: Sizes,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    cosines: Tensor,
    inv_x: Tensor,
    inv_weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """As kernels/group_linear.py documents the tensors."""
    saved = cosines, inv_x, inv_weight
    if not library_multiplies(x, weight):
        from mlfast.kernels.group_linear import group_linear_backward

        return group_linear_backward(sizes, grad_out, x, weight, *saved, grad_x, grad_weight)
    from mlfast.kernels import group_linear_products as kernels

    dtype = inv_x.dtype
    factors = x.new_empty((sizes.groups, sizes.batch, sizes.slots), dtype=dtype)
    shrink_x, shrink_weight = torch.empty_like(inv_x), torch.empty_like(inv_weight)
    kernels.factors(sizes, grad_out, *saved, factors, shrink_x, shrink_weight)
    of_x = of_weight = None
    if grad_x is not None:
        of_x = _as_computed(grad_x, dtype)
        torch.bmm(factors, weight.to(dtype).transpose(1, 2), out=of_x.transpose(0, 1))
    if grad_weight is not None:
        of_weight = _as_computed(grad_weight, dtype)
        torch.bmm(x.to(dtype).permute(1, 2, 0), factors, out=of_weight)
    if sizes.cosine:
        kernels.take(sizes, (of_x, x, shrink_x, grad_x), (of_weight, weight, shrink_weight, grad_weight))
        return
    for grad, products in ((grad_x, of_x), (grad_weight, of_weight)):
        if grad is not None and products is not None and grad is not products:
            grad.copy_(products)


def _as_computed(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the products of a gradient go: there at once, if it has the computing type."""
    return grad if grad.dtype == dtype else grad.new_empty(grad.shape, dtype=dtype)
