"""The built-in data set: scenes of handwritten digits, 40 labels (digit x colour), nothing to download.

What the labels are is decided in `digit_labels`, what an image looks like in `digit_drawing`; this file splits the
handwriting, generates, and keeps the result on disk.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mlfast.data.cache import cache_folder, read_arrays, write_arrays
from mlfast.data.digit_drawing import REFERENCE_SIZE, draw_scenes, smooth_fields
from mlfast.data.digit_labels import CLASSES, draw_labels, graph_matrix, label_model

# Part of the name of every cache file: raise it whenever a change here or in the two files below changes a byte.
GENERATOR_VERSION = 1
DEFAULT_SIZE = {"train": 10_000, "val": 2_000}

_SPLITS = ("train", "val")
_VAL_SHARE = 0.3
_IMAGE_SIZES = (32, 512)
# Images of a chunk share a random stream, so this number is part of what a seed means.
_CHUNK = 64
_STREAM_POOLS, _STREAM_IMAGES = 1, 2


class DigitScenes(Dataset):
    """Scenes of handwritten digits with the 40 labels "red 0" ... "yellow 9".

    The images are composed from the 1797 8x8 drawings that scikit-learn ships. About 3 labels per image are drawn from
    scene types and a planted co-occurrence graph (see `planted_graph`). Training and validation images of one seed
    share the graph and the scene types, but no drawing, whatever their seeds.

    The same arguments give the same bytes, whatever `num_workers`, and a smaller `size` gives the first images of a
    larger one. The result is kept in `cache_dir`; what is damaged there is made again.

    Args:
        split: "train" or "val".
        size: number of images, default 10,000 for training and 2,000 for validation.
        image_size: height and width in pixels, 32 to 512.
        seed: an integer >= 0.
        cache_dir: default `$XDG_CACHE_HOME/mlfast`, or `~/.cache/mlfast` where that variable is not set.
        num_workers: threads that generate, default the number of processor cores.

    Attributes:
        images: uint8 [N, 3, image_size, image_size], RGB.
        targets: int8 [N, 40], 1 where the label is present, else 0.
        classes: the 40 names.

    Raises:
        ValueError: an argument is outside of what is written above.
        ImportError: the images must be generated and scikit-learn is not installed.
    """

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        image_size: int = REFERENCE_SIZE,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        num_workers: int | None = None,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f'split: got {split!r}, expected "train" or "val"; the test split of the digits is "val".')
        self.split = split
        self.size = DEFAULT_SIZE[split] if size is None else _integer("size", size, 1)
        self.image_size = _integer("image_size", image_size, *_IMAGE_SIZES)
        self.seed = _integer("seed", seed, 0)
        workers = os.cpu_count() or 1 if num_workers is None else _integer("num_workers", num_workers, 1)
        self.classes = list(CLASSES)

        path = cache_folder(cache_dir) / self._cache_name()
        arrays = self._cached(path)
        if arrays is None:
            arrays = _generate(split, self.size, self.image_size, self.seed, workers)
            write_arrays(path, dict(zip(("images", "targets"), arrays, strict=True)), "the digit scenes")
        self.images, self.targets = (torch.from_numpy(a) for a in arrays)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The image, uint8 [3, H, W], and its target, int8 [40]."""
        return self.images[index], self.targets[index]

    def subset(self, rows: Sequence[int] | np.ndarray) -> DigitScenes:
        """These images, in this order."""
        part = copy.copy(self)
        part.images, part.targets, part.size = self.images[rows], self.targets[rows], len(rows)
        return part

    def _cache_name(self) -> str:
        return f"digits-v{GENERATOR_VERSION}-{self.split}-{self.size}-{self.image_size}px-seed{self.seed}.npz"

    def _cached(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Images and targets, or None if they are missing or (with a warning) not what they should be."""
        stored = read_arrays(path)
        if stored is None:
            return None
        if {name: (array.dtype, array.shape) for name, array in stored.items()} != self._shapes():
            warnings.warn(
                f"The cache file {path} holds other arrays than its name says; generating again.", stacklevel=3
            )
            return None
        return stored["images"], stored["targets"]

    def _shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        return {
            "images": (np.dtype(np.uint8), (self.size, 3, self.image_size, self.image_size)),
            "targets": (np.dtype(np.int8), (self.size, len(CLASSES))),
        }


def planted_graph(seed: int = 0) -> np.ndarray:
    """The co-occurrence that `DigitScenes(seed=seed)` draws its labels from.

    Returns:
        [40, 40] float64; entry (i, j) is the planted P(label j | label i), 0.5 to 0.8 on the edges and 0 elsewhere.

    Raises:
        ValueError: `seed` is not an integer >= 0.
    """
    return graph_matrix(_integer("seed", seed, 0))


def digit_pools(labels: np.ndarray, split: str) -> list[np.ndarray]:
    """For every digit the drawings of a split, as row numbers into scikit-learn's digits with these labels [N].

    No seed here on purpose: training on one seed and validating on another must not share handwriting either.
    """
    pools = []
    for digit in range(10):
        rows = np.random.default_rng([_STREAM_POOLS, digit]).permutation(np.flatnonzero(labels == digit))
        cut = round(len(rows) * _VAL_SHARE)
        pools.append(rows[:cut] if split == "val" else rows[cut:])
    return pools


def _generate(split: str, size: int, image_size: int, seed: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """images uint8 [size, 3, image_size, image_size] and targets int8 [size, 40]."""
    drawings, digits = _load_drawings()
    rows = digit_pools(digits, split)
    fields = smooth_fields(drawings[np.concatenate(rows)])
    pools = np.split(np.arange(len(fields)), np.cumsum([len(r) for r in rows])[:-1])
    model = label_model(seed)
    images = np.empty((size, 3, image_size, image_size), np.uint8)
    targets = np.empty((size, len(CLASSES)), np.int8)

    def fill(start: int) -> None:
        # Labels and looks have streams of their own, and a chunk is always drawn in full: a prefix stays a prefix.
        stream = [seed, _STREAM_IMAGES, _SPLITS.index(split), start // _CHUNK]
        labels = draw_labels(np.random.default_rng([*stream, 0]), _CHUNK, model)
        chunk = draw_scenes(np.random.default_rng([*stream, 1]), labels, pools, fields, image_size)
        stop = min(start + _CHUNK, size)
        images[start:stop] = chunk[: stop - start]
        targets[start:stop] = labels[: stop - start]

    # Threads, not processes: numpy lets go of the interpreter lock on arrays of this size, and nothing is copied.
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, range(0, size, _CHUNK)))
    return images, targets


def _load_drawings() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "DigitScenes draws with the handwritten digits of scikit-learn, which is not installed: "
            'pip install ".[train]" in a checkout of mlfast'
        ) from error
    bunch = load_digits()
    return bunch.images, bunch.target


def _integer(name: str, value: int, low: int, high: int | None = None) -> int:
    expected = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value!r}, expected {expected}; leave {name} out for the default.")
    return int(value)
