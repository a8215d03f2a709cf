"""Images in folders: `<split>/<class>/image.jpg`, or Hugging Face's imagefolder with a `metadata.jsonl` in the split.

The same file (name and content) in the folders of several classes is one image with several labels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel
from mlfast.data.images import SUFFIXES
from mlfast.data.sources import Sources, safe_path, shown


def splits(sources: Sources, **_: Any) -> list[str]:
    """The folders of the root."""
    return [name for name in sources.listing(".") if (sources.root / name).is_dir()]


def read(
    sources: Sources,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    unknown_labels: OnUnknownLabel = "error",
) -> Annotations:
    """Read one split.

    Args:
        sources: the root folder.
        split: the folder below it.
        classes: names in order; default what is found, sorted.
        unknown_labels: "error", or "ignore" and count labels that are not classes.
    """
    split_folder = safe_path(split, "split")
    collector = Collector(classes, unknown_labels)
    metadata = f"{split_folder}/metadata.jsonl"
    if sources.exists(metadata):
        _add_listed(collector, sources, metadata)
    elif sources.exists(table := f"{split_folder}/metadata.csv"):
        raise AnnotationError(
            f"{sources.root / table} says what the images are, and kind folder reads metadata.jsonl alone; read it as "
            f"kind csv with the options file={table} and image_folder={split_folder}, or rename it if it is no list."
        )
    else:
        _add_found(collector, sources, split_folder)
    return collector.build("folder", split, sources)


def _add_listed(collector: Collector, sources: Sources, metadata: str) -> None:
    folder = metadata.rpartition("/")[0]
    for where, line in sources.lines(metadata):
        try:
            entry: Any = json.loads(line)
        except ValueError as error:
            raise AnnotationError(f"{where}: not JSON ({error}): {shown(line)}") from None
        labels = entry.get("labels") if isinstance(entry, dict) else None
        if not isinstance(labels, list) or "file_name" not in entry:
            expected = '{"file_name": "...", "labels": ["...", ...]}'
            raise AnnotationError(f"{where}: got {shown(line)}, expected {expected}.")
        names = [str(label) if type(label) is int else label for label in labels]
        collector.add(f"{folder}/{safe_path(entry['file_name'], where)}", names, where)


def _add_found(collector: Collector, sources: Sources, split_folder: str) -> None:
    same_name: dict[str, list[tuple[str, str]]] = defaultdict(list)  # file name -> label and path: perhaps one image
    for label in sources.listing(split_folder):
        if (sources.root / split_folder / label).is_dir():
            for path in _images_below(sources, f"{split_folder}/{label}"):
                same_name[path.rpartition("/")[2]].append((label, path))
    for found in same_name.values():
        for copies in _equal(sources, found):
            collector.add(copies[0][1], sorted({label for label, _ in copies}), str(sources.root / copies[0][1]))


def _images_below(sources: Sources, folder: str) -> Iterator[str]:
    files, folders = sources.files_and_folders(folder)
    for name in files:
        if name.lower().endswith(SUFFIXES):
            yield f"{folder}/{name}"
    for name in folders:
        yield from _images_below(sources, f"{folder}/{name}")


def _equal(sources: Sources, found: list[tuple[str, str]]) -> Iterable[list[tuple[str, str]]]:
    """Those with the same content together. Only where names are equal are sizes, and then contents, looked at."""
    if len(found) == 1:
        return [found]
    by_size: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for label, path in found:
        by_size[sources.size(path)].append((label, path))
    by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for size, group in by_size.items():
        for label, path in group:
            by_content[sources.digest(path) if len(group) > 1 else str(size)].append((label, path))
    return by_content.values()
