"""One step of the optimiser: the gradient of a batch, taken at one point or, with SAM, at two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from mlfast.training.batch_norm import running_statistics, uncounted_batches
from mlfast.training.config import TrainConfig
from mlfast.training.distributed import ONE_PROCESS, Processes, without_averaging
from mlfast.training.errors import Diverged
from mlfast.training.sam import SAM, frozen_batch_norm_statistics

Forward = Callable[[Tensor], Tensor]

_LEAST_SCALE = 2.0**-13  # of the loss in float16; it begins at 2**16, and each overflow halves it


class Step:
    """Takes the steps of a run.

    The loss is a sum over classes and a mean over images, so the learning rate does not depend on the batch size. A
    batch is computed in parts of ``micro_batch`` images, whose gradients add up, where memory does not hold all of it.
    With ``grad_checkpointing`` the backbone computes its activations a second time in the backward pass, instead of
    keeping them; batch norm's statistics do not move in that second time.

    Args:
        model: whose weights move, and whose batch norm statistics SAM's second pass leaves alone; wrapped, where
            gradients are averaged over several processes.
        forward: images to what the loss takes.
        loss: of outputs and targets, summed.
        optimizer: takes the step.
        config: ``sam_rho``, ``sam_adaptive``, ``sam_average``, ``clip_grad``, ``micro_batch``, ``grad_checkpointing``,
            ``precision``, ``skip_bad_steps``.
        processes: which agree on the steps that are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        loss: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self.processes = processes
        self.model, self.forward, self.loss, self.optimizer, self.config = model, forward, loss, optimizer, config
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.sam = SAM(optimizer, config.sam_rho, config.sam_adaptive) if config.sam_rho else None
        self.scaler = torch.amp.GradScaler(self.weights[0].device.type, enabled=config.precision == "fp16")
        self.skipped = 0
        self._statistics = running_statistics(model) if config.skip_bad_steps else []

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Move the weights once; returns the loss per image before that and the norm of the gradient, on the device."""
        self.optimizer.zero_grad()
        statistics = [statistic.clone() for statistic in self._statistics]
        loss = self._backward(images, targets, average=self.sam is None or self.config.sam_average)
        if self.sam:
            self.sam.climb()  # does not depend on the gradient's scale, so the scaler has no part in it
            with frozen_batch_norm_statistics(self.model):
                self._backward(images, targets)
            self.sam.restore()
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.weights, self.config.clip_grad or float("inf"))
        if self.config.skip_bad_steps and self._is_bad(loss, norm):
            self.skipped += 1
            for statistic, before in zip(self._statistics, statistics, strict=True):
                statistic.copy_(before)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, norm

    def _is_bad(self, loss: Tensor, norm: Tensor) -> bool:
        good = torch.isfinite(loss)
        if not self.scaler.is_enabled():  # a gradient that overflows is its everyday business: it lowers the scale
            good &= torch.isfinite(norm)
        return self.processes.any(not bool(good), loss.device)

    def check_scale(self) -> None:
        """Look whether float16 still has room for the gradient; a GPU waits for it.

        Raises:
            Diverged: it has not: every step overflows, whatever the scale, and none moves the weights.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE:
            raise Diverged(
                f"the gradient overflows float16 even with the loss scaled to {self.scaler.get_scale():.1g}, so the "
                "weights no longer move; try precision: bf16 or fp32, or a lower lr"
            )

    def _backward(self, images: Tensor, targets: Tensor, average: bool = True) -> Tensor:
        """Add the gradient of the whole batch to the weights; returns its loss per image.

        Gradients are averaged over the processes once, with the last part of the batch, or not at all.
        """
        size = self.config.micro_batch or len(images)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        losses = []
        recomputing = uncounted_batches if self.config.grad_checkpointing else contextlib.nullcontext
        for number, (some_images, some_targets) in enumerate(parts, 1):
            alone = number < len(parts) or not average
            with without_averaging(self.model) if alone else contextlib.nullcontext():
                loss = self.loss(self.forward(some_images), some_targets) / len(images)
                with recomputing(self.model):
                    self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`; the optimiser's own state is not in it."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context of the forward pass: ``"fp32"``, ``"bf16"`` or ``"fp16"``."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, kinds.get(precision, torch.bfloat16), enabled=precision in kinds)
