"""Times contestants fairly: interleaved in one run, on the same inputs, which rotate so that caches do not flatter."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench.memory import peak_bytes
from bench.replay import kernel_seconds

Contestant = Callable[..., Any]

# Rotated inputs together exceed every CPU cache of the machines at hand (32 MiB), up to a number of sets.
ROTATED_BYTES = 128 * 2**20
MOST_SETS = 64
# Inputs below this fit a core's caches, so for a quick call a loop of its own is another case than taking turns.
HOT_BYTES = 2**20
HOT_SECONDS = 1e-3
LOOPS = 5
FEWEST_ROUNDS = 5
most_seconds = 3.0  # of one race's rounds, so that a whole run takes ten minutes; --quick lowers it


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
    """Runs every contestant once per round, in an order drawn anew for each, all of them on the round's inputs.

    Whoever comes first brings the inputs into the caches, and whoever follows a long contestant finds its own code gone
    from them: no one shall always be the one or the other. The subject is timed by pytest-benchmark, the others around
    it in the same way. There are fewer rounds where they would take longer than ``most_seconds``.

    What else one wants to know of the contestants (see `details`) is left in ``benchmark.extra_info``, from which the
    fixture ``record`` takes it into the row.

    Returns:
        The median microseconds of each contestant, as a row has them.
    """
    timed = {name: until_done(run) for name, run in contestants.items()}
    one_round = 0.0
    for run in timed.values():
        for arguments in inputs[:3]:
            last = seconds(run, *arguments)  # compiles, allocates, warms up
        one_round += last
    rounds = max(min(rounds, FEWEST_ROUNDS), min(rounds, int(most_seconds / one_round)))
    with no_garbage_collection():
        times = take_turns(benchmark, timed, inputs, subject, rounds)
        benchmark.extra_info["race"] = details(contestants, timed, inputs, subject, times)
    return {name: microseconds(statistics.median(values)) for name, values in times.items()}


def take_turns(
    benchmark: Any, timed: dict[str, Contestant], inputs: Sequence[tuple[Any, ...]], subject: str, rounds: int
) -> dict[str, list[float]]:
    """The seconds of every contestant in every round."""
    times: dict[str, list[float]] = {name: [] for name in timed if name != subject}
    lots = random.Random(0)
    turn, arguments = 0, inputs[0]
    following: list[str] = []  # who comes after the subject in the round under way

    def call(names: list[str]) -> None:
        for name in names:
            times[name].append(seconds(timed[name], *arguments))

    def set_up() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal turn, following, arguments
        call(following)  # of the round before
        order = lots.sample(list(timed), len(timed))
        place = order.index(subject)
        arguments, following = inputs[turn % len(inputs)], order[place + 1 :]
        turn += 1
        call(order[:place])
        return arguments, {}

    benchmark.pedantic(timed[subject], setup=set_up, rounds=rounds)
    call(following)
    return {subject: list(benchmark.stats.stats.data), **times}


def details(
    contestants: dict[str, Contestant],
    timed: dict[str, Contestant],
    inputs: Sequence[tuple[Any, ...]],
    subject: str,
    times: dict[str, list[float]],
) -> dict[str, Any]:
    """What a row says beside the medians.

    ``rounds``; ``ratio_quartiles``: the three quartiles over the rounds of how many times as long as the subject each
    contestant took; ``peak_bytes``: the peak memory of one call; ``hot_us``, of quick calls on small inputs: the median
    of a loop of its own; ``kernel_us``, on a GPU: the time in a replayed CUDA graph with cold caches, null where there
    is none.
    """
    found: dict[str, Any] = {"rounds": len(times[subject])}
    found["ratio_quartiles"] = {
        name: [round(q, 3) for q in quartiles(values, times[subject])]
        for name, values in times.items()
        if name != subject
    }
    found["peak_bytes"] = {name: peak_bytes(run, inputs[0]) for name, run in contestants.items()}
    small = sum(x.nbytes for x in inputs[0] if torch.is_tensor(x)) < HOT_BYTES
    if small and statistics.median(times[subject]) < HOT_SECONDS:
        found["hot_us"] = own_loops(timed, inputs[0], found["rounds"])
    if torch.cuda.is_initialized():
        replayed = {name: kernel_seconds(run, inputs) for name, run in contestants.items()}
        found["kernel_us"] = {name: s and microseconds(s) for name, s in replayed.items()}
    return found


def quartiles(times: list[float], subject_times: list[float]) -> list[float]:
    """The quartiles over the rounds of how many times as long as the subject a contestant took."""
    ratios = [other / mine for other, mine in zip(times, subject_times, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def own_loops(timed: dict[str, Contestant], arguments: tuple[Any, ...], rounds: int) -> dict[str, float]:
    """Microseconds of each where the same call comes again and again: it finds its code and its data in the caches.

    Five loops of each, in an order drawn anew, and of their medians the median: a disturbance strikes one of them.
    """
    lots, medians = random.Random(0), {name: [] for name in timed}
    for _ in range(LOOPS):
        for name in lots.sample(list(timed), len(timed)):
            run = timed[name]
            for _ in range(10):
                run(*arguments)
            medians[name].append(statistics.median(seconds(run, *arguments) for _ in range(-(-rounds // LOOPS))))
    return {name: microseconds(statistics.median(values)) for name, values in medians.items()}


def microseconds(value: float) -> float:
    """As results are stored."""
    return round(value * 1e6, 1)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector would strike one contestant and spare the next."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
