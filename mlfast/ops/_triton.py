"""Kernels in Triton, which is imported when the first of them is launched: it may be missing, and takes a second."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def triton_kernel(module: str, name: str) -> Callable[..., None]:
    """What launches a kernel: ``name`` of mlfast.kernels.<module>."""

    def launch(*arguments: Any) -> None:
        getattr(importlib.import_module(f"mlfast.kernels.{module}"), name)(*arguments)

    return launch
