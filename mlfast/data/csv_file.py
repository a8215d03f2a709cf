"""A CSV file: one column of labels with a delimiter, or one column per class with 1, 0, and -1 or nothing for unknown.

Both forms of Kaggle, fastai's `fname,labels,is_valid`, and ML-Decoder's NUS-WIDE `filepath,label,split_name`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel, Unlabelled
from mlfast.data.sources import Sources, safe_path, shown

_IMAGE_COLUMNS = ("image", "file_name", "filename", "filepath", "path", "fname", "image_name", "image_id", "id")
_LABEL_COLUMNS = ("labels", "label", "tags", "finding labels")
_SPLIT_COLUMNS = ("split", "split_name", "is_valid")
_DELIMITERS = ("|", ";", ",")
_VALUES = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "-1": -1, "-1.0": -1, "nan": -1, "": -1}
_FASTAI = {"true": "val", "1": "val", "false": "train", "0": "train"}  # values of its column is_valid


def splits(
    sources: Sources,
    *,
    file: str | None = None,
    split_column: str | None = None,
    separator: str | None = None,
    **_: Any,
) -> list[str]:
    """The values of the split column if one file is given, else the CSV files of the folder."""
    if file is None:
        return [name[:-4] for name in sources.listing(".") if name.endswith(".csv")]
    table = _Table(sources, safe_path(file, "file"), separator)
    part = table.column("split_column", split_column, _SPLIT_COLUMNS)
    return ["all"] if part is None else sorted({table.split_of(row, part) for _, row in table.rows})


def read(
    sources: Sources,
    split: str,
    *,
    file: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    class_columns: Sequence[str] | None = None,
    split_column: str | None = None,
    image_folder: str = "",
    image_suffix: str = "",
    separator: str | None = None,
    unlabelled: Unlabelled = "keep",
    classes: Sequence[str] | None = None,
    unknown_labels: OnUnknownLabel = "error",
) -> Annotations:
    """Read one split.

    Args:
        sources: the root folder.
        split: name of the split.
        file: relative to the root, default `<split>.csv`.
        image_column: default the first of image, file_name, filename, filepath, path, fname, image_name, image_id, id.
        label_column: the column with all labels of an image; default labels, label, tags or Finding Labels, if there.
        delimiter: between labels; default the first of | ; , that occurs in the column. A blank must be asked for.
        class_columns: columns of one class each; default, without a label column, all that are left.
        split_column: only rows with the split's name there; default split, split_name or is_valid, if `file` is given.
        image_folder: put in front of every path.
        image_suffix: put behind every path, e.g. ".jpg".
        separator: between the columns; default a tab, semicolon or comma, whichever the first line has most of.
        unlabelled: "keep" images without labels as all negative, or "drop" them.
        classes: names in order; default the class columns, or the labels of all splits in the file, sorted.
        unknown_labels: "error", or "ignore" and count labels that are not classes.
    """
    one_file = file is not None
    file = f"{split}.csv" if file is None else safe_path(file, "file")
    table = _Table(sources, file, separator)
    image = table.column("image_column", image_column, _IMAGE_COLUMNS)
    if image is None:
        raise AnnotationError(f"{table.place}: no column of images in {table.header}; name it with image_column.")
    part = table.column("split_column", split_column, _SPLIT_COLUMNS if one_file else ())
    label = None if class_columns else table.column("label_column", label_column, _LABEL_COLUMNS)
    chosen = [row for row in table.rows if part is None or table.split_of(row[1], part) == split]
    if not chosen:
        there = sorted({table.split_of(row[1], part) for row in table.rows}) if part is not None else []
        raise AnnotationError(f"{table.place}: no row of split {split!r}; there are: {', '.join(there[:8]) or 'none'}.")

    def path(row: list[str]) -> str:
        name = row[image] + image_suffix
        return f"{image_folder}/{name}" if image_folder else name

    if label is not None:
        delimiter = delimiter or _found_delimiter(row[label] for _, row in table.rows)
        if classes is None:
            classes = sorted({name for _, row in table.rows for name in _labels(row[label], delimiter)})
        collector = Collector(classes, unknown_labels)
        collector.notes.append(f"labels of column {table.header[label]!r} are split at {delimiter!r}")
        for where, row in chosen:
            collector.add(path(row), _labels(row[label], delimiter), where)
        return collector.build("csv", split, sources, unlabelled=unlabelled)

    columns = _class_columns(table, class_columns, {image, part})
    collector = Collector([table.header[c] for c in columns] if classes is None else classes, unknown_labels)
    times = Counter(path(row) for _, row in chosen)
    for where, row in chosen:
        by_value: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for c in columns:
            by_value[_value(row[c], where, table.header[c])].append(table.header[c])
        # Absent is what nobody names, so a name is needed only where another row may call it unknown.
        negative = by_value[0] if times[path(row)] > 1 else ()
        collector.add(path(row), by_value[1], where, negative=negative, unknown=by_value[-1])
    return collector.build("csv", split, sources, unlabelled=unlabelled)


class _Table:
    """The header and the rows of a CSV file, every row as long as the header."""

    def __init__(self, sources: Sources, file: str, separator: str | None) -> None:
        self.place = str(sources.root / file)
        first = sources.text(file).split("\n", 1)[0]
        separator = separator or max("\t;,", key=first.count)
        rows = list(sources.rows(file, separator))
        if not rows:
            raise AnnotationError(f"{self.place}: the file is empty; the first line must name the columns.")
        self.header = [name.strip() for name in rows[0][1]]
        self.rows = rows[1:]
        if not self.rows:
            raise AnnotationError(f"{self.place}: there are no rows below the header {self.header}.")
        if repeated := [name for name in self.header if self.header.count(name) > 1]:
            raise AnnotationError(f"{self.place}, line 1: the column {shown(repeated[0])} stands there more than once.")
        for where, row in self.rows:
            if len(row) != len(self.header):
                raise AnnotationError(
                    f"{where}: got {len(row)} fields, expected {len(self.header)} as in the header: "
                    f"{shown(separator.join(row))}. Put quotes around a field that holds {separator!r}."
                )

    def column(self, option: str, name: str | None, usual: Sequence[str]) -> int | None:
        """The number of the column that the user named, or else of the first usual one that is there."""
        if name is not None:
            if name not in self.header:
                raise AnnotationError(f"{self.place}: {option} is {name!r}, but the columns are {self.header}.")
            return self.header.index(name)
        lower = [column.lower() for column in self.header]
        return next((lower.index(column) for column in usual if column in lower), None)

    def split_of(self, row: Sequence[str], column: int) -> str:
        """The split of a row; fastai's column has true or false there, perhaps as numbers."""
        value = row[column].strip()
        return _FASTAI.get(value.lower(), value) if self.header[column].lower() == "is_valid" else value


