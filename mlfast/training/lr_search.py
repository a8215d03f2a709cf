"""Two searches for the learning rate: short runs that a sampler chooses (TPE), and a range test of 100 steps.

Both leave the trainer as they found it, bit for bit: weights, buffers, gradients and random states are put back, and
its optimiser is not used at all, since each trial makes its own.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mlfast.evaluation import Predictions
from mlfast.files import atomic_write
from mlfast.training.batches import Batch
from mlfast.training.config import TrainConfig
from mlfast.training.drawing import BLUE, GREY, ORANGE, new_figure, png, tidy
from mlfast.training.optimization import create_optimizer, create_schedule
from mlfast.training.step import Step

if TYPE_CHECKING:
    from mlfast.training.trainer import Trainer

_SMOOTHING = 0.9  # share of the past in the smoothed loss of the range test
_DIVERGED = 4  # times the least smoothed loss: from there on a range test learns nothing more
_STEPS = 100  # of a range test
_SHARE = 0.1  # of the rate at which the smoothed loss is lowest: the answer of a range test


def search_range(config: TrainConfig) -> tuple[float, float]:
    """Where to look for the rate: around those that are known to work, for a loss summed over classes per image.

    SGD with aam: the paper's rates of 0.004 to 0.03 (the search range of its code) belong to a loss summed over a batch
    of 84, and are 0.34 to 2.5 here; smaller ones are for heads with more layers. Logits have no fixed length, so their
    gradients are larger and their range lies lower: 0.0002 summed over 64 images, as the same code used with ASL, is
    0.013 here, and 0.001 summed over 84 is 0.084. AdamW does not see the scale of the loss.
    """
    if config.optimizer == "adamw":
        return 1e-5, 1e-2
    return (0.01, 3.0) if config.loss == "aam" else (0.003, 1.0)


@dataclass(frozen=True)
class RangeTest:
    """A range test: one step at each rate, from the lowest on.

    Attributes:
        lr: a tenth of the rate at which the smoothed loss is lowest, and not below what was searched.
        rates, losses, smoothed: of each step, up to where the loss diverged.
    """

    lr: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def still_falls(self) -> bool:
        """Whether the loss is lowest at the highest rate, so that the true answer may lie above the one given."""
        return int(np.argmin(self.smoothed)) == len(self.smoothed) - 1

    def draw(self, path: Path) -> None:
        """Write a picture of the loss over the rate as a PNG file."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color=GREY, linewidth=0.6, label="loss of the step")
        axes.plot(self.rates, self.smoothed, color=BLUE, linewidth=1.8, label="smoothed")
        axes.axvline(self.lr, color=ORANGE, label=f"a tenth of the lowest: {self.lr:.3g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss per image", ylim=(0, 1.5 * self.losses[0]))
        tidy(axes)
        with atomic_write(path) as file:
            file.write(png(figure))


@dataclass
class Trial:
    """A short run: its rate, its mAP after each epoch, and whether it was stopped for being below the median."""

    lr: float
    scores: list[float] = field(default_factory=list)
    pruned: bool = False


@dataclass(frozen=True)
class TrialSearch:
    """The short runs of a search, in order, and the rate of the one that ended best."""

    lr: float
    trials: list[Trial]

    def draw(self, path: Path) -> None:
        """Write a picture of the final score of each rate as a PNG file."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        for pruned, color, label in ((False, BLUE, "finished"), (True, GREY, "pruned")):
            chosen = [trial for trial in self.trials if trial.pruned == pruned and trial.scores]
            points = [(trial.lr, 100 * trial.scores[-1]) for trial in chosen]
            if points:
                axes.scatter(*zip(*points, strict=True), color=color, label=label, s=24)
        axes.axvline(self.lr, color=ORANGE, label=f"best: {self.lr:.3g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="last mAP of the short run, %")
        tidy(axes)
        with atomic_write(path) as file:
            file.write(png(figure))


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """Put back afterwards, bit for bit, all that training steps change in a trainer and in the process."""
    model = trainer.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(weight, None if weight.grad is None else weight.grad.clone()) for weight in model.parameters()]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        model.load_state_dict(weights)
        for module, mode in modes:
            module.training = mode
        for weight, gradient in gradients:
            weight.grad = gradient
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def range_test(trainer: Trainer, low: float | None = None, high: float | None = None) -> RangeTest:
    """Take 100 steps at rates that grow exponentially; the answer is a tenth of the rate where the loss is lowest.

    After Smith (2017), "Cyclical Learning Rates", with the rule that fastai calls "minimum". Where the loss falls most
    steeply is no better: with many labels it falls at once, while the head learns how frequent they are. The number of
    steps is fixed because the smoothed loss lags behind by about ten of them, which is part of the rule.

    The optimiser is a new one with the settings of the run (SAM, weight decay and factor of the biases included),
    without schedule. Warm-up and decay of a real run are no part of the test, so it tells the order of magnitude.

    Args:
        trainer: as made for a run; it is left as it was.
        low, high: the first and last rate; by default `search_range`, widened tenfold below and three times above.

    Raises:
        ValueError: a loss that is not finite from the start, or rates that are no range.
    """
    below, above = search_range(trainer.config)
    first, last = _checked_range(low, high, (below / 10, above * 3))
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    with restored(trainer):
        take_step, factors = _new_step(trainer, 1.0)
        trainer.model.train()
        average = 0.0
        for number, batch in enumerate(_batches(trainer, _STEPS)):
            rate = first * (last / first) ** (number / (_STEPS - 1))
            for group, factor in zip(take_step.optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            loss = take_step(batch.images, batch.targets)[0].item()
            average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
            value = average / (1 - _SMOOTHING ** (number + 1))
            if not math.isfinite(loss) or (smoothed and value > _DIVERGED * min(smoothed)):
                break
            rates.append(rate)
            losses.append(loss)
            smoothed.append(value)
    if len(rates) < 3:
        raise ValueError(f"the loss diverged by a learning rate of {first:g}; start lower")
    return RangeTest(max(tenth_of_lowest(rates, smoothed), below if low is None else low), rates, losses, smoothed)


def _checked_range(low: float | None, high: float | None, default: tuple[float, float]) -> tuple[float, float]:
    """The range that is given, each end by default that of another one."""
    low, high = default[0] if low is None else low, default[1] if high is None else high
    if not 0 < low < high < math.inf:
        raise ValueError(f"low: got {low:g} with high {high:g}, expected 0 < low < high")
    return low, high


def _batches(trainer: Trainer, count: int) -> Iterator[Batch]:
    """So many batches, of as many epochs as it takes."""
    epochs = (trainer.train.epoch(number) for number in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), count)


def tenth_of_lowest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate at which the loss is lowest."""
    return _SHARE * rates[int(np.argmin(losses))]


