"""Tar shards as the package webdataset writes them: `<split>-*.tar` with pairs `KEY.jpg` and `KEY.json`.

The JSON is `{"labels": [...]}`, and `"negatives": [...]` where labels are known to be absent; if any image has that,
the rest is unknown. The shards are scanned once, and the places of the images are remembered: so a shard can be read
from front to back (`ShardStream`) and at any image (`ImageDataset`), and statistics work as for any other format.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlfast.data.annotations import AnnotationError, Annotations, Shards
from mlfast.data.collector import Collector, OnUnknownLabel
from mlfast.data.images import SUFFIXES
from mlfast.data.sources import Sources, safe_path, shown

_SHARD = re.compile(r"(.+?)-[^-]*(?:-of-\d+)?\.tar")
_MAX_JSON_BYTES = 1 << 20


def splits(sources: Sources, **_: Any) -> list[str]:
    """What stands before the numbers of the shards."""
    return sorted({match[1] for name in sources.listing(".") if (match := _SHARD.fullmatch(name))})


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
        split: of the shards `<split>-000.tar` or `<split>-000-of-100.tar`, uncompressed.
        classes: names in order; default those of `classes.txt` (one a line), or what is found, sorted.
        unknown_labels: "error", or "ignore" and count labels that are not classes.
    """
    found = ((name, _SHARD.fullmatch(name)) for name in sources.listing("."))
    shards = [name for name, match in found if match and match[1] == split]
    if not shards:
        there = ", ".join(splits(sources)[:8]) or "none"
        raise AnnotationError(
            f"{sources.root}: no {split}-*.tar there, the splits are: {there}; shards must be uncompressed."
        )
    if classes is None and sources.exists("classes.txt"):
        classes = [name for _, name in sources.lines("classes.txt")]
    collector = Collector(classes, unknown_labels)
    number: list[int] = []
    position: list[tuple[int, int]] = []
    partial = False
    for shard_number, shard in enumerate(shards):
        for where, path, place, labels in _samples(sources, shard):
            partial |= "negatives" in labels
            before = len(collector)
            collector.add(f"{shard}/{path}", labels["labels"], where, negative=labels.get("negatives", ()))
            if len(collector) == before:
                raise AnnotationError(f"{where}: the image {shown(path)} is in this shard twice.")
            number.append(shard_number)
            position.append(place)
    places = Shards("tar", tuple(shards), np.array(number, np.int32), np.array(position, np.int64).reshape(-1, 2))
    return collector.build("webdataset", split, sources, rest="unknown" if partial else "negative", shards=places)


def _samples(sources: Sources, shard: str) -> Iterator[tuple[str, str, tuple[int, int], dict[str, Any]]]:
    """(where, image name, (offset, length), labels) of every sample of a shard."""
    place = str(sources.root / shard)
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    labels: dict[str, dict[str, Any]] = {}
    for where, name, member, content in _members(sources, shard):
        key, suffix = _split_name(name)
        if suffix in SUFFIXES:
            if key in images and images[key][0] != name:
                raise AnnotationError(f"{where}: the sample has another image, {shown(images[key][0])}; expected one.")
            images[key] = (name, (member.offset_data, member.size))
        elif suffix == ".json":
            labels[key] = _labels(content, where)
    if lonely := sorted(images.keys() ^ labels.keys()):
        missing = "JSON" if lonely[0] in images else "image"
        raise AnnotationError(f"{place}: the sample {shown(lonely[0])} has no {missing}.")
    for key, (name, span) in images.items():
        yield f"{place}, {name}", name, span, labels[key]


def _members(sources: Sources, shard: str) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes]]:
    """The files of a shard, with the content of those that end in .json."""
    place = sources.shard(shard)
    try:
        with tarfile.open(place, "r:") as archive:
            for member in archive:
                where = f"{place}, {member.name}"
                name = safe_path(member.name, where)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise AnnotationError(f"{where}: a link or special file is refused; shards hold plain files.")
                content = b""
                if name.endswith(".json"):
                    if member.size > _MAX_JSON_BYTES:
                        raise AnnotationError(f"{where}: {member.size} bytes are too many for the labels of an image.")
                    file = archive.extractfile(member)
                    content = file.read() if file else b""
                yield where, name, member, content
                archive.members = []  # type: ignore[attr-defined]  # else the archive remembers every header
            if place.stat().st_size <= archive.offset:
                raise AnnotationError(
                    f"{place}: it ends without the two blocks of zeros that end a tar file, so it was cut off; copy it "
                    f"again (or, if it is whole, add them: head -c 1024 /dev/zero >> {place.name})."
                )
    except tarfile.TarError as error:
        raise AnnotationError(f"{place}: not a whole uncompressed tar file ({error}).") from None


def _split_name(name: str) -> tuple[str, str]:
    """The key up to the first dot of the file name, as webdataset has it, and the suffix in lower case."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, (dot + suffix).lower()


def _labels(content: bytes, where: str) -> dict[str, Any]:
    try:
        labels = json.loads(content)
    except ValueError as error:
        raise AnnotationError(f"{where}: not JSON ({error}).") from None
    lists = [labels.get("labels"), labels.get("negatives", [])] if isinstance(labels, dict) else [None]
    if not all(isinstance(part, list) for part in lists):
        raise AnnotationError(f'{where}: got {shown(labels)}, expected {{"labels": [...]}}.')
    return {k: [str(v) if type(v) is int else v for v in labels[k]] for k in ("labels", "negatives") if k in labels}
