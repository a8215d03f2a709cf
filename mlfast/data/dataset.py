"""Images with their targets, for a DataLoader: any image at any time, or shard by shard."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mlfast.data.annotations import Annotations
from mlfast.data.images import MAX_PIXELS, ImageError, decode

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


class ShardStream(IterableDataset):
    """The images of tar or parquet shards in an order that reads each shard from front to back.

    For storage where jumping about is slow. Each epoch, the shards (row groups, for parquet) are shuffled and dealt out
    to the workers of all ranks; within a buffer images are shuffled too. Every worker gives the same number of images,
    floor(N / (ranks * workers)): one with too few begins again, and one with too many leaves the last out. So this is
    for training; evaluate with `ImageDataset`, which gives every image exactly once.

    Args:
        images: the data set.
        seed: of the order, together with the epoch.
        rank: number of this process, from 0.
        world_size: number of processes.
        buffer_size: images (undecoded) that a worker shuffles among; 1 keeps the order of the shard.

    Raises:
        ValueError: the images are no shards, or there are fewer shards than workers.
    """

    def __init__(
        self, images: ImageDataset, seed: int = 0, rank: int = 0, world_size: int = 1, buffer_size: int = 1000
    ) -> None:
        shards = images.annotations.shards
        if shards is None:
            raise ValueError(f"images: {images.annotations.kind} is not in shards; use ImageDataset itself.")
        if not 0 <= rank < world_size or buffer_size < 1:
            raise ValueError(
                f"got rank {rank} of {world_size} and buffer_size {buffer_size}; expected 0 <= rank, 1 <= buffer."
            )
        self.images, self.seed, self.rank, self.world_size, self.buffer_size = (
            images,
            seed,
            rank,
            world_size,
            buffer_size,
        )
        unit = shards.shard.astype(np.int64) << 32
        if shards.form == "parquet":
            unit += shards.position[:, 0]
        order = np.lexsort((shards.position[:, -1] if shards.form == "parquet" else shards.position[:, 0], unit))
        self._units = np.split(order, np.flatnonzero(np.diff(unit[order])) + 1)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # persistent workers see a change

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        place, places = self.rank * workers + worker, self.world_size * workers
        if len(self._units) < places:
            raise ValueError(
                f"There are {len(self._units)} shards for {self.world_size} processes x {workers} workers; take fewer "
                "workers, or ImageDataset."
            )
        epoch = int(self._epoch)
        own = np.random.default_rng([self.seed, epoch]).permutation(len(self._units))[place::places]
        random = np.random.default_rng([self.seed, epoch, place])
        for index, data in self._shuffled(own, len(self.images) // places, random):
            yield self.images[index] if data is None else self.images.decoded(index, data)

    def _shuffled(
        self, units: np.ndarray, count: int, random: np.random.Generator
    ) -> Iterator[tuple[int, bytes | None]]:
        """(image, bytes) of `count` images, begun again from the first shard if there are too few."""
        buffer: list[tuple[int, bytes | None]] = []
        given = 0
        while given < count:
            for unit in units:
                for index in self._units[unit].tolist():
                    buffer.append((index, self._read(index)))
                    if len(buffer) >= self.buffer_size and given < count:
                        given += 1
                        yield _taken(buffer, random)
                    if given == count:
                        return
            while buffer and given < count:
                given += 1
                yield _taken(buffer, random)

    def _read(self, index: int) -> bytes | None:
        try:
            return read_image(self.images.annotations, index)
        except OSError:
            return None  # asked for again as an item, where it is reported


def read_image(annotations: Annotations, index: int) -> bytes:
    """The content of an image's file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    shards = annotations.shards
    if shards is None:
        return (annotations.root / annotations.paths[index]).read_bytes()
    path = annotations.root / shards.files[shards.shard[index]]
    first, second = shards.position[index].tolist()
    if shards.form == "parquet":
        return _row_group(path, first, shards.column)[second]["bytes"] or b""
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(second)


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, group: int, column: str) -> list[dict[str, Any]]:
    """The images of a row group; kept, as a row cannot be read without the rest of its group."""
    from mlfast.data.parquet import import_parquet

    return import_parquet().ParquetFile(path).read_row_group(group, [column])[column].to_pylist()


def _taken(buffer: list[tuple[int, bytes | None]], random: np.random.Generator) -> tuple[int, bytes | None]:
    """A random element, taken out by putting the last in its place."""
    chosen = int(random.integers(len(buffer)))
    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
    return buffer.pop()
