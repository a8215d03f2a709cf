"""Whether a value that a user gave has the type that an annotation names, and that type in words."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value has a type: a class, ``A | B``, ``Literal``, or a container, whose items are not looked at.

    A number is no truth value, a float is finite and may be written as an integer, and text is no sequence.
    """
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(has_type(value, part) for part in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return isinstance(value, typing.get_origin(kind) or kind)


def described(kind: Any) -> str:
    """A type in words for a message: "a whole number or nothing"."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(described(part) for part in typing.get_args(kind))
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(
        kind, "a list" if typing.get_origin(kind) is Sequence else "a mapping such as {name: value}, with the blank"
    )
