"""What is done to training images, on Pillow's images: crop, RandAugment, Cutout, flip.

All randomness comes from torch's CPU generator, as torchvision's does: who seeds it before a call repeats the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from mlfast.torchvision_compat import import_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

_FILL = [124, 116, 104]  # ImageNet's mean, for what a rotation or shear leaves empty


@dataclass(frozen=True)
class ImageTransform:
    """The `transform` of a `mlfast.data.ImageDataset`. Holds settings only, so that any worker process can unpickle it.

    The order is that of the paper's released code: crop, RandAugment, Cutout, horizontal flip.

    Args:
        crop: side in pixels of the square to cut out after the shorter side was brought to it; None takes images that
            have their size already. The middle is taken, or with an `augment` a random place.
        augment: "none"; "flip": half of the images are mirrored; "randaugment": torchvision's RandAugment too, two of
            14 operations at magnitude 9 of 31.
        cutout: height and width of Cutout's rectangle as a share of the image's, 0 for none. Half of the images get
            one, of a random colour, around a random centre. The paper's code has 0.4.
    """

    crop: int | None = None
    augment: Literal["none", "flip", "randaugment"] = "none"
    cutout: float = 0.0

    def __call__(self, image: Image) -> Image:
        """The transformed image; the given one is left as it is."""
        from PIL.Image import Transpose

        if self.crop is not None:
            image = crop_to(image, self.crop, random=self.augment != "none")
        if self.augment == "randaugment":
            image = randaugment()(image)
        if self.cutout and torch.rand(()) < 0.5:
            image = cutout(image, self.cutout)
        if self.augment != "none" and torch.rand(()) < 0.5:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return image


def crop_to(image: Image, side: int, random: bool = False) -> Image:
    """A square of this side, as large a part of the image as fits in: its middle, or a random place."""
    from PIL import Image as pillow
    from PIL import ImageOps

    place = float(torch.rand(())) if random else 0.5  # one of the two directions has room
    return ImageOps.fit(image, (side, side), pillow.Resampling.BILINEAR, centering=(place, place))


def cutout(image: Image, share: float) -> Image:
    """Paint a rectangle of this share of height and width, cut off at the edges, in a random colour."""
    width, height = image.size
    half_width, half_height = (int(share * side + 0.5) // 2 for side in image.size)
    x, y = (int(torch.randint(side, ())) for side in image.size)
    box = (max(x - half_width, 0), max(y - half_height, 0), min(x + half_width, width), min(y + half_height, height))
    red, green, blue = torch.randint(256, (3,)).tolist()
    image = image.copy()
    image.paste((red, green, blue), box)
    return image


@functools.cache
def randaugment() -> Callable[[Any], Any]:
    """Torchvision's RandAugment with the settings of `ImageTransform`; takes a Pillow image or uint8 ``[3, H, W]``."""
    import_torchvision()
    from torchvision.transforms import InterpolationMode, RandAugment

    return RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR, fill=_FILL)
