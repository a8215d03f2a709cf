"""Class-specific residual attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.integers import sizes
from mlfast.ops._autocast import without_autocast

_TEMPERATURES = {
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
}
_COSINE_UNIT = 23.0  # the default scale of AAMLoss: times this, a cosine has the range of a logit


class CSRA(nn.Module):
    r"""Class-specific residual attention (Zhu & Wu, ICCV 2021), from the formulas of the paper.

    A class gives each of the P positions a score, and its output is the mean score plus ``lam`` times a mean that is
    weighted by a softmax of the same scores:

    .. math:: z_{kp} = \langle w_k, x_p \rangle, \qquad
              y_k = \frac{1}{P} \sum_p z_{kp} + \lambda \sum_p \mathrm{softmax}_p(T z_{kp})\, z_{kp}

    T = infinity is the maximum over positions. With several heads, each has weights and a T of its own, and their
    outputs are added.

    The paper has no angular variant. Here, with ``cosine=True``, ``z`` is the cosine of ``w_k`` and ``x_p``, and the
    sum is divided by ``num_heads * (1 + lam)``, so that outputs stay in [-1, 1]; ``lam = 0`` is then the mean of
    cosines, not the cosine of the mean.

    Args:
        in_features: channels S of the feature map.
        num_classes: number K of classes.
        num_heads: number H of heads.
        temperatures: H values of T, above 0 or infinite. By default those of the paper, for H = 1, 2, 4, 6 or 8:
            1, 2, ... and infinity last; times 23 with cosines, which are smaller than logits by the loss's scale.
        lam: the weight of the attention.
        cosine: whether outputs are cosines, for angular losses; else logits. Neither has a bias.

    Shape:
        features ``[B, S, h, w]``; output ``[B, K]``, at least float32 for cosines. ``weight`` is ``[H * K, S]``.

    Raises:
        TypeError: a size is no integer.
        ValueError: sizes or temperatures that do not fit; the message names the remedy.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_heads: int = 1,
        temperatures: Sequence[float] | None = None,
        lam: float = 0.1,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        in_features, num_classes, num_heads = sizes(
            "CSRA", in_features=in_features, num_classes=num_classes, num_heads=num_heads
        )
        if temperatures is None:
            if num_heads not in _TEMPERATURES:
                known = ", ".join(map(str, _TEMPERATURES))
                raise ValueError(f"the paper has temperatures for {known} heads, got {num_heads=}; pass temperatures")
            temperatures = [value * (_COSINE_UNIT if cosine else 1.0) for value in _TEMPERATURES[num_heads]]
        if len(temperatures) != num_heads or not all(value > 0 for value in temperatures):
            raise ValueError(f"temperatures must be {num_heads} values above 0, one per head, got {list(temperatures)}")
        if not 0 <= lam < math.inf:
            raise ValueError(f"lam must be at least 0 and finite, got {lam}")
        self.in_features = in_features
        self.temperatures = [float(value) for value in temperatures]
        self.lam = lam
        self.cosine = cosine
        self.weight = nn.Parameter(torch.empty(num_heads * num_classes, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, S, h, w]`` to cosines or logits ``[B, K]``."""
        if features.dim() != 4 or features.shape[1] != self.in_features:
            raise ValueError(f"CSRA expects features [B, {self.in_features}, h, w], got {list(features.shape)}")
        scores = self._scores(features.flatten(2).transpose(1, 2))
        heads = zip(scores.chunk(len(self.temperatures), dim=2), self.temperatures, strict=True)
        total = torch.stack([z.mean(1) + self.lam * _attend(z, temperature) for z, temperature in heads]).sum(0)
        return total / (len(self.temperatures) * (1 + self.lam)) if self.cosine else total

    def _scores(self, x: Tensor) -> Tensor:
        """Positions ``[B, P, S]`` to a score per position, head and class, ``[B, P, H * K]``."""
        if not self.cosine:
            return F.linear(x, self.weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):  # as in CosineLinear
            return F.linear(F.normalize(x.to(dtype), dim=2), F.normalize(self.weight.to(dtype), dim=1))

    def extra_repr(self) -> str:
        """Sizes and options, for ``repr``."""
        classes = len(self.weight) // len(self.temperatures)
        return (
            f"in_features={self.in_features}, num_classes={classes}, temperatures={self.temperatures}, "
            f"lam={self.lam}, cosine={self.cosine}"
        )


def _attend(z: Tensor, temperature: float) -> Tensor:
    """The mean of scores ``[B, P, K]`` over positions, weighted by their softmax."""
    if math.isinf(temperature):
        return z.amax(1)
    return (torch.softmax(temperature * z, dim=1) * z).sum(1)
