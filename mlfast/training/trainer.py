"""The training loop."""

from __future__ import annotations

import errno
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlfast.evaluation import Predictions
from mlfast.evaluation.metrics import SCORES
from mlfast.models import MultilabelClassifier
from mlfast.models.checkpoint import CheckpointError, save_model
from mlfast.models.errors import first_line
from mlfast.training.bad_step import RecentSteps
from mlfast.training.batches import Batch, Batches
from mlfast.training.checkpoint import check_classes, save_state
from mlfast.training.config import TrainConfig
from mlfast.training.distributed import ONE_PROCESS, Processes, wrap
from mlfast.training.early_stopping import EarlyStopping
from mlfast.training.ema import EMA
from mlfast.training.errors import Diverged, Interrupted, TrainingError
from mlfast.training.history import History
from mlfast.training.interrupt import StopRequest, catch_interrupt
from mlfast.training.loader import WaitingTime
from mlfast.training.optimization import create_loss, create_optimizer, create_schedule
from mlfast.training.report import write_report
from mlfast.training.step import Step, autocast
from mlfast.training.terminal import BAR_FORMAT, epoch_line, header, introduction, postfix, summary

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_LOOK_EVERY = 10  # steps between two looks at the loss: each look makes a GPU wait


class Trainer:
    """One run: trains a model, evaluates after every epoch, and keeps what is best.

    Args:
        config: the checked settings.
        model: on its device, in its memory format.
        train, val: the batches of the two splits.
        held_out: batches to stop and choose by, in place of ``val``.
        run_dir: an existing folder for everything that is written.
        description: what ``config.json`` says about the model.
        processes: that train together; the batches are this one's share.
        quiet: show nothing on the terminal.
        data_summary: what the batches are, for people.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: MultilabelClassifier,
        train: Batches,
        val: Batches,
        held_out: Batches | None,
        run_dir: Path,
        description: dict[str, Any],
        processes: Processes = ONE_PROCESS,
        quiet: bool = False,
        data_summary: str = "",
    ) -> None:
        self.config, self.model, self.train, self.val, self.held_out = config, model, train, val, held_out
        self.run_dir, self.description, self.processes = run_dir, description, processes
        self.quiet, self.data_summary = quiet or not processes.is_first, data_summary
        self.device = model.mean.device
        self.loss = create_loss(config)
        self.optimizer = create_optimizer(model, config)
        self.total_steps = config.steps or config.epochs * len(train)
        self.num_epochs = math.ceil(self.total_steps / len(train))  # the last one may be a part
        self.schedule = create_schedule(self.optimizer, config, self.total_steps)
        wrapped = wrap(model, processes, self.device)
        called: Callable[[Tensor], Tensor] = torch.compile(wrapped) if config.compile else wrapped  # the same weights
        # Not a method of this object: what refers to itself stays until the garbage collector comes by.
        forward = functools.partial(_apply, config, model, called)
        self.take_step = Step(wrapped, forward, self.loss, self.optimizer, config, processes)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.stopping = EarlyStopping(config.patience)
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the present epoch
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # over those steps
        self.best: dict[str, Any] = {"mAP": -1.0, "epoch": 0, "prefix": ""}
        self.finished = False
        self.waiting = WaitingTime([])
        self.recent = RecentSteps()
        self.history = History(run_dir / "metrics.jsonl", config.tensorboard, writes=processes.is_first)

    def run(self) -> None:
        """Train to the last epoch.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state has been saved.
            Diverged: the loss is not finite, or float16 does not hold the gradient.
            TrainingError: a file cannot be written. Of both the last saved state is the one before.
        """
        at_start = self.epoch == self.step == 0
        num_classes = len(self.description["classes"])
        self._say(introduction(self.config, self.data_summary, num_classes, self.device, self.epoch))
        try:
            if at_start:
                self._save_state()  # from now on the run can be continued, whenever it is killed
            self._run_epochs()
        except Interrupted:
            raise
        except BaseException as error:
            if at_start and self.epoch == 0 and self.processes.is_first:
                (self.run_dir / "state.pt").unlink(missing_ok=True)  # nothing was learned: the name is free again
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise self._no_room(error) from error
            raise
        self._draw()
        write_report(self)
        self._say(summary(self.run_dir, self.history.records, self.best))

    def _run_epochs(self) -> None:
        if self.epoch < self.num_epochs and not self.finished:
            self._say(header(bool(self.held_out)))
        with catch_interrupt() as stop:
            try:
                while self.epoch < self.num_epochs and not self.finished:
                    self._run_epoch(stop)
            except Interrupted:
                self._check_loss()  # a state with NaN in it is not worth saving
                self._save_state()
                self._draw()
                raise

    def close(self) -> None:
        """End the processes that read images."""
        for batches in (self.train, self.val, self.held_out):
            if batches is not None:
                batches.close()

    def _run_epoch(self, stop: StopRequest) -> None:
        start = time.perf_counter()
        images_per_second = self._train_epoch(stop)
        record = {
            "epoch": self.epoch + 1,
            "loss": self._check_loss(),
            "lr": self.schedule.get_last_lr()[0],
            "images_per_second": round(images_per_second, 1),
            "data_seconds": round(self.waiting.seconds, 2),
            "compute_seconds": round(time.perf_counter() - start - self.waiting.seconds, 2),
        }
        for prefix, model in self._models():
            self.processes.share(model.buffers())  # what is evaluated is what the first one saves
            record |= self._evaluate(model, self.val, prefix, stop)
            if self.held_out:
                record |= self._evaluate(model, self.held_out, f"held_out_{prefix}", stop)
        record["seconds"] = round(time.perf_counter() - start, 2)
        self._finish_epoch(record)

    def _train_epoch(self, stop: StopRequest) -> float:
        """Train the rest of the present epoch; returns images per second."""
        self.model.train()
        first, start = self.step, time.perf_counter()
        steps = min(len(self.train), self.total_steps - self.epoch * len(self.train))
        title = f"epoch {self.epoch + 1}/{self.num_epochs}"
        hide = True if self.quiet else None  # None: hidden where the output is not a terminal
        look = {"desc": title, "bar_format": BAR_FORMAT, "leave": False, "disable": hide}
        with tqdm(total=steps, initial=first, **look) as bar:
            self.waiting = WaitingTime(itertools.islice(self.train.epoch(self.epoch, start=first), steps - first))
            for batch in self.waiting:
                self._train_step(batch)
                if self.step % _LOOK_EVERY == 0 or self.step == steps:
                    loss = self._check_loss()
                    self.take_step.check_scale()
                    speed = (self.step - first) * self.config.batch_size / (time.perf_counter() - start)
                    norm = self.recent.norm
                    lr = float(self.schedule.get_last_lr()[0])
                    bar.set_postfix_str(postfix(loss, lr, norm, speed), refresh=False)
                    self._stop_if(self.processes.any(stop.requested, self.device))
                bar.update()
                self._stop_if(stop.requested and self.processes.size == 1)
        if self.step == first:
            return math.nan  # nothing was left of this epoch
        return (self.step - first) * self.config.batch_size / (time.perf_counter() - start)

    def _train_step(self, batch: Batch) -> None:
        loss, norm = self.take_step(batch.images, batch.targets)
        self.recent.add(self.step, loss, norm, batch.rows)
        if self.take_step.skipped > self.config.skip_bad_steps > 0:
            raise self._diverged("gradient", f"NaN or infinite {self.take_step.skipped} times")
        if self.schedule.last_epoch + 1 < self.total_steps:  # beyond its end OneCycle rises again
            self.schedule.step()
        if self.ema:
            self.ema.update()
        self.loss_sum += loss if not self.config.skip_bad_steps else loss.nan_to_num(0, 0, 0)
        self.step += 1

    def _models(self) -> list[tuple[str, MultilabelClassifier]]:
        """What is evaluated: the weights, and their average."""
        return [("", self.model), *([("ema_", self.ema.model)] if self.ema else [])]

    def apply(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What a model says about uint8 images ``[B, 3, H, W]``, in the run's memory format and precision."""
        return _apply(self.config, self.model, model, images)

    @torch.no_grad()
    def _evaluate(
        self, model: MultilabelClassifier, batches: Batches, prefix: str, stop: StopRequest
    ) -> dict[str, float]:
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        predictions = Predictions(len(self.description["classes"]), batches.mostly_unknown)
        for batch in batches.epoch(self.epoch):
            self._stop_if(stop.requested and self.processes.size == 1)
            output = self.apply(model, batch.images)
            loss += self.loss(output, batch.targets)
            if not math.isfinite(loss.item()):
                raise self._diverged("validation loss", str(loss.item()))
            predictions.add(self.model.probabilities(output), batch.targets)
        metrics = predictions.gather().metrics()
        scores = {prefix + name: getattr(metrics, name) for name in SCORES}
        return {prefix + "val_loss": self.processes.total(loss).item() / batches.num_images, **scores}

    def _finish_epoch(self, record: dict[str, Any]) -> None:
        self._say(epoch_line(record))
        self.history.append(record)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()
        metadata = {"epoch": str(self.epoch)}
        self._save("last", self.model, metadata | {"mAP": str(record["mAP"])})
        chosen_by = "held_out_" if self.held_out else ""
        scores = [(record[f"{chosen_by}{prefix}mAP"], prefix, model) for prefix, model in self._models()]
        # Where no class has a positive every score is NaN, and nothing is best.
        score, prefix, model = max(scores, key=lambda entry: -1.0 if math.isnan(entry[0]) else entry[0])
        if round(score, 4) >= round(self.best["mAP"], 4):  # the later of equal ones, as in the released code
            self.best = {"mAP": score, "epoch": self.epoch, "prefix": prefix}
            self._save("best", model, metadata | {"mAP": str(score)})
        warmed_up = self.epoch * len(self.train) >= self.config.warmup * self.total_steps
        score = 0.0 if math.isnan(score) else score
        self.finished = self.config.patience > 0 and self.stopping.should_stop(score, warmed_up)
        if self.finished and self.epoch < self.num_epochs:
            self._say(self.stopping.reason("held-out mAP" if self.held_out else "validation mAP"))
        self._save_state()

    def _check_loss(self) -> float:
        """The mean loss of the present epoch so far. NaN or infinity stays in the sum, so no step escapes."""
        total = self.processes.total(self.loss_sum).item() / self.processes.size
        if not math.isfinite(total):
            raise self._diverged("loss", str(total))
        return total / max(self.step, 1)

    def _diverged(self, what: str, value: str) -> Diverged:
        path = self.run_dir / "bad_step.json"
        told = self.recent.write(path, self.model, self.optimizer, self.train.name)
        allowed = self.config.skip_bad_steps
        skipping = f"raise skip_bad_steps (it is {allowed})" if allowed else "leave out such steps: --skip_bad_steps N"
        return Diverged(
            f"the {what} became {value} in epoch {self.epoch + 1}, by step {self.step} (learning rate "
            f"{self.schedule.get_last_lr()[0]:.3g}); try a lower lr (it is {self.config.lr:g}) or a longer warmup, or "
            f"{skipping}" + (f". Its images, norms and rates: {path}" if told else "")
        )

    def _no_room(self, error: OSError) -> TrainingError:
        told = f"cannot write into {self.run_dir}: {error.strerror}"
        if not (self.run_dir / "state.pt").exists():
            return TrainingError(f"{told}; make room, then start the run again")
        return TrainingError(
            f"{told}. What was saved before is whole; make room, then: mlfast train --resume {self.run_dir}"
        )

    def _stop_if(self, requested: bool) -> None:
        if requested:
            raise Interrupted(self.run_dir)

    def _say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def _draw(self) -> None:
        if self.processes.is_first:
            self.history.plot(self.run_dir / "curves.png")

    def _save(self, name: str, model: MultilabelClassifier, metadata: dict[str, str]) -> None:
        if self.processes.is_first:
            save_model(self.run_dir / name, model, self.description, metadata)

    def _save_state(self) -> None:
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        own = {"rng": {"cpu": torch.get_rng_state(), "cuda": cuda}, "loss_sum": self.loss_sum.cpu()}
        state = {
            "config": self.config.binding(),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "take_step": self.take_step.state_dict(),
            "stopping": self.stopping.state_dict(),
            "finished": self.finished,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "classes": self.description["classes"],
            "processes": self.processes.gather(own),
        }
        if self.processes.is_first:
            save_state(self.run_dir / "state.pt", state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what ``state.pt`` holds; on a CPU the run then goes on as if it had never stopped.

        Raises:
            CheckpointError: another number of processes, other classes, or something is missing or does not fit.
        """
        try:
            self._load_state(state)
        except CheckpointError:
            raise
        except Exception as error:  # every part of the state has its own way to say so
            reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            raise CheckpointError(
                f"{self.run_dir / 'state.pt'} is not a state that this version can continue from: {reason}; start a "
                "new run, or continue with the version that wrote it"
            ) from error

    def _load_state(self, state: dict[str, Any]) -> None:
        check_classes(state.get("classes", self.description["classes"]), self.description["classes"])
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.take_step.load_state_dict(state["take_step"])
        self.stopping.load_state_dict(state["stopping"])
        self.finished = state["finished"]
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.history.restore(self.epoch)
        if len(state["processes"]) != self.processes.size:
            raise CheckpointError(
                f"{self.run_dir} was trained by {len(state['processes'])} processes, and now there are "
                f"{self.processes.size}; start as many as before"
            )
        own = state["processes"][self.processes.rank]
        self.loss_sum.copy_(own["loss_sum"])
        torch.set_rng_state(own["rng"]["cpu"])
        if self.device.type == "cuda" and own["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(own["rng"]["cuda"])


def _apply(
    config: TrainConfig, classifier: MultilabelClassifier, model: Callable[[Tensor], Tensor], images: Tensor
) -> Tensor:
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images = classifier.prepare(images)
    with autocast(images.device, config.precision):
        return model(images)
