"""The end of heads whose classifiers are made of the labels: products with the features' maximum over positions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.ops.cosine_linear import cosine_linear


class FixedClassifiers(nn.Module):
    """`mlfast.MLGCN` or `mlfast.GATN` for inference: its classifiers ``[K, S]`` as a constant. ``fold`` makes it."""

    classifiers: Tensor

    def __init__(self, classifiers: Tensor, cosine: bool) -> None:
        super().__init__()
        self.register_buffer("classifiers", classifiers.detach().clone())
        self.cosine = cosine
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, S, h, w]`` to cosines or logits ``[B, K]``."""
        return score(features, self.classifiers, self.cosine)


def score(features: Tensor, classifiers: Tensor, cosine: bool) -> Tensor:
    """Cosines or logits ``[B, K]`` of the maximum over positions of ``[B, S, h, w]`` and classifiers ``[K, S]``."""
    if features.dim() != 4 or features.shape[1] != classifiers.shape[1]:
        raise ValueError(f"this head expects features [B, {classifiers.shape[1]}, h, w], got {list(features.shape)}")
    pooled = features.amax((2, 3))
    return cosine_linear(pooled, classifiers) if cosine else F.linear(pooled, classifiers)
