"""Open Images V4 to V7: human-verified image labels. Verified negatives are negatives, everything else is unknown.

The files, below the root or in `annotations/`: `<...><split>-annotations-human-imagelabels[-boxable].csv`, the class
descriptions, and for `expand` the hierarchy `bbox_labels_600_hierarchy.json`. Images are `<split>/<ImageID>.jpg`.

The label files have up to 60 million rows `ImageID,Source,LabelName,Confidence`, so they are parsed as arrays of bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations, LabelLists, PathList
from mlfast.data.sources import Sources, shown

_CHUNK_BYTES = 1 << 26
_ID_LENGTH, _LABEL_LENGTH = 16, 16
_DESCRIPTIONS = {
    "boxable": ("oidv7-class-descriptions-boxable.csv", "class-descriptions-boxable.csv"),
    "all": ("oidv7-class-descriptions.csv", "oidv6-class-descriptions.csv", "class-descriptions.csv"),
}
_HIERARCHY = "bbox_labels_600_hierarchy.json"


def splits(sources: Sources, **_: Any) -> list[str]:
    """The paper trains on train and test together (`train+test`) and tests on validation."""
    return ["train", "validation", "test"]


def read(
    sources: Sources,
    split: str,
    *,
    class_set: Literal["boxable", "all"] = "boxable",
    expand: bool = False,
) -> Annotations:
    """Read one split.

    Args:
        sources: the root folder.
        split: "train", "validation" or "test".
        class_set: "boxable": the 601 classes, as in the paper; "all" classes of the description file.
        expand: follow the hierarchy: a positive makes its parents positive, a negative its children negative.
    """
    if class_set not in _DESCRIPTIONS:
        raise ValueError(f'class_set: got {class_set!r}, expected "boxable" or "all".')
    mids, classes = _classes(sources, sources.first_of(*_places(*_DESCRIPTIONS[class_set])))
    file = _label_file(sources, split, class_set)
    ids, labels, values, outside = _rows(sources, file, mids)
    notes = [f"{outside} rows are about other classes and were left out"] if outside else []
    images, image = np.unique(ids, return_inverse=True)
    if expand:
        above = _parents(sources.json(sources.first_of(*_places(_HIERARCHY))), mids)
        image, labels, values = _expanded(image, labels, values, above)
    positive = LabelLists.from_pairs(image[values], labels[values], len(images), len(classes))
    negative = LabelLists.from_pairs(image[~values], labels[~values], len(images), len(classes))
    denied, negative = len(negative.indices), negative.without(positive, len(classes))
    if contradictory := denied - len(negative.indices):
        notes.append(f"{contradictory} labels are both verified and denied; they count as positive")
    return Annotations(
        kind="openimages",
        split=split,
        root=sources.root,
        classes=tuple(classes),
        paths=_image_paths(split, images),
        positive=positive,
        rest="unknown",
        negative=negative,
        notes=tuple(notes),
    )


def _places(*names: str) -> list[str]:
    return [folder + name for name in names for folder in ("", "annotations/")]


def _label_file(sources: Sources, split: str, class_set: str) -> str:
    """The file for the classes if it is there, else the one with all classes."""
    name = f"{split}-annotations-human-imagelabels"
    suffixes = ("-boxable.csv", ".csv") if class_set == "boxable" else (".csv",)
    return sources.first_of(*_places(*[v + name + s for s in suffixes for v in ("oidv7-", "oidv6-", "")]))


def _classes(sources: Sources, file: str) -> tuple[list[str], list[str]]:
    """Machine names ("/m/014j1m") and the unique names in words, in the order of the file."""
    mids: list[str] = []
    names: list[str] = []
    for where, row in sources.rows(file, ","):
        if row[0] == "LabelName":
            continue
        if len(row) != 2 or not row[0].startswith("/") or len(row[0]) > _LABEL_LENGTH or row[0] in mids[-1:]:
            raise AnnotationError(f"{where}: got {shown(row)}, expected a machine name like /m/014j1m and a name.")
        mids.append(row[0])
        names.append(row[1])
    times = Counter(names)
    return mids, [f"{name} ({mid})" if times[name] > 1 else name for mid, name in zip(mids, names, strict=True)]


def _rows(sources: Sources, file: str, mids: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """ImageIDs uint64, class numbers int32 and values bool of the rows about these classes, and how many are not."""
    table = _LabelTable(mids)
    path = sources.root / file
    ids, labels, values, outside = [], [], [], 0
    for start_line, chunk in _chunks(sources, file):
        chunk_ids, label_words, chunk_values = _parse(path, chunk, start_line)
        number = table.numbers(label_words)
        known = number >= 0
        outside += int((~known).sum())
        ids.append(chunk_ids[known])
        labels.append(number[known])
        values.append(chunk_values[known])
    if not sum(map(len, ids)):
        raise AnnotationError(f"{path}: no row is about one of the {len(mids)} classes.")
    return np.concatenate(ids), np.concatenate(labels), np.concatenate(values), outside


class _LabelTable:
    """Finds the number of a machine name that is given as two 64-bit words."""

    def __init__(self, mids: list[str]) -> None:
        words = np.array([mid.encode() for mid in mids], f"S{_LABEL_LENGTH}").view(np.uint64).reshape(-1, 2)
        hashes = self._hash(words)
        self._order = np.argsort(hashes)
        self._words, self._hashes = words[self._order], hashes[self._order]
        if (np.diff(self._hashes) == 0).any():
            raise AnnotationError("The class descriptions name a machine name twice.")

    def numbers(self, words: np.ndarray) -> np.ndarray:
        """The class numbers, int32; -1 for a name that is not a class."""
        place = np.minimum(np.searchsorted(self._hashes, self._hash(words)), len(self._hashes) - 1)
        return np.where((self._words[place] == words).all(1), self._order[place], -1).astype(np.int32)

    @staticmethod
    def _hash(words: np.ndarray) -> np.ndarray:
        mixed = words[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ words[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
        return mixed ^ mixed >> np.uint64(29)


def _chunks(sources: Sources, file: str) -> Iterator[tuple[int, np.ndarray]]:
    """(number of its first line, bytes) of pieces that end with a line, without the header and carriage returns."""
    line, rest = 1, b""
    for block in sources.blocks(file, _CHUNK_BYTES):
        block = rest + block
        end = block.rfind(b"\n") + 1
        block, rest = block[:end], block[end:]
        if block and line == 1:
            header, _, block = block.partition(b"\n")
            _check_header(header, sources.root / file)
            line = 2
        if block:
            yield line, np.frombuffer(block.replace(b"\r", b""), np.uint8)
            line += block.count(b"\n")
    if line == 1:
        _check_header(rest, sources.root / file)
    elif rest.strip():
        yield line, np.frombuffer(rest.replace(b"\r", b"") + b"\n", np.uint8)


def _check_header(header: bytes, path: Path) -> None:
    if header.strip().split(b",")[:4] != [b"ImageID", b"Source", b"LabelName", b"Confidence"]:
        got = shown(header.strip().decode(errors="replace"))
        raise AnnotationError(f"{path}, line 1: got {got}, expected ImageID,Source,LabelName,Confidence.")


def _parse(path: Path, data: np.ndarray, start_line: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ImageIDs uint64 [R], label names uint64 [R, 2] and values bool [R] of complete lines."""
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    commas = np.flatnonzero(data == ord(","))
    if len(commas) != 3 * len(ends):
        _raise_first_wrong(path, data, starts, ends, start_line)
    first, second, third = commas.reshape(-1, 3).T
    length, confidence = third - second - 1, ends - third - 1
    fine = (first - starts == _ID_LENGTH) & (second > first) & (length > 0) & (length <= _LABEL_LENGTH)
    value = data[np.minimum(third + 1, len(data) - 1)]
    # 1, 0, 1.0 or 0.0; a verified label has nothing between.
    fine &= ((value == ord("0")) | (value == ord("1"))) & ((confidence == 1) | (confidence == 3)) & (third < ends)
    fine &= (confidence == 1) | (data[np.minimum(third + 3, len(data) - 1)] == ord("0"))
    if not fine.all():
        _raise_first_wrong(path, data, starts, ends, start_line)
    digits = _hex_digits(_sixteen_bytes(data, starts))
    if (digits > 15).any():
        _raise_first_wrong(path, data, starts, ends, start_line)
    ids = digits[:, 0].astype(np.uint64)
    for column in range(1, _ID_LENGTH):
        ids = ids << np.uint64(4) | digits[:, column]
    labels = _sixteen_bytes(data, second + 1)
    labels[np.arange(_LABEL_LENGTH) >= length[:, None]] = 0
    return ids, labels.view(np.uint64), value == ord("1")


