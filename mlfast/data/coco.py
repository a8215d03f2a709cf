"""MS-COCO 2014 and 2017: `annotations/instances_{train,val}{year}.json`, images in `{train,val}{year}/`.

The paper's "MS-COCO 2014" (117,266 training and 4,952 test images) is the 2017 division without unlabelled images: the
defaults here. The methods it compares with use 2014 (82,783 and 40,504 images), so numbers of the two do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel, Unlabelled
from mlfast.data.sources import Sources, shown

_PAPER = "the paper's 'MS-COCO 2014' counts, 117266 and 4952, are those of 2017 without unlabelled images"


def splits(sources: Sources, **_: Any) -> list[str]:
    """Training and validation; the labels of the test split are not public."""
    return ["train", "val"]


def read(
    sources: Sources,
    split: str,
    *,
    year: int = 2017,
    unlabelled: Unlabelled = "drop",
    classes: Sequence[str] | None = None,
    unknown_labels: OnUnknownLabel = "error",
) -> Annotations:
    """Read one split. An image has a label if it has an object of the class, crowds included.

    Args:
        sources: the root folder, which holds `annotations`.
        split: "train" or "val", or the name of another file `annotations/instances_<split><year>.json`.
        year: 2014 or 2017.
        unlabelled: "drop" leaves out images without objects, as the paper does; "keep" keeps them as all negative.
        classes: names in order; default the file's categories by id.
        unknown_labels: "error", or "ignore" and count objects whose category is not among `classes`.
    """
    if year not in (2014, 2017):
        raise ValueError(f"year: got {year!r}, expected 2014 or 2017.")
    file = f"annotations/instances_{split}{year}.json"
    content = sources.json(file)
    place = str(sources.root / file)
    categories = dict(_pairs(content, "categories", ("id", "name"), place))
    images = dict(_pairs(content, "images", ("id", "file_name"), place))
    labels: dict[Any, set[str]] = {image: set() for image in images}
    for number, (image, category) in enumerate(_pairs(content, "annotations", ("image_id", "category_id"), place)):
        try:
            labels[image].add(categories[category])
        except KeyError:
            name, known = ("image_id", image) if image not in labels else ("category_id", category)
            raise AnnotationError(
                f"{place}: annotations[{number}] has the {name} {known}, which is not listed."
            ) from None
    by_id = [categories[number] for number in sorted(categories)]
    collector = Collector(by_id if classes is None else classes, unknown_labels)
    collector.notes.append(f"COCO {year}, unlabelled images: {unlabelled}; {_PAPER}")
    for number, (image, name) in enumerate(images.items()):
        where = f"{place}: images[{number}]"
        if not isinstance(name, str):
            raise AnnotationError(f"{where}: got the file_name {shown(name)}, expected text.")
        collector.add(f"{split}{year}/{name}", sorted(labels[image]), where)
    return collector.build("coco", split, sources, unlabelled=unlabelled)


def _pairs(content: Any, section: str, keys: tuple[str, str], place: str) -> list[tuple[Any, Any]]:
    """The two fields of every entry of a section."""
    first, second = keys
    entries = content.get(section) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise AnnotationError(f"{place}: there is no list {section!r}; give COCO's instances files.")
    try:
        return [(entry[first], entry[second]) for entry in entries]
    except (KeyError, TypeError, IndexError):
        number = next(n for n, e in enumerate(entries) if not (isinstance(e, dict) and first in e and second in e))
        got = shown(entries[number])
        raise AnnotationError(
            f"{place}: {section}[{number}] is {got}, expected an object with {first!r} and {second!r}."
        ) from None
