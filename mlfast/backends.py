"""Which backends exist on this machine, which one an op takes, and why one is missing.

An op runs on the first backend of its tensor's device that is available here: ``cpu`` on the CPU, ``cuda`` and then
``triton`` on a GPU, and the plain PyTorch ``reference`` where none of them is. A backend that the user asks for, by
:func:`use_backend` or the environment variable ``MLFAST_BACKEND``, is the one that runs, or an error says why not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_native: Any = None
try:
    _native = importlib.import_module("mlfast._native")
except ImportError as error:
    _native_error = str(error)

NAMES = ("reference", "cpu", "triton", "cuda")
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the backends for tensors of a device, the best first
KERNELS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA C++"}  # the language of a backend's kernels


class BackendError(RuntimeError):
    """A backend that was explicitly asked for cannot serve."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    Attributes:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        available: whether it can run on this machine.
        detail: what it is here, or in words what is missing and how to get it.
    """

    name: str
    available: bool
    detail: str


class Backends(tuple[Backend, ...]):
    """The backends of this machine; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(f"{'+' if b.available else '-'} {b.name:<10} {b.detail}" for b in self)


def backends() -> Backends:
    """What is available here, and for each missing backend the reason in words."""
    return Backends(Backend(name, *_state(name)) for name in NAMES)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend. It holds for the whole process, not only for this thread.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: ``name`` is none of these.
        BackendError: the backend is not available here.
    """
    global _requested
    _check(name, "use_backend")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def choose(device: torch.device, served: tuple[str, ...] = ("cpu", "triton", "cuda")) -> str:
    """The name of the backend that an op on tensors of this device takes.

    Args:
        device: of the tensors.
        served: the backends that the op has kernels for.

    Raises:
        BackendError: the backend that was asked for does not serve this device, or has no kernel of this op.
    """
    if _requested is None:
        for name in _BUILT.get(device.type, ()):
            if name in served and (name != "cuda" or _built_for(device)):
                return name
        return "reference"
    if _requested in KERNELS and _requested not in served:
        raise BackendError(
            f"backend {_requested!r} was asked for, but this op has no {KERNELS[_requested]} kernel; "
            f"ask for one of {', '.join(map(repr, (*served, 'reference')))}"
        )
    if not _serves(_requested, device.type):
        raise BackendError(f"backend {_requested!r} was asked for, but it does not run on {device.type} tensors")
    if _requested == "cuda" and not _built_for(device):
        raise BackendError(f"backend 'cuda' was asked for, but it is {_built_for_others(device)}")
    return _requested


def choose_kernels(device: torch.device, served: tuple[str, ...] = ("cpu", "triton", "cuda")) -> str:
    """As :func:`choose`, for an op in a graph that was traced with it: the graph has no reference path.

    Raises:
        BackendError: also where the reference would be taken.
    """
    name = choose(device, served)
    if name == "reference":
        why = "was asked for" if _requested == name else f"is all that there is for {device.type} tensors"
        raise BackendError(
            f"backend 'reference' {why}, but a graph that was compiled or traced for mlfast's kernels is run; compile "
            "or trace it anew under that backend"
        )
    return name


def is_exporting() -> bool:
    """Whether a model is being exported, when every op takes its reference path: no exporter meets a custom op."""
    # torch.export and the ONNX exporter built on it set the flag; the older ONNX exporter and OpenVINO trace. Of
    # torch.compiler.is_exporting(), which reads the same flag, torch.compile makes True in torch 2.11.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def _serves(name: str, device_type: str) -> bool:
    if name == "triton" and device_type == "cpu":
        return _interpreting()
    return name == "reference" or name in DEVICES.get(device_type, ())


@functools.lru_cache
def _built_for(device: torch.device | None) -> bool:
    """Whether the CUDA kernels run on this GPU. One that is not here is believed to be as it should."""
    if not torch.cuda.is_available() or not _native.cuda_archs:
        return True
    major, minor = torch.cuda.get_device_capability(device)
    archs = [int(arch) for arch in _native.cuda_archs.split(";")]
    # Machine code serves later chips of its generation, and the last one's PTX all later ones.
    return 10 * major + minor >= archs[-1] or any(a // 10 == major and a % 10 <= minor for a in archs)


def _built_for_others(device: torch.device | None) -> str:
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return (
        f"built for compute capability {_native.cuda_archs}, and {name} has {major}{minor}; compile for it: "
        f'MLFAST_CUDA_ARCHS="{_native.cuda_archs};{major}{minor}" MLFAST_CUDA=1 {_install_again()}'
    )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _built(device_type: str) -> tuple[str, ...]:
    # That a tensor is on a device proves that the device is there, so nothing here has to ask the driver.
    built = {
        "cpu": _native is not None,
        "cuda": _native is not None and bool(_native.cuda_archs),
        "triton": importlib.util.find_spec("triton") is not None,
    }
    return tuple(name for name in DEVICES[device_type] if built[name])


def _state(name: str) -> tuple[bool, str]:
    return {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}[name]()


def _reference() -> tuple[bool, str]:
    return True, f"plain PyTorch {torch.__version__}, any device"


def _install_again() -> str:
    """The command that compiles anew: what stands in this checkout, or in one that was installed from."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "setup.py").exists():
        return f"pip install --no-deps --editable {checkout}"
    return "pip install --force-reinstall --no-deps --no-cache-dir . in a checkout of mlfast"


def _cpu() -> tuple[bool, str]:
    if _native is None:
        return False, (
            f"the compiled kernels are missing ({_native_error}). Install a C++ compiler "
            f"(Debian: apt-get install g++), then: {_install_again()}"
        )
    return True, f"C++ kernels with {_native.instruction_set()}, {torch.get_num_threads()} threads"


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; it comes with CUDA builds of torch (or: pip install triton)"
    if _interpreting():
        return True, "interpreted on the CPU (TRITON_INTERPRET=1): for tests, very slow"
    if not torch.cuda.is_available():
        return False, f"no GPU: {_why_no_gpu()}"
    return True, f"compiled for {torch.cuda.get_device_name()}"


def _cuda() -> tuple[bool, str]:
    if _native is None:
        return False, "the compiled kernels are missing, see cpu"
    if not _native.cuda_archs:
        return False, (
            f"built without CUDA, because {_native.why_no_cuda}. Install the CUDA toolkit (nvcc), then: "
            f"MLFAST_CUDA=1 {_install_again()}"
        )
    if not torch.cuda.is_available():
        return False, f"built for compute capability {_native.cuda_archs}, but no GPU: {_why_no_gpu()}"
    if not _built_for(None):
        return False, _built_for_others(None)
    return True, f"built for compute capability {_native.cuda_archs}, runs on {torch.cuda.get_device_name()}"


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return "torch finds no CUDA device (is the driver installed, is CUDA_VISIBLE_DEVICES set?)"


def _check(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    available, detail = _state(name)
    if not available:
        raise BackendError(f"{source}: backend {name!r} is not available here: {detail}")


_BUILT = {device_type: _built(device_type) for device_type in DEVICES}
_requested: str | None = os.environ.get("MLFAST_BACKEND") or None
if _requested is not None:
    _check(_requested, "MLFAST_BACKEND")
