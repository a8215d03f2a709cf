"""Batches of image files, read and augmented by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlfast.data.annotations import Shards
from mlfast.data.dataset import BrokenImagesError
from mlfast.training.batches import Batch, Rows, ShardRows
from mlfast.training.errors import TrainingError

Item = tuple[Tensor, Tensor]


class LoaderBatches:
    """Batches of a data set that gives one image at a time, such as `mlfast.data.ImageDataset`.

    The order of an epoch depends on (seed, epoch), and of shards on the number of lanes too; what a transform draws
    from torch's CPU generator depends on (seed, epoch, row). The number of workers changes neither, so a run that
    continues in the middle of an epoch sees exactly what it would have seen. The caller's random state is left alone.
    Workers read ahead two batches each. Those of a shuffled data set live until `close`; those of an evaluation, which
    is rare, are started for it.

    Args:
        images: gives uint8 ``[3, H, W]``, all of one size, and int8 ``[K]``.
        batch_size, seed, rank, world_size: as in `mlfast.training.batches.Rows`.
        names: of the images, by row; ``annotations.paths``.
        mostly_unknown: as in `mlfast.training.batches.Batches`.
        shards: where the images are, if they are read in the order of shards: see `mlfast.training.batches.ShardRows`.
        lanes: as there.
        workers: processes that read; 0 reads in this one.
        start_method: of the workers: "fork", "spawn" or "forkserver"; None takes Python's default.

    Raises:
        TrainingError: while an epoch runs: more images are broken than the data set allows.
    """

    def __init__(
        self,
        images: Dataset[Item],
        batch_size: int,
        *,
        names: Sequence[str],
        device: torch.device,
        seed: int | None = None,
        mostly_unknown: bool = False,
        shards: Shards | None = None,
        lanes: int = 1,
        workers: int = 0,
        start_method: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images, self.names, self.device, self.mostly_unknown = len(names), names, device, mostly_unknown
        self._order = _EpochOrder(
            ShardRows(shards, batch_size, seed, rank, world_size, lanes)
            if shards
            else Rows(len(names), batch_size, seed, rank, world_size)
        )
        self._settings: dict[str, Any] = {
            "dataset": _SeededItems(images, seed or 0),
            "batch_sampler": self._order,
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "persistent_workers": workers > 0 and seed is not None,
            "multiprocessing_context": start_method if workers else None,
            "worker_init_fn": _leave_signals_to_the_parent,
        }
        self._loader = self._new_loader()
        self._reading: weakref.WeakSet[Any] = weakref.WeakSet()  # what has workers

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch ``start`` on."""
        self._order.number, self._order.start = number, start
        with _signals_held_back(self._loader):
            batches = iter(self._loader)
        self._reading.add(batches)
        _READING.add(batches)
        try:
            for images, targets, rows in batches:
                yield Batch(images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True), rows)
        except Exception as error:
            self.close()  # here and now: the traceback keeps hold of what has workers
            if not isinstance(error, BrokenImagesError):
                raise
            # Out of a worker the message comes behind a traceback in text.
            raise TrainingError(str(error).rpartition("BrokenImagesError: ")[2].strip()) from error

    def close(self) -> None:
        """End the workers that still are there; a later epoch would start new ones."""
        _end_workers(self._reading)
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
        return DataLoader(**self._settings, generator=torch.Generator())  # or it would draw from the run's own

    def name(self, row: int) -> str:
        """The path of an image."""
        return self.names[row]


class WaitingTime:
    """Passes batches on and adds up how long they were waited for.

    Attributes:
        seconds: spent waiting so far.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start


class _EpochOrder:
    """The batches of the epoch that is set, as lists of (epoch, row): workers need nothing else to know what to do."""

    def __init__(self, rows: Rows | ShardRows) -> None:
        self.rows, self.number, self.start = rows, 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.number
        for rows in self.rows.epoch(number, self.start):
            yield [(number, row) for row in rows.tolist()]


class _SeededItems(Dataset[Any]):
    """Items by (epoch, row), with a random state of their own."""

    def __init__(self, images: Dataset[Item], seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, row = key
        with seeded(self.seed, epoch, row):
            return *self.images[row], row


@contextmanager
def seeded(seed: int, epoch: int, row: int) -> Iterator[None]:
    """Inside, torch's CPU generator is that of an image in an epoch; outside it is left alone."""
    state = np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed would reach the GPUs' too
        yield


_READING: weakref.WeakSet[Any] = weakref.WeakSet()  # of all `LoaderBatches`


def _end_workers(reading: Iterable[Any]) -> None:
    """End the workers of the loaders' iterators; torch asks them to, and no public call of it does.

    Nobody else would: the garbage collector ends the queues before they can pass the request on, and Python on exit
    sends each worker a single SIGTERM, which is left to the parent, and then waits for it for ever.
    """
    for batches in list(reading):
        if hasattr(batches, "_shutdown_workers"):  # of a loader with workers
            batches._shutdown_workers()
            for worker in batches._workers:
                worker.kill()


atexit.register(_end_workers, _READING)  # before Python's own, which was registered earlier


@contextmanager
def _signals_held_back(loader: DataLoader[Any]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait, in this process and in workers that begin: these may not know yet what to do.

    Not so with "forkserver", whose server begins the workers.
    """
    context = loader.multiprocessing_context or multiprocessing
    if not loader.num_workers or context.get_start_method() == "forkserver":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM)


def _end_at_the_next(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach the workers too, but the parent's present step needs their batches.

    A second SIGTERM ends a worker: the parent sends it to one that does not stop on request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_the_next)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_THE_PARENT)
