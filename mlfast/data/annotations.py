"""The one internal form of every data set's labels, whatever files they came from.

Positives are lists of class numbers (CSR), so that a million images with thousands of classes fit in memory; the dense
row of 1, 0 and -1 is made per image or per batch. Everything is a numpy array: worker processes share it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mlfast.data.statistics import Statistics

_PAIRS_AT_ONCE = 1 << 23


class AnnotationError(ValueError):
    """Something in the files of a data set is not as it must be; the message says where, what, and the remedy."""


class PathList(Sequence[str]):
    """Relative file names in two arrays instead of a million Python objects.

    Attributes:
        blob: uint8, the names one after the other, encoded as the file system does.
        offsets: int64 [N + 1], where each name starts.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, names: Iterable[str]) -> PathList:
        """Pack the names."""
        encoded = [os.fsencode(name) for name in names]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(name) for name in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> str, slice or array -> PathList
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def select(self, indices: np.ndarray) -> PathList:
        """The names at these places, int64 [M], in this order."""
        return PathList(*_gather(self.blob, self.offsets, indices))


@dataclass(frozen=True, eq=False)
class LabelLists:
    """For each image a sorted list of class numbers without repetition (CSR).

    Attributes:
        indptr: int64 [N + 1].
        indices: int32 [total].
    """

    indptr: np.ndarray
    indices: np.ndarray

    @classmethod
    def from_pairs(cls, images: np.ndarray, classes: np.ndarray, num_images: int, num_classes: int) -> LabelLists:
        """From (image, class) pairs, int [P] each, in any order; repeated pairs count once."""
        # Sorted by hand: pairs come nearly in order, which a stable sort profits from, and np.unique hashes instead.
        codes = np.asarray(images, np.int64) * max(num_classes, 1) + np.asarray(classes, np.int64)
        codes.sort(kind="stable")
        rows, columns = np.divmod(codes[np.diff(codes, prepend=-1) > 0], max(num_classes, 1))
        indptr = np.zeros(num_images + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=num_images), out=indptr[1:])
        return cls(indptr, columns.astype(np.int32))

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, image: int) -> np.ndarray:
        return self.indices[self.indptr[image] : self.indptr[image + 1]]

    def images(self) -> np.ndarray:
        """The image of every entry of `indices`, int64 [total]."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    def select(self, images: np.ndarray) -> LabelLists:
        """The lists of these images, int64 [M]."""
        indices, indptr = _gather(self.indices, self.indptr, images)
        return LabelLists(indptr, indices)

    def without(self, other: LabelLists, num_classes: int) -> LabelLists:
        """The lists without the classes that the image has in the other lists too."""
        codes, others = (lists.images() * num_classes + lists.indices for lists in (self, other))
        keep = ~np.isin(codes, others, assume_unique=True)
        return LabelLists.from_pairs(self.images()[keep], self.indices[keep], len(self), num_classes)


@dataclass(frozen=True, eq=False)
class Shards:
    """Where images lie that are not files of their own.

    Attributes:
        form: "tar" or "parquet".
        files: shards, relative to the root.
        shard: int32 [N], number of the shard that holds the image.
        position: int64 [N, 2]: offset and length in a tar; row group and row in it in a parquet file.
        column: of the images in parquet files.
    """

    form: Literal["tar", "parquet"]
    files: tuple[str, ...]
    shard: np.ndarray
    position: np.ndarray
    column: str = ""

    def select(self, images: np.ndarray) -> Shards:
        """The places of these images, int64 [M]."""
        return replace(self, shard=self.shard[images], position=self.position[images])


class Cooccurrence(NamedTuple):
    """How often classes go together, counted in images: int64 [K, K] each.

    `together[i, j]` images have both i and j; of `known[i, j]` images with i it is known whether they have j. The
    conditional probability P(j | i) is `together / known`.
    """

    together: np.ndarray
    known: np.ndarray


@dataclass(frozen=True, eq=False)
class Annotations:
    """The images of one split and their labels.

    Attributes:
        kind: the format it was read from, e.g. "voc2007".
        split: e.g. "train".
        root: the folder that `paths` are relative to.
        classes: K names, in the order of the targets.
        paths: N relative paths with forward slashes; names inside the shards where there are shards.
        positive: the labels that images have.
        rest: what holds for a class that is in no list of the image: "negative" or "unknown".
        negative: labels known to be absent; only where the rest is unknown.
        unknown: labels of which nothing is known; only where the rest is negative.
        notes: what reading left out or put right, in words, with counts.
        shards: set if the images lie in tar or parquet files.
    """

    kind: str
    split: str
    root: Path
    classes: tuple[str, ...]
    paths: PathList
    positive: LabelLists
    rest: Literal["negative", "unknown"] = "negative"
    negative: LabelLists | None = None
    unknown: LabelLists | None = None
    notes: tuple[str, ...] = ()
    shards: Shards | None = None

    def __post_init__(self) -> None:
        wrong = self.negative if self.rest == "negative" else self.unknown
        if wrong is not None:
            raise ValueError(
                f"rest is {self.rest!r}: a list of the {self.rest} labels says the same again; leave it out."
            )
        for lists in (self.positive, self.negative, self.unknown):
            if lists is not None and len(lists) != len(self.paths):
                raise ValueError(f"got labels of {len(lists)} images and {len(self.paths)} paths.")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    def targets(self, index: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """The target of an image, int8 [K], or of M images, int8 [M, K]: 1 has the label, 0 has not, -1 unknown."""
        images = np.atleast_1d(np.asarray(index, np.int64))
        if len(images) and not -len(self) <= images.min() <= images.max() < len(self):
            raise IndexError(f"index: got {index!r} of {len(self)} images.")
        images = np.where(images < 0, images + len(self), images)
        dense = np.full((len(images), self.num_classes), 0 if self.rest == "negative" else -1, np.int8)
        # Positives last: they win over a wrong second entry.
        for lists, value in ((self.negative, 0), (self.unknown, -1), (self.positive, 1)):
            if lists is not None:
                chosen = lists.select(images)
                dense[chosen.images(), chosen.indices] = value
        return dense[0] if np.ndim(index) == 0 else dense

    def subset(self, indices: Sequence[int] | np.ndarray) -> Annotations:
        """These images, in this order; the classes stay."""
        images = np.arange(len(self))[np.asarray(indices, np.int64)]
        return replace(
            self,
            paths=self.paths.select(images),
            positive=self.positive.select(images),
            negative=None if self.negative is None else self.negative.select(images),
            unknown=None if self.unknown is None else self.unknown.select(images),
            shards=None if self.shards is None else self.shards.select(images),
        )

    def counts(self) -> np.ndarray:
        """Images that have each class, int64 [K]."""
        return np.bincount(self.positive.indices, minlength=self.num_classes)

    def known_counts(self) -> np.ndarray:
        """Images of which it is known whether they have the class, int64 [K]."""
        if self.rest == "negative":
            return len(self) - _counts(self.unknown, self.num_classes)
        return self.counts() + _counts(self.negative, self.num_classes)

    def labels_per_image(self) -> np.ndarray:
        """Positives of each image, int64 [N]."""
        return np.diff(self.positive.indptr)

    def cooccurrence(self) -> Cooccurrence:
        """Counts of images, never of objects, with unknown labels left out: what a graph branch is made from."""
        together = _pair_counts(self.positive, self.positive, self.num_classes)
        if self.rest == "unknown":
            return Cooccurrence(together, together + _pair_counts(self.positive, self.negative, self.num_classes))
        with_first = np.broadcast_to(self.counts()[:, None], together.shape)
        return Cooccurrence(together, with_first - _pair_counts(self.positive, self.unknown, self.num_classes))

    def statistics(self) -> Statistics:
        """The row of the paper's Table 1, frequencies and imbalance."""
        return Statistics.of(self.classes, self.labels_per_image(), self.counts(), self.known_counts())


