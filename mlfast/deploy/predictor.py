"""From images to labels."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlfast.data.images import MAX_PIXELS, ImageError
from mlfast.deploy.images import model_input
from mlfast.deploy.runtimes import TorchRuntime, open_model


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one image.

    Attributes:
        labels: name -> probability of the labels whose probability reaches their threshold, most probable first.
        probabilities: of all classes, ``[K]`` float32, in the order of `Predictor.classes`.
    """

    labels: dict[str, float]
    probabilities: np.ndarray


class Predictor:
    """Labels for images, by a trained or exported model. Any number of threads may share one.

    Labels are those whose probability reaches the threshold of their class: the tuned one where there is one
    (``thresholds.json`` beside the model, or the metadata of an exported file), else 0.5. Loading never runs code.

    Args:
        path: a model folder such as ``runs/NAME/best``, or an ``.onnx`` or OpenVINO ``.xml`` file of ``mlfast export``.
        threshold: one for all classes instead.
        batch_size: images that go through the model together.
        max_pixels: refuse images with more.
        device: of a model folder: ``"auto"``, ``"cpu"``, ``"cuda"``, ... Exported files run on the CPU.

    Attributes:
        classes: the K names.
        thresholds: ``[K]`` float64.

    Raises:
        mlfast.models.checkpoint.CheckpointError: no model, a damaged one, or one that would have to be unpickled.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threshold: float | None = None,
        batch_size: int = 32,
        max_pixels: int = MAX_PIXELS,
        device: str = "auto",
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, expected a probability from 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        self.model = open_model(path, device)
        self.info = self.model.info if threshold is None else self.model.info.with_threshold(threshold)
        self.classes = list(self.info.classes)
        self.thresholds = np.array(self.info.thresholds)
        self._limits = self.thresholds.astype(np.float32)  # as metrics compare them
        self.batch_size, self.max_pixels = batch_size, max_pixels

    def __call__(self, images: Any) -> Any:
        """Predict one image, or a list of them.

        Args:
            images: a path, PIL image or array (uint8 ``[H, W, 3]`` RGB, ``[H, W, 4]``, ``[H, W]``, or uint16
                ``[H, W]``), or an iterable of these. A path is one of a file.

        Returns:
            A `Prediction`, or a list of them for an iterable.

        Raises:
            ImageError: an image cannot be read; the message names the first such and the reason.
            TypeError: something else than an image.
        """
        if isinstance(images, (str, os.PathLike, np.ndarray)) or not isinstance(images, Iterable):
            return self([images])[0]
        results = []
        for result in self.stream(images):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results

    def stream(self, images: Iterable[Any]) -> Iterator[Prediction | ImageError]:
        """One result for each image, in order, a batch at a time; an image that cannot be read gives its error.

        Two batches are in memory at a time: one in the model, while the next is read.
        """
        numbered = enumerate(images)
        with ThreadPoolExecutor(min(self.batch_size, os.cpu_count() or 1)) as pool:
            waiting: deque[list[Future[np.ndarray | ImageError]]] = deque()
            while batch := list(itertools.islice(numbered, self.batch_size)):
                waiting.append([pool.submit(self._read, number, image) for number, image in batch])
                if len(waiting) > 1:
                    yield from self._predict([job.result() for job in waiting.popleft()])
            while waiting:
                yield from self._predict([job.result() for job in waiting.popleft()])

    @property
    def shows_attention(self) -> bool:
        """Whether `attention` can tell: of a model folder with an ML-Decoder. Exported files hold no attention."""
        return isinstance(self.model, TorchRuntime) and self.model.shows_attention

    def attention(self, image: Any) -> np.ndarray:
        """Where the ML-Decoder looks for each label in an image: ``[K, h, w]`` float32, the mean over its heads.

        The map lies over the image as the model sees it: all of it, or with ``resize: crop`` the largest square in the
        middle. Labels that share a query (where there are more than 100) share a map.

        Raises:
            ValueError: the model is an exported file, or its head is no ML-Decoder.
            ImageError, TypeError: as a call.
        """
        if not isinstance(self.model, TorchRuntime):
            raise ValueError("attention: exported files hold none; open the model folder that they were made from")
        return self.model.attention(self._input(image)[None])[0]

    def _input(self, image: Any) -> np.ndarray:
        return model_input(image, self.info.image_size, self.info.resize, self.max_pixels)

    def _read(self, number: int, image: Any) -> np.ndarray | ImageError:
        try:
            return self._input(image)
        except ImageError as error:
            name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"images[{number}]"
            return ImageError(f"{name}: {error}")

    def _predict(self, batch: list[np.ndarray | ImageError]) -> Iterator[Prediction | ImageError]:
        arrays = [image for image in batch if isinstance(image, np.ndarray)]
        rows = iter(self.model(np.stack(arrays)) if arrays else ())
        for image in batch:
            yield image if isinstance(image, ImageError) else self._prediction(next(rows))

    def _prediction(self, probabilities: np.ndarray) -> Prediction:
        reached = np.flatnonzero(probabilities >= self._limits)
        order = reached[np.argsort(-probabilities[reached], kind="stable")]
        return Prediction({self.classes[k]: float(probabilities[k]) for k in order}, probabilities)