def _sixteen_bytes(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The 16 bytes from each place on, uint8 [R, 16]; zeros behind the end."""
    padded = np.concatenate([data, np.zeros(16, np.uint8)])
    overlapping = np.ndarray(len(data) + 1, "V16", padded, strides=(1,))
    return overlapping[starts].view(np.uint8).reshape(-1, 16)


def _hex_digits(characters: np.ndarray) -> np.ndarray:
    """The values of lower-case hexadecimal digits; 255 for other characters."""
    table = np.full(256, 255, np.uint8)
    table[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
    return table[characters]


def _raise_first_wrong(path: Path, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, start_line: int) -> NoReturn:
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        line = data[start:end].tobytes().decode(errors="replace")
        parts = line.split(",")
        good_id = len(parts[0]) == _ID_LENGTH and not set(parts[0]) - set("0123456789abcdef")
        good = len(parts) == 4 and good_id and parts[3] in ("0", "1", "0.0", "1.0")
        if not good or not 0 < len(parts[2]) <= _LABEL_LENGTH:
            raise AnnotationError(
                f"{path}, line {start_line + number}: got {shown(line)}, expected an ImageID of 16 hexadecimal digits, "
                "a source, a label name and a confidence of 0 or 1; machine-generated labels are not for this reader."
            )
    raise AssertionError("a wrong line was seen but not found")


def _image_paths(split: str, ids: np.ndarray) -> PathList:
    """`<split>/<ImageID>.jpg` of every image, without making a million strings."""
    shifts = np.arange(60, -1, -4, dtype=np.uint64)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[(ids[:, None] >> shifts & np.uint64(15)).astype(np.uint8)]
    prefix, suffix = (np.frombuffer(text.encode(), np.uint8) for text in (f"{split}/", ".jpg"))
    rows = [np.broadcast_to(part, (len(ids), part.shape[-1])) for part in (prefix, digits, suffix)]
    blob = np.concatenate(rows, axis=1)
    return PathList(blob.reshape(-1), np.arange(len(ids) + 1, dtype=np.int64) * blob.shape[1])


def _parents(tree: Any, mids: list[str]) -> np.ndarray:
    """Whether class j is above class i, at any distance, bool [K, K].

    Kinds alone ("Subcategory"), as in Google's own oid_hierarchical_labels_expansion.py: the tree lists parts too, but
    an image of a wheel need not show a car.
    """
    number = {mid: n for n, mid in enumerate(mids)}
    above = np.zeros((len(mids), len(mids)), bool)

    def walk(node: dict[str, Any], ancestors: list[int]) -> None:
        own = number.get(node.get("LabelName", ""))
        if own is not None:
            above[own, ancestors] = True
            ancestors = [*ancestors, own]
        for child in node.get("Subcategory", []):
            walk(child, ancestors)

    walk(tree, [])
    return above


def _expanded(
    image: np.ndarray, labels: np.ndarray, values: np.ndarray, above: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows with those added that follow from the hierarchy."""
    images, all_labels, all_values = [image], [labels], [values]
    for value, implies in ((True, above), (False, above.T)):
        of, what = np.nonzero(implies)
        implied = LabelLists.from_pairs(of, what, len(above), len(above))
        rows = np.flatnonzero(values == value)
        added = implied.select(labels[rows])
        images.append(np.repeat(image[rows], np.diff(added.indptr)))
        all_labels.append(added.indices)
        all_values.append(np.full(len(added.indices), value))
    return np.concatenate(images), np.concatenate(all_labels), np.concatenate(all_values)
