"""How fast a model answers in every runtime of this machine, as it was trained and folded."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mlfast.deploy.export import DeployedModel, exported_program, sample_images, save_onnx, save_openvino
from mlfast.deploy.model_info import ModelInfo
from mlfast.deploy.runtimes import OnnxRuntime, OpenVinoRuntime, normalised
from mlfast.models import MultilabelClassifier

RUNTIMES = ("eager", "compiled", "onnxruntime", "openvino")
_TURNS = 3  # each contestant runs in blocks of its own, which come round in turn: the machine drifts
_MOST = 50  # calls in a block

Call = Callable[[np.ndarray], np.ndarray]  # normalised images [B, 3, H, W] -> probabilities [B, K]
Contestant = Callable[[], Call]  # what makes it ready


@dataclass(frozen=True)
class Speed:
    """What one runtime reached.

    Attributes:
        name: of the runtime, and whether the model was folded.
        latency: median seconds for one image; None where it does not run.
        throughput: images per second in batches.
        difference: the largest difference of a probability to the model as it was trained, in eager PyTorch.
        problem: why it does not run; empty where it does.
    """

    name: str
    latency: float | None = None
    throughput: float | None = None
    difference: float | None = None
    problem: str = ""


def measure(
    model: MultilabelClassifier,
    info: ModelInfo,
    *,
    runtimes: tuple[str, ...] = RUNTIMES,
    files: tuple[Path, ...] = (),
    batch_size: int = 16,
    seconds: float = 2.0,
    report: Callable[[str], None] = lambda line: None,
) -> list[Speed]:
    """Time a model in every runtime, on normalised images in memory: reading and resizing them is the same for all.

    Latency is that of one image alone; throughput that of batches, one after the other. Every runtime has the threads
    it takes by itself.

    Args:
        model: as it was trained.
        info: its image size and normalisation.
        runtimes: some of `RUNTIMES`.
        files: exported files of the same model, such as an int8 one, to be timed too.
        batch_size: for the throughput.
        seconds: for each contestant, latency and throughput each; a slow one gets three calls all the same.
        report: receives a line whenever something is done: exporting and compiling a large model takes minutes.
    """
    images = normalised(sample_images(info.image_size), info)
    alone, batch = images[:1], np.resize(images, (batch_size, *images.shape[1:]))
    truth = _eager(model.eval())(batch)
    with tempfile.TemporaryDirectory(prefix="mlfast-bench-") as scratch:
        ready: dict[str, Call] = {}
        results: dict[str, Speed] = {}
        for name, make in _contestants(model, info, runtimes, files, Path(scratch)):
            start = time.perf_counter()
            try:
                call = make()
                call(alone)
                found = call(batch)
            except Exception as error:  # whatever a runtime has against a model is what the user asked to see
                results[name] = Speed(name, problem=_reason(error))
                continue
            ready[name] = call
            results[name] = Speed(name, difference=float(np.abs(found - truth).max()))
            report(f"{name}: ready after {time.perf_counter() - start:.0f} s")
        report("timing one image")
        latencies = take_turns(ready, alone, seconds)
        report(f"timing batches of {batch_size}")
        batches = take_turns(ready, batch, seconds)
    return [
        Speed(name, latencies[name], batch_size / batches[name], result.difference) if name in ready else result
        for name, result in results.items()
    ]


def _contestants(
    model: MultilabelClassifier, info: ModelInfo, runtimes: tuple[str, ...], files: tuple[Path, ...], scratch: Path
) -> Iterator[tuple[str, Contestant]]:
    forms = {"as trained": model, "folded": model.fold()}
    graphs = {form: scratch / f"{form.replace(' ', '-')}.onnx" for form in forms}

    def written(form: str) -> Path:
        if not graphs[form].exists():
            save_onnx(exported_program(DeployedModel(forms[form]).eval(), info.image_size), info, graphs[form])
        return graphs[form]

    def in_onnx_runtime(form: str) -> Call:
        return _probabilities(OnnxRuntime(written(form)))

    def in_openvino(form: str, precision: str = "f32") -> Call:
        path = graphs[form].with_suffix(".xml")
        if not path.exists():
            save_openvino(written(form), info, path)
        return _probabilities(OpenVinoRuntime(path, precision))

    makers: dict[str, tuple[str, Callable[[str], Call]]] = {
        "eager": ("PyTorch eager", lambda form: _eager(forms[form])),
        "compiled": ("torch.compile", lambda form: _compiled(forms[form])),
        "onnxruntime": ("ONNX Runtime", in_onnx_runtime),
        "openvino": ("OpenVINO", in_openvino),
    }
    for runtime in runtimes:
        title, make = makers[runtime]
        for form in forms:
            yield f"{title}, {form}", partial(make, form)
    if "openvino" in runtimes and has_bfloat16():
        yield "OpenVINO bfloat16, folded", partial(in_openvino, "folded", "bf16")
    for file in files:
        yield file.name, partial(_open, file)


def _reason(error: BaseException) -> str:
    """One line about the innermost cause: exporters wrap it in advice."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join([type(error).__name__ + ":", *str(error).strip().splitlines()[:1]])


def _open(file: Path) -> Call:
    return _probabilities(OnnxRuntime(file) if file.suffix == ".onnx" else OpenVinoRuntime(file))


def _eager(model: MultilabelClassifier) -> Call:
    return _in_torch(DeployedModel(model).eval())


def _compiled(model: MultilabelClassifier) -> Call:
    return _in_torch(torch.compile(DeployedModel(model).eval(), dynamic=False))  # type: ignore[arg-type]


def _in_torch(model: nn.Module) -> Call:
    @torch.no_grad()
    def call(inputs: np.ndarray) -> np.ndarray:
        probabilities: Tensor = model(torch.from_numpy(inputs))[1]
        return probabilities.numpy()

    return call


def _probabilities(runtime: OnnxRuntime | OpenVinoRuntime) -> Call:
    return lambda inputs: runtime.run(inputs)[1]


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor, as it then does unless told otherwise."""
    try:
        import openvino
    except ModuleNotFoundError:
        return False
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def take_turns(calls: dict[str, Call], inputs: np.ndarray, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, in blocks that come round in turn; each was called before on such inputs."""
    sizes = {
        name: min(_MOST, max(1, int(seconds / _TURNS / max(_seconds(call, inputs), 1e-6))))
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            time.sleep(0.05)  # the threads of the one before stop spinning
            if sizes[name] > 1:
                call(inputs)  # caches are filled; a single call is so long that it makes no difference
            times[name] += [_seconds(call, inputs) for _ in range(sizes[name])]
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(call: Call, inputs: np.ndarray) -> float:
    start = time.perf_counter()
    call(inputs)
    return time.perf_counter() - start
