"""Runs compared, and runs that something happens to."""

import torch

from mlfast.training.trainer import Trainer

TIMES = {"seconds", "images_per_second", "data_seconds", "compute_seconds"}


def final_state(run_dir):
    """What a run would be continued from."""
    return torch.load(run_dir / "state.pt", weights_only=True)


def assert_same(first, second):
    """Equality of nested state, of tensors bit by bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_same(*pair)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def untimed(history):
    """A history without what the clock measured."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


def at_step(monkeypatch, number, action):
    """Do something after the given step, counted over the whole run."""
    original, count = Trainer._train_step, 0

    def step(self, batch):
        nonlocal count
        original(self, batch)
        count += 1
        if count == number:
            action()

    monkeypatch.setattr(Trainer, "_train_step", step)


def fail():
    raise RuntimeError("power cut")
