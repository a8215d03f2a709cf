"""A trained model as one file for another runtime, verified there before it is kept.

The graph takes normalised images ``[B, 3, H, W]`` float32, B free, and gives ``logits`` and ``probabilities``
``[B, K]``: the loss's scale is applied. There is one graph: ONNX is written from the exported program, and OpenVINO
reads the ONNX.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlfast.deploy.images import model_input
from mlfast.deploy.model_info import KEY, ModelInfo
from mlfast.deploy.runtimes import OUTPUTS, OnnxRuntime, OpenVinoRuntime, normalised
from mlfast.deploy.thresholds import read_thresholds
from mlfast.evaluation.thresholds import fold_thresholds, threshold_logits
from mlfast.models import MultilabelClassifier
from mlfast.models.checkpoint import load_model

LIMIT = 1e-4  # of a probability
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
_EXTRAS = {"onnx": "export", "openvino": "openvino"}
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}

Probabilities = Callable[[np.ndarray], np.ndarray]  # of uint8 images


@dataclass(frozen=True)
class Export:
    """A written file.

    Attributes:
        path: of the file; an OpenVINO model has its weights beside it in a ``.bin`` file.
        difference: the largest difference of a probability between the runtime and PyTorch.
        images: how many images it was measured on.
    """

    path: Path
    difference: float
    images: int


class DeployedModel(nn.Module):
    """Normalised images to ``(logits, probabilities)``, scaled, and moved so that thresholds fold to 0.5."""

    def __init__(self, model: MultilabelClassifier, thresholds: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.limits: Tensor | None
        limits = None if thresholds is None else threshold_logits(thresholds).float()
        self.register_buffer("limits", limits)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[B, 3, H, W]`` to two of ``[B, K]``."""
        logits = self.model.scale * self.model(images)
        if self.limits is not None:
            logits = logits - self.limits
        return logits, torch.sigmoid(logits)


def export_model(
    folder: str | Path, file_format: str = "onnx", output: str | Path | None = None, *, fold_thresholds: bool = False
) -> Export:
    """Write a model folder as one file, run that file in its runtime on real images, and compare with PyTorch.

    Args:
        folder: of the model, such as ``runs/NAME/best``; its ``thresholds.json`` goes into the file where there is one.
        file_format: ``"onnx"``; ``"openvino"`` (.xml and .bin); or ``"torch"``, an exported program (.pt2).
        output: the file; by default ``model.onnx``, ``model.xml`` or ``model.pt2`` in the folder.
        fold_thresholds: move the logits so that 0.5 means each class's own threshold, for servers that know only one.
            The probabilities are then no longer those that the model was trained to give.

    Raises:
        CheckpointError: as `load_model`.
        ValueError: an unknown format, another suffix, nothing to fold, or the runtime differs by more than 1e-4.
        OSError: the file cannot be written where ``output`` says.
        ImportError: a package of the extra ``export`` or ``openvino`` is missing.
    """
    _check_format(file_format)
    folder = Path(folder)
    path = folder / f"model{_SUFFIXES[file_format]}" if output is None else Path(output)
    if path.suffix != _SUFFIXES[file_format]:
        raise ValueError(f"output: got {path}, expected a name that ends in {_SUFFIXES[file_format]}")
    model, description = load_model(folder)
    stored = read_thresholds(folder, description["classes"])
    if fold_thresholds and stored is None:
        raise ValueError(f"{folder} has no thresholds to fold; choose them with: mlfast evaluate {folder} --tune SPLIT")
    info = ModelInfo.from_mapping(description, *(stored or ()))
    limits = torch.tensor(info.thresholds) if fold_thresholds else None
    deployed = DeployedModel(model.fold(), limits).eval()
    if fold_thresholds:
        info = info.folded()

    program = exported_program(deployed, info.image_size)
    images = sample_images(info.image_size)
    with scratch_folder(path) as scratch:
        partial = scratch / path.name
        runtime = _WRITERS[file_format](program, info, partial)
        difference = _worst_difference(runtime, model, limits, images, info)
        if not difference <= LIMIT:
            raise ValueError(
                f"{file_format} gives probabilities that differ from PyTorch's by up to {difference:.1e}, more than "
                f"{LIMIT:.0e}, so {path} was not written"
            )
        del runtime  # OpenVINO holds its file open
        for file in sorted(scratch.glob(f"{glob.escape(path.stem)}.*")):  # .bin before .xml
            os.replace(file, path.with_suffix(file.suffix))
    return Export(path, difference, len(images))


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside the file that is to be written, which goes with what is left in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); choose another output (--output FILE)") from error
    with scratch as name:
        yield Path(name)


