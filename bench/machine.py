"""What the numbers were measured on: hardware, versions, and the machine's own limits, measured in the same run."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import numpy
import torch

import mlfast
from bench.race import Contestant, seconds, until_done


def processor(device: torch.device) -> str:
    """The model name, and what this process sees of it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor()
    isa = next((b.detail.split(",")[0].split()[-1] for b in mlfast.backends() if b.name == "cpu" and b.available), "?")
    return f"{name}, {torch.get_num_threads()} threads, {isa}"


def slug(text: str) -> str:
    """A file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """The commit of the checkout, marked where it has changes."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def description(device: torch.device) -> dict[str, str]:
    """Everything that a reader needs to judge the numbers."""
    return {
        "processor": processor(device),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "mlfast": mlfast.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def copy_bandwidth(device: torch.device, num_bytes: int = 256 * 2**20) -> float:
    """Bytes per second of torch's copy between buffers far beyond the caches; a copy counts as a read and a write."""
    source, target = torch.ones(num_bytes // 4, device=device), torch.empty(num_bytes // 4, device=device)
    copy = until_done(target.copy_)
    copy(source)
    return 2 * num_bytes / fastest(copy, source)


def matrix_rate(device: torch.device) -> float:
    """Operations per second of torch's float32 product of two square matrices; a multiply-add counts as two."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    product = torch.empty(size, size, device=device)
    multiply = until_done(lambda: torch.mm(a, b, out=product))
    multiply()
    return 2 * size**3 / fastest(multiply)


def fastest(run: Contestant, *arguments: object) -> float:
    """Seconds of the fastest of many calls: what is compared with a limit should know the limit."""
    return min(seconds(run, *arguments) for _ in range(50))
