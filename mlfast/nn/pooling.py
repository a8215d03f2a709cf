"""Pooling layers."""

from __future__ import annotations

from torch import Tensor, nn

from mlfast.ops.reweight_pool import reweight_pool


class ReweightPool(nn.Module):
    """Channels times fixed or learned weights, then the mean plus the maximum over positions.

    :func:`mlfast.functional.reweight_pool` as a module. At inference the weights of the paper's graph branch are
    constants: with them it is this layer.

    Args:
        weight: [S] floating point. A ``nn.Parameter`` is trained; another tensor is kept as a buffer, so that it
            moves and is saved with the module.

    Shape:
        features ``[B, S, h, w]`` -> ``[B, S]``, in the dtype of the features.

    Raises:
        ValueError: ``weight`` is not floating point with one dimension.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.dim() != 1 or not weight.is_floating_point():
            raise ValueError(
                f"ReweightPool: weight must be [S], floating point, got {list(weight.shape)} of {weight.dtype}"
            )
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, S, h, w]`` to ``[B, S]``."""
        return reweight_pool(features, self.weight)

    def extra_repr(self) -> str:
        """The number of channels, for ``repr``."""
        return f"channels={self.weight.numel()}"
