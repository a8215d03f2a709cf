"""Batches: read by workers, shared among processes, timed, and mixed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mlfast.data.transforms import ImageTransform
from mlfast.training import TrainConfig
from mlfast.training.loader import LoaderBatches, WaitingTime
from mlfast.training.mixing import MixedBatches

CPU = torch.device("cpu")


def gradients(count: int = 12, **settings) -> LoaderBatches:
    """Batches of made-up images which an augmentation changes visibly."""
    return LoaderBatches(Gradients(count), names=[f"{row}.jpg" for row in range(count)], device=CPU, **settings)


class Gradients(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __getitem__(self, row):
        ramp = np.add.outer(np.arange(32), 2 * np.arange(32))[..., None] + np.array([row, 2 * row, 40])
        image = ImageTransform(None, "randaugment", 0.4)(Image.fromarray(ramp.astype(np.uint8)))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor([row], dtype=torch.int8)


def assert_equal_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for pair in zip(first, second, strict=True):
        assert all(map(torch.equal, *pair))


# Reading


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_change_nothing(start_method):
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {start_method} here")
    here = gradients(batch_size=4, seed=3)
    others = gradients(batch_size=4, seed=3, workers=1, start_method=start_method)
    state = torch.get_rng_state()
    for epoch, start in ((0, 0), (1, 2)):
        assert_equal_batches(here.epoch(epoch, start), others.epoch(epoch, start))
    others.close()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_depends_on_its_number_and_an_image_on_its_row():
    batches = gradients(batch_size=4, seed=3)
    assert_equal_batches(list(batches.epoch(5))[1:], batches.epoch(5, 1))
    one, two = (
        {int(row): image for batch in batches.epoch(epoch) for image, row in zip(batch.images, batch.rows, strict=True)}
        for epoch in (0, 1)
    )
    assert sum(not torch.equal(one[row], two[row]) for row in one) > 8
    whole, halves = gradients(batch_size=4, seed=3), [
        gradients(batch_size=4, seed=3, rank=rank, world_size=2) for rank in (0, 1)
    ]  # fmt: skip
    for batch, *parts in zip(whole.epoch(2), *(half.epoch(2) for half in halves), strict=True):
        for rank, part in enumerate(parts):
            assert_equal_batches([[tensor[rank::2] for tensor in batch]], [part])


def test_in_evaluation_each_process_has_its_share_and_each_image_counts_once():
    shares = [gradients(11, batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
    rows = [[batch.rows.tolist() for batch in share.epoch(0)] for share in shares]
    assert rows == [[[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9]]]
    assert [len(share) for share in shares] == [2, 2] and shares[0].num_images == 11


def test_signals_to_the_workers_do_not_end_them():
    before = set(multiprocessing.active_children())
    batches = gradients(batch_size=2, seed=0, workers=1).epoch(0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 5


def test_signals_that_come_before_a_worker_is_ready_do_not_end_it(monkeypatch):
    before = set(multiprocessing.active_children())

    def start(worker):  # and the signals of a whole group come before it has begun
        real(worker)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)

    real = multiprocessing.Process.start
    monkeypatch.setattr("torch.utils.data._utils.worker.signal_handling._set_worker_signal_handlers", slow_start)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    batches = gradients(batch_size=2, workers=1, start_method="fork")
    assert len(list(batches.epoch(0))) == 6
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert not set(multiprocessing.active_children()) - before


def slow_start(real=torch.utils.data._utils.signal_handling._set_worker_signal_handlers):
    real()  # torch's own: a SIGTERM ends the worker
    time.sleep(0.3)


def test_workers_end_when_batches_are_closed_and_others_begin_for_another_epoch():
    before = set(multiprocessing.active_children())
    batches = gradients(batch_size=2, seed=0, workers=2)
    epochs = [batches.epoch(0), batches.epoch(0)]
    next(epochs[0])
    batches.close()
    assert not set(multiprocessing.active_children()) - before
    assert len(list(epochs[1])) == 6
    batches.close()
    assert not set(multiprocessing.active_children()) - before


class KilledAtFive(Gradients):
    def __getitem__(self, row):
        if row == 5:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory ends
        return super().__getitem__(row)


def test_workers_do_not_keep_a_process_from_ending_not_even_where_one_was_killed():
    code = "from tests.training.test_batches import *\nbatches = gradients(batch_size=4, seed=0, workers=1)\n"
    code += "epoch = batches.epoch(0); next(epoch); print('read', flush=True)\n"
    code += "val = LoaderBatches(KilledAtFive(12), 2, names=list('abcdefghijkl'), device=CPU, workers=2)\n"
    code += "list(val.epoch(0))"
    path = {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True, timeout=90
    )
    assert (ended.returncode, ended.stdout) == (1, "read\n"), ended.stderr
    assert "is killed by signal" in ended.stderr or "exited unexpectedly" in ended.stderr


def test_waiting_is_measured(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    waiting = WaitingTime(iter("ab"))
    assert list(waiting) == ["a", "b"] and waiting.seconds == 2.75


# Mixing


class OneBatch:
    num_images, mostly_unknown = 4, False

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (4, 3, 16, 20), generator=random, dtype=torch.uint8)
        self.targets = torch.tensor([[1, 0, 1], [0, 0, -1], [1, 1, 0], [-1, 0, 0]], dtype=torch.int8)

    def epoch(self, number, start=0):
        yield self.images, self.targets, torch.arange(4)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(kind):
    plain = OneBatch()
    mixed = MixedBatches(plain, **{"mixup": 0.0, "cutmix": 0.0} | {kind: 1.0}, seed=5)
    shares = []
    for epoch in range(20):
        images, targets, _ = next(mixed.epoch(epoch))
        share = targets[2, 1].item()  # partner 1 has not what image 2 has
        shares.append(share)
        other = 1 - share
        expected = torch.tensor([[-1, 0, share], [other, other, -1], [share, share, -1], [-1, 0, other]])
        torch.testing.assert_close(targets, expected, atol=1e-6, rtol=0)
        old, new = plain.images.double(), images.double()
        if kind == "mixup":
            assert (share * old + other * old.flip(0) - new).abs().max() <= 0.5 + 1e-3
        else:
            foreign = (images != plain.images).any(0).any(0)
            assert (images == torch.where(foreign, plain.images.flip(0), plain.images)).all()
            assert foreign.double().mean().item() == pytest.approx(other, abs=1e-6)
    assert len(set(shares)) > 10 and max(shares) <= 1 and min(shares) >= 0
    assert_equal_batches(mixed.epoch(3), mixed.epoch(3))


@pytest.mark.parametrize("loss", ["aam", "asl", "bce"])
def test_every_loss_takes_mixed_labels_and_leaves_unknown_ones_out(loss):
    from mlfast.training.optimization import create_loss

    images, targets, _ = next(MixedBatches(OneBatch(), 1.0, 0.0, seed=1).epoch(0))
    scores = torch.linspace(-0.9, 0.9, 12).view(4, 3).requires_grad_()
    create_loss(TrainConfig(loss=loss))(scores, targets).backward()
    assert ((scores.grad == 0) == (targets < 0)).all()
    assert images.dtype == torch.uint8
