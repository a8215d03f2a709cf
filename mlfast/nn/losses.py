"""Losses as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mlfast.ops import aam_loss as aam
from mlfast.ops import asymmetric_loss as asl
from mlfast.sparse_targets import SparseTargets


class AAMLoss(nn.Module):
    """Asymmetric angular-margin loss of cosines, :func:`mlfast.functional.aam_loss` as a module.

    Args:
        scale: s > 0, which multiplies the cosines. The paper: 17 (VOC), 23 (COCO, NUS-WIDE), 25 (VG500).
        margin: m in [-1, 1], the angular margin as a difference of cosines; 0 in the paper's best results.
        k: weight of the positives in [0, 1].
        gamma_neg: focusing exponent of the negatives.
        gamma_pos: focusing exponent of the positives.
        prob_shift: added to the negatives' probability, as ASL's clip; 0 in the paper, see :meth:`released`.
        label_smoothing: in [0, 1).
        class_weight: [K] or None; kept as a buffer, so it moves with the module.
        reduction: "sum", "mean" (over known labels), "batchmean" or "none".

    Shape:
        cos [..., K], target [..., K] or SparseTargets -> a scalar, or [..., K] for ``reduction="none"``.
        Values of a float target are not checked: in [0, 1], or negative for unknown.
    """

    def __init__(
        self,
        scale: float = 23.0,
        margin: float = 0.0,
        k: float = 0.7,
        gamma_neg: float = 1.0,
        gamma_pos: float = 0.0,
        prob_shift: float = 0.0,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        aam.check_options(scale, margin, k, gamma_neg, gamma_pos, prob_shift, label_smoothing, reduction)
        self.scale = scale
        self.margin = margin
        self.k = k
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.prob_shift = prob_shift
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)

    @classmethod
    def released(cls, scale: float = 30.0, gamma_neg: float = 0.0, gamma_pos: float = 0.0, **options: Any) -> AAMLoss:
        """The released code's behaviour: a probability shift of 0.05 as soon as a gamma is above 0.

        Its engine's defaults are ``scale=30, k=0.7``; its constructor's (``margin=0.35, k=0.8``) are never used. The
        published configurations leave both gammas at 0.
        """
        shift = 0.05 if gamma_neg > 0 or gamma_pos > 0 else 0.0
        return cls(scale=scale, gamma_neg=gamma_neg, gamma_pos=gamma_pos, prob_shift=shift, **options)

    def forward(self, cos: Tensor, target: Tensor | SparseTargets) -> Tensor:
        """The loss; see :func:`mlfast.functional.aam_loss` for dtypes and errors."""
        return aam.aam_loss(
            cos,
            target,
            scale=self.scale,
            margin=self.margin,
            k=self.k,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            prob_shift=self.prob_shift,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, as they appear in ``print(module)``."""
        names = ("scale", "margin", "k", "gamma_neg", "gamma_pos", "prob_shift", "label_smoothing", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class AsymmetricLoss(nn.Module):
    """Asymmetric loss (ASL) of logits, :func:`mlfast.functional.asymmetric_loss` as a module.

    Args:
        gamma_neg: focusing exponent of the negatives.
        gamma_pos: focusing exponent of the positives.
        clip: probability below which a negative has no loss, in [0, 1).
        detach_focus: whether the gradient does not flow through the focusing weight.
        label_smoothing: in [0, 1).
        class_weight: [K] or None; kept as a buffer, so it moves with the module.
        reduction: "sum", "mean" (over known labels), "batchmean" or "none".

    Shape:
        logits [..., K], target [..., K] or SparseTargets -> a scalar, or [..., K] for ``reduction="none"``.
        Values of a float target are not checked: in [0, 1], or negative for unknown.
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        detach_focus: bool = False,
        reduction: str = "sum",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        asl.check_options(gamma_neg, gamma_pos, clip, label_smoothing, detach_focus, reduction)
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.detach_focus = detach_focus
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)

    def forward(self, logits: Tensor, target: Tensor | SparseTargets) -> Tensor:
        """The loss; see :func:`mlfast.functional.asymmetric_loss` for dtypes and errors."""
        return asl.asymmetric_loss(
            logits,
            target,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            detach_focus=self.detach_focus,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, as they appear in ``print(module)``."""
        names = ("gamma_neg", "gamma_pos", "clip", "detach_focus", "label_smoothing", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
