"""Batch norm's running statistics: kept as they are, or put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that batch norm writes in training: means, variances and numbers of batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [buffer for module in norms for buffer in module.buffers(recurse=False)]


@contextmanager
def uncounted_batches(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm runs as in training, but its running statistics and batch count stay as they are.

    For activations that gradient checkpointing computes again: they must save the same tensors as the first time, so
    the statistics are written with a momentum of 0. (`mlfast.training.sam.frozen_batch_norm_statistics` does not touch
    them at all, which saves fewer.)
    """
    counted = [
        (module, module.momentum, module.num_batches_tracked)
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    try:
        for module, _, _ in counted:
            module.momentum, module.num_batches_tracked = 0.0, None
        yield
    finally:
        for module, momentum, number in counted:
            module.momentum, module.num_batches_tracked = momentum, number
