"""A linear layer whose outputs are cosines: the plain head under an angular-margin loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.integers import sizes
from mlfast.ops.cosine_linear import cosine_linear


class CosineLinear(nn.Module):
    """Cosine of the angle between a feature vector and the weight vector of each class (``functional.cosine_linear``).

    ``cos[..., k] = <x, w_k> / (|x| |w_k|)``, without a bias. It is the head behind global average pooling when the
    paper trains with angular losses (Prokofiev & Sovrasov; ``AngleSimpleLinear`` in their released code, which clamps).
    The scale ``s`` of the loss is not applied here.

    Under autocast, and for half precision inputs, everything runs in float32: a cosine is multiplied by a scale of
    20 or more before the sigmoid, which would make bfloat16's three digits visible. Float64 stays float64.
    Rounding may give a cosine of 1 + 1e-7; it is not clamped, since a clamp would stop the gradient there.

    Args:
        in_features: length D of a feature vector.
        num_classes: number K of classes.

    Shape:
        input ``[..., D]``, any floating dtype; output ``[..., K]``, float32 (float64 for float64 inputs).
        ``weight`` is ``[K, D]``, initialised to random directions of length 1.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size below 1, or an input whose last dimension is not D.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.in_features, self.num_classes = sizes("CosineLinear", in_features=in_features, num_classes=num_classes)
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new random directions of length 1."""
        with torch.no_grad():
            self.weight.normal_()
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``[..., D]`` to cosines ``[..., K]``."""
        if isinstance(x, Tensor) and x.shape[-1:] != (self.in_features,):
            raise ValueError(f"CosineLinear expects [..., {self.in_features}], got {list(x.shape)}")
        return cosine_linear(x, self.weight)

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}"
