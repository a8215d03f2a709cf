"""What ops ask of their arguments, and what they say when it is not met."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlfast.ops._dtypes import CODES
from mlfast.sparse_targets import SparseTargets

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
REDUCTIONS = ("sum", "mean", "batchmean", "none")


def check_number(op: str, name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    """A number of Python or NumPy as a float.

    Raises TypeError for what is none, ValueError for one that is not finite or not as expected.
    """
    if not isinstance(value, (float, int, numbers.Real)):
        remedy = f"; pass {name}.item()" if isinstance(value, Tensor) and value.numel() == 1 else ""
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__} {value!r}{remedy}")
    if not (-math.inf < value < math.inf and holds(value)):  # type: ignore[arg-type, operator]
        raise ValueError(f"{op}: {name} must be {expected}, got {value}")
    return float(value)


def remembered(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check of options that takes place once; compilers see it every time, and so does what cannot be hashed."""
    cached = functools.lru_cache(maxsize=256, typed=True)(check)

    @functools.wraps(check)
    def checked(*options: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(*options)
        try:
            return cached(*options)
        except TypeError:
            return check(*options)

    return checked


def check_float_tensor(op: str, name: str, tensor: Any) -> None:
    """Raises TypeError unless it is a tensor of one of `FLOATS`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be bfloat16, half, float32 or float64, got {tensor.dtype}; pass {name}.float()"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}; pass {name}.to_dense()")


def check_device(op: str, name: str, placed: Any, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless a tensor or graph is on the device of another argument."""
    if placed.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got {placed.device}; "
            f"pass {name}.to({other_name}.device)"
        )


def check_reduction(op: str, reduction: Any) -> None:
    """Raises ValueError for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def check_tensors(
    op: str, name: str, scores: Tensor, target: Tensor | SparseTargets, class_weight: Tensor | None
) -> None:
    """Raises TypeError or ValueError unless the three fit together; ``name`` is what the op calls its scores."""
    check_float_tensor(op, name, scores)
    if not isinstance(target, (Tensor, SparseTargets)):
        raise TypeError(f"{op}: target must be a tensor or mlfast.SparseTargets, got {type(target).__name__}")
    if target.shape != scores.shape:
        remedy = "pass one value per label, not class indices"
        if len(target.shape) == scores.dim():
            remedy = f"do the model and the data set have the same classes, and is {name} of the same batch?"
        raise ValueError(
            f"{op}: target must have the shape of {name}, {tuple(scores.shape)}, got {tuple(target.shape)}; {remedy}"
        )
    if scores.dim() == 0:
        raise ValueError(f"{op}: {name} must have a dimension of classes, [..., K], got a scalar")
    check_device(op, "target", target, name, scores)
    if isinstance(target, Tensor):
        if target.layout != torch.strided:
            raise TypeError(
                f"{op}: target must be a dense tensor, got {target.layout}; pass target.to_dense(), or the positives "
                "as mlfast.SparseTargets"
            )
        if target.dtype not in CODES:
            raise TypeError(f"{op}: target must be bool, an integer or a float, got {target.dtype}")
        if target.requires_grad:
            raise ValueError(f"{op}: target must not require grad, there is no gradient by it; pass target.detach()")
    if class_weight is not None:
        _check_class_weight(op, name, scores, class_weight)


def _check_class_weight(op: str, name: str, scores: Tensor, class_weight: Any) -> None:
    if not isinstance(class_weight, Tensor):
        raise TypeError(
            f"{op}: class_weight must be a tensor, got {type(class_weight).__name__}; pass torch.tensor(class_weight)"
        )
    if class_weight.shape != scores.shape[-1:]:
        raise ValueError(
            f"{op}: class_weight must have one value per class, [{scores.shape[-1]}], got {list(class_weight.shape)}"
        )
    check_float_tensor(op, "class_weight", class_weight)
    check_device(op, "class_weight", class_weight, name, scores)
    if class_weight.requires_grad:
        raise ValueError(f"{op}: class_weight must not require grad, there is no gradient by it; detach it")
