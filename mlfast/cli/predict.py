"""``mlfast predict``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlfast.cli import FAILED
from mlfast.cli.arguments import either_dash, names_of

if TYPE_CHECKING:
    from mlfast.deploy import Prediction, Predictor

_Named = Iterator[tuple[str, "Prediction"]]


def main(argv: list[str]) -> int:
    """Print the labels of images; the status is 1 if one of them could not be read."""
    parser = argparse.ArgumentParser(
        prog="mlfast predict",
        description="Find the labels of images. What cannot be read is named and left out; the exit status is then 1.",
    )
    parser.add_argument("model", metavar="MODEL", help="runs/NAME/best, or an .onnx or .xml file of mlfast export")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders or patterns such as 'in/**/*.jpg'")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="[%(default)s]")
    parser.add_argument("--threshold", type=float, metavar="X", help="one for all labels, not the tuned ones")
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FOLDER",
        help="write each picture with its labels here, as PNG, and where an ML-Decoder looks for each",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time  [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...; of a model folder  [%(default)s]")
    options = parser.parse_args(either_dash(argv, names_of(parser)))
    from PIL import Image

    from mlfast.deploy import Predictor
    from mlfast.deploy.images import find_images

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # too large an image is an error that names it
    files = find_images(options.images)
    if options.draw:
        _check_folder(options.draw, files)
    predictor = Predictor(
        options.model, threshold=options.threshold, batch_size=options.batch_size, device=options.device
    )
    failures: list[str] = []
    results = _results(predictor, files, failures)
    if options.draw:
        results = _drawing(results, predictor, options.draw)
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[options.format](results)
    if failures:
        print(f"mlfast predict: {len(failures)} of {len(files)} images could not be read", file=sys.stderr)
    return FAILED if failures else 0


def _check_folder(folder: Path, files: list[str]) -> None:
    """Refuse to draw where images are read: a picture has the name of its image."""
    if folder.resolve() in {Path(file).resolve().parent for file in files}:
        raise ValueError(f"--draw: {folder} holds images that are to be read, and could be overwritten; take another")


def _results(predictor: Predictor, files: list[str], failures: list[str]) -> _Named:
    """File and prediction of what can be read; the rest is named on the terminal."""
    from tqdm import tqdm

    from mlfast.data.images import ImageError

    bar = tqdm(predictor.stream(files), total=len(files), unit="image", leave=False, disable=None)
    for file, result in zip(files, bar, strict=True):
        if isinstance(result, ImageError):
            failures.append(file)
            tqdm.write(f"mlfast predict: {result}", file=sys.stderr)
        else:
            yield file, result


def _drawing(results: _Named, predictor: Predictor, folder: Path) -> _Named:
    """Pass the results on, and write a picture for each."""
    from mlfast.data.transforms import crop_to
    from mlfast.deploy.draw import draw_attention, draw_labels
    from mlfast.deploy.images import read_image

    folder.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for file, prediction in results:
        stem = name = Path(file).stem
        number = 1
        while name in used:  # a/1.jpg and b/1.jpg
            number += 1
            name = f"{stem}-{number}"
        used.add(name)
        image = read_image(file)
        sheet = draw_labels(image, prediction.labels)
        if predictor.shows_attention and prediction.labels:
            maps = dict(zip(predictor.classes, predictor.attention(file), strict=True))
            seen = crop_to(image, min(image.size)) if predictor.info.resize == "crop" else image
            sheet = draw_attention(sheet, seen, {label: maps[label] for label in prediction.labels})
        sheet.save(folder / f"{name}.png")
        yield file, prediction


def _print_table(results: _Named) -> None:
    for file, prediction in results:
        labels = ", ".join(f"{name} {probability:.2f}" for name, probability in prediction.labels.items())
        print(f"{file}: {labels or '-'}")


def _print_json(results: _Named) -> None:
    """An array, each entry on a line, printed as it comes."""
    separator = "[\n"
    for file, prediction in results:
        labels = {name: round(probability, 6) for name, probability in prediction.labels.items()}
        print(separator + json.dumps({"image": file, "labels": labels}), end="")
        separator = ",\n"
    print("[]" if separator == "[\n" else "\n]")


def _print_csv(results: _Named) -> None:
    """A line for each label; an image without one has a line with empty fields."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("image", "label", "probability"))
    for file, prediction in results:
        rows = [(file, name, f"{probability:.6f}") for name, probability in prediction.labels.items()]
        writer.writerows(rows or [(file, "", "")])
