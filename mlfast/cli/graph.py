"""``mlfast graph``."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mlfast.models import LabelCounts, LabelGraph


def main(argv: list[str]) -> int:
    """Print and draw the label graph of a data set."""
    from mlfast.cli.arguments import parse
    from mlfast.models import conditional_probabilities, create_label_graph

    options, of_reader = parse(_parser(), argv)
    if options.targets and options.root:
        raise ValueError(f"got --targets {options.targets} and the data set {options.kind} {options.root}; give one")
    counts, names = _read_targets(options.targets) if options.targets else _read_data(options, of_reader)
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
        _write_picture(graph, probabilities, names, options.out)
        print(f"drawn: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast graph",
        allow_abbrev=False,
        usage="mlfast graph [KIND ROOT] [--split SPLIT] [--OPTION VALUE ...]",
        description="Show the label graph that graph branches use: an edge from one label to another where the second "
        "is on at least the share --threshold of the images with the first. docs/models.md says how it is used. The "
        "options of mlfast data check for the kind are taken too.",
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

    targets = np.load(path, allow_pickle=False)
    if not isinstance(targets, np.ndarray):
        raise ValueError(f"--targets: {path} holds several arrays; save the targets [N, K] alone, as .npy")
    counts = count_labels(torch.from_numpy(targets))
    return counts, [str(i) for i in range(len(counts.together))]


def _read_data(options: argparse.Namespace, of_reader: dict[str, Any]) -> tuple[LabelCounts, list[str]]:
    import numpy as np
    import torch

    from mlfast.data import load_annotations
    from mlfast.models import LabelCounts

    annotations = load_annotations(options.kind, options.root, options.split, **of_reader)
    counts = [torch.from_numpy(np.ascontiguousarray(part)) for part in annotations.cooccurrence()]
    return LabelCounts(*counts), list(annotations.classes)


def _write_picture(graph: LabelGraph, probabilities: Tensor, names: list[str], path: Path) -> None:
    from mlfast.training.graph_drawing import draw_label_graph

    try:
        figure = draw_label_graph(graph, probabilities, names)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'mlfast graph draws with matplotlib; it is missing: pip install ".[report]" in a checkout of mlfast',
            name=error.name,
        ) from error
    figure.savefig(path, dpi=110)
