"""What the numbers were measured on: hardware, versions, and the machine's own limits, measured in the same run."""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
from datetime import date
from pathlib import Path

import numpy
import torch

import mlfast
from bench.race import seconds


def processor() -> str:
    """The model name and what this process sees of it."""
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


def description() -> dict[str, str]:
    """Everything that a reader needs to judge the numbers."""
    return {
        "processor": processor(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "mlfast": mlfast.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def copy_bandwidth(num_bytes: int = 256 * 2**20, repeats: int = 7) -> float:
    """Bytes per second of torch's copy between buffers far beyond the caches; a copy counts as a read and a write."""
    source, target = torch.ones(num_bytes // 4), torch.empty(num_bytes // 4)
    target.copy_(source)
    return 2 * num_bytes / statistics.median(seconds(target.copy_, source) for _ in range(repeats))
