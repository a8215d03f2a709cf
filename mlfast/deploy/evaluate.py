"""What a model is worth on a split, at one threshold of 0.5 and at one for each class (the paper's Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from mlfast.deploy.runtimes import Runtime
from mlfast.deploy.splits import LabelledImages, batches, mostly_unknown
from mlfast.deploy.thresholds import rounded_down
from mlfast.evaluation import MultilabelMetrics, Predictions, Thresholds
from mlfast.evaluation.metrics import SCORES


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
    predictions = Predictions(len(model.info.classes), known_only=mostly_unknown(images))
    count = -(-len(images) // batch_size)
    # disable=None: no bar where the output is not a terminal
    for pixels, targets in tqdm(
        batches(images, batch_size), total=count, desc=title, unit="batch", leave=False, disable=None
    ):
        predictions.add(model(pixels), targets)
    return predictions


def tune(predictions: Predictions, **options: Any) -> Tuned:
    """The best threshold of each class, rounded down to four digits; ``options`` are those of `tune_thresholds`."""
    thresholds = predictions.thresholds(**options)
    return Tuned(thresholds, rounded_down(thresholds.values, thresholds.below))


def table(rows: dict[str, MultilabelMetrics]) -> str:
    """Metrics side by side, in percent."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>7}" for name in SCORES)]
    for title, metrics in rows.items():
        lines.append(f"{title:<{width}}" + "".join(f"{100 * getattr(metrics, name):>7.1f}" for name in SCORES))
    return "\n".join(lines)


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    if len(ours) != len(theirs):
        return f"model has {len(ours)} classes, the data {len(theirs)}"
    first = next(k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"class {first} of the model is {ours[first]!r}, that of the data {theirs[first]!r}"
