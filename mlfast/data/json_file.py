"""One JSON file per split, as the paper's code has it: `{"classes": [...], "images": [[path, [labels]], ...]}`.

Paths are relative to the file. A third element of an image is a list of labels known to be absent; if any image has
one, whatever no list names is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel, Unlabelled, checked_classes
from mlfast.data.sources import Sources, safe_path, shown
from mlfast.files import atomic_write


def splits(sources: Sources, *, file: str | None = None, **_: Any) -> list[str]:
    """The JSON files of the folder."""
    if file is not None:
        return ["all"]
    return [name[:-5] for name in sources.listing(".") if name.endswith(".json")]


def read(
    sources: Sources,
    split: str,
    *,
    file: str | None = None,
    unlabelled: Unlabelled = "keep",
    classes: Sequence[str] | None = None,
    unknown_labels: OnUnknownLabel = "error",
) -> Annotations:
    """Read one split.

    Args:
        sources: the root folder.
        split: name of the split.
        file: relative to the root, default `<split>.json`.
        unlabelled: "keep" images without labels as all negative, as the released code does, or "drop" them.
        classes: names in order; default the file's, sorted as the released code sorts them.
        unknown_labels: "error"; or "ignore" and count labels that are not classes, as the released code does.
    """
    file = f"{split}.json" if file is None else safe_path(file, "file")
    content = sources.json(file)
    place = str(sources.root / file)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("classes", "images")):
        raise AnnotationError(f'{place}: expected an object {{"classes": [...], "images": [[path, [labels]], ...]}}.')
    collector = Collector(_sorted(content["classes"], place) if classes is None else classes, unknown_labels)
    folder = file.rpartition("/")[0]
    partial = any(isinstance(entry, list) and len(entry) == 3 for entry in content["images"])
    repeated = 0
    for number, entry in enumerate(content["images"]):
        where = f"{place}: images[{number}]"
        path, positive, negative = _entry(entry, where)
        collector.add(f"{folder}/{path}" if folder else path, positive, where, negative=negative)
        repeated += len(positive) - len(set(positive))
    if repeated:
        collector.notes.append(f"{repeated} times an image lists a label again; it counts once")
    return collector.build("json", split, sources, rest="unknown" if partial else "negative", unlabelled=unlabelled)


def write(annotations: Annotations, path: Path) -> None:
    """Write the labels of a split as `read` takes them; known negatives are listed where anything is unknown.

    The file appears only when all of it is on the disk.

    Raises:
        FileExistsError: there is such a file.
        AnnotationError: a name is no valid Unicode text.
    """
    partial = annotations.rest == "unknown" or annotations.unknown is not None
    images: list[list[Any]] = []
    for row, name in enumerate(annotations.paths):
        entry = [name, _names(annotations, annotations.positive[row])]
        if partial:
            entry.append(_names(annotations, np.flatnonzero(annotations.targets(row) == 0)))
        images.append(entry)
    text = json.dumps({"classes": list(annotations.classes), "images": images}, ensure_ascii=False)
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        near = text[max(error.start - 20, 0) : error.end + 20]
        raise AnnotationError(f"{path}: a name near {near!r} is not UTF-8 and cannot be listed; rename it.") from None
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    with atomic_write(path) as file:
        file.write(content)


def _names(annotations: Annotations, classes: np.ndarray) -> list[str]:
    return [annotations.classes[number] for number in classes.tolist()]


def _entry(entry: Any, where: str) -> tuple[str, list[str], list[str]]:
    if not isinstance(entry, list) or len(entry) not in (2, 3) or not all(isinstance(part, list) for part in entry[1:]):
        raise AnnotationError(f"{where}: got {shown(entry)}, expected [path, [labels]].")
    path, positive, *negative = entry
    return safe_path(path, where), _texts(positive), _texts(negative[0] if negative else [])


def _texts(labels: list[Any]) -> list[Any]:
    """Numbers as text: the paper's VG500 has them."""
    return [str(label) if type(label) is int else label for label in labels]


def _sorted(classes: list[Any], place: str) -> list[str]:
    try:
        return checked_classes(_texts(sorted(classes)))
    except (TypeError, AnnotationError) as error:
        raise AnnotationError(f"{place}: {error}") from None
