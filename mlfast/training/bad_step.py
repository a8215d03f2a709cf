"""What is known of a step whose loss or gradient was not finite, for whoever has to find out why."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlfast.files import write_text

_REMEMBERED = 32  # more steps than lie between two looks at the loss


class RecentSteps:
    """Loss, gradient norm and images of the last steps, on the device: nothing waits for them."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, Tensor, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)

    @property
    def norm(self) -> float:
        """Of the last gradient; waits for it."""
        return float(self._steps[-1][2])

    def add(self, step: int, loss: Tensor, norm: Tensor, rows: Tensor) -> None:
        """Remember a step of the present epoch: its loss per image, gradient norm, and the rows of its images."""
        self._steps.append((step, loss, norm, rows))

    def write(self, path: Path, model: nn.Module, optimizer: Optimizer, name: Callable[[int], str]) -> bool:
        """Write a report on the first of them that is not finite; returns whether there is one."""
        steps = ((step, loss.item(), norm.item(), rows) for step, loss, norm, rows in self._steps)
        bad = next((entry for entry in steps if not all(map(math.isfinite, entry[1:3]))), None)
        if bad is None:
            return False
        step, loss, norm, rows = bad
        report: dict[str, Any] = {"step": step, "loss": loss, "gradient_norm": norm}
        report["images"] = [name(int(row)) for row in rows]
        report["lr"] = [group["lr"] for group in optimizer.param_groups]
        # By now the step may have reached the weights.
        report["weight_norms"] = {
            key: torch.linalg.vector_norm(weight.detach().float()).item() for key, weight in model.named_parameters()
        }
        write_text(path, json.dumps(report, indent=1) + "\n")
        return True
