"""What whoever runs a model must know besides its graph; every exported file carries it as JSON under one key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlfast.models.checkpoint import CheckpointError

KEY = "mlfast"
FORMAT = 1
# How an image becomes a square, as training had it, and how a reader of a file's metadata is told.
RESIZES = {
    "squash": "stretch to image_size x image_size, bilinear with antialiasing; RGB",
    "crop": "cut the largest square out of the middle, then image_size x image_size, bilinear with antialiasing; RGB",
}
_MODEL_API_RESIZES = {"squash": "standard", "crop": "crop"}


@dataclass(frozen=True)
class ModelInfo:
    """Classes, thresholds, and how an image becomes the model's input.

    Attributes:
        classes: K names.
        thresholds: K probabilities; a label is predicted where its probability is at least this.
        image_size: height and width of the input.
        resize: ``"squash"`` stretches an image to that; ``"crop"`` cuts the largest square out of its middle first.
        mean, std: of each channel (RGB) of images in [0, 1]: the input is ``(image / 255 - mean) / std``.
        chosen_on: the images that the thresholds were chosen on, such as ``"digits/val, 2000 images"``; metrics on
            the same ones flatter. "" where nobody chose them, or an older file does not say.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"
    chosen_on: str = ""

    def __post_init__(self) -> None:
        numbers = (*self.thresholds, *self.mean, *self.std)
        if not (
            self.classes
            and all(isinstance(name, str) for name in self.classes)
            and len(self.thresholds) == len(self.classes)
            and len(self.mean) == len(self.std) == 3
            and all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
            and all(x > 0 for x in self.std)
            and isinstance(self.image_size, int)
            and self.image_size > 0
            and self.resize in RESIZES
            and isinstance(self.chosen_on, str)
        ):
            raise CheckpointError(f"the description of the model contradicts itself: {self}")

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], thresholds: np.ndarray | None = None, chosen_on: str = ""
    ) -> ModelInfo:
        """From ``config.json`` or what `to_json` wrote; thresholds are 0.5 where neither says others.

        Raises:
            CheckpointError: something is missing or of the wrong kind.
        """
        try:
            limits = values.get("thresholds", [0.5] * len(values["classes"])) if thresholds is None else thresholds
            return cls(
                classes=tuple(values["classes"]),
                thresholds=tuple(map(float, limits)),
                image_size=values["image_size"],
                mean=tuple(values["mean"]),
                std=tuple(values["std"]),
                resize=values.get("resize", "squash"),
                chosen_on=values.get("chosen_on", "") if thresholds is None else chosen_on,
            )
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the description of the model is incomplete: {error}") from error

    @classmethod
    def from_json(cls, text: str | None, source: str) -> ModelInfo:
        """From the metadata of an exported file.

        Raises:
            CheckpointError: there is none, or it is damaged or of another version; the message names the source.
        """
        if not text:
            raise CheckpointError(f"{source} does not say what its classes are: it was not written by mlfast export")
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise CheckpointError(f"its metadata are not of format {FORMAT}")
            return cls.from_mapping(values)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self), "preprocessing": RESIZES[self.resize]})

    def with_threshold(self, value: float) -> ModelInfo:
        """The same with one threshold for all classes, chosen on no images."""
        return replace(self, thresholds=(value,) * len(self.classes), chosen_on="")

    def folded(self) -> ModelInfo:
        """The same for logits into which the thresholds were folded: 0.5 now means what they meant."""
        return replace(self, thresholds=(0.5,) * len(self.classes))

    def model_api(self) -> dict[str, Any]:
        """The same in the words of OpenVINO Model API, which has one threshold, and no spaces in labels.

        The threshold is the classes' own where it is the same for all (as after ``--fold-thresholds``), else 0.5.
        """
        same = len(set(self.thresholds)) == 1
        return {
            "model_type": "Classification",
            "labels": " ".join(name.replace(" ", "_") for name in self.classes),
            "multilabel": "True",
            "confidence_threshold": str(self.thresholds[0] if same else 0.5),
            "output_raw_scores": "True",
            "mean_values": " ".join(f"{255 * x:.8g}" for x in self.mean),
            "scale_values": " ".join(f"{255 * x:.8g}" for x in self.std),
            "reverse_input_channels": "False",
            "resize_type": _MODEL_API_RESIZES[self.resize],
        }
