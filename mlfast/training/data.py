"""From the settings to the batches of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlfast.data.annotations import Annotations, LabelLists
from mlfast.data.dataset import ImageDataset, to_tensor
from mlfast.data.digits import DigitScenes
from mlfast.data.shards import WINDOW
from mlfast.data.stratify import stratified_rows
from mlfast.data.stream import ShardImages
from mlfast.data.transforms import ImageTransform
from mlfast.models.label_graph import LabelCounts, count_labels
from mlfast.training.augmentation import AugmentedBatches
from mlfast.training.batches import Batches, TensorBatches
from mlfast.training.config import TrainConfig
from mlfast.training.data_settings import DEFAULT_DIGITS
from mlfast.training.errors import ConfigError
from mlfast.training.loader import Item, LoaderBatches
from mlfast.training.mixing import MixedBatches
from mlfast.training.splits import read_splits

_EVALUATED_AT_ONCE = 256  # digits
_MOST_WORKERS = 4  # unless the settings say how many


class Data(NamedTuple):
    """The splits of a run, and the names of the classes in the order of the targets.

    ``held_out`` is the part of the training images that nothing is trained on, if there is one beside ``val``: where
    the data has no other split, ``val`` is that part. ``count_labels`` counts which labels occur together in those that
    are trained on. ``summary`` says for people what is what, and ``held_out_images`` names what is held out, in order.
    """

    train: Batches
    val: Batches
    held_out: Batches | None
    classes: tuple[str, ...]
    count_labels: Callable[[], LabelCounts]
    summary: str
    held_out_images: Sequence[str]


def create_data(config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> Data:
    """Read the labels of the splits and make their batches; no image is opened yet.

    What is held out keeps the frequency of every class (iterative stratification). It is the same in every run: which
    images they are is no part of a run's randomness.

    Args:
        config: the settings.
        device: where batches go.
        rank, world_size: number of this process, and of all; each gets its share of the images.

    Raises:
        ConfigError: the labels or images are not there, or there are fewer training images than a batch has.
    """
    share: dict[str, Any] = {"device": device, "rank": rank, "world_size": world_size}
    data = _digits(config, share) if config.data == "digits" else _files(config, share)
    if not len(data.train):
        raise ConfigError(
            [f"batch_size: got {config.batch_size}, expected at most {data.train.num_images}, the images to train on"]
        )
    if config.augment_on == "device" and (config.augment != "none" or config.cutout):
        data = data._replace(train=AugmentedBatches(data.train, config.augment, config.cutout, config.seed))
    if config.mixup or config.cutmix:
        return data._replace(train=MixedBatches(data.train, config.mixup, config.cutmix, config.seed))
    return data


def _digits(config: TrainConfig, share: dict[str, Any]) -> Data:
    train = DigitScenes("train", config.train_images or DEFAULT_DIGITS["train_images"], config.image_size)
    val = DigitScenes("val", config.val_images or DEFAULT_DIGITS["val_images"], config.image_size)
    images, classes = np.nonzero(train.targets.numpy())
    labels = LabelLists.from_pairs(images, classes, len(train), len(train.classes))
    kept, held_out = _hold_out(labels, len(train.classes), config)

    def batches(scenes: DigitScenes, rows: Any = slice(None)) -> TensorBatches:
        size = max(config.batch_size, _EVALUATED_AT_ONCE)
        return TensorBatches(scenes.images[rows], scenes.targets[rows], size, **share)

    return Data(
        _digits_to_train(config, train, kept, share),
        batches(val),
        batches(train, held_out) if len(held_out) else None,
        tuple(train.classes),
        lambda: count_labels(train.targets[kept]),
        f"digits: {len(kept)} images of train to train on, {len(val)} of val to validate on"
        + (f", {len(held_out)} held out of train to stop and choose by" if len(held_out) else ""),
        [f"image {row}" for row in held_out],
    )


def _digits_to_train(config: TrainConfig, scenes: DigitScenes, kept: np.ndarray, share: dict[str, Any]) -> Batches:
    transform = _workers_transform(config)
    images, targets = scenes.images[kept], scenes.targets[kept]
    if transform == ImageTransform():
        return TensorBatches(images, targets, config.batch_size, seed=config.seed, numbers=kept.tolist(), **share)
    names = [f"image {row}" for row in kept]
    dataset = _TensorImages(images, targets, transform)
    workers = _workers(config)
    return LoaderBatches(dataset, config.batch_size, names=names, seed=config.seed, workers=workers, **share)


def _workers_transform(config: TrainConfig, crop: int | None = None) -> ImageTransform:
    if config.augment_on == "device":  # AugmentedBatches does it
        return ImageTransform(crop)
    return ImageTransform(crop, config.augment, config.cutout)


class _TensorImages(Dataset[Item]):
    """Images in memory which are augmented as Pillow's."""

    def __init__(self, images: Tensor, targets: Tensor, transform: ImageTransform) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __getitem__(self, row: int) -> Item:
        from PIL import Image

        image = Image.fromarray(self.images[row].permute(1, 2, 0).contiguous().numpy())
        return to_tensor(self.transform(image)), self.targets[row]


