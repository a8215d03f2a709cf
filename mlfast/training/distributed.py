"""Training on several processes, each with its share of every batch::

    torchrun --nproc-per-node=4 -m mlfast train my.yaml

Every process has the whole model, and gradients are averaged (DistributedDataParallel). Metrics are of all images,
each counted once. The first process alone writes files and shows progress.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """All processes of a run, as one of them sees them.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes and talks."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes; every one of them has to ask."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process; every one of them has to ask."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any process; every one of them has to ask."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=device)) > 0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, on every one of them."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ONE_PROCESS = Processes()


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """The model to call in training, whose backward pass averages gradients over the processes."""
    if processes.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def without_averaging(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside, gradients stay those of this process."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.no_sync() if is_wrapped else contextlib.nullcontext()  # type: ignore[operator]


@contextlib.contextmanager
def joined_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun started; one, where it did not.

    Args:
        device: the setting: GPUs talk over NCCL, all else over gloo.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    on_gpus = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
