"""A label graph as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlfast.training.drawing import new_figure

if TYPE_CHECKING:
    from torch import Tensor

    from mlfast.models import LabelGraph

_FULL_TURN = 2 * math.pi


def draw_label_graph(graph: LabelGraph, probabilities: Tensor, names: list[str]) -> Any:
    """Linked labels on a circle, neighbours near each other; an arrow is the darker, the likelier the effect.

    Args:
        graph: with at least one edge.
        probabilities: ``[K, K]``, P(second | first).
        names: of the K labels.

    Returns:
        A matplotlib figure.
    """
    order = circle_order(graph.edges)
    angle = {label: _FULL_TURN * place / len(order) for place, label in enumerate(order)}
    size = max(6.0, 3 + 0.16 * len(order))
    figure = new_figure(size, size)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    for i, j in graph.edges:
        _arrow(axes, angle[i], angle[j], float(probabilities[i, j]))
    for label, turn in angle.items():
        axes.plot(math.cos(turn), math.sin(turn), "o", color="#1f77b4", markersize=5)
        _label(axes, names[label], turn)
    reach = 1.08 + 0.22 * max(len(names[label]) for label in order) / size
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.axis("off")
    return figure


def circle_order(edges: list[tuple[int, int]]) -> list[int]:
    """The linked labels, so that neighbours are near: component by component, depth first from the least linked."""
    neighbours: dict[int, set[int]] = {}
    for i, j in edges:
        neighbours.setdefault(i, set()).add(j)
        neighbours.setdefault(j, set()).add(i)

    def rank(label: int) -> tuple[int, int]:
        return len(neighbours[label]), label

    order: dict[int, None] = {}
    stack = sorted(neighbours, key=rank, reverse=True)
    while stack:
        label = stack.pop()
        if label not in order:
            order[label] = None
            stack += sorted(neighbours[label] - set(order), key=rank, reverse=True)
    return list(order)


def _arrow(axes: Any, start: float, end: float, probability: float) -> None:
    """Bent towards the middle, so that arrows between neighbours on the circle do not hide in its line."""
    across = (end - start + math.pi) % _FULL_TURN - math.pi
    places = [(math.cos(turn), math.sin(turn)) for turn in (end, start)]
    style = {
        "arrowstyle": "-|>",
        "color": str(round(0.85 * (1 - probability), 3)),
        "connectionstyle": f"arc3,rad={0.35 * (1 - abs(across) / math.pi) * (-1 if across > 0 else 1):.3f}",
        "shrinkA": 4,
        "shrinkB": 4,
    }
    axes.annotate("", xy=places[0], xytext=places[1], arrowprops=style)


def _label(axes: Any, name: str, turn: float) -> None:
    left = math.cos(turn) < 0
    axes.text(
        1.05 * math.cos(turn),
        1.05 * math.sin(turn),
        name,
        rotation=math.degrees(turn) + (180 if left else 0),
        rotation_mode="anchor",
        ha="right" if left else "left",
        va="center",
        fontsize=9,
    )
