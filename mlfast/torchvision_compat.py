"""Lets timm and torchvision import where a CUDA torchvision wheel sits beside a CPU-only torch.

The Linux wheels of torchvision on PyPI are CUDA builds. Beside a CPU build of torch their C++ library cannot load, and
the import stops with ``operator torchvision::nms does not exist``: torchvision registers shape functions for operators
that nobody declared. timm imports torchvision, so it stops as well. Neither needs those operators to build a backbone.

`import_torchvision` first tries the plain import, and acts only on exactly that failure. Whatever in mlfast needs
timm or torchvision calls it first, in DataLoader workers too.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_FAILURE = "operator torchvision::{} does not exist"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_REMEDY = 'torchvision is not installed: pip install ".[train]" in a checkout of mlfast'

_fragments: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring the operators which its C++ library could not.

    Returns:
        The ``torchvision`` module. Transforms, data sets and models work; an operator that was only declared
        (``torchvision.ops.nms``) raises ``NotImplementedError`` when it is called.

    Raises:
        ImportError: torchvision is not installed; the message names the remedy.
    """
    for operator, schema in _SCHEMAS.items():
        try:
            return importlib.import_module("torchvision")
        except ModuleNotFoundError as error:
            if error.name != "torchvision":
                raise
            raise ModuleNotFoundError(_REMEDY, name="torchvision") from error
        except RuntimeError as error:
            if _FAILURE.format(operator) not in str(error):
                raise
        _declare(schema)
        _forget_half_imported()
    return importlib.import_module("torchvision")


def _declare(schema: str) -> None:
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    fragment.define(schema)
    _fragments.append(fragment)


def _forget_half_imported() -> None:
    """A module that imported before the failure stays in sys.modules and would be taken for a good one."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
