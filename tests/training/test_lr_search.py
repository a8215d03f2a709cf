"""The search for the learning rate: it finds a good one, and leaves no trace."""

import math
import random

import numpy as np
import pytest
import torch

from mlfast import cli
from mlfast.training import TrainConfig
from mlfast.training.distributed import ONE_PROCESS
from mlfast.training.fit import create_trainer
from mlfast.training.lr_search import RangeTest, range_test, search_range, tenth_of_lowest, tpe_search


@pytest.fixture
def trainer(tiny, tmp_path):
    def make(**settings):
        return create_trainer(tiny(**settings), tmp_path / "search", ONE_PROCESS, quiet=True)

    return make


def everything(trainer):
    """All that a search could leave behind."""
    return {
        "model": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "optimizer": str(trainer.optimizer.state_dict()),
        "modes": [module.training for module in trainer.model.modules()],
        "gradients": [weight.grad for weight in trainer.model.parameters()],
        "random": (random.random(), np.random.rand(), torch.rand(2).tolist()),
    }


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@pytest.mark.parametrize("settings", [{}, {"sam_rho": 0.05, "bias_lr": 2.0, "loss": "bce"}])
@pytest.mark.parametrize("search", ["range", "tpe"])
def test_a_search_leaves_no_trace(trainer, search, settings, monkeypatch):
    monkeypatch.setattr("mlfast.training.lr_search._STEPS", 20)
    run = trainer(train_images=160, batch_size=8, val_images=16, **settings)
    first = next(run.train.epoch(7))
    run.take_step(first.images, first.targets)  # something in the optimiser, gradients on the weights
    run.model.backbone.eval()
    kept = [weight.grad.clone() for weight in run.model.parameters()]
    seed(5)
    before = everything(run)
    seed(5)
    if search == "range":
        range_test(run)
    else:
        pytest.importorskip("optuna")
        tpe_search(run, trials=2, epochs=1)
    after = everything(run)
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
    assert all(
        torch.equal(weight.grad, gradient) for weight, gradient in zip(run.model.parameters(), kept, strict=True)
    )
    for key in ("optimizer", "modes", "random"):
        assert after[key] == before[key], key


def test_the_answer_is_a_tenth_of_the_rate_where_the_loss_is_lowest():
    rates = list(np.logspace(-3, 1, 81))
    early_fall = [1 + 5 / (1 + rate / 0.005) + 0.2 * math.log10(rate / 2) ** 2 for rate in rates]
    lowest = rates[int(np.argmin(early_fall))]
    assert lowest > 1 and tenth_of_lowest(rates, early_fall) == pytest.approx(lowest / 10)


def test_range_test_stops_where_the_loss_diverges(trainer):
    run = trainer(train_images=160, batch_size=8, loss="bce")  # cosines are bounded: aam does not diverge
    found = range_test(run, 1e-3, 1e6)
    assert len(found.rates) < 100 and found.rates[0] == pytest.approx(1e-3)
    assert 1e-3 <= found.lr < 1e2


def test_range_test_takes_100_steps_of_any_data_and_stays_in_the_range(trainer):
    found = range_test(trainer(), 0.4, 3)  # 4 steps an epoch; a tenth of any of these rates is below them
    assert len(found.rates) == 100 and found.rates[-1] == pytest.approx(3) and found.lr == 0.4


@pytest.mark.parametrize("search", [range_test, tpe_search])
def test_rates_that_are_no_range(trainer, search):
    pytest.importorskip("optuna")
    run = trainer()
    for low, high in ((0.0, None), (-1.0, 1.0), (2.0, 1.0), (99.0, None), (None, math.inf)):
        with pytest.raises(ValueError, match="expected 0 < low < high"):
            search(run, low=low, high=high)


def test_a_loss_that_still_falls_is_told():
    assert RangeTest(0.1, [0.5, 1], [2, 1], [2, 1]).still_falls
    assert not RangeTest(0.1, [0.5, 1], [1, 2], [1, 2]).still_falls


def test_tpe_prefers_a_rate_that_learns(trainer):
    pytest.importorskip("optuna")
    run = trainer(train_images=128, batch_size=16, val_images=64, lr=1e-7)
    found = tpe_search(run, trials=6, epochs=2, low=1e-7, high=1.0)
    assert found.trials[0].lr == pytest.approx(1e-7)  # the configured rate comes first
    assert found.lr > 1e-3
    assert max(trial.scores[-1] for trial in found.trials if not trial.pruned) > found.trials[0].scores[-1]


@pytest.mark.parametrize(
    ("settings", "known"),
    [({}, 0.5), ({}, 84 * 0.007), ({"loss": "asl"}, 64 * 0.0002), ({"optimizer": "adamw"}, 1e-4)],
)
def test_the_range_holds_the_rates_that_are_known(settings, known):
    low, high = search_range(TrainConfig(**settings))
    assert low < known < high


def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    options = ["--image_size", "32", "--val_images", "16", "--device", "cpu", "--train_images", "160"]
    assert cli.main(["find-lr", "--mode", "range", "--batch_size", "8", *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("lr: ") and float(out[-1].split()[1]) > 0
    assert (tmp_path / "lr_search.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["find-lr", "--trials", "1", "--trial_epochs", "1", "--picture", "tpe.png", *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "lr: 0.5" and out[-2] == "picture: tpe.png" and len(out) == 4
    assert not (tmp_path / "runs").exists()
    unwritable = ["--picture", "no/such/folder.png", "--mode", "range", "--batch_size", "8"]
    assert cli.main(["find-lr", *unwritable, *options]) == 0  # what was found is told
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("lr: ") and out[-2].startswith("picture: none, as no/such/folder.png cannot be written")
    assert cli.main(["find-lr", "--trials", "0"]) == 2
    assert "trials: got 0, expected at least 1" in capsys.readouterr().err
