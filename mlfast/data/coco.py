"""MS-COCO 2014 and 2017: `annotations/instances_{train,val}{year}.json`, images in `{train,val}{year}/`.

The paper's "MS-COCO 2014" (117,266 training and 4,952 test images) is the 2017 division without unlabelled images: the
defaults here. The methods it compares with use 2014 (82,783 and 40,504 images), so numbers of the two do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel, Unlabelled
from mlfast.data.sources import Sources

if TYPE_CHECKING:
    from mlfast.data.coco_file import Instances

_PAPER = "the paper's 'MS-COCO 2014' counts, 117266 and 4952, are those of 2017 without unlabelled images"


def splits(sources: Sources, *, year: int = 2017, **_: Any) -> list[str]:
    """Training and validation, or the one that is there; the labels of the test split are not public."""
    both = ["train", "val"]
    return [split for split in both if sources.exists(f"annotations/instances_{split}{year}.json")] or both


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
    content = _decoded(sources, file)
    place = str(sources.root / file)
    categories = _by_id(((c.id, c.name) for c in content.categories), f"{place}: categories")
    images = _by_id(((image.id, image.file_name) for image in content.images), f"{place}: images")
    labels: dict[int, set[str]] = {image: set() for image in images}
    for number, found in enumerate(content.annotations):
        if found.image_id not in labels:
            raise AnnotationError(
                f"{place}: annotations[{number}] has the image_id {found.image_id}, which is not listed."
            )
        if found.category_id not in categories:
            raise AnnotationError(
                f"{place}: annotations[{number}] has the category_id {found.category_id}, which is not listed."
            )
        labels[found.image_id].add(categories[found.category_id])
    by_id = [categories[number] for number in sorted(categories)]
    collector = Collector(by_id if classes is None else classes, unknown_labels)
    collector.notes.append(f"COCO {year}, unlabelled images: {unlabelled}; {_PAPER}")
    for number, (image, name) in enumerate(images.items()):
        collector.add(f"{split}{year}/{name}", sorted(labels[image]), f"{place}: images[{number}]")
    return collector.build("coco", split, sources, unlabelled=unlabelled)


def _decoded(sources: Sources, file: str) -> Instances:
    try:
        import msgspec
    except ModuleNotFoundError as error:
        message = 'COCO needs msgspec, which is not installed: pip install ".[train]" in a checkout of mlfast'
        raise ModuleNotFoundError(message, name="msgspec") from error
    from mlfast.data.coco_file import Instances

    try:
        return msgspec.json.decode(sources.content(file), type=Instances)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError(f"{sources.root / file}: {error}; give COCO's instances files.") from None


def _by_id(entries: Iterable[tuple[int, str]], section: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, (key, name) in enumerate(entries):
        if key in found:
            raise AnnotationError(f"{section}[{number}] has the id {key} once more.")
        found[key] = name
    return found
