"""Images with their targets, for a DataLoader."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlfast.data.annotations import Annotations
from mlfast.data.images import MAX_PIXELS, ImageError, decode
from mlfast.data.shards import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

_BROKEN_COLOUR = (124, 116, 104)  # ImageNet's mean
_BROKEN_SIZE = (224, 224)


class BrokenImagesError(RuntimeError):
    """More images cannot be read than is allowed; the message names them."""


class ImageDataset(Dataset):
    """The images of a split with their targets.

    An image that is missing or cannot be decoded is named in a warning and counted, and gives a grey image with the
    target "all unknown" (-1): no loss, no gradient, left out of the metrics, and every other image keeps its place. The
    count is shared by all worker processes, and each image counts once.

    Args:
        annotations: what `load_annotations` gives.
        size: height and width to resize to, one number or (height, width); None keeps the image's own.
        transform: from the resized PIL image to a PIL image or a uint8 tensor [3, H, W]; None changes nothing.
        max_broken: raise as soon as more images than this are broken; default 10 and 0.1 % of the images.
        max_pixels: an image of more is broken.

    Raises:
        BrokenImagesError: when an item is asked for and the limit is passed.
        ValueError: an argument is outside of what is written above.
    """

    def __init__(
        self,
        annotations: Annotations,
        size: int | tuple[int, int] | None = None,
        transform: Callable[[Image], Image | Tensor] | None = None,
        max_broken: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if annotations.kind == "digits":
            raise ValueError("annotations: the digits have no image files; use mlfast.data.DigitScenes.")
        self.annotations = annotations
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size: got {size!r}, expected a number of pixels >= 1, (height, width) or None.")
        self.transform = transform
        self.max_broken = 10 + len(annotations) // 1000 if max_broken is None else max_broken
        self.max_pixels = max_pixels
        # One byte per image in shared memory: workers write without a lock, and an image counts once in all epochs.
        self._broken = torch.zeros(len(annotations), dtype=torch.uint8).share_memory_()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the K classes."""
        return self.annotations.classes

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, uint8 [3, H, W], and its target, int8 [K]: 1 has the label, 0 has not, -1 unknown."""
        index = range(len(self))[index]
        try:
            return self.decoded(index, read_image(self.annotations, index))
        except OSError as error:
            return self._replacement(index, f"{type(error).__name__}: {error.strerror or error}")

    def decoded(self, index: int, data: bytes) -> tuple[Tensor, Tensor]:
        """The item of an image whose bytes are here already."""
        try:
            image = decode(data, self.size, self.max_pixels)
        except ImageError as error:
            return self._replacement(index, str(error))
        return self._tensor(image), torch.from_numpy(self.annotations.targets(index))

    def broken(self) -> list[str]:
        """The paths of the images that could not be read so far, by all workers."""
        return [self.annotations.paths[i] for i in self._broken.nonzero()[:, 0].tolist()]

    def _tensor(self, image: Image) -> Tensor:
        result = image if self.transform is None else self.transform(image)
        if isinstance(result, Tensor):
            if result.dtype != torch.uint8 or result.ndim != 3 or result.shape[0] != 3:
                got = f"{result.dtype} {list(result.shape)}"
                raise ValueError(f"transform: gave {got}, expected uint8 [3, H, W]; it is normalised on the device.")
            return result
        return to_tensor(result)

    def _replacement(self, index: int, reason: str) -> tuple[Tensor, Tensor]:
        from PIL import Image

        path = self.annotations.paths[index]
        if not self._broken[index]:
            self._broken[index] = 1
            warnings.warn(f"{self.annotations.root / path} is left out: {reason}", stacklevel=3)
        if (count := int(self._broken.count_nonzero())) > self.max_broken:
            names = ", ".join(self.broken()[:10])
            raise BrokenImagesError(
                f"{count} of {len(self)} images cannot be read, more than max_broken={self.max_broken}: {names}. The "
                f"last: {reason}. Mend or remove them (mlfast data check --decode lists all), or raise max_broken."
            )
        height, width = self.size or _BROKEN_SIZE
        grey = Image.new("RGB", (width, height), _BROKEN_COLOUR)
        return self._tensor(grey), torch.full((self.annotations.num_classes,), -1, dtype=torch.int8)


def to_tensor(image: Image) -> Tensor:
    """An image of Pillow's as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