def _found_delimiter(cells: Iterable[str]) -> str:
    text = "".join(cells)
    return next((delimiter for delimiter in _DELIMITERS if delimiter in text), "|")


def _labels(cell: str, delimiter: str) -> list[str]:
    """The labels of a cell: "a|b", or a list as Python writes it, "['a', 'b']"."""
    cell, quotes = cell.strip(), ""
    if cell.startswith("[") and cell.endswith("]"):
        cell, quotes = cell[1:-1], "'\""
    return [name for part in cell.split(delimiter) if (name := part.strip().strip(quotes or None).strip())]


def _class_columns(table: _Table, given: Sequence[str] | None, others: set[int | None]) -> list[int]:
    if given is None:
        named = {n for n, name in enumerate(table.header) if name.lower() in _SPLIT_COLUMNS}
        return [n for n in range(len(table.header)) if n not in others | named]
    if absent := [name for name in given if name not in table.header]:
        raise AnnotationError(f"{table.place}: class_columns names {absent[0]!r}, but the columns are {table.header}.")
    return [table.header.index(name) for name in given]


def _value(cell: str, where: str, column: str) -> int:
    value = _VALUES.get(cell.strip().lower())
    if value is None:
        raise AnnotationError(
            f"{where}: column {column!r} holds {shown(cell)}, expected 1, 0, or -1, nan or nothing for unknown. If "
            "it is no class, name the columns that are with class_columns."
        )
    return value