def tpe_search(
    trainer: Trainer, trials: int = 15, epochs: int = 3, low: float | None = None, high: float | None = None
) -> TrialSearch:
    """Make short runs from the present weights, at rates chosen by a tree-structured Parzen estimator (optuna).

    Each run is a whole small one, OneCycle with ``lr`` at its peak included, so what is found is the ``lr`` of the
    configuration. The score is the mAP on the held-out images where the run has some, else on val. A run whose score
    is below the median of the earlier ones after as many epochs is stopped; one that diverges scores 0. The paper's
    code searches on a linear grid at a constant rate with 5 random trials before the estimator's; the 5 are kept.

    Args:
        trainer: as made for a run; it is left as it was.
        trials: number of short runs; the first tries the configured rate where it lies in the range.
        epochs: of each.
        low, high: of the rates; by default `search_range`.

    Raises:
        ModuleNotFoundError: optuna, of the ``tune`` extra, is not installed.
        ValueError: no rate in the range trains without diverging, or the rates are no range.
    """
    optuna = _optuna()
    low, high = _checked_range(low, high, search_range(trainer.config))
    tried: list[Trial] = []

    def run(trial: Any) -> float:
        tried.append(Trial(trial.suggest_float("lr", low, high, log=True)))
        with restored(trainer):
            for epoch, score in enumerate(_short_run(trainer, tried[-1].lr, epochs)):
                tried[-1].scores.append(score)
                trial.report(score, epoch)
                if trial.should_prune() and epoch < epochs - 1:
                    tried[-1].pruned = True
                    raise optuna.TrialPruned
        return tried[-1].scores[-1]

    sampler = optuna.samplers.TPESampler(n_startup_trials=5, seed=trainer.config.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())
    if low <= trainer.config.lr <= high:
        study.enqueue_trial({"lr": trainer.config.lr})
    study.optimize(run, n_trials=trials)
    best = max((trial for trial in tried if not trial.pruned), key=lambda trial: trial.scores[-1])
    if best.scores[-1] == 0:
        raise ValueError(f"the loss diverges at every rate tried from {low:g} to {high:g}; search lower")
    return TrialSearch(best.lr, tried)


def _short_run(trainer: Trainer, lr: float, epochs: int) -> Iterator[float]:
    """Train for some epochs; gives the score after each, or 0 for good once the loss is not finite."""
    take_step, _ = _new_step(trainer, lr)
    config = replace(trainer.config, lr=lr)
    schedule = create_schedule(take_step.optimizer, config, epochs * len(trainer.train))
    for epoch in range(epochs):
        trainer.model.train()
        total = torch.zeros((), device=trainer.device)
        for batch in trainer.train.epoch(epoch):
            total += take_step(batch.images, batch.targets)[0]
            schedule.step()
        if not math.isfinite(total.item()):
            yield 0.0
            return
        yield _score(trainer)


@torch.no_grad()
def _score(trainer: Trainer) -> float:
    trainer.model.eval()
    predictions = Predictions(len(trainer.description["classes"]))
    for batch in (trainer.held_out or trainer.val).epoch(0):
        output = trainer.take_step.forward(batch.images)
        if not bool(torch.isfinite(output).all()):
            return 0.0
        predictions.add(trainer.model.probabilities(output), batch.targets)
    return predictions.metrics().mAP


def _new_step(trainer: Trainer, lr: float) -> tuple[Step, list[float]]:
    """A step with an optimiser of its own, and the factor of the rate of each of its groups."""
    optimizer = create_optimizer(trainer.model, replace(trainer.config, lr=lr))
    step = Step(trainer.model, trainer.take_step.forward, trainer.loss, optimizer, trainer.config)
    return step, [group["lr"] / lr for group in optimizer.param_groups]


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'mode tpe needs optuna, which is not installed: pip install ".[tune]" in a checkout of mlfast',
            name="optuna",
        ) from error
    optuna.logging.disable_default_handler()
    return optuna
