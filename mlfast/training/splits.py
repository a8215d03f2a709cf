"""The labels of the splits of a run: which there are, that they agree, and that they share no image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.loading import load_annotations, options_of, reader
from mlfast.data.problems import shared_images
from mlfast.data.sources import Sources
from mlfast.training.config import TrainConfig
from mlfast.training.data_settings import DEFAULT_SPLITS
from mlfast.training.errors import ConfigError

_LOOKED_FOR = 100  # images of a split


def read_splits(config: TrainConfig) -> tuple[Annotations, Annotations | None]:
    """Labels to train on and to evaluate on, with the same classes in the same order.

    The second is None where there is no such split, the settings name none and hold images out, which then serve.

    Raises:
        ConfigError: labels or images are not there, the classes differ, or both splits have an image.
    """
    train_split, val_split = DEFAULT_SPLITS[config.data]
    options = dict(config.data_args)
    train, problem = _load(config, "train_split", config.train_split or train_split, options)
    if config.val_split is None and train and not has_split(config.data, config.data_root, val_split, options):
        if config.held_out_share:
            return train, None
        raise ConfigError([_no_val(config, train, val_split)])
    if train and "classes" in options_of(reader(config.data)):
        options = {"classes": list(train.classes)} | options  # what is found in the other split may be less
    val, other_problem = _load(config, "val_split", config.val_split or val_split, options)
    if not train or not val:
        raise ConfigError([text for text in (problem, other_problem) if text])
    if train.classes != val.classes:
        raise ConfigError([f"val_split: {val.split!r} has other classes than {train.split!r}; give both the same list"])
    if shared := shared_images(train, val):
        raise ConfigError([_share(config, train, val, shared)])
    return train, val


def has_split(kind: str, root: str | None, split: str, options: dict[str, Any]) -> bool:
    """Whether the files of a data set name this split; what cannot be told counts as yes."""
    try:
        there = reader(kind).splits(Sources(Path(str(root)).expanduser()), **options)
    except (AnnotationError, TypeError, ValueError):  # reading the labels says it better
        return True
    return any(name == split or name.startswith(f"{split}-") for part in split.split("+") for name in there)


def _no_val(config: TrainConfig, train: Annotations, split: str) -> str:
    return (
        f"val_split: {config.data_root} has no split {split!r}; name another one, or train with --held_out 0.2, which "
        f"keeps a part of {train.split} to validate on, or divide the images: {_division(config, train)}"
    )


def _share(config: TrainConfig, train: Annotations, val: Annotations, shared: list[str]) -> str:
    return (
        f"val_split: {train.split!r} and {val.split!r} share {len(shared)} images, such as {shared[0]}, so validation "
        "would measure what was learned by heart; expected splits without a common image. mlfast data check names "
        f"them. Divide the images ({_division(config, train)}), or train on one split alone: --held_out 0.2 keeps a "
        "part of it to choose by, and to validate on where there is no other"
    )


def _division(config: TrainConfig, train: Annotations) -> str:
    given = {name: value for name, value in config.data_args.items() if isinstance(value, (str, int))}
    options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items())
    root = shlex.quote(str(config.data_root))
    return f"mlfast data split {config.data} {root}{options} --split {train.split} --into train=0.8 val=0.2"


def _load(config: TrainConfig, key: str, split: str, options: dict[str, Any]) -> tuple[Annotations | None, str]:
    """The labels of a split, or what is wrong with them."""
    try:
        annotations = load_annotations(config.data, config.data_root, split, **options)
    except AnnotationError as error:
        return None, f"{key}: {error}"
    except (TypeError, ValueError) as error:  # a value of an option, or splits that cannot be joined
        return None, f"{key if 'splits' in str(error) else 'data_args'}: {error}"
    if not len(annotations):
        return None, f"{key}: {split!r} has no images"
    if missing := _missing_images(annotations):
        return None, f"{key}: there are labels of {len(annotations)} images, but {missing} does not exist, nor others"
    return annotations, ""


def _missing_images(annotations: Annotations) -> Path | None:
    """The path of the first image if none of a sample is there. That some are missing is the data set's business."""
    if annotations.shards:
        return None
    sample = np.linspace(0, len(annotations) - 1, min(len(annotations), _LOOKED_FOR)).astype(int).tolist()
    if any((annotations.root / annotations.paths[row]).exists() for row in sample):
        return None
    return annotations.root / annotations.paths[0]
