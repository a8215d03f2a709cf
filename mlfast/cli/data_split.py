"""``mlfast data split``: divides a data set of files, and writes one list of kind "json" for every part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mlfast.cli.arguments import parse
from mlfast.data import json_file
from mlfast.data.loading import READERS, load_annotations
from mlfast.data.stratify import stratified_split


def main(argv: Sequence[str]) -> int:
    """Divide a data set."""
    _split(*parse(_parser(), argv))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast data split",
        allow_abbrev=False,
        usage="mlfast data split KIND ROOT --split SPLIT --into NAME=SHARE ... [--OPTION VALUE ...]",
        description="Divide the images of a split so that every part has its share of every class (iterative "
        "stratification), and write the list of each part beside the images: ROOT/NAME.json, to be read as kind json.",
    )
    parser.add_argument("kind", choices=list(READERS), metavar="KIND", help=", ".join(READERS))
    parser.add_argument("root", metavar="ROOT", help="folder of the data set")
    parser.add_argument("--split", required=True, metavar="SPLIT", help="to divide; a+b joins two")
    parser.add_argument(
        "--into",
        nargs="+",
        default=["train=0.8", "val=0.2"],
        metavar="NAME=SHARE",
        help="the parts, whose shares have the sum 1  [train=0.8 val=0.2]",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides between equals  [0]")
    parser.add_argument("--cache_dir", metavar="DIR", help="default $XDG_CACHE_HOME/mlfast or ~/.cache/mlfast")
    return parser


def _split(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    shares = _shares(arguments.into)
    annotations = load_annotations(
        arguments.kind, arguments.root, arguments.split, cache_dir=arguments.cache_dir, **options
    )
    if annotations.shards is not None:
        raise ValueError(
            f"{arguments.kind} lies in shards, which cannot be listed anew; hold a part out while training "
            "(mlfast train --held_out 0.1), or divide the images before they are packed."
        )
    paths = [annotations.root / f"{name}.json" for name in shares]
    if there := [str(path) for path in paths if path.exists()]:
        raise ValueError(f"--into: {there[0]} exists already and is not written over; take another name or remove it.")
    parts = stratified_split(annotations, list(shares.values()), arguments.seed)
    for part, path in zip(parts, paths, strict=True):
        json_file.write(part, path)
        print(f"{path}: {len(part)} images, {part.statistics().labels_per_image:.3f} labels per image")
    print(f"read them with: mlfast data check json {arguments.root} --split {' '.join(shares)}")


def _shares(texts: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"--into: got {text!r}, expected NAME=SHARE, e.g. val=0.2") from None
        if not name or "/" in name or "\\" in name:
            raise ValueError(f"--into: got the name {name!r}, expected one without a slash.")
    if len(shares) < len(texts):
        raise ValueError(f"--into: got {' '.join(texts)}, expected every name once.")
    return shares
