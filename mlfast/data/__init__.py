"""Data sets: the built-in digit scenes."""

from mlfast.data.digits import DigitScenes, planted_graph

__all__ = ["DigitScenes", "planted_graph"]
