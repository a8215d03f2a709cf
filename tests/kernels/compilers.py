"""The compilers of kernels for GPUs, run ahead of time without one: Triton's for each target, and nvcc."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
H100 = ("cuda", 90, 32)
OTHER_TARGETS = (("cuda", 80, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
TARGETS = (H100, *OTHER_TARGETS)
MOST_PROCESSES = 4  # that compile at once; each imports torch and Triton
NO_COMPILER = "0 compatible backends"  # Triton's words for a target that this build does not know

# Each target gets a process of its own: this one may interpret Triton kernels, and whoever interprets cannot compile.
TRITON_DRIVER = """
import base64, importlib, json, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mlfast.kernels import elementwise_loss as frame

def compile(module, kernel, signature, constants, options, target):
    module = importlib.import_module("mlfast.kernels." + module)
    kernel = getattr(module, kernel)
    multiples = [name for name, kind in signature.items() if kind.endswith(":16")]
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    for parameter in kernel.params:
        assert parameter.annotation_type in ("", signature[parameter.name]), parameter.name
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in multiples]
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": getattr(module, "NUM_WARPS", frame.NUM_WARPS), **options}
    if target[0] != "cuda":
        options.pop("maxnreg", None)
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    usage = ""
    if "cubin" in compiled.asm:
        with open("kernel.cubin", "wb") as file:
            file.write(compiled.asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "kernel.cubin"]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    cubin = base64.b64encode(compiled.asm.get("cubin", b"")).decode()
    launch = {"threads": compiled.metadata.num_warps * target[2], "shared": compiled.metadata.shared}
    return {"ttir": compiled.asm["ttir"], "text": text, "usage": usage, "cubin": cubin, **launch}

print(json.dumps([compile(*job) for job in json.load(sys.stdin)]))
"""


def compile_ahead(jobs: list, target: tuple, folder: Path) -> list[dict]:
    """Compiles jobs for a target; raises CalledProcessError where that fails.

    A job is a module, a kernel, its signature, constants and options. Pointers are aligned, as tensors are; "i32:16" is
    a number that is a multiple of 16.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}

    def compiled(part: list) -> list[dict]:
        request = json.dumps([(*job, target) for job in part])
        with tempfile.TemporaryDirectory(dir=folder) as own:
            command = [sys.executable, "-c", TRITON_DRIVER]
            run = subprocess.run(command, input=request, capture_output=True, text=True, cwd=own, env=environment)
        run.check_returncode()
        return json.loads(run.stdout)

    results: list[dict] = [{}] * len(jobs)
    processes = min(len(jobs), len(os.sched_getaffinity(0)), MOST_PROCESSES)
    with ThreadPoolExecutor(processes) as pool:
        for first, part in enumerate(pool.map(compiled, (jobs[first::processes] for first in range(processes)))):
            results[first::processes] = part
    return results


def resources(usage: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def assert_no_spills(jobs, compile_triton, target):
    for job, result in zip(jobs, compile_triton(jobs, target), strict=True):
        if target[0] == "cuda":
            used = resources(result["usage"])
            assert used["STACK"] == used["LOCAL"] == 0, (job, used)
        else:
            # Scalar registers may be kept in lanes of vector registers, which costs no memory.
            assert set(re.findall(r"private_segment_fixed_size:?\s+(\d+)", result["text"])) == {"0"}, job


NVCC_FLAGS = ("-std=c++17", "-O3", "-prec-div=false", "-ftz=true", "-Xptxas", "-v", "-Werror", "all-warnings")
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return os.environ.get("NVCC") or shutil.which("nvcc") or (str(home) if home.exists() else None)


def cuda_archs(nvcc: str) -> list[int]:
    """Those of our targets that this nvcc compiles for."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in (80, 90, 100) if f"compute_{arch}" in known]
