"""Mixup and CutMix: images of a batch mixed with one another, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mlfast.training.batches import Batch, Batches


class MixedBatches:
    """Mixes each image of a batch with the one as far from the batch's end as it is from the beginning.

    Mixup (Zhang et al., 2018) takes ``share * image + (1 - share) * other``; CutMix (Yun et al., 2019) puts a rectangle
    of the other image, of 1 - share of the area, at the same place of this one. The share is drawn for a whole batch
    from Beta(alpha, alpha), and depends on (seed, epoch, batch) alone. The targets are mixed by the share: float32
    between 0 and 1, and -1 where either image's label is unknown.

    Args:
        batches: what is mixed.
        mixup, cutmix: alpha of each, 0 for none; with both, a fair coin decides for each batch.
        seed: of the shares and rectangles.
    """

    def __init__(self, batches: Batches, mixup: float, cutmix: float, seed: int) -> None:
        self.batches, self.mixup, self.cutmix, self.seed = batches, mixup, cutmix, seed
        self.num_images, self.mostly_unknown = batches.num_images, batches.mostly_unknown

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The mixed batches of an epoch from batch ``start`` on."""
        for place, (images, targets, rows) in enumerate(self.batches.epoch(number, start), start):
            random = np.random.default_rng([self.seed, number, place])
            if self.cutmix and (not self.mixup or random.random() < 0.5):
                images, share = cutmix(images, random.beta(self.cutmix, self.cutmix), random)
            else:
                share = random.beta(self.mixup, self.mixup)
                images = mixup(images, share)
            yield Batch(images, mix_targets(targets, share), rows)

    def name(self, row: int) -> str:
        """What to call an image in a message."""
        return self.batches.name(row)

    def close(self) -> None:
        """End the processes that read."""
        self.batches.close()


def mixup(images: Tensor, share: float) -> Tensor:
    """Mean of each image, with weight ``share``, and its partner, uint8 ``[B, 3, H, W]``, rounded."""
    return torch.lerp(images.flip(0).float(), images.float(), share).round_().to(torch.uint8)


def cutmix(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """Each image with a rectangle of its partner, uint8 ``[B, 3, H, W]``, and the share that is left of it.

    The rectangle has the image's aspect; where it reaches over the edge, more than ``share`` is left.
    """
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    (top, bottom), (left, right) = (_interval(length, side * length, random) for length in (height, width))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def mix_targets(targets: Tensor, share: float) -> Tensor:
    """Labels of the mixed images, float32 ``[B, K]``; unknown (-1) where either is."""
    partner = targets.flip(0)
    mixed = torch.lerp(partner.float(), targets.float(), share)
    return mixed.masked_fill_((targets < 0) | (partner < 0), -1.0)


def _interval(length: int, size: float, random: np.random.Generator) -> tuple[int, int]:
    """About ``size`` of ``length`` pixels around a random centre, cut off at the edges."""
    start = int(random.integers(length)) - round(size) // 2
    return max(start, 0), min(start + round(size), length)
