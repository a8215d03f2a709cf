"""Exact metrics of multi-label classification: average precision, and precision, recall and F1 at a threshold.

The metrics are those of the paper's section 4.1 and of its Tables 2 to 6: mAP, and overall (O) and per-class (C)
precision, recall and F1, in the form of Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks"
(2019). Where the literature means other things by the same names, they are options of `multilabel_metrics`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mlfast.evaluation.columns import Blocks, Column, Ranks, dense_blocks, map_columns, ranks

ArrayLike = torch.Tensor | np.ndarray
F1_FORMS = ("harmonic", "macro", "sample")
SCORES = ("mAP", "OP", "OR", "OF1", "CP", "CR", "CF1")  # of `MultilabelMetrics`, as tables show them
# An unsigned target is read as signed: the largest number, as -1 becomes, is unknown.
_SIGNED = {torch.uint8: torch.int8, torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_BLOCK_ELEMENTS = 1 << 24  # of what is copied at once


@dataclass(frozen=True)
class MultilabelMetrics:
    """Metrics of one evaluation: fractions in [0, 1], all of them nan if no class has a positive.

    Attributes:
        mAP: mean average precision over the classes that have a positive.
        per_class_ap: average precision [K] as float64, nan for a class without positives.
        OP, OR, OF1: precision, recall and F1 over all (image, class) pairs together.
        CP, CR: precision and recall per class, averaged over the classes that have a positive. A class that is never
            predicted has precision 0.
        CF1: the harmonic mean of CP and CR, or what ``f1`` asked for.
        num_classes_evaluated: the number of classes that have a positive.
    """

    mAP: float
    per_class_ap: np.ndarray
    OP: float
    OR: float
    OF1: float
    CP: float
    CR: float
    CF1: float
    num_classes_evaluated: int

    def as_dict(self) -> dict[str, Any]:
        """The metrics in plain Python types, fit for JSON but for nan; `per_class_ap` becomes a list of floats."""
        return {**asdict(self), "per_class_ap": self.per_class_ap.tolist()}


def average_precision(scores: ArrayLike, targets: ArrayLike, *, interpolated: bool = False) -> ArrayLike:
    """Average precision of every class, exact under ties.

    AP of a class is the mean over its positives i of `#positives with score >= s_i / #images with score >= s_i`.
    Equal to `sklearn.metrics.average_precision_score` on every class that has a positive.

    Args:
        scores: [N, K] of any floating or integer dtype, tensor (on any device) or numpy array; any scale, higher means
            more likely. Infinite scores are legal.
        targets: [N, K], bool, integer or float: 1 is a positive, 0 a negative, < 0 unknown. An unknown entry is
            left out of its class.
        interpolated: take at each positive the best precision at that recall or a higher one, as PASCAL VOC (2010 on)
            and Query2Label do; never lower, so not on one scale with the paper's numbers.

    Returns:
        [K] float64, nan for a class without positives: a tensor on the device of `scores`, or a numpy array if
        `scores` is one.

    Raises:
        ValueError: not two dimensions, shapes that differ, nan anywhere, or targets above 0 that are not 1.
        TypeError: something else than tensors and numpy arrays.
    """
    score, target = checked(scores, targets, "scores")
    result = _average_precision(score, target, interpolated)
    return result.numpy() if isinstance(scores, np.ndarray) else result


def multilabel_metrics(
    probabilities: ArrayLike,
    targets: ArrayLike,
    threshold: float | ArrayLike = 0.5,
    *,
    interpolated: bool = False,
    f1: str = "harmonic",
    absent: str = "exclude",
) -> MultilabelMetrics:
    """The metrics of the paper's section 4.1 for one set of predictions.

    A class is predicted where `probability >= threshold`, with the threshold rounded to the dtype of the probabilities,
    so that a threshold taken from the scores themselves counts as reached. Unknown targets (< 0) count nowhere.

    Args:
        probabilities: [N, K], tensor on any device or numpy array. Any scores do if the threshold is on their scale.
        targets: [N, K], bool, integer or float: 1 is a positive, 0 a negative, < 0 unknown.
        threshold: a number, or one per class [K].
        interpolated: as in `average_precision`.
        f1: what CP, CR and CF1 are. ``"harmonic"``: means over classes, and the harmonic mean of the two (Chen et al.).
            ``"macro"``: CF1 is the mean of the classes' own F1 (ASL's code). ``"sample"``: all three are means over
            images, which is what the paper's released code prints as CP, CR, CF1.
        absent: a class without positives is left out of the means over classes (``"exclude"``), or counts as 0 in them
            (``"zero"``: the released code's mAP).

    Raises:
        ValueError: not two dimensions, shapes that differ, nan anywhere, targets above 0 that are not 1, or an unknown
            option.
        TypeError: something else than tensors and numpy arrays (or a number for the threshold).
    """
    check_options(interpolated=interpolated, f1=f1, absent=absent)
    score, target = checked(probabilities, targets, "probabilities")
    limit = checked_threshold(threshold, score)
    if score.device.type == "cpu":
        per_class, of_classes = class_counts(dense_blocks(score, target), limit.expand(score.shape[1]), interpolated)
        of_images = _counts(score, target, limit)[1] if f1 == "sample" else None
    else:
        per_class = _average_precision(score, target, interpolated).cpu().numpy()
        of_classes, of_images = _counts(score, target, limit)
    return summary(per_class, of_classes, of_images, f1=f1, absent=absent)


def class_counts(blocks: Blocks, limits: torch.Tensor, interpolated: bool) -> tuple[np.ndarray, np.ndarray]:
    """AP [K], and hits, predictions and positives [3, K] at the limits [K]: one sort of each class serves both."""
    at_least = limits.float().numpy() if limits.dtype in (torch.float16, torch.bfloat16) else limits.numpy()

    def of_column(column: Column) -> tuple[float, int, int, int]:
        at, limit = ranks(column), at_least[column.label]
        hits, guesses = (len(values) - np.searchsorted(values, limit) for values in (at.scores, at.everything))
        return _ap(at, interpolated), hits, guesses, len(at.scores)

    found = np.array(map_columns(of_column, blocks), dtype=np.float64).reshape(-1, 4)
    return found[:, 0], found[:, 1:].T


def summary(
    per_class: np.ndarray,
    of_classes: np.ndarray,
    of_images: np.ndarray | None,
    *,
    f1: str = "harmonic",
    absent: str = "exclude",
) -> MultilabelMetrics:
    """The metrics from AP [K], and hits, predictions and positives of every class [3, K].

    Those of every image [3, N] are needed for ``f1="sample"``.
    """
    counted = ~np.isnan(per_class)
    if not counted.any():
        nan = float("nan")
        return MultilabelMetrics(nan, per_class, nan, nan, nan, nan, nan, nan, num_classes_evaluated=0)
    in_mean = counted if absent == "exclude" else np.ones_like(counted)
    hits, guesses, truths = of_classes.sum(1)
    overall = float(hits / max(guesses, 1)), float(hits / max(truths, 1))
    precision, recall, mean_f1 = _means(of_classes[:, in_mean] if of_images is None or f1 != "sample" else of_images)
    return MultilabelMetrics(
        mAP=float(np.nan_to_num(per_class[in_mean]).mean()),
        per_class_ap=per_class,
        OP=overall[0],
        OR=overall[1],
        OF1=_harmonic(*overall),
        CP=precision,
        CR=recall,
        CF1=_harmonic(precision, recall) if f1 == "harmonic" else mean_f1,
        num_classes_evaluated=int(counted.sum()),
    )


def _counts(score: torch.Tensor, target: torch.Tensor, limit: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Hits, predictions and positives of every class [3, K] and of every image with a known label [3, N].

    A block of images at a time.
    """
    rows = max(1, _BLOCK_ELEMENTS // max(1, score.shape[1]))
    of_classes = torch.zeros(3, score.shape[1], dtype=torch.int64, device=score.device)
    of_images = []
    for scores, truth in zip(score.split(rows), target.split(rows), strict=True):
        positive, predicted = truth > 0, (scores >= limit) & (truth >= 0)
        masks = predicted & positive, predicted, positive
        of_classes += torch.stack([mask.sum(0) for mask in masks])
        seen = (truth >= 0).any(1)  # an image of which nothing is known counts nowhere
        of_images.append(torch.stack([mask.sum(1) for mask in masks])[:, seen])
    images = torch.cat(of_images, 1) if of_images else of_classes[:, :0]
    return of_classes.cpu().numpy().astype(np.float64), images.cpu().numpy().astype(np.float64)


def _means(counts: np.ndarray) -> tuple[float, float, float]:
    """Mean precision, recall and F1 of the columns of [3, n]; what is never predicted has precision 0."""
    hits, guesses, truths = counts
    f1 = 2 * hits / np.maximum(guesses + truths, 1)
    precision, recall = hits / np.maximum(guesses, 1), hits / np.maximum(truths, 1)
    return float(precision.mean()), float(recall.mean()), float(f1.mean())


def _average_precision(score: torch.Tensor, target: torch.Tensor, interpolated: bool) -> torch.Tensor:
    """AP of every column: [N, K] -> [K]."""
    if score.device.type == "cpu" or interpolated:
        values = map_columns(lambda column: _ap(ranks(column), interpolated), dense_blocks(score.cpu(), target.cpu()))
        return torch.tensor(values, dtype=torch.float64, device=score.device)
    columns = max(1, _BLOCK_ELEMENTS // max(1, len(score)))
    blocks = zip(score.split(columns, dim=1), target.split(columns, dim=1), strict=True)
    return torch.cat([_ap_of_rows_torch(s.t().contiguous(), t.t().contiguous()) for s, t in blocks])


def _ap(at: Ranks, interpolated: bool) -> float:
    if len(at.scores) == 0:
        return float("nan")
    precision = at.true / at.predicted
    return float(np.mean(np.maximum.accumulate(precision) if interpolated else precision))


def _ap_of_rows_torch(score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same without a loop. An unknown entry keeps its place in the order and adds nothing to any count."""
    ranked, order = score.sort(dim=1, descending=True)
    target = target.gather(1, order)
    positive = target > 0
    positives_above, known_above = (mask.cumsum(1, dtype=torch.int32) for mask in (positive, target >= 0))
    # Equal scores all count at the last place of their group: the nearest group end from here on.
    place = torch.arange(ranked.shape[1], dtype=torch.int32, device=score.device).expand_as(ranked)
    ends = torch.ones_like(positive)
    ends[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    last = place.where(ends, torch.iinfo(torch.int32).max).flip(1).cummin(1).values.flip(1).long()
    precision = positives_above.gather(1, last).double() / known_above.gather(1, last).clamp(min=1)
    # 0 / 0 = nan for a class without positives.
    return (precision * positive).sum(1) / positive.sum(1)


def checked(scores: ArrayLike, targets: ArrayLike, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as tensors on one device, or a ValueError or TypeError that says what is wrong."""
    score = _tensor(scores, name)
    target = _tensor(targets, "targets").to(score.device)
    target = target.view(_SIGNED.get(target.dtype, target.dtype))
    if score.ndim != 2:
        raise ValueError(
            f"{name}: got shape {tuple(score.shape)}, expected [images, classes]; reshape it, or add [None] to one row."
        )
    if target.shape != score.shape:
        raise ValueError(
            f"targets: got shape {tuple(target.shape)}, expected {tuple(score.shape)} as {name} has; "
            "pass one row per image and one column per class, in the same order."
        )
    rows = max(1, _BLOCK_ELEMENTS // max(1, score.shape[1]))  # masks of everything at once would double the memory
    for of_scores, of_targets in zip(score.split(rows), target.split(rows), strict=True):
        _check_values(of_scores, of_targets, name)
    return score, target


def _check_values(score: torch.Tensor, target: torch.Tensor, name: str) -> None:
    if score.isnan().any():
        bad = int(score.isnan().sum())
        raise ValueError(f"{name}: got {bad} nan, expected numbers; look for a diverged model or for 0/0 before this.")
    if not ((target <= 0) | (target == 1)).all():
        raise ValueError(
            "targets: got values above 0 that are not 1 (or nan), expected 1, 0 or negative = unknown; "
            "threshold soft targets first."
        )


def checked_threshold(threshold: float | ArrayLike, score: torch.Tensor) -> torch.Tensor:
    """One number or one per class, as a tensor like the scores [N, K], or a ValueError that says what is wrong."""
    limit = torch.as_tensor(threshold, dtype=torch.float64).detach().to(score.device)
    if limit.ndim and limit.shape != score.shape[1:]:
        raise ValueError(
            f"threshold: got shape {tuple(limit.shape)}, expected a number or [{score.shape[1]}], one per class."
        )
    if limit.isnan().any():
        raise ValueError("threshold: got nan, expected numbers; use infinity for a class that is never predicted.")
    return limit.to(score.dtype) if score.is_floating_point() else limit


def _tensor(values: ArrayLike, name: str) -> torch.Tensor:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name}: got a masked array, whose mask would be lost; pass .filled(-1) for unknown targets.")
    if isinstance(values, np.ndarray):
        # torch takes neither read-only memory nor negative strides.
        values = torch.from_numpy(np.require(np.ascontiguousarray(values), requirements=["C", "W"]))
    elif not isinstance(values, torch.Tensor):
        expected = "a torch tensor or a numpy array; wrap it in one."
        raise TypeError(f"{name}: got {type(values).__name__}, expected {expected}")
    if values.is_complex():
        raise TypeError(f"{name}: got {values.dtype}, expected real numbers; pass .real or .abs().")
    return values.detach()


def check_options(*, interpolated: bool = False, f1: str = "harmonic", absent: str = "exclude") -> None:
    """Raises ValueError for an unknown definition."""
    _check_option("f1", f1, F1_FORMS)
    _check_option("absent", absent, ("exclude", "zero"))


def _check_option(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, expected))}.")


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / max(precision + recall, 1e-300)
