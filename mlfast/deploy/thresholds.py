"""``thresholds.json`` beside a model: the tuned threshold of each class, bound to the weights it was tuned for."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlfast.evaluation import Thresholds
from mlfast.files import write_text
from mlfast.models.checkpoint import CheckpointError

NAME = "thresholds.json"
_FORMAT = 1


class StoredThresholds(NamedTuple):
    """Thresholds ``[K]`` and the images that they were chosen on, in words."""

    values: np.ndarray
    chosen_on: str


def read_thresholds(folder: Path, classes: list[str]) -> StoredThresholds | None:
    """The thresholds of a model folder, None where it has no such file.

    Raises:
        CheckpointError: the file is damaged, or belongs to other weights or classes.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        names = [entry["name"] for entry in stored["classes"]]
        values = np.array([entry["threshold"] for entry in stored["classes"]], dtype=np.float64)
        weights, version = stored["weights_sha256"], stored["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error
    again = "tune again with: mlfast evaluate MODEL --tune SPLIT, or delete the file"
    if version != _FORMAT or not ((values >= 0) & (values <= 1)).all():
        raise CheckpointError(f"{path} holds something else than thresholds of format {_FORMAT}; {again}")
    if names != classes:
        raise CheckpointError(f"{path} belongs to other classes; {again}")
    if weights != _sha256(folder / "model.safetensors"):
        raise CheckpointError(f"{path} was tuned for other weights than those beside it; {again}")
    return StoredThresholds(values, str(stored.get("chosen_on", "")))


def write_thresholds(
    folder: Path, classes: list[str], tuned: Thresholds, values: np.ndarray, source: str, aim: str = "F1"
) -> Path:
    """Write thresholds ``[K]`` beside the weights that they belong to, atomically.

    Args:
        folder: of the model.
        classes: K names.
        tuned: what they rest on.
        values: as they are used, see `rounded_down`.
        source: the images that they were chosen on, in words.
        aim: what was maximised there, in words; what was reached of it is stored with each class.
    """
    doubt = {**dict.fromkeys(tuned.defaulted, "default"), **dict.fromkeys(tuned.unreliable, "few positives")}
    entries = [
        {
            "name": name,
            "threshold": float(values[k]),
            "reached": None if math.isnan(tuned.reached[k]) else round(float(tuned.reached[k]), 4),
            "positives": int(tuned.positives[k]),
            **({"doubt": doubt[k]} if k in doubt else {}),
        }
        for k, name in enumerate(classes)
    ]
    stored = {
        "format": _FORMAT,
        "chosen_on": source,
        "chosen_for": aim,
        "weights_sha256": _sha256(folder / "model.safetensors"),
        "classes": entries,
    }
    write_text(folder / NAME, json.dumps(stored, indent=2) + "\n")
    return folder / NAME


def rounded_down(values: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Thresholds in (0, 1], down to four significant digits, or halfway to the score ``below`` if that is nearer.

    A tuned threshold is the score of an image: in another runtime, whose last bits differ, that image would fall below.
    """
    return np.array([_rounded_down(v, b) for v, b in zip(values.tolist(), below.tolist(), strict=True)])


def _rounded_down(value: float, below: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(max(value, 1e-30))) - 3)
    # Through decimal text, so that 0.3 does not become 0.29990000000000006.
    rounded = min(value, float(f"{math.floor(value / unit + 1e-9) * unit:.4g}"))
    middle = (value + below) / 2
    return rounded if math.isnan(below) or rounded >= middle else middle


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
