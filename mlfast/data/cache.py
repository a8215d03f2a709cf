"""What is kept on disk so that it need not be made again: arrays in npz files, without pickle.

A file is written beside its place and renamed, so no reader and no crash ever sees half of it, and one that cannot be
read is made again. Annotations are kept with the digests of all files that they were read from, and of shards of
images, which are too large to be read each time, with size and times of change; they are read again as soon as one of
these differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlfast.data.annotations import Annotations, LabelLists, PathList, Shards
from mlfast.data.sources import Sources

# Part of the key: raise it whenever a reader or the layout of the file changes.
ANNOTATIONS_VERSION = 3

_LABELS = ("positive", "negative", "unknown")
# A shard that changes again within the clock's grain keeps its stamp, so what is this young is not kept.
_MIN_AGE_NS = 2_000_000_000


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """`cache_dir`, default `$XDG_CACHE_HOME/mlfast`, or `~/.cache/mlfast` where that variable is not set."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlfast"


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None if it is missing or (with a warning) cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, NotImplementedError, zipfile.BadZipFile) as error:
        warnings.warn(f"The cache file {path} cannot be read ({error}); generating again.", stacklevel=3)
        return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Keep the arrays; a folder that cannot be written only brings a warning about `what`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"Could not keep {what} in {path} ({error}); made anew each time.", stacklevel=3)


def annotations_path(kind: str, sources: Sources, split: str, options: Mapping[str, Any], folder: Path) -> Path:
    """The cache file of annotations that are read with these arguments."""
    key = json.dumps(
        [ANNOTATIONS_VERSION, kind, str(sources.root.resolve()), split, options], sort_keys=True, default=list
    )
    return folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def read_annotations(path: Path, sources: Sources) -> Annotations | None:
    """The annotations of a cache file; None if there are none, they are damaged, or a file changed since."""
    arrays = read_arrays(path)
    if arrays is None:
        return None
    try:
        return _unpacked(arrays, sources)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        warnings.warn(f"The cache file {path} holds something else ({error!r}); generating again.", stacklevel=3)
        return None


def write_annotations(path: Path, annotations: Annotations, sources: Sources) -> None:
    """Keep the annotations, unless a shard that they come from was changed just now."""
    if time.time_ns() - sources.newest_stamp() < _MIN_AGE_NS:
        return
    meta = {name: getattr(annotations, name) for name in ("kind", "split", "classes", "rest", "notes")}
    arrays = {"blob": annotations.paths.blob, "offsets": annotations.paths.offsets}
    for name in _LABELS:
        lists = getattr(annotations, name)
        if lists is not None:
            arrays |= {f"{name}_indptr": lists.indptr, f"{name}_indices": lists.indices}
    if shards := annotations.shards:
        meta["shards"] = {"form": shards.form, "files": shards.files, "column": shards.column}
        arrays |= {"shard": shards.shard, "position": shards.position}
    text = json.dumps({**meta, "seen": sources.seen})
    arrays["meta"] = np.frombuffer(text.encode(), np.uint8)
    write_arrays(path, arrays, "the annotations")


def _unpacked(arrays: dict[str, np.ndarray], sources: Sources) -> Annotations | None:
    meta = json.loads(arrays["meta"].tobytes())
    if not sources.unchanged(meta["seen"]):
        return None
    classes = tuple(meta["classes"])
    paths = PathList(arrays["blob"], _checked_offsets(arrays["offsets"], len(arrays["blob"])))
    labels: dict[str, LabelLists | None] = dict.fromkeys(_LABELS)
    for name in _LABELS:
        if name == "positive" or f"{name}_indptr" in arrays:
            indices = arrays[f"{name}_indices"]
            if indices.dtype != np.int32 or (len(indices) and not 0 <= indices.min() <= indices.max() < len(classes)):
                raise ValueError("class numbers out of range")
            labels[name] = LabelLists(_checked_offsets(arrays[f"{name}_indptr"], len(indices)), indices)
    shards = None
    if "shards" in meta:
        files = tuple(meta["shards"].pop("files"))
        shards = Shards(files=files, shard=arrays["shard"], position=arrays["position"], **meta["shards"])
        if shards.shard.shape != (len(paths),) or shards.position.shape != (len(paths), 2):
            raise ValueError("places of the wrong shape")
    rest, notes = meta["rest"], tuple(meta["notes"])
    return Annotations(
        meta["kind"],
        meta["split"],
        sources.root,
        classes,
        paths,
        rest=rest,
        notes=notes,
        shards=shards,
        **labels,  # type: ignore[arg-type]
    )


def _checked_offsets(offsets: np.ndarray, total: int) -> np.ndarray:
    if offsets.dtype != np.int64 or offsets.ndim != 1 or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError("offsets that do not fit")
    if (np.diff(offsets) < 0).any():
        raise ValueError("offsets that fall")
    return offsets
