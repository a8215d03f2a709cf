"""The predictions of a whole split, collected batch by batch: metrics of it are exact, not means of batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlfast.evaluation.columns import Blocks, known_blocks
from mlfast.evaluation.metrics import (
    ArrayLike,
    MultilabelMetrics,
    check_options,
    checked,
    checked_threshold,
    class_counts,
    multilabel_metrics,
    summary,
)
from mlfast.evaluation.thresholds import Thresholds, thresholds_of, tune_thresholds


class Predictions:
    """Probabilities and targets of the images of a split, on the CPU, in float32.

    Args:
        num_classes: K.
        known_only: keep the entries with a known target alone, 17 bytes each, instead of 5 bytes for every entry. For
            data where most labels of an image are unknown: OpenImages has a dozen verified ones out of thousands.
    """

    def __init__(self, num_classes: int, known_only: bool = False) -> None:
        self.num_classes = num_classes
        self.known_only = known_only
        self.num_images = 0
        self._gathered = False
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, probabilities: ArrayLike, targets: ArrayLike) -> None:
        """Take in one batch: [B, K] each, as `multilabel_metrics` takes them.

        Raises:
            ValueError, TypeError: as `multilabel_metrics`, a number of classes that is not K, or scores outside [0, 1].
        """
        score, target = checked(probabilities, targets, "probabilities")
        if score.shape[1] != self.num_classes:
            raise ValueError(
                f"probabilities: got {score.shape[1]} classes, expected {self.num_classes}; pass the same classes, "
                "in the same order, every time."
            )
        if self.known_only:
            image, label = (target >= 0).nonzero(as_tuple=True)
            parts = [image + self.num_images, label.int(), score[image, label].float(), target[image, label] > 0]
        else:
            # A copy: the caller may write the next batch where this one is.
            own = score.to("cpu", torch.float32, copy=True)
            parts = [own, (target > 0).to(torch.int8) - (target < 0).to(torch.int8)]
        batch = tuple(tensor.cpu() for tensor in parts)
        _check_range(batch[-2])
        self._batches.append(batch)
        self.num_images += len(score)

    def gather(self) -> Predictions:
        """The predictions of all processes together, on every process; itself where there is only one.

        Every image counts: give each process its own share of the images, without repeating some to make shares equal.
        """
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        if alone or self._gathered:
            return self
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (self.num_images, self._tensors()))
        whole = Predictions(self.num_classes, self.known_only)
        whole._gathered = True
        for images, tensors in shares:
            first = tensors[0] + whole.num_images if self.known_only else tensors[0]
            whole._batches.append((first, *tensors[1:]))
            whole.num_images += images
        return whole

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, float32 [N, K], and targets, int8 [N, K]: 1, 0, or -1 for unknown. Not of ``known_only``."""
        score, target = self._tensors()
        return score, target

    def positives(self) -> np.ndarray:
        """The images that have each class, ``[K]`` int64."""
        if not self.known_only:
            return (self.matrices()[1] > 0).sum(0).numpy()
        _, label, _, positive = self._tensors()
        return torch.bincount(label[positive], minlength=self.num_classes).numpy()

    def metrics(
        self, threshold: float | ArrayLike = 0.5, *, interpolated: bool = False, **options: Any
    ) -> MultilabelMetrics:
        """`multilabel_metrics` of everything; all others are its keyword arguments."""
        if not self.known_only:
            return multilabel_metrics(*self.matrices(), threshold, interpolated=interpolated, **options)
        check_options(interpolated=interpolated, **options)
        limits = checked_threshold(threshold, torch.empty(0, self.num_classes)).expand(self.num_classes)
        per_class, of_classes = class_counts(self._blocks(), limits, interpolated)
        image, label, score, positive = self._tensors()
        predicted = score >= limits[label]
        masks = predicted & positive, predicted, positive
        of_images = torch.stack([torch.bincount(image[mask], minlength=self.num_images) for mask in masks])
        of_images = of_images[:, torch.bincount(image, minlength=self.num_images) > 0]
        return summary(per_class, of_classes, of_images.double().numpy(), **options)

    def thresholds(self, **options: Any) -> Thresholds:
        """`tune_thresholds` of everything; ``options`` are its keyword arguments."""
        if not self.known_only:
            return tune_thresholds(*self.matrices(), **options)
        return thresholds_of(self._blocks(shared=options.get("shared", False)), self.num_classes, **options)

    def _blocks(self, shared: bool = False) -> Blocks:
        label, score, positive = (tensor.numpy() for tensor in self._tensors()[1:])
        if shared:  # all entries are of one class
            return known_blocks(np.zeros_like(label), score, positive, 1)
        return known_blocks(label, score, positive, self.num_classes)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything so far, in one piece."""
        if not self._batches:
            empty, none = torch.empty(0, self.num_classes), torch.empty(0, dtype=torch.int64)
            known = none, none.int(), none.float(), none.bool()
            return known if self.known_only else (empty, empty.to(torch.int8))
        if len(self._batches) > 1:
            pieces = [list(column) for column in zip(*self._batches, strict=True)]
            self._batches.clear()
            joined = []
            while pieces:  # each kind of tensor is freed before the next is joined
                joined.append(torch.cat(pieces.pop(0)))
            self._batches.append(tuple(joined))
        return self._batches[0]


def _check_range(scores: torch.Tensor) -> None:
    """Logits would give metrics too, at thresholds that mean something else."""
    if not scores.numel():
        return
    least, most = (float(value) for value in scores.aminmax())
    if least < 0 or most > 1:
        raise ValueError(
            f"probabilities: got values from {least:.4g} to {most:.4g}, expected 0 to 1; pass "
            "model.probabilities(output), or the sigmoid of logits (of scale * cosine)."
        )
