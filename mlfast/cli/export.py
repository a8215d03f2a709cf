"""``mlfast export``."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Write a model for another runtime, verified in it."""
    parser = argparse.ArgumentParser(
        prog="mlfast export",
        description="Write a model for another runtime, run it there on real images and compare with PyTorch. The file "
        "holds classes, thresholds and preprocessing. docs/deploy.md says how to read it.",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, such as runs/NAME/best")
    parser.add_argument("--format", choices=("onnx", "openvino", "torch"), default="onnx", help="[%(default)s]")
    parser.add_argument("--output", metavar="FILE", help="by default model.onnx, model.xml or model.pt2 in MODEL")
    parser.add_argument(
        "--fold-thresholds",
        action="store_true",
        help="move the logits so that a probability of 0.5 means each class's own threshold, for servers with only one",
    )
    options = parser.parse_args(argv)
    from mlfast.deploy import export_model

    done = export_model(options.model, options.format, options.output, fold_thresholds=options.fold_thresholds)
    print(f"{done.path}: probabilities of {done.images} images differ from PyTorch's by at most {done.difference:.1e}")
    return 0
