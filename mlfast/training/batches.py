"""Batches out of tensors that are in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8 ``[B, 3, H, W]``.
        targets: int8 ``[B, K]``; 1 has the label, 0 has not, -1 unknown.
        rows: where each image stands in its data set.
    """

    images: Tensor
    targets: Tensor
    rows: Tensor


class TensorBatches:
    """Slices a data set that fits in memory into batches; no worker processes, no copies between processes.

    Everything is moved to the device once. The order of an epoch depends on the seed and the epoch's number alone, so
    a run that continues in the middle of an epoch sees the images that it would have seen.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        targets: int8 ``[N, K]``; 1 has the label, 0 has not, -1 unknown.
        batch_size: images a batch. A shuffled last batch that is not full is left out; without shuffling it is kept.
        seed: of the order; None keeps the order of the tensors.
        rank, world_size: of several processes, each has every ``world_size``-th image of every batch.
    """

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
    ) -> None:
        self.images = images.to(device)
        self.targets = targets.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.share = slice(rank, None, world_size)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (self.seed is None and rest > 0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch ``start`` on."""
        order = self._order(number)
        for batch in range(start, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size][self.share]
            yield Batch(self.images[rows], self.targets[rows], rows)

    def name(self, row: int) -> str:
        """What to call an image in a message."""
        return f"image {row}"

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(len(self.images), device=self.images.device)
        # One generator per epoch, seeded by a pair of numbers: nothing has to be stored to continue a run.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.images), generator=generator).to(self.images.device)
