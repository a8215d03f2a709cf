"""Decision thresholds per class, chosen on a split with known labels (the paper's Table 6).

Every distinct score of a positive is tried, which is exact: lowering a threshold past negatives alone makes precision
worse and recall no better. A class is predicted where ``probability >= threshold``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mlfast.evaluation.columns import Blocks, Column, Ranks, dense_blocks, map_columns, ranks
from mlfast.evaluation.metrics import ArrayLike, checked

_LARGEST_BETA = 1e6  # from there on all that counts is recall

FEW_POSITIVES = 10


@dataclass(frozen=True)
class Thresholds:
    """Thresholds and how far they can be trusted.

    Attributes:
        values: [K] float64: predict class k where ``probability >= values[k]``.
        reached: [K] what was maximised, on the split they were chosen on: F-beta, or the recall at the wanted
            precision; nan where ``default`` was taken.
        below: [K] the highest score under each threshold, nan if there is none: between the two all decide alike.
        positives: [K] positives that each choice rests on.
        defaulted: classes that got the default: without a positive, or where the precision is out of reach.
        unreliable: classes with 1 to 9 positives: their threshold follows single images.
    """

    values: np.ndarray
    reached: np.ndarray
    below: np.ndarray
    positives: np.ndarray
    defaulted: list[int]
    unreliable: list[int]

    def warning(self, classes: list[str] | None = None) -> str:
        """One line that names the classes whose thresholds deserve doubt; empty if there are none."""
        names = classes or [str(k) for k in range(len(self.values))]
        parts = []
        if self.defaulted:
            parts.append(f"the default threshold for {_listed(names, self.defaulted)}")
        if self.unreliable:
            parts.append(f"fewer than {FEW_POSITIVES} positives for {_listed(names, self.unreliable)}")
        return "; ".join(parts)


def tune_thresholds(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    beta: float = 1.0,
    min_precision: float | None = None,
    shared: bool = False,
    default: float = 0.5,
) -> Thresholds:
    """The threshold of each class that maximises F-beta, or recall at a floor of precision.

    Take probabilities of the model in evaluation mode, on images as they are tested: thresholds chosen under
    augmentation, as in the released code, are those of other images.

    Args:
        probabilities: [N, K], tensor or numpy array.
        targets: [N, K]: 1 is a positive, 0 a negative, < 0 unknown and left out.
        beta: weight of recall against precision; 1 is F1, 2 favours recall.
        min_precision: instead of F-beta, the lowest threshold with at least this precision.
        shared: one threshold for all classes, chosen over all entries together.
        default: for a class without a positive, or whose precision never reaches ``min_precision``.

    Raises:
        ValueError: as `multilabel_metrics`; ``beta`` not above 0, or ``min_precision`` not in (0, 1].
    """
    score, target = checked(probabilities, targets, "probabilities")
    blocks = dense_blocks(*(m.cpu().reshape(-1, 1) if shared else m.cpu() for m in (score, target)))
    return thresholds_of(blocks, score.shape[1], beta=beta, min_precision=min_precision, shared=shared, default=default)


def thresholds_of(
    blocks: Blocks,
    num_classes: int,
    *,
    beta: float = 1.0,
    min_precision: float | None = None,
    shared: bool = False,
    default: float = 0.5,
) -> Thresholds:
    """`tune_thresholds` of the known entries of each class, or of all of them in one column if ``shared``."""
    if not 0 < beta <= _LARGEST_BETA:
        raise ValueError(f"beta: got {beta}, expected a number above 0 and at most {_LARGEST_BETA:g}; 1 gives F1.")
    if np.isnan(default):
        raise ValueError(f"default: got {default}, expected a number.")
    if min_precision is not None and not 0 < min_precision <= 1:
        raise ValueError(f"min_precision: got {min_precision}, expected a fraction above 0 and at most 1.")
    choose = _choice(beta, min_precision)

    def of_column(column: Column) -> tuple[float, float, float, int]:
        at = ranks(column)
        value, reached = choose(at) if len(at.scores) else (np.nan, np.nan)
        lower = np.searchsorted(at.everything, value)
        below = np.nan if np.isnan(value) or lower == 0 else float(at.everything[lower - 1])
        return value, reached, below, len(at.scores)

    found = np.array(map_columns(of_column, blocks), dtype=np.float64).reshape(-1, 4)
    return _thresholds(np.repeat(found, num_classes, axis=0) if shared else found, default)


def _choice(beta: float, min_precision: float | None) -> Callable[[Ranks], tuple[float, float]]:
    def best_f(at: Ranks) -> tuple[float, float]:
        f = (1 + beta**2) * at.true / (beta**2 * len(at.true) + at.predicted)
        best = len(f) - 1 - int(np.argmax(f[::-1]))  # of equal ones the highest threshold
        return float(at.scores[best]), float(f[best])

    def recall_at_precision(at: Ranks) -> tuple[float, float]:
        good = np.flatnonzero(at.true / at.predicted >= min_precision)
        if len(good) == 0:
            return np.nan, np.nan
        return float(at.scores[good[0]]), float(at.true[good[0]] / len(at.true))

    return best_f if min_precision is None else recall_at_precision


def _thresholds(found: np.ndarray, default: float) -> Thresholds:
    values, reached, below, positives = found.T
    missing, few = np.isnan(values), (positives > 0) & (positives < FEW_POSITIVES)
    return Thresholds(
        values=np.where(missing, default, values),
        reached=reached,
        below=below,
        positives=positives.astype(np.int64),
        defaulted=np.flatnonzero(missing).tolist(),
        unreliable=np.flatnonzero(few & ~missing).tolist(),
    )


def _listed(names: list[str], which: list[int], most: int = 12) -> str:
    more = f" and {len(which) - most} more" if len(which) > most else ""
    return f"{len(which)} classes: " + ", ".join(names[k] for k in which[:most]) + more


# From which logit on a sigmoid is 1 in float32, and one that is below all where it is not 0.
_LOGIT_OF_1, _LOGIT_OF_0 = 16.6355324, -104.0


def threshold_logits(thresholds: torch.Tensor) -> torch.Tensor:
    """The logit from which a probability of float32 reaches each threshold [K]; float64, finite for 0 and 1 too."""
    return torch.logit(thresholds.double()).clamp(_LOGIT_OF_0, _LOGIT_OF_1)


def fold_thresholds(logits: torch.Tensor, thresholds: ArrayLike) -> torch.Tensor:
    """Logits [..., K] moved so that a probability of 0.5 means the class's own threshold [K], in [0, 1].

    ``z - log(t / (1 - t))``: any server with one threshold of 0.5 then decides as tuned. A NumPy array, such as
    `Thresholds.values`, is checked.

    Raises:
        ValueError: a threshold of an array is outside [0, 1].
    """
    if isinstance(thresholds, np.ndarray):
        if not ((thresholds >= 0) & (thresholds <= 1)).all():
            raise ValueError("thresholds: got values outside [0, 1] or nan, expected probabilities.")
        thresholds = torch.from_numpy(thresholds).to(logits.device)
    return logits - threshold_logits(thresholds).to(logits.dtype)
