"""``mlfast data check``: what is in a data set, and what is wrong with it."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mlfast.cli import FAILED, USER_ERROR
from mlfast.cli.arguments import parse
from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.dataset import ImageDataset
from mlfast.data.loading import KINDS, load_annotations, reader
from mlfast.data.problems import names, problems_of, strays_of
from mlfast.data.shards import shard_order
from mlfast.data.sources import Sources
from mlfast.data.statistics import Statistics
from mlfast.data.stream import ShardImages

_CLASSES_SHOWN = 8
_WARM_UP_IMAGES, _SPEED_IMAGES = 8, 256
_COLUMNS = ("split", "images", "classes", "labels/image", "unlabelled", "unknown", "neg./pos.", "mean imbalance")


def main(argv: Sequence[str]) -> int:
    """Show what is there; the exit status is 0 if it is fine, 1 if there are problems, 2 if labels cannot be read."""
    return _check(*parse(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast data check",
        allow_abbrev=False,
        usage="mlfast data check KIND ROOT [--split SPLIT ...] [--decode] [--speed] [--OPTION VALUE ...]",
        description="Read the labels of a data set, show its statistics and name what is wrong. docs/data.md says "
        "which files each kind needs.",
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("root", nargs="?", metavar="ROOT", help="folder of the data set; none for digits")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="default all; train+test joins two")
    parser.add_argument("--decode", action="store_true", help="decode every image, and find images with equal content")
    parser.add_argument("--speed", action="store_true", help="measure images/s on one core")
    parser.add_argument("--size", type=int, default=448, metavar="N", help="of the images for --speed  [448]")
    parser.add_argument("--all_classes", action="store_true", help="show the frequency of every class")
    parser.add_argument("--cache_dir", metavar="DIR", help="default $XDG_CACHE_HOME/mlfast or ~/.cache/mlfast")
    return parser


def _check(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    kind, root = arguments.kind, arguments.root
    if root is None and kind != "digits":
        raise ValueError(f"{kind} needs ROOT, the folder of the data set.")
    default = ["train", "val"] if kind == "digits" else None
    splits = arguments.split or default or reader(kind).splits(Sources(root), **options)
    if not splits:
        raise ValueError(f"{root} holds nothing that looks like a split of kind {kind}; see docs/data.md.")
    loaded, status = [], 0
    for split in splits:
        try:
            loaded.append(load_annotations(kind, root, split, cache_dir=arguments.cache_dir, **options))
        except AnnotationError as error:
            print(f"mlfast data: {split}: {error}", file=sys.stderr)
            status = USER_ERROR
    if not loaded:
        return status
    print(f"{kind}, {root or 'built in'}")
    statistics = [part.statistics() for part in loaded]
    _print_table([_COLUMNS, *[_row(a.split, s) for a, s in zip(loaded, statistics, strict=True)]])
    for part, found in zip(loaded, statistics, strict=True):
        _print_classes(part, found, arguments.all_classes)
    for part in loaded:
        for note in part.notes:
            print(f"note: {part.split}: {note}")
    problems = list(problems_of(loaded, arguments.decode))
    strays = [] if status else list(strays_of(loaded))  # a split that could not be read may list them
    for note in strays:
        print(f"note: {note}")
    for problem in problems:
        print(f"problem: {problem}")
    if arguments.speed and kind != "digits":
        for part in loaded:
            print(_speed(part, arguments.size))
    if not problems and not status:
        print("no problems found" + ("" if arguments.decode else "; --decode looks into the images too"))
    return status or (FAILED if problems else 0)


def _row(split: str, s: Statistics) -> tuple[str, ...]:
    return (
        split,
        f"{s.images}",
        f"{s.num_classes}",
        f"{s.labels_per_image:.3f}",
        f"{s.unlabelled}",
        f"{s.unknown_share:.1%}",
        f"{s.negatives_per_positive:.1f}",
        f"{s.mean_imbalance:.1f}",
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))


def _print_classes(annotations: Annotations, s: Statistics, all_classes: bool) -> None:
    """Positives and frequency of the classes, from the most frequent to the rarest."""
    order = np.argsort(-s.positives, kind="stable")
    lines = [f"  {s.positives[k]:>9}  {s.frequency[k]:>7.2%}  {annotations.classes[k]}" for k in order]
    if not all_classes and len(lines) > 2 * _CLASSES_SHOWN:
        between = f"  ... {len(lines) - 2 * _CLASSES_SHOWN} more, shown by --all_classes"
        lines = [*lines[:_CLASSES_SHOWN], between, *lines[-_CLASSES_SHOWN:]]
    print(f"\n{annotations.split}: images with the class, share of those where it is known", *lines, sep="\n")
    if s.empty_classes:
        print(f"note: {annotations.split}: {len(s.empty_classes)} classes have no image: {names(s.empty_classes)}")


def _speed(annotations: Annotations, size: int) -> str:
    files = ImageDataset(annotations, size, max_broken=len(annotations))
    random = np.random.default_rng(0)
    images: Dataset = files
    if annotations.shards is None:
        order, how = random.permutation(len(annotations)), "in random order"
    else:
        images, order, how = ShardImages(files), shard_order(annotations.shards, random), "shard by shard"
    warm_up, timed = order[:_WARM_UP_IMAGES].tolist(), order[_WARM_UP_IMAGES:][:_SPEED_IMAGES].tolist()
    timed = timed or warm_up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken images are told of elsewhere
        for index in warm_up:
            images[index]
        start = time.perf_counter()
        for index in timed:
            images[index]
        rate = len(timed) / (time.perf_counter() - start)
    work = f"{len(timed)} images {how}: read, decoded, resized"
    return f"speed: {annotations.split}: {rate:.0f} images/s on one core at {size} x {size} ({work})"
