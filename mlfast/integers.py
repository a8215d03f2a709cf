"""Sizes and indices from outside: integers of Python, NumPy or torch, and nothing that only looks like one."""

from __future__ import annotations

import operator
from typing import Any

import torch


def integer(owner: str, name: str, value: Any) -> int:
    """The value of an argument as an int.

    Raises:
        TypeError: it is no integer; a bool or a float counts as none, whatever its value.
    """
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool
    if isinstance(value, int) and not is_bool:
        return value  # also the symbol of one, under torch.compile
    try:
        if not is_bool:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{owner}: {name} must be an integer, got {type(value).__name__} {value!r}; convert it with int()")


def sizes(owner: str, **values: Any) -> list[int]:
    """The values of arguments that are sizes, as ints.

    Raises:
        TypeError: one is no integer.
        ValueError: one is below 1; the message names all.
    """
    found = {name: integer(owner, name, value) for name, value in values.items()}
    if min(found.values()) < 1:
        *first, last = (f"{name}={value}" for name, value in found.items())
        raise ValueError(f"{owner} needs sizes of at least 1, got {', '.join(first)} and {last}")
    return list(found.values())
