"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A second model whose weights follow those of the first: ``ema += (1 - d) * (weight - ema)`` after every step.

    The decay warms up, ``d = min(decay, 1 - (step + 1) ** (-2/3))``, so that a short run is not averaged with its own
    random start; with a decay of 0.9997 and no warm-up the paper's average has a half-life of 2,300 steps.
    Floating point buffers (batch norm statistics) are averaged like weights, integer buffers are copied.

    Args:
        model: the model to follow, already on its device and in its memory format. It must keep its tensors: update
            them in place, as optimisers and ``load_state_dict`` do.
        decay: the decay reached after the warm-up, in [0, 1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.step = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the followed model's present weights. Call it once after every optimiser step."""
        self.step += 1
        decay = min(self.decay, 1 - (self.step + 1) ** (-2 / 3))
        if self._averaged:
            torch._foreach_lerp_(_targets(self._averaged), _sources(self._averaged), weight=1 - decay)
        if self._copied:
            torch._foreach_copy_(_targets(self._copied), _sources(self._copied))

    def state_dict(self) -> dict[str, Any]:
        """Weights and step count, for `load_state_dict`."""
        return {"step": self.step, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])


def _targets(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [average for average, _ in pairs]


def _sources(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [weight for _, weight in pairs]
