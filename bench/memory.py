"""The peak memory of one call: what PyTorch's allocator held at the most, above what it held before the call.

The same definition on both kinds of device. Memory that a library takes for itself, such as the packed matrices of a
matrix product on a CPU, is not in it; mlfast's kernels allocate none.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch


def peak_bytes(run: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Bytes of outputs, gradients and everything in between. Gradients of the arguments are cleared first."""
    for argument in arguments:
        if torch.is_tensor(argument):
            argument.grad = None
    return _on_gpu(run, arguments) if torch.cuda.is_initialized() else _on_cpu(run, arguments)


def _on_gpu(run: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(run: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """The highest running sum of what the profiler reports: allocations are positive, releases negative."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run(*arguments)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
