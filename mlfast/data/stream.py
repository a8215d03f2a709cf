"""The images of shards with their targets, read from front to back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mlfast.data.dataset import ImageDataset
from mlfast.data.shards import WINDOW, BlockReader, shard_order, shuffled_in_windows


class ShardImages(Dataset):
    """The items of an `ImageDataset`, for rows that are asked for in about the order of their shards.

    Args:
        images: a data set in shards.
        patience: as of `BlockReader`.
    """

    def __init__(self, images: ImageDataset, patience: int = 2 * WINDOW) -> None:
        self.images = images
        self.reader = BlockReader(images.annotations, patience)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """As `ImageDataset`: the image, uint8 [3, H, W], and its target, int8 [K]."""
        try:
            data = self.reader.read(index)
        except OSError:
            return self.images[index]  # read alone; if that fails too, it is named
        return self.images.decoded(index, data)


class ShardStream(IterableDataset):
    """The images of tar or parquet shards for a training loop of one's own, read from front to back.

    Each epoch, the shards (row groups, for parquet) are put in random order, and the sequence of their images is dealt
    out in equal parts to the workers of all ranks: each reads its own shards, and shares at most the first and the last
    with a neighbour. Within a window images are shuffled. Every worker gives floor(N / (ranks * workers)) images, none
    twice, so ranks stay in step; the few that are left out are others in every epoch. For evaluation take
    `ImageDataset`, which gives every image.

    Args:
        images: the data set.
        seed: of the order, together with the epoch.
        rank: number of this process, from 0.
        world_size: number of processes.
        window: images (undecoded) that a worker shuffles among; 1 keeps the order of the shard.

    Raises:
        ValueError: the images are not in shards, or there is no such rank.
    """

    def __init__(
        self, images: ImageDataset, seed: int = 0, rank: int = 0, world_size: int = 1, window: int = WINDOW
    ) -> None:
        if images.annotations.shards is None:
            raise ValueError(f"images: {images.annotations.kind} is not in shards; use ImageDataset itself.")
        if not 0 <= rank < world_size or window < 1:
            raise ValueError(f"got rank {rank} of {world_size} and window {window}; expected 0 <= rank, 1 <= window.")
        self.images, self.seed, self.rank, self.world_size, self.window = images, seed, rank, world_size, window
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # persistent workers see a change

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        part, parts = self.rank * workers + worker, self.world_size * workers
        key = [self.seed, int(self._epoch)]
        shards = self.images.annotations.shards
        assert shards is not None
        order = shard_order(shards, np.random.default_rng(key))
        count = len(order) // parts
        own = order[part * count : (part + 1) * count]
        items = ShardImages(self.images, patience=2 * self.window)
        for index in shuffled_in_windows(own, np.random.default_rng([*key, part]), self.window).tolist():
            yield items[index]
