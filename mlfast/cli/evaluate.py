"""``mlfast evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_SPLITS = ("train", "val")


def main(argv: list[str]) -> int:
    """Print the metrics of a model, and choose its thresholds."""
    parser = argparse.ArgumentParser(
        prog="mlfast evaluate",
        description="Measure a model on a split at a threshold of 0.5 and, where there are any, at one for each class "
        "(the paper's Table 6).",
    )
    parser.add_argument("model", metavar="MODEL", help="runs/NAME/best, or an .onnx or .xml file of mlfast export")
    parser.add_argument("--data", choices=("digits",), default="digits", help="[%(default)s]")
    parser.add_argument("--split", choices=_SPLITS, default="val", help="to measure on  [%(default)s]")
    parser.add_argument("--images", type=int, metavar="N", help="the first N of a split; by default all")
    parser.add_argument(
        "--tune", choices=_SPLITS, metavar="SPLIT", help="choose thresholds on this split, written beside the model"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...; of a model folder  [%(default)s]")
    options = parser.parse_args(argv)
    import numpy as np

    from mlfast.deploy.evaluate import predict_split, table
    from mlfast.deploy.runtimes import open_model

    folder = Path(options.model)
    if options.tune and not folder.is_dir():
        raise ValueError(f"--tune writes thresholds.json beside a model, but {folder} is not a model folder")
    model = open_model(folder, options.device, ignore_thresholds=bool(options.tune))
    if options.tune:
        values, chosen_on = _tune(model, folder, options)
    else:
        values, chosen_on = np.array(model.info.thresholds), "as they come with the model"
    predictions = predict_split(model, _digits(options.split, options, model), title=options.split)
    rows = {"0.5": predictions.metrics()}
    if (values != 0.5).any():
        rows["adaptive"] = predictions.metrics(threshold=values)
    print(table(rows))
    note = f"adaptive thresholds: {chosen_on}" if "adaptive" in rows else "--tune SPLIT chooses thresholds"
    print(f"\n{predictions.num_images} images of digits/{options.split}; {note}")
    if options.tune == options.split:
        print("These are the images that the thresholds were chosen on: on others, the second line will be lower.")
    return 0


def _tune(model: Any, folder: Path, options: argparse.Namespace) -> tuple[Any, str]:
    from mlfast.deploy.evaluate import predict_split, tune
    from mlfast.deploy.thresholds import write_thresholds

    predictions = predict_split(model, _digits(options.tune, options, model), title=f"tuning on {options.tune}")
    tuned = tune(predictions)
    classes = list(model.info.classes)
    source = f"digits/{options.tune}, {predictions.num_images} images"
    path = write_thresholds(folder, classes, tuned.thresholds, tuned.values, source)
    doubts = tuned.thresholds.warning(classes)
    print(f"thresholds chosen on {source}: {path}" + (f"\ndoubtful: {doubts}" if doubts else "") + "\n")
    return tuned.values, f"chosen on {source}"


def _digits(split: str, options: argparse.Namespace, model: Any) -> Any:
    from mlfast.data import DigitScenes

    return DigitScenes(split, options.images, model.info.image_size)
