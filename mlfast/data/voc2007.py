"""PASCAL VOC 2007: `Annotations/*.xml` and `ImageSets/Main/<split>.txt`; any data set in the same layout.

root: the folder VOC2007, VOCdevkit, or the one that holds VOCdevkit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.collector import Collector, OnUnknownLabel
from mlfast.data.sources import Sources, shown

# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
_OBJECT = ("annotation", "object")


def splits(sources: Sources, **_: Any) -> list[str]:
    """The paper trains on trainval and tests on test."""
    return ["trainval", "test"]


def read(
    sources: Sources,
    split: str,
    *,
    difficult: Literal["positive", "unknown", "negative"] = "positive",
    image_suffix: str = ".jpg",
    classes: Sequence[str] | None = None,
    unknown_labels: OnUnknownLabel = "error",
) -> Annotations:
    """Read one split: train, val, trainval or test.

    Args:
        sources: the root folder.
        split: the name of a list in ImageSets/Main.
        difficult: what a class is of which an image has only objects marked difficult. The paper counts it as positive
            (1.58 and 1.54 labels per image in Table 1), and so does the default; the official evaluation leaves it out,
            which is "unknown".
        image_suffix: of the image files.
        classes: names in order; default the 20 of VOC.
        unknown_labels: "error", or "ignore" and count objects whose name is not a class.
    """
    if difficult not in ("positive", "unknown", "negative"):
        raise ValueError(f'difficult: got {difficult!r}, expected "positive", "unknown" or "negative".')
    base = _base(sources)
    collector = Collector(CLASSES if classes is None else classes, unknown_labels)
    for where, name in sources.lines(f"{base}ImageSets/Main/{split}.txt"):
        if "/" in name or "\\" in name:
            raise AnnotationError(f"{where}: got {shown(name)}, expected an image's name without folder and suffix.")
        xml = f"{base}Annotations/{name}.xml"
        if not sources.exists(xml):
            raise AnnotationError(
                f"{where}: the image {shown(name)} has no annotation; {sources.root / xml} is missing."
            )
        clear, only_difficult = _labels(sources, xml)
        positive = clear | only_difficult if difficult == "positive" else clear
        unknown = only_difficult if difficult == "unknown" else ()
        path = f"{base}JPEGImages/{name}{image_suffix}"
        collector.add(path, sorted(positive), str(sources.root / xml), unknown=sorted(unknown))
    return collector.build("voc2007", split, sources)


def _base(sources: Sources) -> str:
    for base in ("", "VOC2007/", "VOCdevkit/VOC2007/"):
        if sources.exists(f"{base}ImageSets/Main"):
            return base
    raise AnnotationError(
        f"{sources.root} holds no ImageSets/Main, nor does VOC2007 or VOCdevkit/VOC2007 in it; unpack "
        "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar there."
    )


def _labels(sources: Sources, xml: str) -> tuple[set[str], set[str]]:
    """Classes with an object that is not difficult, and those with difficult objects only."""
    clear: set[str] = set()
    difficult: set[str] = set()
    name, hard = "", False
    for path, text in sources.xml_elements(xml):
        if path == (*_OBJECT, "name"):  # the parts of a person have names too, one level deeper
            name = text
        elif path == (*_OBJECT, "difficult"):
            hard = text == "1"
        elif path == _OBJECT:
            (difficult if hard else clear).add(name)
            name, hard = "", False
    return clear, difficult - clear
