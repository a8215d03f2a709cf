"""``mlfast bench --deployed``: trained models in every runtime of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfast.cli.arguments import either_dash, names_of

if TYPE_CHECKING:
    from mlfast.deploy.speed import Speed
    from mlfast.models import MultilabelClassifier

_PACKAGES = ("torch", "onnxruntime", "openvino")


def main(argv: list[str]) -> int:
    """Time models and print a table for each."""
    parser = _parser()
    options = parser.parse_args(either_dash(argv, names_of(parser)))
    from mlfast.deploy.speed import RUNTIMES, measure

    runtimes = tuple(options.runtimes.split(",")) if options.runtimes else RUNTIMES
    if unknown := set(runtimes) - set(RUNTIMES):
        raise ValueError(f"--runtimes: got {sorted(unknown)[0]!r}, expected some of {','.join(RUNTIMES)}")
    if options.batch_size < 1 or not options.seconds > 0:
        raise ValueError("--batch-size and --seconds: expected at least 1 and more than 0")
    folders: list[Path | None] = [*map(Path, options.models)] or [None]
    print(_machine(), end="\n\n")
    for folder in folders:
        model, info, title = _paper_model() if folder is None else _trained_model(folder)
        files = () if folder is None else tuple(sorted(folder.glob("*int8*.xml")))
        print(title, flush=True)
        found = measure(
            model,
            info,
            runtimes=runtimes,
            files=files,
            batch_size=options.batch_size,
            seconds=options.seconds,
            report=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
        )
        print(_table(found, options.batch_size), end="\n\n", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast bench --deployed",
        description="Time trained models on this machine in eager PyTorch, torch.compile, ONNX Runtime and OpenVINO: "
        "as trained, folded, and the int8 files of mlfast export that lie in the folder. A row has milliseconds for "
        "one image, images a second in batches, and how far probabilities are from PyTorch's. Give several models to "
        "weigh speed against mAP.",
    )
    parser.add_argument("--deployed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="runs/NAME/best, ...; without any, the paper's EfficientNetV2-S with ML-Decoder and random weights",
    )
    parser.add_argument("--runtimes", metavar="A,B", help="some of eager,compiled,onnxruntime,openvino  [all]")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="for the throughput  [%(default)s]")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="X", help="for each number, about  [%(default)s]")
    return parser


def _trained_model(folder: Path) -> tuple[MultilabelClassifier, Any, str]:
    from safetensors import safe_open

    from mlfast.deploy.model_info import ModelInfo
    from mlfast.models.checkpoint import load_model

    model, description = load_model(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        reached = (file.metadata() or {}).get("mAP")
    accuracy = f"mAP {100 * float(reached):.1f} in training" if reached else "mAP unknown"
    info = ModelInfo.from_mapping(description)
    labels, size = len(info.classes), info.image_size
    return (
        model,
        info,
        f"{folder}: {description['backbone']}, {description['head']}, {labels} labels, {size} px, {accuracy}",
    )


def _paper_model() -> tuple[MultilabelClassifier, Any, str]:
    import torch

    from mlfast.deploy.model_info import ModelInfo
    from mlfast.models import create_model

    torch.manual_seed(0)
    model = create_model("tf_efficientnetv2_s", 80, head="ml_decoder")
    with torch.no_grad():
        model(torch.randn(4, 3, 224, 224))  # batch norms that saw nothing would blow up every rounding
    mean, std = (tuple(values.flatten().tolist()) for values in (model.mean, model.std))
    info = ModelInfo(tuple(map(str, range(80))), (0.5,) * 80, 448, mean, std)
    return model.eval(), info, "tf_efficientnetv2_s, ml_decoder, 80 labels, 448 px, random weights"


def _machine() -> str:
    import torch

    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = [f"{name} {_version(name)}" for name in _PACKAGES]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads; {', '.join(versions)}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _table(found: list[Speed], batch_size: int) -> str:
    width = max(len(speed.name) for speed in found)
    batch = f"batch of {batch_size}"
    lines = [f"{'':<{width}}  {'one image':>10}  {batch:>14}  {'difference':>10}"]
    for speed in found:
        if speed.latency is None or speed.throughput is None:
            lines.append(f"{speed.name:<{width}}  not measured: {speed.problem}")
        else:
            line = f"{speed.name:<{width}}  {1e3 * speed.latency:>7.2f} ms  {speed.throughput:>8.1f} img/s"
            lines.append(f"{line}  {speed.difference:>10.1e}")
    return "\n".join(lines)
