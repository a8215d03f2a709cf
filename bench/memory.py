"""Memory of the contestants: what freed memory costs, and the peak of one call.

The peak is what PyTorch's allocator held at the most, above what it held before the call: the same definition on both
kinds of device. What a library takes for itself is not in it, such as the packed matrices of a matrix product on a CPU,
nor is the scratch of mlfast's own CPU kernels: docs/benchmarks.md says how much that is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

# Parameters of glibc's mallopt: above how many free bytes the heap shrinks (-1: never), and how many blocks may lie
# outside of it, which go back to the system when they are freed.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> str:
    """Has the C library keep what is freed, as other allocators do; says in words what became of it.

    By default glibc gives large blocks back to the system, so that each large tensor costs page faults again, and on
    virtual machines whose host takes free memory back, a hundred times as much. Luck then decides who pays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0)):
        return "left to the system's allocator"
    return "kept by the process"


def peak_bytes(run: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Bytes of outputs, gradients and everything in between. Gradients of the arguments are cleared first.

    A call that leaves gradients in a module would release them in the next one, which then seems to take less.
    """
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