def exported_program(model: nn.Module, image_size: int) -> Any:
    """The graph of ``[B, 3, image_size, image_size]`` for any B."""
    example = torch.zeros(2, 3, image_size, image_size)
    # From batches in channels_last, kernels for other strides would be exported; contiguous input is what comes.
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad(), _quiet():
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _write_onnx(program: Any, info: ModelInfo, path: Path) -> Probabilities:
    save_onnx(program, info, path)
    return OnnxRuntime(path)


def save_onnx(program: Any, info: ModelInfo, path: Path) -> None:
    """Write an `exported_program` as one ONNX file with its metadata."""
    with _quiet():
        written = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=list(OUTPUTS), verbose=False
        )
    assert written is not None
    if hasattr(written, "rename_axes"):  # older versions of PyTorch have a name of their own, such as s34
        shape: Any = written.model.graph.inputs[0].shape
        written.rename_axes({shape[0]: "batch"})
    written.model.metadata_props[KEY] = info.to_json()
    for key, value in info.model_api().items():  # where Model API looks in an ONNX file
        written.model.metadata_props[f"model_info {key}"] = value
    written.save(path, external_data=False)


def _write_openvino(program: Any, info: ModelInfo, path: Path) -> Probabilities:
    # Through ONNX, whose exporter has already computed what does not depend on the image: OpenVINO's own reader of
    # exported programs lacks an operator of vision transformers.
    graph = path.with_name("graph.onnx")
    save_onnx(program, info, graph)
    save_openvino(graph, info, path)
    graph.unlink()
    return OpenVinoRuntime(path)


def save_openvino(graph: Path, info: ModelInfo, path: Path) -> None:
    """Write an ONNX file as OpenVINO IR in float32 with its metadata."""
    import openvino

    model = openvino.convert_model(graph)
    model.set_rt_info(info.to_json(), [KEY])
    for key, value in info.model_api().items():
        model.set_rt_info(value, ["model_info", key])
    openvino.save_model(model, path, compress_to_fp16=False)


def _write_torch(program: Any, info: ModelInfo, path: Path) -> Probabilities:
    with _quiet():
        torch.export.save(program, path, extra_files={f"{KEY}.json": info.to_json()})
        loaded = torch.export.load(path).module()  # a file of our own, so nothing foreign is unpickled

    @torch.no_grad()
    def probabilities(images: np.ndarray) -> np.ndarray:
        return loaded(torch.from_numpy(normalised(images, info)))[1].numpy()

    return probabilities


_WRITERS: dict[str, Callable[[Any, ModelInfo, Path], Probabilities]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch": _write_torch,
}


@torch.no_grad()
def _worst_difference(
    runtime: Probabilities, model: MultilabelClassifier, limits: Tensor | None, images: np.ndarray, info: ModelInfo
) -> float:
    """The largest difference to the model as it was trained, neither folded nor exported; NaN if anything is NaN."""
    logits = model.scale * model(model.prepare(torch.from_numpy(images).permute(0, 3, 1, 2))).double()
    if limits is not None:
        logits = fold_thresholds(logits, limits)
    truth = torch.sigmoid(logits).numpy()
    alone, together = runtime(images[:1]), runtime(images)  # batches of 1 and of all: the size is free
    return float(max(np.abs(alone - truth[:1]).max(), np.abs(together - truth).max()))


def sample_images(image_size: int) -> np.ndarray:
    """Scenes of digits, uint8 ``[16, H, W, 3]``: photographs would do as well, but these are always at hand."""
    from mlfast.data import DigitScenes

    scenes = DigitScenes("val", 16, 64).images.permute(0, 2, 3, 1).numpy()
    return np.stack([model_input(scene, image_size) for scene in scenes])


def _check_format(file_format: str) -> None:
    if file_format not in _NEEDS:
        raise ValueError(f"file_format: got {file_format!r}, expected one of {', '.join(map(repr, _NEEDS))}")
    for package in _NEEDS[file_format]:
        if importlib.util.find_spec(package) is None:
            extra = _EXTRAS[file_format]
            raise ModuleNotFoundError(
                f'export to {file_format} needs {package}: pip install ".[{extra}]" in a checkout of mlfast',
                name=package,
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own insides."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
