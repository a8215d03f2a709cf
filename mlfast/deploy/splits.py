"""The labelled images of a split, as a model takes them: any kind of data that `mlfast.data` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from mlfast.data.dataset import ImageDataset
from mlfast.data.digits import DigitScenes
from mlfast.data.loading import load_annotations, options_of, reader
from mlfast.data.transforms import ImageTransform
from mlfast.deploy.model_info import ModelInfo


class LabelledImages(Protocol):
    """A data set: item i is an image, uint8 ``[3, H, W]`` of the model's size, and a target, int8 ``[K]``."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the K classes."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Image and target, as tensors."""


def read_split(
    kind: str,
    root: str | None,
    split: str,
    info: ModelInfo,
    *,
    images: int | None = None,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    **options: Any,
) -> LabelledImages:
    """The images of a split at the size of the model, without augmentation.

    Args:
        kind: of the data, one of `mlfast.data.KINDS`.
        root: the folder of the data set; None for the digits.
        split: such as "val"; "train+test" joins two.
        info: of the model. Its classes are those that are read, in its order, unless ``options`` has ``classes``.
        images: the first so many only; None for all.
        only: of these the ones with such a name, of the digits "image 0" and so on; None for all.
        without: names of images that are left out; a name that none has is no error.
        options: of the kind's reader, see docs/data.md.

    Raises:
        ValueError: the labels cannot be read, or an option does not exist.
    """
    if kind == "digits":
        if root is not None or options:
            raise ValueError("the digits are built in: they take no folder and no options")
        scenes = DigitScenes(split, images, info.image_size)
        return scenes.subset(_rows([f"image {row}" for row in range(len(scenes))], only, without))
    if "classes" in options_of(reader(kind)):
        options = {"classes": list(info.classes)} | options
    annotations = load_annotations(kind, root, split, **options)
    if images is not None:
        annotations = annotations.subset(np.arange(min(images, len(annotations))))
    if only is not None or without:
        annotations = annotations.subset(_rows(annotations.paths, only, without))
    if info.resize == "crop":
        return ImageDataset(annotations, transform=ImageTransform(info.image_size))
    return ImageDataset(annotations, info.image_size)


def _rows(names: Sequence[str], only: Sequence[str] | None, without: Sequence[str]) -> np.ndarray:
    """The rows of the images that are asked for."""
    if only is not None:
        return _named(names, only)
    left_out = set(without)
    return np.array([row for row, name in enumerate(names) if name not in left_out], np.int64)


def _named(names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """The rows with these names."""
    wanted_names = set(wanted)
    rows = [row for row, name in enumerate(names) if name in wanted_names]
    if missing := wanted_names.difference(names[row] for row in rows):
        raise ValueError(
            f"{len(missing)} of {len(wanted)} images that the run held out are not there any more, such as "
            f"{min(missing)}: the data set has changed since. Name another split"
        )
    return np.array(rows, np.int64)


def mostly_unknown(images: LabelledImages) -> bool:
    """Whether only some labels of an image are known, as in Open Images."""
    return isinstance(images, ImageDataset) and images.annotations.rest == "unknown"


def broken_images(images: LabelledImages) -> list[str]:
    """The files that could not be read so far; their targets are unknown, so they count nowhere."""
    return images.broken() if isinstance(images, ImageDataset) else []


def batches(images: LabelledImages, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """uint8 images ``[B, H, W, 3]`` and targets ``[B, K]``, in order; threads read one batch ahead."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        starts = range(0, len(images), batch_size)
        waiting: list[Any] = []
        for first in starts:
            # Lists, not the iterator of pool.map: all of a batch is under way before the one before it is given out.
            waiting.append(
                [pool.submit(images.__getitem__, row) for row in range(first, min(first + batch_size, len(images)))]
            )
            if len(waiting) > 1:
                yield _stacked([job.result() for job in waiting.pop(0)])
        for jobs in waiting:
            yield _stacked([job.result() for job in jobs])


def _stacked(items: list[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.stack([image.numpy().transpose(1, 2, 0) for image, _ in items])
    return pixels, np.stack([target.numpy() for _, target in items])
