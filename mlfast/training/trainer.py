"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mlfast
from mlfast.evaluation.metrics import multilabel_metrics
from mlfast.models import MultilabelClassifier
from mlfast.training.batches import TensorBatches
from mlfast.training.checkpoint import save_model, save_state
from mlfast.training.config import TrainConfig
from mlfast.training.ema import EMA
from mlfast.training.errors import Interrupted, TrainingError
from mlfast.training.history import History
from mlfast.training.interrupt import StopRequest, catch_interrupt
from mlfast.training.optimization import create_optimizer, create_schedule
from mlfast.training.terminal import BAR_FORMAT, epoch_line, header, summary

_METRICS = ("mAP", "OF1", "CF1", "OP", "OR", "CP", "CR")
_LOOK_EVERY = 10  # steps between two looks at the loss: each look makes a GPU wait


class Trainer:
    """One run: trains a model with the AAM loss, evaluates after every epoch, and keeps what is best.

    Args:
        config: the checked settings.
        model: on its device, in its memory format.
        train, val: the batches of the two splits.
        run_dir: an existing folder for everything that is written.
        description: what ``config.json`` says about the model.
        quiet: show nothing on the terminal.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: MultilabelClassifier,
        train: TensorBatches,
        val: TensorBatches,
        run_dir: Path,
        description: dict[str, Any],
        quiet: bool = False,
    ) -> None:
        self.config, self.model, self.train, self.val = config, model, train, val
        self.run_dir, self.description, self.quiet = run_dir, description, quiet
        self.device = model.mean.device
        self.loss = mlfast.AAMLoss(
            scale=config.scale,
            margin=config.margin,
            k=config.k,
            gamma_neg=config.gamma_neg,
            gamma_pos=config.gamma_pos,
            prob_shift=config.prob_shift,
            reduction="sum",
        )
        self.optimizer = create_optimizer(model, config)
        self.schedule = create_schedule(self.optimizer, config, config.epochs * len(train))
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the present epoch
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # over those steps
        self.best: dict[str, Any] = {"mAP": -1.0, "epoch": 0, "prefix": ""}
        self.history = History(run_dir / "metrics.jsonl")

    def run(self) -> None:
        """Train to the last epoch.

        Raises:
            Interrupted: Ctrl-C was pressed; the state has been saved.
            TrainingError: the loss is not finite. The last saved state is the one before.
        """
        with catch_interrupt() as stop:
            try:
                while self.epoch < self.config.epochs:
                    self._run_epoch(stop)
            except Interrupted:
                self._check_loss()  # a state with NaN in it is not worth saving
                self._save_state()
                self.history.plot(self.run_dir / "curves.png")
                raise
        self.history.plot(self.run_dir / "curves.png")
        self._say(summary(self.run_dir, self.history.records, self.best))

    def _run_epoch(self, stop: StopRequest) -> None:
        start = time.perf_counter()
        images_per_second = self._train_epoch(stop)
        record = {
            "epoch": self.epoch + 1,
            "loss": self.loss_sum.item() / len(self.train),
            "lr": self.schedule.get_last_lr()[0],
            "images_per_second": round(images_per_second, 1),
        }
        record |= self._evaluate(self.model, "", stop)
        if self.ema:
            record |= self._evaluate(self.ema.model, "ema_", stop)
        record["seconds"] = round(time.perf_counter() - start, 2)
        self._finish_epoch(record)

    def _train_epoch(self, stop: StopRequest) -> float:
        """Train the rest of the present epoch; returns images per second."""
        self.model.train()
        first, start = self.step, time.perf_counter()
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        hide = True if self.quiet else None  # None: hidden where the output is not a terminal
        look = {"desc": title, "bar_format": BAR_FORMAT, "leave": False, "disable": hide}
        with tqdm(total=len(self.train), initial=first, **look) as bar:
            for images, targets in self.train.epoch(self.epoch, start=first):
                self._train_step(images, targets)
                if self.step % _LOOK_EVERY == 0 or self.step == len(self.train):
                    loss = self._check_loss()
                    speed = (self.step - first) * self.config.batch_size / (time.perf_counter() - start)
                    lr = self.schedule.get_last_lr()[0]
                    bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2g}, {speed:.0f} images/s", refresh=False)
                bar.update()
                self._stop_if(stop)
        if self.step == first:
            return math.nan  # nothing was left of this epoch
        return (self.step - first) * self.config.batch_size / (time.perf_counter() - start)

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        # The loss is a sum over classes and a mean over images: the learning rate does not depend on the batch size.
        loss = self.loss(self._forward(self.model, images), targets) / len(images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.ema:
            self.ema.update()
        self.loss_sum += loss.detach()
        self.step += 1

    def _forward(self, model: MultilabelClassifier, images: Tensor) -> Tensor:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            return model(model.prepare(images))

    @torch.no_grad()
    def _evaluate(self, model: MultilabelClassifier, prefix: str, stop: StopRequest) -> dict[str, float]:
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        probabilities, truths = [], []
        for images, targets in self.val.epoch(self.epoch):
            self._stop_if(stop)
            output = self._forward(model, images)
            loss += self.loss(output, targets)
            probabilities.append(model.probabilities(output))
            truths.append(targets)
        if not math.isfinite(loss.item()):
            raise self._diverged("validation loss", loss.item())
        metrics = multilabel_metrics(torch.cat(probabilities), torch.cat(truths))
        scores = {prefix + name: getattr(metrics, name) for name in _METRICS}
        return {prefix + "val_loss": loss.item() / len(self.val.images), **scores}

    def _finish_epoch(self, record: dict[str, Any]) -> None:
        if self.epoch == 0:
            self._say(header())
        self._say(epoch_line(record))
        self.history.append(record)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()
        metadata = {"epoch": str(self.epoch)}
        save_model(self.run_dir / "last", self.model, self.description, metadata | {"mAP": str(record["mAP"])})
        for prefix, model in (("", self.model), ("ema_", self.ema.model if self.ema else None)):
            score = record.get(f"{prefix}mAP", math.nan)
            if model and score > self.best["mAP"]:
                self.best = {"mAP": score, "epoch": self.epoch, "prefix": prefix}
                save_model(self.run_dir / "best", model, self.description, metadata | {"mAP": str(score)})
        self._save_state()

    def _check_loss(self) -> float:
        """The mean loss of the present epoch so far. NaN or infinity stays in the sum, so no step escapes."""
        total = self.loss_sum.item()
        if not math.isfinite(total):
            raise self._diverged("loss", total)
        return total / max(self.step, 1)

    def _diverged(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"the {what} became {value} in epoch {self.epoch + 1}, by step {self.step} (learning rate "
            f"{self.schedule.get_last_lr()[0]:.3g}); try a lower lr (it is {self.config.lr:g}) or a longer warmup"
        )

    def _stop_if(self, stop: StopRequest) -> None:
        if stop.requested:
            raise Interrupted(self.run_dir)

    def _say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def _save_state(self) -> None:
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "best": self.best,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }
        save_state(self.run_dir / "state.pt", state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what ``state.pt`` holds; on a CPU the run then goes on as if it had never stopped."""
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.loss_sum.copy_(state["loss_sum"])
        self.history.restore(self.epoch)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
