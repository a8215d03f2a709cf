"""What fused ops say to double backward: that they have none, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def without_second_derivative(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], *incoming: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a backward pass returns: with create_graph=True, differentiating the gradients again raises.

    They depend on the saved tensors, which a checkpoint lets one read once only, and the incoming gradients. Without an
    edge to these, a derivative by chosen inputs would pass the gradients by, and be silently wrong.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    requires_grad = torch.empty((), requires_grad=True)
    of = [tensor for tensor in (*saved, *incoming) if tensor is not None]
    return tuple(None if grad is None else NoSecondDerivative.apply(grad, requires_grad, *of) for grad in grads)


class NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on, and says what is missing if it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, requires_grad: Tensor, *of: Tensor) -> Tensor:
        """Returns ``grad``; the second argument makes the result require grad, the others are what it depends on."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(
            "mlfast's fused ops have no second derivative; for double backward compute the op inside "
            'mlfast.use_backend("reference")'
        )