def concatenate(parts: Sequence[Annotations]) -> Annotations:
    """Several splits as one; they must agree in root, classes and in what the rest is, and not share an image."""
    first = parts[0]
    for part in parts[1:]:
        if (part.root, part.classes, part.rest) != (first.root, first.classes, first.rest):
            raise ValueError(
                f"The splits {first.split!r} and {part.split!r} cannot be joined: their root, classes or rule differ; "
                "give both the same list of classes."
            )
    paths = PathList.of(path for part in parts for path in part.paths)
    if shared := len(paths) - len(set(paths)):
        raise ValueError(f"The splits {', '.join(part.split for part in parts)} share {shared} images; join others.")
    positives = [part.positive for part in parts]
    return replace(
        first,
        split="+".join(part.split for part in parts),
        paths=paths,
        positive=_join(positives),
        negative=_join_optional([part.negative for part in parts], positives),
        unknown=_join_optional([part.unknown for part in parts], positives),
        notes=tuple(f"{part.split}: {note}" for part in parts for note in part.notes),
        shards=_join_shards([part.shards for part in parts if part.shards is not None]),
    )


def _join(lists: Sequence[LabelLists]) -> LabelLists:
    lengths = np.concatenate([np.diff(part.indptr) for part in lists])
    return LabelLists(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([part.indices for part in lists]))


def _join_optional(lists: Sequence[LabelLists | None], positives: Sequence[LabelLists]) -> LabelLists | None:
    if all(part is None for part in lists):
        return None
    return _join([_none_of(len(first)) if part is None else part for part, first in zip(lists, positives, strict=True)])


def _none_of(num_images: int) -> LabelLists:
    return LabelLists(np.zeros(num_images + 1, np.int64), np.empty(0, np.int32))


def _join_shards(parts: Sequence[Shards]) -> Shards | None:
    if not parts:
        return None
    starts = np.cumsum([0, *[len(part.files) for part in parts]])
    return Shards(
        parts[0].form,
        tuple(file for part in parts for file in part.files),
        np.concatenate([part.shard + start for part, start in zip(parts, starts, strict=False)]).astype(np.int32),
        np.concatenate([part.position for part in parts]),
        parts[0].column,
    )


def _gather(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs `values[offsets[r]:offsets[r + 1]]` of these rows one after the other, and their offsets."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    new_offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=new_offsets[1:])
    places = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], lengths)
    return values[places], new_offsets


def _counts(lists: LabelLists | None, num_classes: int) -> np.ndarray:
    return np.bincount([] if lists is None else lists.indices, minlength=num_classes)


def _pair_counts(first: LabelLists, second: LabelLists | None, num_classes: int) -> np.ndarray:
    """Images with class i in the first lists and class j in the second, int64 [K, K]."""
    total = np.zeros(num_classes * num_classes, np.int64)
    if second is None:
        return total.reshape(num_classes, num_classes)
    per_entry = np.diff(second.indptr)[first.images()]  # partners of every entry of the first
    ends = np.cumsum(per_entry)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + _PAIRS_AT_ONCE, side="right")), start + 1)
        partners, _ = _gather(second.indices, second.indptr, first.images()[start:stop])
        codes = np.repeat(first.indices[start:stop].astype(np.int64), per_entry[start:stop]) * num_classes + partners
        if total.size <= codes.size:
            total += np.bincount(codes, minlength=total.size)
        else:
            codes, repeats = np.unique(codes, return_counts=True)
            total[codes] += repeats
        start = stop
    return total.reshape(num_classes, num_classes)
