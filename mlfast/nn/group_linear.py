"""The last layer of ML-Decoder: a linear layer of its own for every group of classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlfast.integers import integer, sizes
from mlfast.ops.group_linear import group_linear

MOST_GROUPS = 100  # of ML-Decoder by default


class GroupLinear(nn.Module):
    """Maps L vectors to K classes, f = ceil(K / L) from each: :func:`mlfast.functional.group_linear` as a module.

    It is the group fully-connected layer of ML-Decoder (Ridnik et al., 3.2), and with ``cosine`` that of Prokofiev &
    Sovrasov for angular losses: there their released code adds a learned bias to the cosines, which starts at 0. The
    scale of the loss is not applied here.

    Args:
        in_features: length D of a vector.
        num_classes: number K of classes.
        num_groups: number L of vectors, at most K; None for min(100, K). Where L * f is above K, the last slots
            belong to no class and are not trained.
        cosine: whether outputs are cosines rather than products.
        bias: whether a learned bias is added.

    Shape:
        x ``[B, L, D]`` -> ``[B, K]``; see :func:`mlfast.functional.group_linear` for dtypes.
        ``weight`` is ``[L, D, f]``, initialised by ``xavier_normal_`` as in ML-Decoder; ``bias`` ``[K]``, zeros.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is below 1, there are more groups than classes, or x is not [B, L, D].
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_groups: int | None = None,
        cosine: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        in_features, num_classes = sizes("GroupLinear", in_features=in_features, num_classes=num_classes)
        if num_groups is None:
            num_groups = min(MOST_GROUPS, num_classes)
        num_groups = integer("GroupLinear", "num_groups", num_groups)
        if not 1 <= num_groups <= num_classes:
            raise ValueError(
                f"GroupLinear: num_groups must be from 1 to the number of classes, {num_classes}, got {num_groups}"
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_groups = num_groups
        self.cosine = cosine
        self.weight = nn.Parameter(torch.empty(num_groups, in_features, -(-num_classes // num_groups)))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_classes)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, and set the bias to zero."""
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors ``[B, L, D]`` to classes ``[B, K]``."""
        if isinstance(x, Tensor) and x.shape[1:] != self.weight.shape[:2]:
            raise ValueError(
                f"GroupLinear expects [B, {self.num_groups}, {self.in_features}], a vector for each of "
                f"num_groups={self.num_groups}, got {list(x.shape)}; make the layer with num_groups and in_features "
                "of x"
            )
        return group_linear(x, self.weight, self.bias, num_classes=self.num_classes, cosine=self.cosine)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, num_groups={self.num_groups}, "
            f"cosine={self.cosine}, bias={self.bias is not None}"
        )
