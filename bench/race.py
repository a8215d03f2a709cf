"""Times contestants fairly: interleaved in one run, on the same inputs, which rotate so that caches do not flatter."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Contestant = Callable[..., Any]

# Rotated inputs together exceed every CPU cache of the machines at hand (32 MiB), up to a number of sets.
ROTATED_BYTES = 128 * 2**20
MOST_SETS = 64


def number_of_sets(bytes_per_set: int) -> int:
    """How many input sets to rotate over."""
    return max(2, min(MOST_SETS, ROTATED_BYTES // max(bytes_per_set, 1)))


def seconds(run: Contestant, *arguments: Any) -> float:
    """One timed call."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def until_done(run: Contestant) -> Contestant:
    """The same call, which returns when the GPU has finished what it launched; on a CPU, the call itself."""
    if not torch.cuda.is_initialized():
        return run

    def call(*arguments: Any) -> None:
        run(*arguments)
        torch.cuda.synchronize()

    return call


def race(
    benchmark: Any, contestants: dict[str, Contestant], inputs: Sequence[tuple[Any, ...]], subject: str, rounds: int
) -> dict[str, float]:
    """Runs every contestant once per round, in the order given, each on the round's inputs.

    Name contestants that share code apart from each other: the second of two in a row would find its code in the
    caches. The subject comes last in a round, which pytest-benchmark times; the others run in the round's set-up, timed
    the same way.

    Returns:
        The median seconds of each contestant.
    """
    contestants = {name: until_done(run) for name, run in contestants.items()}
    others = {name: run for name, run in contestants.items() if name != subject}
    times: dict[str, list[float]] = {name: [] for name in others}
    turn = 0

    def set_up() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal turn
        arguments = inputs[turn % len(inputs)]
        turn += 1
        for name, run in others.items():
            times[name].append(seconds(run, *arguments))
        return arguments, {}

    for run in contestants.values():
        for arguments in inputs[:3]:
            run(*arguments)  # compiles, allocates, warms up
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(contestants[subject], setup=set_up, rounds=rounds)
    finally:
        gc.enable()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {subject: benchmark.stats.stats.median, **medians}
