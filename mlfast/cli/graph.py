"""``mlfast graph``."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mlfast.models import LabelCounts, LabelGraph

_FULL_TURN = 2 * math.pi


def main(argv: list[str]) -> int:
    """Print and draw the label graph of a data set."""
    options = _parser().parse_args(argv)
    from mlfast.models import conditional_probabilities, create_label_graph

    counts, names = _read_targets(options.targets) if options.targets else _read_data(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels without neighbours are printed below
        graph = create_label_graph(counts, threshold=options.threshold)
    probabilities = conditional_probabilities(counts)
    width = max(map(len, names), default=0)
    for i, j in sorted(graph.edges, key=lambda edge: -probabilities[edge]):
        print(f"{names[i]:>{width}} -> {names[j]:<{width}}  {probabilities[i, j]:.2f}")
    isolated = [names[i] for i in graph.isolated]
    print(f"{len(graph.edges)} edges with P(second | first) >= {options.threshold:g} between {len(names)} labels")
    print(f"without neighbours: {len(isolated)}{': ' if isolated else ''}{', '.join(isolated)}")
    if graph.edges:
        _draw(graph, probabilities, names, options.out)
        print(f"drawn: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast graph",
        description="Show the label graph that graph branches use: an edge from one label to another where the second "
        "is on most images with the first. docs/models.md says how it is used.",
    )
    parser.add_argument("kind", nargs="?", default="digits", metavar="KIND", help="data set, as mlfast data  [digits]")
    parser.add_argument("root", nargs="?", metavar="ROOT", help="folder of the data set; none for digits")
    parser.add_argument("--split", default="train", help="[train]")
    parser.add_argument("--targets", metavar="FILE", help=".npy file of targets [N, K], instead of a data set")
    parser.add_argument("--threshold", type=float, default=0.4, metavar="X", help="least P(second | first)  [0.4]")
    parser.add_argument("--out", type=Path, default=Path("label_graph.png"), metavar="FILE", help="[label_graph.png]")
    return parser


def _read_targets(path: str) -> tuple[LabelCounts, list[str]]:
    import numpy as np
    import torch

    from mlfast.models import count_labels

    counts = count_labels(torch.from_numpy(np.load(path, allow_pickle=False)))
    return counts, [str(i) for i in range(len(counts.together))]


def _read_data(options: argparse.Namespace) -> tuple[LabelCounts, list[str]]:
    import numpy as np
    import torch

    from mlfast.data import load_annotations
    from mlfast.models import LabelCounts

    annotations = load_annotations(options.kind, options.root, options.split)
    counts = [torch.from_numpy(np.ascontiguousarray(part)) for part in annotations.cooccurrence()]
    return LabelCounts(*counts), list(annotations.classes)


# --------------------------------------------------------------------------------------------------------- drawing


def _draw(graph: LabelGraph, probabilities: Tensor, names: list[str], path: Path) -> None:
    """Linked labels on a circle, neighbours near each other; an arrow is the darker, the likelier the effect."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'mlfast graph draws with matplotlib, which is not installed: pip install "mlfast[report]"', name=error.name
        ) from error
    order = circle_order(graph.edges)
    angle = {label: _FULL_TURN * place / len(order) for place, label in enumerate(order)}
    size = max(6.0, 3 + 0.16 * len(order))
    figure = Figure(figsize=(size, size), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    for i, j in graph.edges:
        _arrow(axes, angle[i], angle[j], float(probabilities[i, j]))
    for label, turn in angle.items():
        axes.plot(math.cos(turn), math.sin(turn), "o", color="#1f77b4", markersize=5)
        _label(axes, names[label], turn)
    reach = 1.08 + 0.22 * max(len(names[label]) for label in order) / size
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.axis("off")
    figure.savefig(path)


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
