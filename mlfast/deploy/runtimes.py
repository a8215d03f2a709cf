"""One model, three runtimes: from uint8 images to probabilities by PyTorch, ONNX Runtime or OpenVINO.

Nothing that is loaded here can run code: weights are safetensors, descriptions JSON, graphs ONNX or OpenVINO IR.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mlfast.deploy.model_info import KEY, ModelInfo
from mlfast.deploy.thresholds import read_thresholds
from mlfast.models.checkpoint import CheckpointError, check_path, load_model
from mlfast.nn.ml_decoder import FoldedMLDecoder

OUTPUTS = ("logits", "probabilities")  # Model API reads the first and applies a sigmoid itself
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar", ".bin")


class Runtime(Protocol):
    """A loaded model; any number of threads may call it at the same time."""

    info: ModelInfo

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 images ``[B, H, W, 3]`` of the model's size to probabilities ``[B, K]``, float32."""


def open_model(path: str | Path, device: str = "auto", *, ignore_thresholds: bool = False) -> Runtime:
    """Load a model folder, an ``.onnx`` file or an OpenVINO ``.xml`` file.

    Args:
        path: of what `mlfast train` or `mlfast export` wrote.
        device: of a model folder: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ... Exported files run on the CPU.
        ignore_thresholds: do not read ``thresholds.json``: it is about to be written.

    Raises:
        CheckpointError: missing, damaged, not written by mlfast, or a file that would be unpickled.
        ValueError: no such device.
    """
    path = Path(path)
    check_path(path)
    if path.is_dir():
        return TorchRuntime(path, device, ignore_thresholds)
    runtimes: dict[str, Callable[[Path], Runtime]] = {".onnx": OnnxRuntime, ".xml": OpenVinoRuntime}
    runtime = runtimes.get(path.suffix.lower())
    if runtime is None:
        raise CheckpointError(f"{path} {_refusal(path.suffix.lower())}")
    if device not in ("auto", "cpu"):
        raise ValueError(f"device: got {device!r}, but exported files run on the CPU here; leave it out")
    return runtime(path)


def _refusal(suffix: str) -> str:
    if suffix in _PICKLES:
        reason = "may be a pickle, and loading a pickle runs whatever code is in it: refused"
    elif suffix == ".pt2":
        reason = "is for C++ and torch.export.load, which unpickles: refused"
    elif suffix == ".safetensors":
        return "is part of a model; pass the folder that it lies in"
    else:
        reason = "is not a model"
    return f"{reason}; expected a model folder such as runs/NAME/best, an .onnx or an OpenVINO .xml file"


class TorchRuntime:
    """A model folder in PyTorch, folded for inference."""

    def __init__(self, folder: Path, device: str = "auto", ignore_thresholds: bool = False) -> None:
        model, description = load_model(folder)
        stored = None if ignore_thresholds else read_thresholds(folder, description["classes"])
        self.info = ModelInfo.from_mapping(description, *(stored or ()))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model = model.fold().to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {device!r}, which cannot be used here: {error}") from error

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Runtime`."""
        batch = torch.from_numpy(images).to(self.model.mean.device).permute(0, 3, 1, 2)
        return self.model.probabilities(self.model(self.model.prepare(batch))).float().cpu().numpy()

    @property
    def shows_attention(self) -> bool:
        """Whether the head is an ML-Decoder."""
        return isinstance(self.model.classifier, FoldedMLDecoder)

    @torch.inference_mode()
    def attention(self, images: np.ndarray) -> np.ndarray:
        """Where an ML-Decoder looks in uint8 images ``[B, H, W, 3]``: ``[B, K, h, w]``, float32."""
        batch = torch.from_numpy(images).to(self.model.mean.device).permute(0, 3, 1, 2)
        return self.model.attention(self.model.prepare(batch)).float().cpu().numpy()


class OnnxRuntime:
    """An exported file in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'reading .onnx needs onnxruntime: pip install ".[export]" in a checkout of mlfast', name="onnxruntime"
            ) from error
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class of their own
            raise CheckpointError(f"{path} is not a readable ONNX model: {error}") from error
        self.info = ModelInfo.from_json(self._session.get_modelmeta().custom_metadata_map.get(KEY), str(path))

    def run(self, inputs: np.ndarray) -> list[np.ndarray]:
        """Logits and probabilities ``[B, K]`` of normalised images ``[B, 3, H, W]``."""
        return self._session.run(list(OUTPUTS), {"images": inputs})

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Runtime`."""
        return self.run(normalised(images, self.info))[1]


class OpenVinoRuntime:
    """An exported file in OpenVINO, on the CPU.

    In float32 even where the processor has bfloat16, unless ``precision`` is ``"bf16"``.
    """

    def __init__(self, path: Path, precision: str = "f32") -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'reading OpenVINO models needs openvino: pip install ".[openvino]" in a checkout of mlfast',
                name="openvino",
            ) from error
        try:
            core = openvino.Core()
            model = core.read_model(path)
            has_info = model.has_rt_info([KEY])
            text = model.get_rt_info([KEY]).astype(str) if has_info else None
            self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        except Exception as error:  # its errors have no class of their own
            raise CheckpointError(f"{path} is not a readable OpenVINO model: {error}") from error
        self.info = ModelInfo.from_json(text, str(path))
        self._own = threading.local()  # an infer request serves one thread at a time

    def run(self, inputs: np.ndarray) -> list[np.ndarray]:
        """Logits and probabilities ``[B, K]`` of normalised images ``[B, 3, H, W]``."""
        request: Any = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        found = request.infer({"images": inputs})
        return [found[name].copy() for name in OUTPUTS]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Runtime`."""
        return self.run(normalised(images, self.info))[1]


def normalised(images: np.ndarray, info: ModelInfo) -> np.ndarray:
    """uint8 images ``[B, H, W, 3]`` to the graph's input, float32 ``[B, 3, H, W]``."""
    mean, std = (np.array(values, np.float32) for values in (info.mean, info.std))
    scaled = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
