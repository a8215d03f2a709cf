"""The time of a kernel as it is, on a GPU: a replayed CUDA graph, without Python and without launches, caches cold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

FEWEST_CALLS, MOST_CALLS = 100, 500
MOST_SECONDS = 0.1  # of one replay, unless the L2 cache asks for more calls
REPLAYS = 7


def kernel_seconds(run: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float | None:
    """Seconds of one call in a graph of many, or None where the call cannot be captured (it waits for the GPU).

    Every call of a graph takes other inputs, in turn, so many that together they are twice the L2 cache; those below
    about 200 KB stay within it, for a graph holds at most ``MOST_CALLS`` calls.
    """
    sets = rotation(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets[:3]:
            run(*arguments)  # what allocates or compiles on a stream's first call must not do so in the capture
        torch.cuda.synchronize()
        one_call = seconds_until_done(run, sets[0])
    calls = len(sets) * math.ceil(min(FEWEST_CALLS, MOST_SECONDS / one_call) / len(sets))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in range(calls):
                run(*sets[call % len(sets)])
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    return statistics.median(replay_seconds(graph) for _ in range(REPLAYS)) / calls


def seconds_until_done(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """One call, from the host's side."""
    start = time.perf_counter()
    run(*arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rotation(inputs: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Input sets of twice the size of the L2 cache together: copies of those given, which stay as they are."""
    wanted = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    per_call = sum(x.nbytes * (1 + x.requires_grad) for x in inputs[0] if torch.is_tensor(x))
    number = max(len(inputs), min(MOST_CALLS, math.ceil(wanted / per_call))) if per_call else len(inputs)
    return [tuple(map(copy, inputs[i % len(inputs)])) for i in range(number)]


def copy(argument: Any) -> Any:
    """The tensor anew, in its layout; anything else is shared."""
    if not torch.is_tensor(argument):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, from event to event."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
