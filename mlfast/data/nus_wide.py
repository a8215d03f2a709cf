"""NUS-WIDE, 81 concepts, in its original layout: `ImageList/`, `Groundtruth/`, `ConceptsList/`, images in `Flickr/`.

The other common form, one `data.csv` with `filepath,label,split_name`, is kind "csv".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, Unlabelled
from mlfast.data.sources import Sources, safe_path, shown

_CONCEPTS = "ConceptsList/Concepts81.txt"
_LISTS = {"train": "Train", "test": "Test"}


def splits(sources: Sources, *, split_file: str | None = None, **_: Any) -> list[str]:
    """The official division, 161,789 and 107,859 images; the paper has a 70:30 division of its own."""
    return list(_LISTS) if split_file is None else ["all"]


def read(
    sources: Sources,
    split: str,
    *,
    unlabelled: Unlabelled = "drop",
    split_file: str | None = None,
    image_folder: str = "Flickr",
) -> Annotations:
    """Read one split.

    Args:
        sources: the root folder.
        split: "train" or "test"; with `split_file` any name.
        unlabelled: "drop" leaves out images without a concept, as the paper does; "keep" keeps them as all negative.
        split_file: list of images, relative to the root, one a line as in ImageList/Imagelist.txt: another division.
        image_folder: holds the images.
    """
    if split_file is None and split not in _LISTS:
        raise ValueError(f'split: got {split!r}, expected "train" or "test", or another one with split_file=...')
    part = _LISTS.get(split, "")
    images, labels = (f"{part}Imagelist", "TrainTestLabels") if split_file is None else ("Imagelist", "AllLabels")
    image_list = f"ImageList/{images}.txt"
    paths = list(sources.lines(image_list))
    concepts = [name for _, name in sources.lines(_CONCEPTS)]
    suffix = f"_{part}" if split_file is None else ""
    rows = np.empty((len(paths), len(concepts)), bool)
    for column, concept in enumerate(concepts):
        file = f"Groundtruth/{labels}/Labels_{concept}{suffix}.txt"
        rows[:, column] = _flags(sources, file, len(paths), image_list)

    chosen = range(len(paths)) if split_file is None else _chosen(sources, split_file, paths)
    collector = Collector(concepts)
    names = np.array(concepts, object)
    for image in chosen:
        where, path = paths[image]
        collector.add(f"{image_folder}/{safe_path(path, where)}", names[rows[image]].tolist(), where)
    return collector.build("nus_wide", split, sources, unlabelled=unlabelled)


def _flags(sources: Sources, file: str, count: int, image_list: str) -> np.ndarray:
    """The 0 or 1 of every line, bool [count]."""
    # A hundred thousand lines in 81 files: bytes at once, and line by line only to find what is wrong.
    flags = np.frombuffer(sources.content(file).translate(None, b" \t\r\n"), np.uint8)
    if len(flags) == count and ((flags == ord("0")) | (flags == ord("1"))).all():
        return flags == ord("1")
    for where, line in sources.lines(file):
        if line not in ("0", "1"):
            raise AnnotationError(f"{where}: got {shown(line)}, expected 0 or 1.")
    raise AnnotationError(
        f"{sources.root / file} has {len(flags)} lines, but {image_list} lists {count} images; "
        "one of them is incomplete."
    )


def _chosen(sources: Sources, split_file: str, paths: list[tuple[str, str]]) -> list[int]:
    number = {safe_path(path, where): image for image, (where, path) in enumerate(paths)}
    chosen = []
    for where, line in sources.lines(split_file):
        image = number.get(safe_path(line, where))
        if image is None:
            raise AnnotationError(f"{where}: the image {shown(line)} is not in ImageList/Imagelist.txt.")
        chosen.append(image)
    return chosen
