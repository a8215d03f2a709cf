"""Parquet files as Hugging Face's `datasets` writes them: `image` (bytes and path) and `labels` (names or numbers).

`<split>-*.parquet` below the root or in `data/`. Class names come from the ClassLabel in the schema. Needs pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations, Shards
from mlfast.data.collector import Collector, OnUnknownLabel
from mlfast.data.sources import Sources, shown


def import_parquet() -> Any:
    """The module pyarrow.parquet.

    Raises:
        ModuleNotFoundError: pyarrow is not installed; the message names the remedy.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        message = 'Parquet needs pyarrow, which is not installed: pip install ".[parquet]" in a checkout of mlfast'
        raise ModuleNotFoundError(message, name="pyarrow") from error
    return pyarrow.parquet


def splits(sources: Sources, **_: Any) -> list[str]:
    """What stands before the first dash of the files' names."""
    return sorted({name.rpartition("/")[2].partition("-")[0].removesuffix(".parquet") for name in _files(sources, "*")})


def read(
    sources: Sources,
    split: str,
    *,
    image_column: str = "image",
    label_column: str = "labels",
    classes: Sequence[str] | None = None,
    unknown_labels: OnUnknownLabel = "error",
) -> Annotations:
    """Read one split.

    Args:
        sources: the root folder.
        split: the files `<split>-*.parquet` or `<split>.parquet`.
        image_column: a struct with a field `bytes`.
        label_column: lists of names, or of numbers if the schema has their names.
        classes: names in order; default those of the schema, or what is found, sorted.
        unknown_labels: "error", or "ignore" and count labels that are not classes.
    """
    import_parquet()
    files = _files(sources, split)
    if not files:
        raise AnnotationError(f"{sources.root}: no {split}-*.parquet or {split}.parquet there or in data/.")
    names = _class_names(_opened(sources, files[0]).schema_arrow, label_column)
    collector = Collector(names if classes is None else classes, unknown_labels)
    shard: list[int] = []
    position: list[tuple[int, int]] = []
    for number, file in enumerate(files):
        content = _opened(sources, file)
        place = f"{sources.root / file}"
        _check_columns(content.schema_arrow, place, image_column, label_column)
        for group in range(content.num_row_groups):
            for row, labels in enumerate(_column(content, group, label_column, place)):
                where = f"{place}, row group {group}, row {row}"
                # The images have no names that could be relied on: their place is their name.
                collector.add(f"{file}/{group}/{row}", _named(labels, names, where), where)
                shard.append(number)
                position.append((group, row))
    spots = np.array(position, np.int64).reshape(-1, 2)
    places = Shards("parquet", tuple(files), np.array(shard, np.int32), spots, image_column)
    return collector.build("parquet", split, sources, shards=places)


def _opened(sources: Sources, file: str) -> Any:
    import pyarrow

    path = sources.shard(file)
    try:
        return import_parquet().ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise AnnotationError(f"{path}: not a whole parquet file ({error}).") from None


def _column(content: Any, group: int, column: str, place: str) -> list[Any]:
    import pyarrow

    try:
        return content.read_row_group(group, [column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise AnnotationError(f"{place}, row group {group}: the column {column!r} is damaged ({error}).") from None


def _files(sources: Sources, split: str) -> list[str]:
    folders = ["", "data/"] if sources.exists("data") else [""]
    names = [folder + name for folder in folders for name in sources.listing(folder or ".")]
    wanted = (f"{split}-*.parquet", f"{split}.parquet")
    return [name for name in names if any(fnmatch(name.rpartition("/")[2], pattern) for pattern in wanted)]


def _check_columns(schema: Any, place: str, image_column: str, label_column: str) -> None:
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in schema.names:
            raise AnnotationError(f"{place}: {option} is {column!r}, but the columns are {schema.names}.")
    kind = schema.field(image_column).type
    if "bytes" not in [kind.field(n).name for n in range(kind.num_fields)]:
        raise AnnotationError(
            f"{place}: the column {image_column!r} is {kind}; expected a struct with a field 'bytes'."
        )


def _class_names(schema: Any, label_column: str) -> list[str] | None:
    """The names of the ClassLabel of the column in the metadata that `datasets` writes, however deep it stands."""
    text = (schema.metadata or {}).get(b"huggingface")
    feature = json.loads(text).get("info", {}).get("features", {}).get(label_column) if text else None
    while feature and not (isinstance(feature, dict) and "names" in feature):
        feature = feature[0] if isinstance(feature, list) else feature.get("feature")
    return feature["names"] if feature else None


def _named(labels: Any, names: list[str] | None, where: str) -> list[str]:
    labels = labels if isinstance(labels, list) else [labels]
    if all(isinstance(label, str) for label in labels):
        return labels
    if not all(type(label) is int and 0 <= label < (len(names) if names else 1 << 31) for label in labels):
        raise AnnotationError(f"{where}: got the labels {shown(labels)}, expected names, or numbers of the classes.")
    return [names[label] if names else str(label) for label in labels]
