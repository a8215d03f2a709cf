"""Augmentation of batches on the device where they are, in place of the workers' on Pillow's images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlfast.data.transforms import randaugment
from mlfast.training.batches import Batch, Batches
from mlfast.training.loader import seeded


class AugmentedBatches:
    """Augments each image of a batch as `mlfast.data.transforms.ImageTransform` does, by the same random numbers.

    What is drawn depends on (seed, epoch, row) alone, so an image has the same flip, the same rectangle and the same
    operations of RandAugment as from the workers. Pixels of turned and sheared images differ a little: torchvision
    computes them otherwise on tensors. Each image is done by itself, a few small kernels each.

    Args:
        batches: what is augmented; uint8 ``[B, 3, H, W]``.
        augment: "none", "flip", or "randaugment" and flip.
        cutout: side of Cutout's rectangle as a share of the image's; 0 for none.
        seed: of the run.
    """

    def __init__(self, batches: Batches, augment: str, cutout: float, seed: int) -> None:
        self.batches, self.augment, self.cutout, self.seed = batches, augment, cutout, seed
        self.num_images, self.mostly_unknown = batches.num_images, batches.mostly_unknown

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The augmented batches of an epoch from batch ``start`` on."""
        for images, targets, rows in self.batches.epoch(number, start):
            changed = torch.empty_like(images)
            for place, row in enumerate(rows.tolist()):
                with seeded(self.seed, number, row):
                    changed[place] = self._augment(images[place])
            yield Batch(changed, targets, rows)

    def name(self, row: int) -> str:
        """What to call an image in a message."""
        return self.batches.name(row)

    def close(self) -> None:
        """End the processes that read."""
        self.batches.close()

    def _augment(self, image: Tensor) -> Tensor:
        """``[3, H, W]``; draws in the order of `ImageTransform`."""
        if self.augment == "randaugment":
            image = randaugment()(image)
        if self.cutout and torch.rand(()) < 0.5:
            image = cutout(image, self.cutout)
        if self.augment != "none" and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image


def cutout(image: Tensor, share: float) -> Tensor:
    """`mlfast.data.transforms.cutout` of a tensor: a rectangle of this share of the sides, in a random colour."""
    height, width = image.shape[-2:]
    half_width, half_height = (int(share * side + 0.5) // 2 for side in (width, height))
    x, y = (int(torch.randint(side, ())) for side in (width, height))
    colour = torch.randint(256, (3,)).to(image)
    image = image.clone()
    box = image[:, max(y - half_height, 0) : y + half_height, max(x - half_width, 0) : x + half_width]
    box.copy_(colour.view(3, 1, 1).expand_as(box))
    return image
