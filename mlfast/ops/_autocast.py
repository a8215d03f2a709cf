"""What ops ask of autocast: whether it is on, and to be left alone by it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; the meta device, on which models are counted, knows none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> Any:
    """A context in which operations have the dtype of their arguments."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
