"""What a race leaves beside its medians: rounds, spread, hot loops, and peak memory."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import race
from bench.memory import peak_bytes

MIB = 2**20


class Benchmark:
    """What the race uses of pytest-benchmark."""

    def __init__(self):
        self.extra_info, self.stats = {}, SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, run, setup, rounds):
        for _ in range(rounds):
            arguments, _ = setup()
            self.stats.stats.data.append(race.seconds(run, *arguments))


class Clock:
    """The race's, which only moves while a contestant sleeps: the machine may be as busy as it likes."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(race, "time", clock)
    return clock


def test_a_race_leaves_its_details(clock):
    benchmark, calls = Benchmark(), []

    def sleeper(name, seconds):
        return lambda x: (calls.append(name), clock.sleep(seconds))

    contestants = {"eager": sleeper("eager", 2e-3), "mlfast": sleeper("mlfast", 5e-4)}
    median_us = race.race(benchmark, contestants, [(torch.zeros(2),), (torch.zeros(2),)], "mlfast", 7)
    found = benchmark.extra_info["race"]
    assert median_us == found["hot_us"] == {"eager": 2000, "mlfast": 500}
    assert found["rounds"] == 7
    assert found["ratio_quartiles"] == {"eager": [4, 4, 4]}
    assert found["peak_bytes"] == {"eager": 0, "mlfast": 0}
    assert "kernel_us" not in found or torch.cuda.is_available()
    rounds = [calls[i : i + 2] for i in range(4, 18, 2)]
    assert all(sorted(turns) == ["eager", "mlfast"] for turns in rounds)
    assert {turns[0] for turns in rounds} == {"eager", "mlfast"}  # nobody always comes first


def test_a_round_has_one_input_and_every_place_is_drawn(clock):
    benchmark, calls, names = Benchmark(), [], ("a", "b", "mlfast")
    contestants = {name: lambda x, name=name: calls.append((name, x)) or clock.sleep(1e-3) for name in names}
    inputs = [(1,), (2,), (3,)]
    times = race.take_turns(benchmark, contestants, inputs, "mlfast", 60)
    assert {name: len(of) for name, of in times.items()} == dict.fromkeys(names, 60)
    rounds = [calls[i : i + 3] for i in range(0, 180, 3)]
    assert [x for turns in rounds for _, x in turns] == [1 + number % 3 for number in range(60) for _ in names]
    orders = {tuple(name for name, _ in turns) for turns in rounds}
    assert len(orders) == 6


def test_large_inputs_have_no_hot_loop_and_slow_rounds_are_few(monkeypatch, clock):
    monkeypatch.setattr(race, "most_seconds", 0.02)
    for size, slept in ((race.HOT_BYTES // 4, 5e-4), (1, 5e-3)):
        benchmark = Benchmark()
        inputs = [(torch.zeros(size),)] * 2
        race.race(benchmark, {"mlfast": lambda x, slept=slept: clock.sleep(slept)}, inputs, "mlfast", 300)
        assert "hot_us" not in benchmark.extra_info["race"]
    assert benchmark.extra_info["race"]["rounds"] == race.FEWEST_ROUNDS


def test_quartiles_are_of_ratios_round_by_round():
    assert race.quartiles([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == [2, 2, 3]
    assert race.quartiles([3.0], [2.0]) == [1.5] * 3


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(MIB // 4)
    assert 4 <= peak_bytes(lambda x: x.sum(), (x,)) <= 64
    assert peak_bytes(lambda x: x + 1, (x,)) == pytest.approx(MIB, abs=64)  # and the 1
    assert peak_bytes(lambda x: (x + 1) * 2, (x,)) == pytest.approx(
        2 * MIB, abs=64
    )  # the sum lives until the product is made
    assert peak_bytes(lambda x: [len(x + i) for i in range(5)], (x,)) == pytest.approx(
        MIB, abs=64
    )  # one after the other


def test_peak_memory_counts_the_gradient_and_not_the_one_before():
    x = torch.ones(MIB // 4, requires_grad=True)

    def step(x):
        x.grad = None
        (x * 2).sum().backward()

    step(x)
    first, second = peak_bytes(step, (x,)), peak_bytes(step, (x,))
    assert first == second == pytest.approx(MIB, abs=64)  # the product is gone when the gradient comes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replay_on_a_gpu():
    from bench.replay import kernel_seconds

    x = torch.ones(MIB, device="cuda", requires_grad=True)

    def step(x):
        x.grad = None
        (x * 2).sum().backward()

    assert 0 < kernel_seconds(step, [(x,), (x.detach().clone().requires_grad_(),)]) < 1e-2
    assert kernel_seconds(lambda x: x.sum().item(), [(x,)]) is None
    assert (x + 1).sum().item() == 2 * MIB  # the failed capture leaves a sane device


FAULTS_OF_LARGE_TENSORS = """
import resource, sys, torch
from bench.memory import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep" and keep_memory() != "kept by the process":
    sys.exit(77)
for _ in range(20):  # it takes a few until a hole fits
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_has_no_page_faults():
    def faults(how):
        run = subprocess.run([sys.executable, "-c", FAULTS_OF_LARGE_TENSORS, how], capture_output=True, text=True)
        if run.returncode == 77:
            pytest.skip("not glibc: the allocator cannot be told")
        return int(run.stdout)

    assert faults("keep") < 100 < faults("give back")
