"""Batches of a data set: what the trainer asks of them, and those out of tensors that are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mlfast.data.annotations import Shards
from mlfast.data.shards import shard_order, shuffled_in_windows


class Batch(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8 ``[B, 3, H, W]``.
        targets: int8 ``[B, K]``; 1 has the label, 0 has not, -1 unknown. Of mixed images float32, between 0 and 1.
        rows: where each image stands in its data set.
    """

    images: Tensor
    targets: Tensor
    rows: Tensor


class Batches(Protocol):
    """What the trainer asks of a split.

    Attributes:
        num_images: of the split, over all processes.
        mostly_unknown: whether a label of which nothing is said is unknown and not absent, as in Open Images.
    """

    num_images: int
    mostly_unknown: bool

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch ``start`` on, on the device."""
        ...

    def name(self, row: int) -> str:
        """What to call an image in a message."""
        ...

    def close(self) -> None:
        """End the processes that read, if there are any."""
        ...


class Rows:
    """Which images make up which batch.

    The order of an epoch depends on the seed and the epoch's number alone, so a run that continues in the middle of an
    epoch sees the images that it would have seen. Of several processes, each has every ``world_size``-th image: in
    training of every batch, so all take part in each step; in evaluation of the split, so each image counts once.

    Args:
        num_images: in the split.
        batch_size: images a batch, over all processes. A shuffled last batch that is not full is left out. Without
            shuffling it is kept, and the number is per process.
        seed: of the order; None keeps the order of the images.
        rank, world_size: number of this process, and of all.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.rank, self.num_images, self.world_size)) // self.batch_size)
        return self.num_images // self.batch_size

    def epoch(self, number: int, start: int = 0, device: torch.device | None = None) -> Iterator[Tensor]:
        """The rows of each batch of an epoch from batch ``start`` on, int64 ``[B]``."""
        if self.seed is None:
            own = torch.arange(self.rank, self.num_images, self.world_size, device=device)
            yield from own[start * self.batch_size :].split(self.batch_size) if start < len(self) else ()
            return
        # One generator per epoch, seeded by a pair of numbers: nothing has to be stored to continue a run.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        order = torch.randperm(self.num_images, generator=generator).to(device)
        for batch in range(start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]


class ShardRows:
    """As `Rows`, of images in shards: in an order that reads each shard from front to back.

    The images of an epoch, shard by shard and the shards in random order, are dealt out to the processes in equal
    parts, and the part of a process to its lanes: `lanes` batches one after the other come from as many lanes, so that
    each of as many workers reads shards of its own. Within a lane images are shuffled in windows. All this depends on
    the seed, the epoch's number and the numbers of processes and lanes, and on nothing that was read: a run can
    continue in the middle of an epoch here too.

    Args:
        shards: where the images are.
        batch_size, seed, rank, world_size: as of `Rows`. Without a seed each process has a part of the shards.
        lanes: into how many sequences the images of a process are divided.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        lanes: int = 1,
    ) -> None:
        self.shards, self.batch_size, self.seed, self.lanes = shards, batch_size, seed, lanes
        self.rank, self.world_size = rank, world_size
        self.num_images = len(shards.shard)

    def __len__(self) -> int:
        return len(self._sizes())

    def epoch(self, number: int, start: int = 0) -> Iterator[Tensor]:
        """The rows of each batch of an epoch from batch ``start`` on, int64 ``[B]``."""
        sizes = self._sizes()
        by_lane = np.concatenate([np.arange(lane, len(sizes), self.lanes) for lane in range(self.lanes)])
        ends = np.empty(len(sizes), np.int64)
        ends[by_lane] = np.cumsum(sizes[by_lane])
        rows = self._own(number)
        for batch in range(start, len(sizes)):
            yield torch.from_numpy(rows[ends[batch] - sizes[batch] : ends[batch]])

    def _sizes(self) -> np.ndarray:
        """Images of each batch of this process, int64."""
        if self.seed is not None:
            return np.full(self.num_images // self.batch_size, self.batch_size // self.world_size)
        first, last = self._share()
        return np.diff(np.append(np.arange(first, last, self.batch_size), last))

    def _share(self) -> tuple[int, int]:
        """Where the images of this process begin and end in the order of the epoch."""
        total = self.num_images
        if self.seed is not None:
            total -= total % self.batch_size
        return total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size

    def _own(self, number: int) -> np.ndarray:
        """The images of this process, lane after lane."""
        first, last = self._share()
        if self.seed is None:
            return shard_order(self.shards)[first:last]
        rows = shard_order(self.shards, np.random.default_rng([self.seed, number]))[first:last]
        sizes = self._sizes()
        lengths = [int(sizes[lane :: self.lanes].sum()) for lane in range(self.lanes)]
        random = np.random.default_rng([self.seed, number, self.rank])
        return np.concatenate([shuffled_in_windows(lane, random) for lane in np.split(rows, np.cumsum(lengths)[:-1])])


class TensorBatches:
    """Slices a data set that fits in memory into batches; no worker processes, no copies between processes.

    Everything is moved to the device once.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        targets: int8 ``[N, K]``; 1 has the label, 0 has not, -1 unknown.
        batch_size, seed, rank, world_size: as in `Rows`.
        numbers: what each image is called in messages; by default its row.
    """

    mostly_unknown = False

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.numbers = range(len(images)) if numbers is None else numbers
        self.images = images.to(device)
        self.targets = targets.to(device)
        self.num_images = len(images)
        self._rows = Rows(len(images), batch_size, seed, rank, world_size)

    def __len__(self) -> int:
        return len(self._rows)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch ``start`` on."""
        for rows in self._rows.epoch(number, start, self.images.device):
            yield Batch(self.images[rows], self.targets[rows], rows)

    def name(self, row: int) -> str:
        """What to call an image in a message."""
        return f"image {self.numbers[row]}"

    def close(self) -> None:
        """Nothing: no processes read."""
