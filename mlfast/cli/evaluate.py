"""``mlfast evaluate``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfast.cli.arguments import either_dash, names_of
from mlfast.cli.data_choice import DataChoice, add_data_options, chosen_data

if TYPE_CHECKING:
    import numpy as np

    from mlfast.deploy.runtimes import Runtime
    from mlfast.evaluation import MultilabelMetrics, Predictions

_DESCRIPTION = """\
Measure a model on a split at a threshold of 0.5 and, where there are any, at one for each class (the paper's Table 6).
"""
_EXAMPLES = """\
examples:
  mlfast evaluate runs/x/best                       the validation split of the run's own data
  mlfast evaluate runs/x/best --tune train          and thresholds that maximise F1 on its training split
  mlfast evaluate runs/x/best --tune held_out       or on the images that it held out of that split
  mlfast evaluate runs/x/best/model.onnx --data csv --data_root pictures --data_args '{file: test.csv}' --split test
"""


def main(argv: list[str]) -> int:
    """Print the metrics of a model, and choose its thresholds."""
    parser = _parser()
    options = parser.parse_args(either_dash(argv, names_of(parser)))
    _check(options)
    import numpy as np

    from mlfast.data import BrokenImagesError
    from mlfast.deploy.runtimes import open_model

    data = chosen_data(options, Path(options.model))
    model = open_model(options.model, options.device, ignore_thresholds=bool(options.tune))
    try:
        values, chosen_on = np.array(model.info.thresholds), model.info.chosen_on
        if options.tune:
            values, chosen_on = _tune(model, data, options)
        predictions, broken = _predict(model, data, options.split, options)
    except BrokenImagesError as error:
        raise ValueError(str(error)) from error
    definitions = {"interpolated": options.interpolated, "f1": options.f1, "absent": options.absent}
    rows = {"0.5": predictions.metrics(**definitions)}
    if adaptive := bool((values != 0.5).any()):
        rows["adaptive"] = predictions.metrics(values, **definitions)
    source = f"{data.kind}/{data.split(options.split)}"
    notes = [f"{predictions.num_images} images of {source}; {_origin(adaptive, chosen_on, options)}", *broken]
    if absent := len(values) - rows["0.5"].num_classes_evaluated:
        counted = "left out of the means" if options.absent == "exclude" else "counted as 0"
        notes.append(f"{absent} of {len(values)} classes have no positive here: {counted}")
    notes += [*_losses(rows), *_flattery(chosen_on, data, options)]
    facts = zip(model.info.classes, predictions.positives(), rows["0.5"].per_class_ap, values, strict=True)
    classes = [
        {"name": name, "positives": int(positives), "AP": _finite(precision), "threshold": float(threshold)}
        for name, positives, precision, threshold in facts
    ]
    if options.format == "json":
        _print_json({"model": options.model, "data": source, "images": predictions.num_images}, rows, classes, notes)
    else:
        _print_table(rows, classes if options.per_class else [], notes)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast evaluate",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="runs/NAME/best, or an .onnx or .xml file of mlfast export")
    parser.add_argument("--split", default="val", help="to measure on; val is the one that the run validated on  [val]")
    parser.add_argument("--per-class", action="store_true", help="average precision and threshold of every class too")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time  [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...; of a model folder  [%(default)s]")
    add_data_options(parser)
    group = parser.add_argument_group("thresholds")
    group.add_argument("--tune", metavar="SPLIT", help="choose them on this split; thresholds.json is written to MODEL")
    group.add_argument("--beta", type=float, default=1.0, metavar="X", help="maximise F-beta; 2 favours recall  [1]")
    group.add_argument("--min-precision", type=float, metavar="X", help="instead, most recall at this precision")
    group.add_argument("--shared", action="store_true", help="one threshold for all classes")
    group = parser.add_argument_group("definitions (docs/evaluation.md)")
    group.add_argument("--interpolated", action="store_true", help="AP as PASCAL VOC 2010 and Query2Label have it")
    group.add_argument(
        "--f1", choices=("harmonic", "macro", "sample"), default="harmonic", help="what CP, CR, CF1 are  [%(default)s]"
    )
    group.add_argument(
        "--absent", choices=("exclude", "zero"), default="exclude", help="classes without a positive  [%(default)s]"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.tune and Path(options.model).is_file():
        raise ValueError(
            f"--tune writes thresholds.json beside a model, but {options.model} is not a model folder; tune that, "
            "then export it"
        )
    if not options.tune and (options.beta != 1 or options.min_precision is not None or options.shared):
        raise ValueError("--beta, --min-precision and --shared say how --tune SPLIT chooses; give it too")
    if options.beta != 1 and options.min_precision is not None:
        raise ValueError("--beta and --min-precision are two ways to choose; give one")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: got {options.batch_size}, expected at least 1")


def _predict(
    model: Runtime, data: DataChoice, name: str, options: argparse.Namespace, purpose: str = ""
) -> tuple[Predictions, list[str]]:
    """The predictions for a split, and lines about what could not be read."""
    from mlfast.deploy.evaluate import predict_split
    from mlfast.deploy.splits import broken_images

    images = data.read(name, model.info, options.images)
    predictions = predict_split(model, images, options.batch_size, title=f"{purpose}{data.split(name)}")
    broken = broken_images(images)
    notes = [f"{len(broken)} of them could not be read and count nowhere: {', '.join(broken[:3])}"] if broken else []
    return predictions, notes


def _tune(model: Runtime, data: DataChoice, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The thresholds, written beside the model, and the images that they were chosen on, in words."""
    from mlfast.deploy.evaluate import tune
    from mlfast.deploy.thresholds import write_thresholds

    predictions, broken = _predict(model, data, options.tune, options, "tuning on ")
    tuned = tune(predictions, beta=options.beta, min_precision=options.min_precision, shared=options.shared)
    classes = list(model.info.classes)
    aim = f"F{options.beta:g}"
    if options.min_precision is not None:
        aim = f"recall at a precision of {options.min_precision:g}"
    aim += ", one threshold for all classes" if options.shared else ""
    source = f"{data.kind}/{data.split(options.tune)}, {predictions.num_images} images"
    path = write_thresholds(Path(options.model), classes, tuned.thresholds, tuned.values, source, aim)
    doubts = tuned.thresholds.warning(classes)
    lines = [f"thresholds chosen on {source}, for {aim}: {path}", *broken, *([f"doubtful: {doubts}"] if doubts else [])]
    print("\n".join(lines) + "\n", file=sys.stderr if options.format == "json" else sys.stdout)
    return tuned.values, source


def _origin(adaptive: bool, chosen_on: str, options: argparse.Namespace) -> str:
    """Where the thresholds come from."""
    if adaptive and options.tune:
        return f"adaptive thresholds: chosen on {chosen_on}"
    if adaptive:
        return "adaptive thresholds: as they come with the model, " + (
            f"chosen on {chosen_on}" if chosen_on else "which does not say what they were chosen on"
        )
    if chosen_on:  # an exported file with folded thresholds, or ones that were chosen and are 0.5
        return f"the threshold of every class is 0.5, which stands for thresholds chosen on {chosen_on}"
    hint = "; --tune SPLIT chooses others" if Path(options.model).is_dir() else ""
    return f"the threshold of every class is 0.5{hint}"


def _losses(rows: dict[str, MultilabelMetrics]) -> list[str]:
    """A line where the thresholds of the classes are worse than 0.5 here."""
    if "adaptive" not in rows:
        return []
    lower = [score for score in ("OF1", "CF1") if getattr(rows["adaptive"], score) < getattr(rows["0.5"], score)]
    if not lower:
        return []
    return [f"{' and '.join(lower)} lower with the chosen thresholds than with 0.5: they do not suit these images."]


def _flattery(chosen_on: str, data: DataChoice, options: argparse.Namespace) -> list[str]:
    """A line where the thresholds were chosen on images of the split that is measured."""
    kind, _, names = chosen_on.rpartition(", ")[0].partition("/")  # such as "coco/train+val, 100 images"
    if kind != data.kind or not set(names.split("+")) & set(data.split(options.split).split("+")):
        return []
    elsewhere = "on others, metrics at these thresholds are lower."
    if options.tune or kind == "digits" or not (options.data or options.data_root or options.data_args):
        return [f"These are the images that the thresholds were chosen on: {elsewhere}"]
    return [f"If this is the {kind}/{names} that the thresholds were chosen on: {elsewhere}"]


def _print_table(rows: dict[str, MultilabelMetrics], classes: list[dict[str, Any]], notes: list[str]) -> None:
    from mlfast.deploy.evaluate import table

    print(table(rows), "", *notes, sep="\n")
    if classes:
        width = max(len("class"), *(len(entry["name"]) for entry in classes))
        print(f"\n{'class':<{width}}  positives     AP  threshold")
        for entry in classes:
            precision = "-" if entry["AP"] is None else f"{100 * entry['AP']:.1f}"
            print(f"{entry['name']:<{width}}  {entry['positives']:>9}  {precision:>5}  {entry['threshold']:>9.4g}")


def _print_json(
    about: dict[str, Any], rows: dict[str, MultilabelMetrics], classes: list[dict[str, Any]], notes: list[str]
) -> None:
    metrics = {
        title: {name: _finite(value) for name, value in row.as_dict().items() if name != "per_class_ap"}
        for title, row in rows.items()
    }
    print(json.dumps({**about, "metrics": metrics, "classes": classes, "notes": notes}, indent=2))


def _finite(value: float) -> float | None:
    """None for nan, which JSON does not have."""
    return None if math.isnan(value) else value
