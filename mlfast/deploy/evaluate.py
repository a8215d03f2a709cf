"""What a model is worth on a split, at one threshold of 0.5 and at one for each class (the paper's Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mlfast.deploy.runtimes import Runtime
from mlfast.deploy.thresholds import rounded_down
from mlfast.evaluation import MultilabelMetrics, Predictions, Thresholds

COLUMNS = ("mAP", "OP", "OR", "OF1", "CP", "CR", "CF1")


class LabelledImages(Protocol):
    """A data set: item i is an image, uint8 ``[3, H, W]`` of the model's size, and a target, int8 ``[K]``."""

    classes: Sequence[str]

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Image and target, as tensors."""


@dataclass(frozen=True)
class Tuned:
    """Thresholds chosen on a split: what they rest on, and the values ``[K]`` that are used."""

    thresholds: Thresholds
    values: np.ndarray


def predict_split(model: Runtime, images: LabelledImages, batch_size: int = 64, *, title: str = "") -> Predictions:
    """Probabilities and targets of a whole split, by the model as it is deployed: no augmentation, nothing left out.

    Raises:
        ValueError: the classes are not the model's, in its order.
    """
    if list(images.classes) != list(model.info.classes):
        raise ValueError(f"the {_difference(model.info.classes, images.classes)}, so their scores cannot be compared")
    predictions = Predictions(len(model.info.classes))
    # disable=None: no bar where the output is not a terminal
    for first in tqdm(range(0, len(images), batch_size), desc=title, unit="batch", leave=False, disable=None):
        items = [images[index] for index in range(first, min(first + batch_size, len(images)))]
        pixels = np.stack([image.numpy().transpose(1, 2, 0) for image, _ in items])
        predictions.add(model(pixels), np.stack([target.numpy() for _, target in items]))
    return predictions


def tune(predictions: Predictions) -> Tuned:
    """The threshold of each class with the best F1, rounded down to four digits."""
    thresholds = predictions.thresholds()
    return Tuned(thresholds, rounded_down(thresholds.values))


def table(rows: dict[str, MultilabelMetrics]) -> str:
    """Metrics side by side, in percent."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>7}" for name in COLUMNS)]
    for title, metrics in rows.items():
        lines.append(f"{title:<{width}}" + "".join(f"{100 * getattr(metrics, name):>7.1f}" for name in COLUMNS))
    return "\n".join(lines)


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    if len(ours) != len(theirs):
        return f"model has {len(ours)} classes, the data {len(theirs)}"
    first = next(k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"class {first} of the model is {ours[first]!r}, that of the data {theirs[first]!r}"
