"""What a data set is like: the columns of the paper's Table 1, class frequencies and imbalance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one split.

    Attributes:
        images: N.
        num_classes: K.
        labels_per_image: mean number of positives of an image (Table 1's "avg # of labels").
        unlabelled: images without a positive.
        positives: images with each class, int64 [K].
        frequency: positives over the images of which the class is known, float64 [K]; nan where it is never known.
        empty_classes: classes without a positive.
        unknown_share: share of unknown among all N*K (image, class) pairs.
        negatives_per_positive: over all known pairs; inf without positives. What the focusing exponents fight.
        mean_imbalance: mean over the classes with a positive of (positives of the most frequent class / positives of
            the class), "MeanIR" of Charte et al. (2015); 1 is balanced.
    """

    images: int
    num_classes: int
    labels_per_image: float
    unlabelled: int
    positives: np.ndarray
    frequency: np.ndarray
    empty_classes: tuple[str, ...]
    unknown_share: float
    negatives_per_positive: float
    mean_imbalance: float

    @classmethod
    def of(
        cls, classes: Sequence[str], labels_per_image: np.ndarray, positives: np.ndarray, known: np.ndarray
    ) -> Statistics:
        """From the positives of each image [N], and per class [K] the images that have it and that are known."""
        pairs = len(labels_per_image) * len(classes)
        filled = positives[positives > 0]
        total = int(positives.sum())
        return cls(
            images=len(labels_per_image),
            num_classes=len(classes),
            labels_per_image=float(labels_per_image.mean()) if len(labels_per_image) else 0.0,
            unlabelled=int((labels_per_image == 0).sum()),
            positives=positives,
            frequency=np.divide(positives, known, out=np.full(len(classes), np.nan), where=known > 0),
            empty_classes=tuple(name for name, count in zip(classes, positives, strict=True) if not count),
            unknown_share=1 - float(known.sum()) / pairs if pairs else 0.0,
            negatives_per_positive=(int(known.sum()) - total) / total if total else float("inf"),
            mean_imbalance=float((filled.max() / filled).mean()) if len(filled) else float("nan"),
        )