def _files(config: TrainConfig, share: dict[str, Any]) -> Data:
    train, val = read_splits(config)
    kept, held_out = _hold_out(train.positive, train.num_classes, config)
    crop = config.image_size if config.resize == "crop" else None
    augmented = _workers_transform(config, crop)

    def batches(annotations: Annotations, transform: ImageTransform, seed: int | None = None) -> LoaderBatches:
        images = ImageDataset(annotations, None if crop else config.image_size, transform, config.max_broken)
        return LoaderBatches(
            ShardImages(images, patience=2 * WINDOW * _lanes(config)) if annotations.shards else images,
            config.batch_size,
            names=annotations.paths,
            seed=seed,
            mostly_unknown=annotations.rest == "unknown",
            shards=annotations.shards,
            lanes=_lanes(config),
            workers=_workers(config),
            **share,
        )

    trained, left_out = train.subset(kept), train.subset(held_out)
    if val is None and not len(left_out):
        raise ConfigError([f"held_out: {config.held_out_share:g} of {len(train)} images is none, and there is no val"])
    if val is not None:
        _check_positives(val, "val_split")
    if len(left_out):
        _check_positives(left_out, "held_out")
    return Data(
        batches(trained, augmented, config.seed),
        batches(left_out if val is None else val, ImageTransform(crop)),
        batches(left_out, ImageTransform(crop)) if len(left_out) and val is not None else None,
        train.classes,
        lambda: LabelCounts(*map(torch.from_numpy, map(np.ascontiguousarray, trained.cooccurrence()))),
        f"{config.data} in {config.data_root}: {_parts(len(trained), train.split, val, len(left_out))}",
        list(left_out.paths),
    )


def _check_positives(annotations: Annotations, setting: str) -> None:
    """No score can be computed where no image has any label."""
    if not len(annotations.positive.indices):
        raise ConfigError(
            [
                f"{setting}: none of the {len(annotations)} images of {annotations.split!r} to measure on has a label, "
                "so there is no mAP to choose by; expected at least one"
            ]
        )


def _parts(trained: int, split: str, val: Annotations | None, left_out: int) -> str:
    """How many images each part of the data has, for people."""
    parts = [f"{trained} images of {split} to train on"]
    if val is not None:
        parts.append(f"{len(val)} of {val.split} to validate on")
    if left_out:
        purpose = "to validate on, as there is no other split" if val is None else "to stop and choose by"
        parts.append(f"{left_out} held out of {split} {purpose}")
    return ", ".join(parts)


def _hold_out(labels: LabelLists, num_classes: int, config: TrainConfig) -> Sequence[np.ndarray]:
    """Rows to train on and rows held out."""
    share = config.held_out_share
    if not share:
        return np.arange(len(labels)), np.arange(0)
    return stratified_rows(labels, num_classes, [1 - share, share])


def _workers(config: TrainConfig) -> int:
    return min(_MOST_WORKERS, os.cpu_count() or 1) if config.workers is None else config.workers


def _lanes(config: TrainConfig) -> int:
    """One for each worker, by the settings alone: a run may continue on a machine with another number of cores."""
    return _MOST_WORKERS if config.workers is None else max(config.workers, 1)
