"""Sharpness-aware minimisation: each step takes the gradient at the worst point nearby."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

_EPSILON = 1e-12  # added to the norm of the gradient, as in the paper's released code


class SAM:
    """Two gradients a step: `climb` goes from ``p`` to ``p + e``, `descend` steps from ``p`` with the second.

    ``e = rho g / (|g| + 1e-12)``, with one norm over all gradients; adaptive: ``e = rho p^2 g / (| |p| g | + 1e-12)``.
    Foret et al. 2021, equation 2; the adaptive form is that of Kwon et al. 2021 (ASAM). The paper trains with the plain
    form and rho 0.05 (Prokofiev & Sovrasov, training strategy)::

        loss(model(images)).backward()
        sam.climb()
        with frozen_batch_norm_statistics(model):
            loss(model(images)).backward()  # at p + e
        sam.descend()

    - `climb` uses the gradients up: ``e`` is made in their place, and they are None afterwards. What it keeps until
      `descend` is a copy of the weights, because subtracting ``e`` would not give the same bits back.
    - Nothing waits for a GPU. Where the norm is NaN or infinite, ``e`` is 0: the step is that of the optimiser alone.
    - Clip the second gradient, before `descend`. Clipping the first changes nothing but its norm, which cancels.
    - To accumulate gradients, do all backward passes before `climb`, and all of them again before `descend`.
    - With a GradScaler, whose scale cancels from ``e``: scale both losses, and instead of `descend` call
      ``scaler.unscale_(sam.optimizer)``, clip, `restore`, ``scaler.step(sam.optimizer)``, ``scaler.update()``.

    Args:
        optimizer: any optimiser; the parameters of all its groups climb. Learning rate schedules belong to it.
        rho: how far to climb, the length of ``e``.
        adaptive: measure lengths relative to each weight.

    Raises:
        ValueError: ``rho`` is negative or not finite.
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        if not 0 <= rho < math.inf:
            raise ValueError(f"rho must be finite and at least 0, got {rho}")
        self.optimizer, self.rho, self.adaptive = optimizer, rho, adaptive
        self._climbed: list[Tensor] = []
        self._saved: list[Tensor] = []  # where these were before

    @torch.no_grad()
    def climb(self) -> None:
        """Move the weights that have a gradient to ``p + e``, and set the gradients to None.

        Raises:
            RuntimeError: no parameter has a gradient, or the weights are there already.
        """
        if self._climbed:
            raise RuntimeError("SAM.climb was called twice; call descend or restore in between")
        weights = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not weights:
            raise RuntimeError("SAM.climb found no gradient; call backward before")
        self._saved = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(self._saved, weights)
        torch._foreach_add_(weights, self._step(weights))
        for weight in weights:
            weight.grad = None
        self._climbed = weights

    def descend(self) -> None:
        """Return to ``p`` and let the optimiser step with the gradients of ``p + e``."""
        self.restore()
        self.optimizer.step()

    @torch.no_grad()
    def restore(self) -> None:
        """Return to ``p``, bit for bit, and free the copy; gradients stay.

        Raises:
            RuntimeError: the weights are at ``p``, for `climb` was not called.
        """
        if not self._climbed:
            raise RuntimeError("SAM has nothing to restore; call climb before descend")
        torch._foreach_copy_(self._climbed, self._saved)
        self._climbed, self._saved = [], []

    def _step(self, weights: list[Tensor]) -> list[Tensor]:
        """``e``, made in place of the gradients."""
        step = [weight.grad for weight in weights if weight.grad is not None]
        if self.adaptive:
            torch._foreach_mul_(step, weights)
        norm = get_total_norm(step)
        if self.adaptive:
            torch._foreach_mul_(step, weights)
        torch._foreach_mul_(step, torch.where(norm.isfinite(), self.rho / (norm + _EPSILON), 0))
        for part in step:
            part.nan_to_num_(0, 0, 0)  # 0 times infinity
        return step

    def state_dict(self) -> dict[str, Any]:
        """That of the optimiser: between two steps there is nothing else to keep."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict`, or the optimiser's own, gave."""
        self.optimizer.load_state_dict(state)


@contextmanager
def frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm still normalises by the batch, but its running statistics and batch count stay as they are.

    For the second pass of SAM, which would count each batch twice, the second time at weights that are not the model's.
    Layers in eval mode are left alone. A model under torch.compile is compiled once more for it.
    """
    # Without the flag, batch norm in training mode neither reads nor writes its statistics.
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
