"""VG500, Visual Genome with 500 labels, as SSGRL and C-Tran divide it.

`train_list_500.txt`, `test_list_500.txt` (one file name a line), `vg_category_500_labels_index.json` ({file name:
[class numbers]}), images in `VG_100K` and `VG_100K_2`. The classes have numbers and no names.
"""

from __future__ import annotations

from typing import Any

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector
from mlfast.data.sources import Sources, safe_path, shown

_NUM_CLASSES = 500
_LABELS = "vg_category_500_labels_index.json"
_FOLDERS = ("VG_100K", "VG_100K_2")


def splits(sources: Sources, **_: Any) -> list[str]:
    """82,904 and 10,000 images."""
    return ["train", "test"]


def read(sources: Sources, split: str) -> Annotations:
    """Read one split: "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f'split: got {split!r}, expected "train" or "test".')
    labels = sources.json(_LABELS)
    place = str(sources.root / _LABELS)
    if not isinstance(labels, dict):
        raise AnnotationError(f"{place}: got a {type(labels).__name__}, expected an object {{file name: [numbers]}}.")
    folder_of = {name: folder for folder in _FOLDERS if sources.exists(folder) for name in sources.listing(folder)}
    names = [str(number) for number in range(_NUM_CLASSES)]
    collector = Collector(names)
    absent = 0
    for where, line in sources.lines(f"{split}_list_500.txt"):
        name = safe_path(line, where)
        if name not in labels:
            raise AnnotationError(f"{where}: the image {shown(name)} has no labels in {_LABELS}.")
        numbers = labels[name]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < _NUM_CLASSES for n in numbers):
            raise AnnotationError(f"{place}: {shown(name)} has {shown(numbers)}, expected a list of numbers 0 to 499.")
        absent += name not in folder_of
        collector.add(f"{folder_of.get(name, _FOLDERS[0])}/{name}", [names[n] for n in numbers], where)
    if absent:
        collector.notes.append(f"{absent} images are neither in VG_100K nor in VG_100K_2")
    return collector.build("vg500", split, sources)
