"""What can be wrong with a data set beyond its labels: files that are missing, broken, or in two splits."""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mlfast.data.annotations import Annotations
from mlfast.data.images import SUFFIXES, ImageError, decode
from mlfast.data.shards import read_image

_NAMED = 10  # names of a problem that are printed


def problems_of(loaded: Sequence[Annotations], decode_all: bool) -> Iterable[str]:
    """Everything that is wrong, in words, with names."""
    first = loaded[0]
    for other in loaded[1:]:
        if other.classes != first.classes:
            different = sorted(set(first.classes) ^ set(other.classes)) or ["their order"]
            yield (
                f"the classes of {first.split} and {other.split} differ: {names(different)}; give both the same list "
                "with the option classes"
            )
    yield from _shared(loaded)
    if first.kind == "digits":
        return
    yield from _suspicious_names(first)
    for part in loaded:
        yield from _missing(part)
    if decode_all:
        yield from _undecodable(loaded)


def _suspicious_names(annotations: Annotations) -> Iterable[str]:
    """Classes that would be others', had the file been read or written otherwise."""
    by_lower: dict[str, list[str]] = defaultdict(list)
    for name in annotations.classes:
        by_lower[name.lower()].append(name)
    if alike := [" and ".join(map(repr, same)) for same in by_lower.values() if len(same) > 1]:
        yield (
            f"{len(alike)} class names differ in upper and lower case alone: {names(alike)}; spell them alike where "
            "they mean the same"
        )
    known = set(annotations.classes)
    joined = [repr(name) for name in annotations.classes if " " in name and known.issuperset(name.split())]
    if joined and annotations.kind == "csv":
        yield (
            f"{len(joined)} class names are made of others: {names(joined)}; if blanks separate labels, read them with "
            "--delimiter ' '"
        )


def shared_images(first: Annotations, second: Annotations) -> list[str]:
    """The paths that both splits list, in the order of the second."""
    known = set(first.paths)
    return [path for path in second.paths if path in known]


def _shared(loaded: Sequence[Annotations]) -> Iterable[str]:
    for first, second in itertools.combinations(loaded, 2):
        if shared := shared_images(first, second):
            yield f"{first.split} and {second.split} share {len(shared)} images: {names(shared)}"


def _missing(annotations: Annotations) -> Iterable[str]:
    """Files that are listed and not there, or empty. Folders are listed once: asking a million times is slow."""
    files = annotations.paths if annotations.shards is None else annotations.shards.files
    folders: dict[str, dict[str, int]] = {}
    missing, empty = [], []
    for path in files:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = _sizes(os.path.join(annotations.root, folder))
        size = folders[folder].get(name)
        if size is None:
            missing.append(path)
        elif size == 0:
            empty.append(path)
    if missing:
        yield f"{annotations.split}: {len(missing)} of {len(files)} files are missing: {names(missing)}"
    if empty:
        yield f"{annotations.split}: {len(empty)} files are empty: {names(empty)}"


def _sizes(folder: str) -> dict[str, int]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError:
        return {}


def strays_of(loaded: Sequence[Annotations]) -> Iterable[str]:
    """Images beside the listed ones that no split lists, by folder."""
    if loaded[0].shards is not None or loaded[0].kind == "digits":
        return
    listed: dict[str, set[str]] = defaultdict(set)
    for part in filter(_is_listed, loaded):
        for path in part.paths:
            folder, _, name = path.rpartition("/")
            listed[folder].add(name)
    for folder, known in listed.items():
        there = _sizes(os.path.join(loaded[0].root, folder))
        if stray := sorted(name for name in there if name not in known and name.lower().endswith(SUFFIXES)):
            yield f"{len(stray)} images in {folder or 'the root'} are in none of these splits: {names(stray)}"


def _is_listed(part: Annotations) -> bool:
    """Whether a list names the images; folders of classes hold no others, but copies that were taken for one image."""
    return part.kind != "folder" or any((part.root / one / "metadata.jsonl").exists() for one in part.split.split("+"))


def _undecodable(loaded: Sequence[Annotations]) -> Iterable[str]:
    """Images that cannot be decoded, and groups of images with the same bytes."""
    same: dict[bytes, list[str]] = defaultdict(list)
    for part in loaded:
        broken = []
        # Pillow lets go of the interpreter lock while it decodes.
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")
            results = pool.map(lambda index, part=part: _decoded(part, index), range(len(part)))
            for index, (digest, reason) in enumerate(results):
                path = part.paths[index]
                if reason:
                    broken.append(f"{path} ({reason})")
                if digest:
                    same[digest].append(f"{part.split}:{path}")
        if broken:
            yield f"{part.split}: {len(broken)} images cannot be decoded: {names(broken)}"
    twins = [" = ".join(paths) for paths in same.values() if len(paths) > 1]
    if twins:
        yield f"{len(twins)} images are there more than once with the same content: {names(twins)}"


def _decoded(annotations: Annotations, index: int) -> tuple[bytes, str]:
    """(digest, reason why it cannot be decoded or "")."""
    try:
        data = read_image(annotations, index)
    except FileNotFoundError:
        return b"", ""  # reported with the missing files
    except OSError as error:
        return b"", error.strerror or str(error)
    try:
        decode(data)
    except ImageError as error:
        return b"", str(error)
    return hashlib.sha256(data).digest(), ""


def names(found: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more
