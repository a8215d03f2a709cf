"""Exact metrics of multi-label classification: average precision, and precision, recall and F1 at a threshold.

The metrics are those of the paper's section 4.1 and of its Tables 2 to 6: mAP, and overall (O) and per-class (C)
precision, recall and F1, in the form of Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks"
(2019). The paper's released code computes its "CF1" per image instead of per class, so its numbers for CF1 are on
another scale.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

ArrayLike = torch.Tensor | np.ndarray

# Columns are sorted a block at a time: copies of all scores would be too much for thousands of classes.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class MultilabelMetrics:
    """Metrics of one evaluation: fractions in [0, 1], all of them nan if no class has a positive.

    Attributes:
        mAP: mean average precision over the classes that have a positive.
        per_class_ap: average precision [K] as float64, nan for a class without positives.
        OP, OR, OF1: precision, recall and F1 over all (image, class) pairs together.
        CP, CR: precision and recall per class, averaged over the classes that have a positive. A class that is never
            predicted has precision 0.
        CF1: the harmonic mean of CP and CR (not the mean of the F1 of each class).
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


def average_precision(scores: ArrayLike, targets: ArrayLike) -> ArrayLike:
    """Average precision of every class, without interpolation and exact under ties.

    AP of a class is the mean over its positives i of `#positives with score >= s_i / #images with score >= s_i`.
    Equal to `sklearn.metrics.average_precision_score` on every class that has a positive.

    Args:
        scores: [N, K] of any floating or integer dtype, tensor (on any device) or numpy array; any scale, higher means
            more likely. Infinite scores are legal.
        targets: [N, K], bool, integer or float: 1 is a positive, 0 a negative, < 0 unknown. An unknown entry is
            left out of its class.

    Returns:
        [K] float64, nan for a class without positives: a tensor on the device of `scores`, or a numpy array if
        `scores` is one.

    Raises:
        ValueError: not two dimensions, shapes that differ, nan anywhere, or targets above 0 that are not 1.
        TypeError: something else than tensors and numpy arrays.
    """
    score, target = _checked(scores, targets, "scores")
    result = _average_precision(score, target)
    return result.numpy() if isinstance(scores, np.ndarray) else result


def multilabel_metrics(
    probabilities: ArrayLike, targets: ArrayLike, threshold: float | ArrayLike = 0.5
) -> MultilabelMetrics:
    """The metrics of the paper's section 4.1 for one set of predictions.

    A class is predicted where `probability >= threshold`, with the threshold rounded to the dtype of the probabilities,
    so that a threshold taken from the scores themselves counts as reached. Unknown targets (< 0) count nowhere.

    Args:
        probabilities: [N, K], tensor on any device or numpy array. Any scores do if the threshold is on their scale.
        targets: [N, K], bool, integer or float: 1 is a positive, 0 a negative, < 0 unknown.
        threshold: a number, or one per class [K].

    Raises:
        ValueError: not two dimensions, shapes that differ, nan anywhere, or targets above 0 that are not 1.
        TypeError: something else than tensors and numpy arrays (or a number for the threshold).
    """
    score, target = _checked(probabilities, targets, "probabilities")
    limit = _checked_threshold(threshold, score)
    per_class = _average_precision(score, target).cpu().numpy()
    counted = ~np.isnan(per_class)

    positive = target > 0
    predicted = (score >= limit) & (target >= 0)
    counts = torch.stack([m.sum(0) for m in (predicted & positive, predicted, positive)])
    hits, guesses, truths = counts.cpu().numpy().astype(np.float64)
    if not counted.any():
        nan = float("nan")
        return MultilabelMetrics(nan, per_class, nan, nan, nan, nan, nan, nan, num_classes_evaluated=0)
    overall_precision, overall_recall = (float(hits.sum() / max(whole.sum(), 1)) for whole in (guesses, truths))
    class_precision, class_recall = (float((hits / np.maximum(w, 1))[counted].mean()) for w in (guesses, truths))
    return MultilabelMetrics(
        mAP=float(per_class[counted].mean()),
        per_class_ap=per_class,
        OP=overall_precision,
        OR=overall_recall,
        OF1=_harmonic(overall_precision, overall_recall),
        CP=class_precision,
        CR=class_recall,
        CF1=_harmonic(class_precision, class_recall),
        num_classes_evaluated=int(counted.sum()),
    )


def _average_precision(score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """AP of every column: [N, K] -> [K], in blocks of columns."""
    if score.dtype in (torch.float16, torch.bfloat16):
        score = score.float()
    columns = max(1, _BLOCK_ELEMENTS // max(1, len(score)))
    # On a CPU numpy's vectorised sort of values is several times faster than torch's sort, which carries indices along.
    rows = _ap_of_rows_numpy if score.device.type == "cpu" else _ap_of_rows_torch
    blocks = zip(score.split(columns, dim=1), target.split(columns, dim=1), strict=True)
    return torch.cat([rows(s.t().contiguous(), t.t().contiguous()) for s, t in blocks])


def _ap_of_rows_numpy(score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    result = torch.full((len(score),), float("nan"), dtype=torch.float64)
    for k, (row, truth) in enumerate(zip(score.numpy(), target.numpy(), strict=True)):
        known = truth >= 0
        above_all = np.sort(row if known.all() else row[known])
        above_positive = np.sort(row[truth > 0])
        if len(above_positive):
            # Places from the left, so that everything equal counts as above or level.
            positives = len(above_positive) - np.searchsorted(above_positive, above_positive)
            everything = len(above_all) - np.searchsorted(above_all, above_positive)
            result[k] = float(np.mean(positives / everything))
    return result


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


def _checked(scores: ArrayLike, targets: ArrayLike, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    score = _tensor(scores, name)
    target = _tensor(targets, "targets").to(score.device)
    if score.ndim != 2:
        raise ValueError(
            f"{name}: got shape {tuple(score.shape)}, expected [images, classes]; reshape it, or add [None] to one row."
        )
    if target.shape != score.shape:
        raise ValueError(
            f"targets: got shape {tuple(target.shape)}, expected {tuple(score.shape)} as {name} has; "
            "pass one row per image and one column per class, in the same order."
        )
    if score.isnan().any():
        bad = int(score.isnan().sum())
        raise ValueError(f"{name}: got {bad} nan, expected numbers; look for a diverged model or for 0/0 before this.")
    if not ((target <= 0) | (target == 1)).all():
        raise ValueError(
            "targets: got values above 0 that are not 1 (or nan), expected 1, 0 or negative = unknown; "
            "threshold soft targets first."
        )
    return score, target


def _checked_threshold(threshold: float | ArrayLike, score: torch.Tensor) -> torch.Tensor:
    limit = torch.as_tensor(threshold, dtype=torch.float64).detach().to(score.device)
    if limit.ndim and limit.shape != score.shape[1:]:
        raise ValueError(
            f"threshold: got shape {tuple(limit.shape)}, expected a number or [{score.shape[1]}], one per class."
        )
    if limit.isnan().any():
        raise ValueError("threshold: got nan, expected numbers; use infinity for a class that is never predicted.")
    return limit.to(score.dtype) if score.is_floating_point() else limit


def _tensor(values: ArrayLike, name: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    if isinstance(values, np.ndarray):
        # torch takes neither read-only memory nor negative strides.
        return torch.from_numpy(np.require(np.ascontiguousarray(values), requirements=["C", "W"]))
    raise TypeError(f"{name}: got {type(values).__name__}, expected a torch tensor or a numpy array; wrap it in one.")


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / max(precision + recall, 1e-300)
