"""Images in folders: `<split>/<class>/image.jpg`, or Hugging Face's imagefolder with a `metadata.jsonl` in the split.

The same file (name and content) in the folders of several classes is one image with several labels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel
from mlfast.data.sources import Sources, safe_path, shown

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
    twins: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)  # same name and size: perhaps one image
    for label in sources.listing(split_folder):
        top = sources.root / split_folder / label
        if not top.is_dir():
            continue
        for folder, _, files in sorted(os.walk(top)):
            sources.exists(os.path.relpath(folder, sources.root))
            for file in sorted(files):
                if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                    path = os.path.join(folder, file)
                    twins[file, os.path.getsize(path)].append((label, path))
    for found in twins.values():
        same: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for label, path in found:
            alone = len(found) == 1
            same["" if alone else _digest(sources.path(os.path.relpath(path, sources.root)))].append((label, path))
        for copies in same.values():
            path = os.path.relpath(copies[0][1], sources.root)
            collector.add(path, sorted({label for label, _ in copies}), str(copies[0][1]))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
