"""Gathers images and their labels one by one while a format is read, and makes `Annotations` of them."""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations, LabelLists, PathList, Shards
from mlfast.data.sources import Sources, safe_path, shown

OnUnknownLabel = Literal["error", "ignore"]
Unlabelled = Literal["keep", "drop"]


class _Pairs:
    """(image, class) pairs that grow."""

    def __init__(self) -> None:
        self.images, self.classes = array("q"), array("q")

    def lists(self, num_images: int, order: np.ndarray) -> LabelLists:
        """As lists, with the classes renumbered by `order`."""
        classes = order[np.frombuffer(self.classes, np.int64)] if len(self.classes) else np.empty(0, np.int64)
        images = np.frombuffer(self.images, np.int64) if len(self.images) else np.empty(0, np.int64)
        return LabelLists.from_pairs(images, classes, num_images, len(order))


class Collector:
    """Takes the images of a split with their labels.

    An image that comes again adds its labels to the first; a positive wins over a negative, and a negative over an
    unknown. Both are counted in the notes.

    Args:
        classes: the class names in order; None takes the labels that come, sorted (as numbers if all are numbers).
        unknown_labels: what to do with a label that is not among `classes`: "error", or "ignore" and count.
    """

    def __init__(self, classes: Sequence[str] | None, unknown_labels: OnUnknownLabel = "error") -> None:
        if unknown_labels not in ("error", "ignore"):
            raise ValueError(f'unknown_labels: got {unknown_labels!r}, expected "error" or "ignore".')
        self.notes: list[str] = []
        self._fixed = classes is not None
        self._numbers = {name: number for number, name in enumerate(checked_classes(classes or ()))}
        self._unknown_labels = unknown_labels
        self._images: dict[str, int] = {}
        self._positive, self._negative, self._unknown = _Pairs(), _Pairs(), _Pairs()
        self._repeats = 0
        self._ignored: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        path: str,
        positive: Sequence[str],
        where: str,
        negative: Sequence[str] = (),
        unknown: Sequence[str] = (),
    ) -> None:
        """One image, or more labels of one.

        Args:
            path: relative to the root.
            positive: labels that it has; likewise `negative` and `unknown`.
            where: the place in the file, for messages.

        Raises:
            AnnotationError: the path leads out of the folder, or a label is not a class.
        """
        path = safe_path(path, where)
        image = len(self._images)
        if path in self._images:
            image = self._images[path]
            self._repeats += 1
        else:
            self._images[path] = image
        for pairs, labels in ((self._positive, positive), (self._negative, negative), (self._unknown, unknown)):
            if labels:
                # A million images come through here: what is known is looked up at once, the rest one by one.
                try:
                    numbers = [self._numbers[label] for label in labels]
                except (KeyError, TypeError):
                    numbers = [number for label in labels if (number := self._number(label, where)) is not None]
                pairs.images.extend([image] * len(numbers))
                pairs.classes.extend(numbers)

    def build(
        self,
        kind: str,
        split: str,
        sources: Sources,
        *,
        rest: Literal["negative", "unknown"] = "negative",
        unlabelled: Unlabelled = "keep",
        shards: Shards | None = None,
    ) -> Annotations:
        """Everything that was added.

        Args:
            kind: see `Annotations`; likewise `split`, `rest` and `shards`.
            sources: where it came from.
            unlabelled: "drop" leaves out the images without a positive.

        Raises:
            AnnotationError: there is no image or no class.
            ValueError: `unlabelled` is neither "keep" nor "drop".
        """
        if unlabelled not in ("keep", "drop"):
            raise ValueError(f'unlabelled: got {unlabelled!r}, expected "keep" or "drop".')
        if not self._images or not self._numbers:
            missing = "image" if not self._images else "label"
            raise AnnotationError(f"{kind}, split {split!r}: {sources.root} holds no {missing}.")
        classes = list(self._numbers) if self._fixed else _sorted_classes(self._numbers)
        place = {name: number for number, name in enumerate(classes)}
        order = np.array([place[name] for name in self._numbers])
        positive, negative, unknown = (
            pairs.lists(len(self._images), order) for pairs in (self._positive, self._negative, self._unknown)
        )
        negative = self._without(negative, positive, len(classes))
        unknown = self._without(self._without(unknown, positive, len(classes)), negative, len(classes))
        annotations = Annotations(
            kind=kind,
            split=split,
            root=sources.root,
            classes=tuple(classes),
            paths=PathList.of(self._images),
            positive=positive,
            rest=rest,
            negative=negative if rest == "unknown" else None,
            unknown=unknown if rest == "negative" and len(unknown.indices) else None,
            notes=self._all_notes(),
            shards=shards,
        )
        return dropped_unlabelled(annotations) if unlabelled == "drop" else annotations

    def _number(self, label: object, where: str) -> int | None:
        """The number of a label, perhaps a new one, or None to leave it out."""
        if not isinstance(label, str) or not label:
            raise AnnotationError(f"{where}: got the label {shown(label)}, expected text that is not empty.")
        if label in self._numbers:
            return self._numbers[label]
        if not self._fixed:
            self._numbers[label] = len(self._numbers)
            return self._numbers[label]
        if self._unknown_labels == "error":
            near = difflib.get_close_matches(label, self._numbers, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise AnnotationError(
                f"{where}: the label {shown(label)} is not one of the {len(self._numbers)} classes.{hint} Correct it, "
                'give your own list of classes, or leave such labels out with unknown_labels="ignore".'
            )
        self._ignored[label] = self._ignored.get(label, 0) + 1
        return None

    def _without(self, lists: LabelLists, stronger: LabelLists, num_classes: int) -> LabelLists:
        """The lists without what a stronger list holds too, which is noted."""
        if not len(lists.indices) or not len(stronger.indices):
            return lists
        kept = lists.without(stronger, num_classes)
        if lost := len(lists.indices) - len(kept.indices):
            self.notes.append(f"{lost} labels were contradictory; positive went before negative before unknown")
        return kept

    def _all_notes(self) -> tuple[str, ...]:
        notes = list(self.notes)
        if self._repeats:
            notes.append(f"{self._repeats} times an image came again; its labels were joined")
        if self._ignored:
            names = ", ".join(shown(name) for name in list(self._ignored)[:5])
            notes.append(f"{sum(self._ignored.values())} labels that are not classes were left out: {names}")
        return tuple(notes)


def dropped_unlabelled(annotations: Annotations) -> Annotations:
    """Without the images that have no positive; the number goes into the notes."""
    labelled = np.flatnonzero(annotations.labels_per_image())
    if not (dropped := len(annotations) - len(labelled)):
        return annotations
    note = f"{dropped} images without labels were dropped"
    return replace(annotations.subset(labelled), notes=(*annotations.notes, note))


def checked_classes(classes: Sequence[str]) -> list[str]:
    """The class names; refuses a repetition and what is not text."""
    names = list(classes)
    for name in names:
        if not isinstance(name, str) or not name:
            raise AnnotationError(f"classes: got {shown(name)}, expected names that are text and not empty.")
    if repeated := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise AnnotationError(f"classes: {shown(repeated[0])} stands there more than once.")
    return names


def _sorted_classes(names: Iterable[str]) -> list[str]:
    names = list(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)
