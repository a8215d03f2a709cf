"""Images in tar and parquet files: any one of them, or all of them in an order that reads each file once.

Reading shuffled images one by one jumps about in the shards, and in a parquet file each jump unpacks a whole row group.
So an epoch takes the shards in random order, each from front to back, and shuffles the images within a window: what a
window needs is read block by block and held, undecoded, until its turn comes. `shard_order` and `shuffled_in_windows`
say which image comes when, and need no file for that: where a pass stopped, it can go on. `BlockReader` reads them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from mlfast.data.annotations import Annotations, Shards
from mlfast.data.sources import Stamp, stamp

WINDOW = 1000  # images that are shuffled among each other
_BLOCK_BITS = 23  # of a tar file 8 MiB at once


def read_image(annotations: Annotations, index: int) -> bytes:
    """The content of an image's file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    shards = annotations.shards
    if shards is None:
        return (annotations.root / annotations.paths[index]).read_bytes()
    path = annotations.root / shards.files[shards.shard[index]]
    first, second = shards.position[index].tolist()
    if shards.form == "parquet":
        return _bytes(_row_group(path, stamp(path), first, shards.column)[second])
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(second)


def shard_order(shards: Shards, random: np.random.Generator | None = None) -> np.ndarray:
    """All images, int64 [N], each shard (of parquet files: each row group) from front to back.

    Args:
        shards: where the images are.
        random: shuffles the shards; None leaves them in their order.
    """
    units, unit = np.unique(_units(shards), return_inverse=True)
    turn = np.arange(len(units)) if random is None else random.permutation(len(units))
    return np.lexsort((shards.position[:, 1 if shards.form == "parquet" else 0], turn[unit]))


def shuffled_in_windows(rows: np.ndarray, random: np.random.Generator, window: int = WINDOW) -> np.ndarray:
    """The rows, shuffled among each `window` consecutive ones."""
    return rows[np.lexsort((random.random(len(rows)), np.arange(len(rows)) // window))]


class BlockReader:
    """Reads images that are asked for in about the order of their shards, each part of a shard once.

    The first image of a block brings in the whole block: the images that begin in the same 8 MiB of a tar file, or a
    row group of a parquet file. Each is held until it is asked for. A block that nobody has asked for any more in a
    long time is let go of: another reader has the rest of it.

    Args:
        annotations: of images in shards.
        patience: how many other images are read before a block is let go of; at least two windows of every sequence
            that this reader serves.
    """

    def __init__(self, annotations: Annotations, patience: int = 2 * WINDOW) -> None:
        if annotations.shards is None:
            raise ValueError(f"annotations: {annotations.kind} is not in shards; read its images one by one.")
        self.annotations, self.shards, self.patience = annotations, annotations.shards, patience
        units = _units(self.shards)
        if self.shards.form == "tar":
            units = (units << 32) + (self.shards.position[:, 0] >> _BLOCK_BITS)
        _, self._block = np.unique(units, return_inverse=True)
        self._order = shard_order(self.shards)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(self._block))])
        self._held: OrderedDict[int, tuple[int, dict[int, bytes]]] = OrderedDict()  # block -> when last used, images
        self._reads = 0

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            OSError: the block cannot be read; `read_image` tells whether the image can.
        """
        block = int(self._block[index])
        _, images = self._held.pop(block, (0, {}))
        if index not in images:
            images = self._read_block(block)
        data = images.pop(index)
        self._reads += 1
        if images:
            self._held[block] = self._reads, images
        while self._held and self._reads - next(iter(self._held.values()))[0] > self.patience:
            self._held.popitem(last=False)
        return data

    def _read_block(self, block: int) -> dict[int, bytes]:
        rows = self._order[self._starts[block] : self._starts[block + 1]].tolist()
        path = self.annotations.root / self.shards.files[self.shards.shard[rows[0]]]
        places = self.shards.position[rows].tolist()
        if self.shards.form == "parquet":
            content = _row_group(path, stamp(path), places[0][0], self.shards.column)
            return {row: _bytes(content[place]) for row, (_, place) in zip(rows, places, strict=True)}
        with open(path, "rb") as file:
            return {row: _read_at(file, *place) for row, place in zip(rows, places, strict=True)}


def _units(shards: Shards) -> np.ndarray:
    """What is read from front to back: the number of the shard, or of the row group, int64 [N]."""
    shard = shards.shard.astype(np.int64)
    return shard if shards.form == "tar" else (shard << 32) + shards.position[:, 0]


def _read_at(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, changed: Stamp, group: int, column: str) -> Any:
    """The images of a row group; kept for the next image, as a row cannot be read without the rest of its group."""
    import pyarrow

    try:
        return _parquet_file(path, changed).read_row_group(group, [f"{column}.bytes"], use_threads=False)[column]
    except pyarrow.ArrowException as error:  # damaged pages are no OSError to pyarrow
        raise OSError(f"row group {group} of {path} cannot be read: {error}") from error


@functools.lru_cache(maxsize=16)
def _parquet_file(path: Path, _changed: Stamp) -> Any:
    """Kept open: its list of row groups may take megabytes to read."""
    from mlfast.data.parquet import import_parquet

    return import_parquet().ParquetFile(path)


def _bytes(image: Any) -> bytes:
    """Those of a row; none where there is no image, which then is told to be empty."""
    return image["bytes"].as_py() or b"" if image.is_valid else b""
