"""``mlfast export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlfast.cli.arguments import either_dash, names_of
from mlfast.cli.data_choice import add_data_options, chosen_data

_EXAMPLES = """\
examples:
  mlfast export runs/x/best                                model.onnx in that folder
  mlfast export runs/x/best --format openvino --int8       model-int8.xml; mAP before and after on the run's own data
"""

_OF_INT8 = ("calibrate", "split", "max_drop", "data", "data_root", "data_args", "images")


def main(argv: list[str]) -> int:
    """Write a model for another runtime, verified in it."""
    parser = _parser()
    options = parser.parse_args(either_dash(argv, names_of(parser)))
    if options.int8:
        return _export_int8(options)
    given = [f"--{name}" for name in _OF_INT8 if getattr(options, name) != parser.get_default(name)]
    if given:
        raise ValueError(f"{', '.join(given).replace('_', '-')}: for --int8 alone; give it too, or leave them out")
    from mlfast.deploy import export_model

    done = export_model(options.model, options.format, options.output, fold_thresholds=options.fold_thresholds)
    print(f"{done.path}: probabilities of {done.images} images differ from PyTorch's by at most {done.difference:.1e}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast export",
        description="Write a model for another runtime, run it there on real images and compare with PyTorch. The file "
        "holds classes, thresholds and preprocessing. docs/deploy.md says how to read it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, such as runs/NAME/best")
    parser.add_argument("--format", choices=("onnx", "openvino", "torch"), default="onnx", help="[%(default)s]")
    parser.add_argument("--output", metavar="FILE", help="by default model.onnx, model.xml or model.pt2 in MODEL")
    parser.add_argument(
        "--fold-thresholds",
        action="store_true",
        help="move the logits so that a probability of 0.5 means each class's own threshold, for servers with only one",
    )
    group = parser.add_argument_group("int8, for --format openvino")
    group.add_argument("--int8", action="store_true", help="quantise with NNCF, and measure what that costs")
    group.add_argument("--calibrate", default="train", metavar="SPLIT", help="whose images choose the ranges  [train]")
    group.add_argument("--split", default="val", help="to measure mAP on, before and after  [val]")
    group.add_argument(
        "--max-drop", type=float, default=1.0, metavar="X", help="write nothing if mAP falls by more points  [1]"
    )
    add_data_options(parser)
    return parser


def _export_int8(options: argparse.Namespace) -> int:
    if options.format != "openvino":
        raise ValueError(f"--int8 is for --format openvino, got {options.format}")
    from mlfast.data import BrokenImagesError
    from mlfast.deploy.evaluate import table
    from mlfast.deploy.model_info import ModelInfo
    from mlfast.deploy.quantize import export_int8
    from mlfast.models.checkpoint import load_model

    folder = Path(options.model)
    info = ModelInfo.from_mapping(load_model(folder)[1])
    data = chosen_data(options, folder)
    try:
        done = export_int8(
            folder,
            data.read(options.calibrate, info, options.images),
            data.read(options.split, info, options.images),
            options.output,
            fold_thresholds=options.fold_thresholds,
            max_drop=options.max_drop / 100,
        )
    except BrokenImagesError as error:
        raise ValueError(str(error)) from error
    sizes = f"{done.bytes_before / 1e6:.1f} MB of weights became {done.bytes_after / 1e6:.1f} MB"
    source = f"{data.kind}/{data.split(options.calibrate)}"
    print(f"{done.path}: calibrated with {done.calibration_images} images of {source}; {sizes}")
    print(f"{done.images} images of {data.kind}/{data.split(options.split)}, at the model's thresholds:\n")
    print(table({"float32": done.before, "int8": done.after}))
    return 0
