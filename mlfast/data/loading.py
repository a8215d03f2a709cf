"""Any data set by the name of its format."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlfast.data.annotations import Annotations, LabelLists, PathList, concatenate
from mlfast.data.cache import annotations_path, cache_folder, read_annotations, write_annotations
from mlfast.data.sources import Sources
from mlfast.value_types import described, has_type

# kind -> the module that reads it: `read(sources, split, **options)` and `splits(sources)`.
READERS = {
    "coco": "coco",
    "csv": "csv_file",
    "folder": "folder",
    "json": "json_file",
    "nus_wide": "nus_wide",
    "openimages": "openimages",
    "parquet": "parquet",
    "vg500": "vg500",
    "voc2007": "voc2007",
    "webdataset": "webdataset",
}
KINDS = (*READERS, "digits")


def load_annotations(
    kind: str,
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Annotations:
    """Read the labels of one split; no image is opened.

    The result is kept in a cache and taken from there until a file that it was read from changes.

    Args:
        kind: the format, one of `KINDS`.
        root: the folder of the data set; None for "digits".
        split: e.g. "train"; "train+test" joins two.
        cache_dir: default `$XDG_CACHE_HOME/mlfast`, or `~/.cache/mlfast` where that variable is not set.
        options: those of the format, see docs/data.md.

    Raises:
        AnnotationError: a file is missing or holds something wrong; the message has file, line and content.
        ValueError: there is no such kind, option or value of an option.
    """
    if kind == "digits":
        return _digits(split, cache_dir, options)
    module = reader(kind)
    check_options(kind, options)
    if root is None:
        raise ValueError(f"root: {kind} needs the folder of the data set; only the digits are built in.")
    parts = [_load(kind, module, Path(root), part, options, cache_folder(cache_dir)) for part in split.split("+")]
    return parts[0] if len(parts) == 1 else concatenate(parts)


def reader(kind: str) -> ModuleType:
    """The module that reads this format.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in READERS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}{hint}")
    return importlib.import_module(f"mlfast.data.{READERS[kind]}")


def options_of(module: ModuleType) -> dict[str, inspect.Parameter]:
    """The options of a format: the keyword arguments of its `read`."""
    parameters = inspect.signature(module.read).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _load(kind: str, module: ModuleType, root: Path, split: str, options: dict[str, Any], folder: Path) -> Annotations:
    sources = Sources(root)
    path = annotations_path(kind, sources, split, options, folder)
    annotations = read_annotations(path, sources)
    if annotations is None:
        annotations = module.read(sources, split, **options)
        write_annotations(path, annotations, sources)
    return annotations


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Check that the format has these options, and the types of their values.

    Raises:
        ValueError: there is no such kind or option, or a value is of another type.
    """
    module = reader(kind)
    known: Sequence[str] = list(options_of(module))
    types = typing.get_type_hints(module.read)
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind} has no option {name!r}; it has: {', '.join(known) or 'none'}.{hint}")
        if not has_type(value, types[name]):
            raise ValueError(f"{name}: got {value!r}, expected {described(types[name])}")


def _digits(split: str, cache_dir: str | os.PathLike[str] | None, options: dict[str, Any]) -> Annotations:
    """The labels of the built-in scenes; their images are in memory, in `DigitScenes`."""
    from mlfast.data.digits import DigitScenes

    scenes = DigitScenes(split, cache_dir=cache_dir, **options)
    images, classes = np.nonzero(scenes.targets.numpy())
    return Annotations(
        kind="digits",
        split=split,
        root=cache_folder(cache_dir),
        classes=tuple(scenes.classes),
        paths=PathList.of(f"{split}/{number}" for number in range(len(scenes))),
        positive=LabelLists.from_pairs(images, classes, len(scenes), len(scenes.classes)),
    )
