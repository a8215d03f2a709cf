"""What compilers say of the kernels for GPUs: ``python -m bench.gpu_static`` writes results/static/gpu.json.

Registers, spills, shared memory, the occupancy that they allow, and the instructions of the main loop. **Static
figures, never speeds**; no GPU is needed. The compilers and the jobs are those of tests/kernels.
Triton must be there, which brings cuobjdump; nvcc, or Triton's compiler for AMD GPUs, may be missing, and then their
figures are.
"""

from __future__ import annotations

import base64
import importlib
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import commit
from tests.kernels import compilers

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "bench" / "results" / "static" / "gpu.json"
DISASSEMBLED = 90  # instructions are counted for this chip; the others' loops are alike

Kernel = dict[str, Any]


class Chip(NamedTuple):
    """What a streaming multiprocessor holds (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int


CHIPS = {80: Chip(64, 32, 65536, 164 * 1024), 90: Chip(64, 32, 65536, 228 * 1024), 100: Chip(64, 32, 65536, 228 * 1024)}


class Count(NamedTuple):
    """Special-function instructions of an element that a formula needs, by its page in docs/."""

    op: str
    triton: dict[str, Any]  # constants and types that name the variant
    cuda: str  # what the mangled name of the variant contains
    special: int
    why: str


COUNTS = (
    Count(
        "aam_loss",
        {"target": "*i8", "POWER_NEG": 1, "SMOOTHED": False, "MARGIN": False, "SHIFTED": False},
        "ByteTargetENS1_7AamHardILb0ELb0ELi1E",
        2,
        "an exponential and a reciprocal; the logarithm is a polynomial",
    ),
    Count(
        "asymmetric_loss",
        {"target": "*i8", "POWER_NEG": 4, "SMOOTHED": False, "CLIPPED": True},
        "ByteTargetENS1_7AslHardILb1ELb0ELi3E",
        3,
        "an exponential and a reciprocal, and the clip's division; logarithms are polynomials",
    ),
)


# ------------------------------------------------------------------------------------------------------------ figures


def occupancy(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Percent of a multiprocessor's warps that can be resident: registers are given by 256 to a warp, shared by 128."""
    chip, warps = CHIPS[arch], -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    limits = [chip.warps // warps, chip.blocks, chip.registers // per_warp // warps]
    if shared_bytes:
        limits.append(chip.shared_bytes // (-(-shared_bytes // 128) * 128))
    return round(100 * min(limits) * warps / chip.warps)


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def main_loop(instructions: list[tuple[int, str, str]]) -> Counter[str]:
    """How often each instruction stands in the first loop (a branch backwards) that reads or writes memory.

    The first one serves full tiles in Triton; later ones serve the last tile and add partial sums.
    """
    loops = []
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.split(".")[0] == "BRA" and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    for start, end in sorted(loops):
        found = Counter(name for address, name, _ in instructions if start <= address <= end)
        if any(name.startswith(("LDG", "STG")) for name in found):
            return found
    return Counter()


def loop_figures(found: Counter[str]) -> Kernel:
    """The loop in numbers: special functions, float32 arithmetic, tensor cores, and memory by width."""

    def total(*starts: str) -> int:
        return sum(count for name, count in found.items() if name.startswith(starts))

    memory = {name: count for name, count in sorted(found.items()) if name.startswith(("LDG", "STG"))}
    arithmetic = total("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP")
    return {"special": total("MUFU"), "float32": arithmetic, "tensor": total("HMMA", "HGMMA"), "memory": memory}


def disassembled(cuobjdump: str, cubin: Path) -> dict[str, list[tuple[int, str, str]]]:
    """The instructions of every kernel of a cubin: address, name, operands."""
    run = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    parts = run.stdout.split("Function : ")[1:]
    return {
        part.split("\n", 1)[0].strip(): [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(part)]
        for part in parts
    }


def with_count(kernel: Kernel, per_thread: int | None, matches: Callable[[Count], bool]) -> Kernel:
    """Adds special functions per element, beside what docs/ counts, for the variants that it counts."""
    for count in COUNTS:
        if per_thread and kernel.get("loop", {}).get("special") and count.op == kernel["op"] and matches(count):
            kernel |= {"special_per_element": kernel["loop"]["special"] / per_thread, "counted": count.special}
            kernel |= {"counted_as": count.why}
    return kernel


# ------------------------------------------------------------------------------------------------------------- Triton


def triton_jobs() -> list[Any]:
    """Every job of the lists in tests/kernels/test_compile_*.py, once."""
    stems = sorted(path.stem for path in (ROOT / "tests" / "kernels").glob("test_compile_*.py"))
    found = [value for stem in stems for value in vars(importlib.import_module(f"tests.kernels.{stem}")).values()]
    jobs = (job for value in found if isinstance(value, list) for job in value if is_job(job))
    return list({json.dumps(job): job for job in jobs}.values())


def is_job(value: Any) -> bool:
    """Module, kernel, signature, constants, and what the driver of that file takes beside."""
    return isinstance(value, tuple) and [type(part) for part in value[:4]] == [str, str, dict, dict]


def triton_kernels(folder: Path, cuobjdump: str) -> Iterator[Kernel]:
    jobs = triton_jobs()
    for target in compilers.TARGETS:
        try:
            results = compilers.compile_ahead(jobs, target, folder)
        except subprocess.CalledProcessError as error:
            if compilers.NO_COMPILER not in error.stderr:
                raise RuntimeError(error.stderr) from error
            continue
        for job, result in zip(jobs, results, strict=True):
            yield triton_kernel(job, target, result, folder, cuobjdump)


def triton_kernel(job: Any, target: tuple, result: dict[str, Any], folder: Path, cuobjdump: str) -> Kernel:
    op, name, signature, constants, *_ = job
    variant = {**{key: kind for key, kind in signature.items() if kind.startswith("*")}, **constants}
    kernel = {
        "op": op,
        "language": "Triton",
        "kernel": name,
        "variant": describe(variant),
        "threads": result["threads"],
    }
    if target[0] == "hip":
        return kernel | {"target": target[1]} | amd_figures(result["text"])
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", result["usage"])}
    # These kernels keep nothing on the stack or in local memory but spills. What is shared is asked for at the launch.
    spilled, shared = used["STACK"] + used["LOCAL"], used["SHARED"] + result["shared"]
    kernel |= figures(target[1], result["threads"], used["REG"], spilled, shared)
    if target[1] == DISASSEMBLED:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(base64.b64decode(result["cubin"]))
        (instructions,) = disassembled(cuobjdump, cubin).values()
        kernel["loop"] = loop_figures(main_loop(instructions))
    per_thread = constants["BLOCK"] // result["threads"] if "BLOCK" in constants else None
    return with_count(kernel, per_thread, lambda count: count.triton.items() <= variant.items())


def describe(variant: dict[str, Any]) -> str:
    """Types of the pointers, then the constants, without what is absent or the same everywhere."""
    left_out = ("MAX_PROGRAMS", "BLOCK", "workspace")
    shown = {key: value for key, value in variant.items() if value not in (None, False) and key not in left_out}
    return ", ".join(key if value is True else f"{key} {str(value).lstrip('*')}" for key, value in shown.items())


def figures(arch: int, threads: int, registers: int, spill_bytes: int, shared_bytes: int) -> Kernel:
    """The same for both languages."""
    return {
        "target": f"sm_{arch}",
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": shared_bytes,
        "occupancy_percent": occupancy(arch, threads, registers, shared_bytes),
    }


def amd_figures(text: str) -> Kernel:
    """What LLVM notes in the assembly; the occupancy is in waves per SIMD, of 8.

    Spilled is what takes memory; scalar registers that are kept in lanes of vector registers do not.
    """

    def noted(key: str) -> int:
        return int(re.search(rf"{key}:?\s+(\d+)", text)[1])

    shared = noted(r"\.group_segment_fixed_size")
    return {
        "registers": noted(r"\.vgpr_count"),
        "spill_bytes": noted(r"\.private_segment_fixed_size"),
        "shared_bytes": shared,
        "occupancy_percent": round(100 * noted("; Occupancy") / 8),
    }


# ----------------------------------------------------------------------------------------------------------- CUDA C++


def cuda_kernels(nvcc: str, folder: Path, cuobjdump: str) -> Iterator[Kernel]:
    jobs = [(source, arch) for source in compilers.CUDA_SOURCES for arch in compilers.cuda_archs(nvcc)]
    with ThreadPoolExecutor(2) as pool:
        for kernels in pool.map(lambda job: list(cuda_source(nvcc, *job, folder, cuobjdump)), jobs):
            yield from kernels


def cuda_source(nvcc: str, source: Path, arch: int, folder: Path, cuobjdump: str) -> Iterator[Kernel]:
    cubin = folder / f"{source.stem}-{arch}.cubin"
    command = [nvcc, *compilers.NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = {}
    for part in log.split("Compiling entry function '")[1:]:  # with the functions that the kernel calls
        spilled[part.split("'")[0]] = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True)
    used = dict(re.findall(r"Function (\w+):\s+(REG:.*)", usage.stdout))
    threads = most_threads(cuobjdump, cubin)
    code = disassembled(cuobjdump, cubin) if arch == DISASSEMBLED else {}
    names = demangled(used)
    for name, text in used.items():
        registers, shared = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "SHARED"))
        kernel = {"op": source.stem, "language": "CUDA C++", "kernel": names[name], "variant": ""}
        kernel |= {"threads": threads[name]} | figures(arch, threads[name], registers, spilled[name], shared)
        if name in code:
            kernel["loop"] = loop_figures(main_loop(code[name]))
        yield with_count(kernel, elements_per_thread(name), lambda count, name=name: count.cuda in name)


def most_threads(cuobjdump: str, cubin: Path) -> dict[str, int]:
    """The __launch_bounds__ of every kernel, with which it is launched."""
    run = subprocess.run([cuobjdump, "-elf", str(cubin)], capture_output=True, text=True, check=True)
    sections = (part.split("\n", 1) for part in run.stdout.split("\n.nv.info.")[1:])
    bounds = (
        (name, re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+)", text)) for name, text in sections
    )
    return {name.strip(): int(bound[1], 16) for name, bound in bounds if bound}


def elements_per_thread(name: str) -> int | None:
    """The losses' kernels read 16 bytes of scores at once (csrc/cuda/elementwise_loss.cuh)."""
    score = re.search(r"loss_kernelI(f|d|6__half|13__nv_bfloat16)", name)
    return 16 // {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}[score[1]] if score else None


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Names as a reader knows them, without namespaces and arguments, where c++filt is installed."""
    names = list(names)
    if not (tool := shutil.which("c++filt")):
        return dict(zip(names, names, strict=True))
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"^void |mlfast::cuda::|\(anonymous namespace\)::|\(.*$", "", line) for line in lines.splitlines()]
    return dict(zip(names, short, strict=True))


# ------------------------------------------------------------------------------------------------------------- report


def html(found: dict[str, Any], table: Callable[[Iterable[str], Iterable[Iterable[str]]], str]) -> Iterator[str]:
    """Two tables: resources by op and target, and the loops whose special functions docs/ counts."""
    tools = ", ".join(f"{escape(name)} {escape(version)}" for name, version in found["tools"].items())
    yield f"<p>From the compilers ({tools}), commit {escape(found['commit'])}. No GPU ran anything: no speeds.</p>"
    grouped: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in found["kernels"]:
        grouped.setdefault((kernel["op"], kernel["language"], kernel["target"]), []).append(kernel)
    header = ["op", "language", "target", "kernels", "registers", "spilled bytes", "shared bytes", "occupancy, %"]
    keys = ("registers", "spill_bytes", "shared_bytes", "occupancy_percent")
    yield table(header, [[*key, str(len(of)), *(span(of, name) for name in keys)] for key, of in grouped.items()])
    counted = [kernel for kernel in found["kernels"] if "counted" in kernel]
    yield (
        "<p>The main loop on sm_90, instructions of a thread: special functions (MUFU) of an element, as disassembled "
        "and as counted in docs/. CUDA C++ holds a second, scalar path to memory in the same loop, for misaligned "
        "tensors.</p>"
    )
    header = ["op", "kernel", "MUFU per element", "counted", "as", "float32 in the loop", "memory in the loop"]
    yield table(header, [loop_cells(kernel) for kernel in counted])


def span(kernels: list[Kernel], key: str) -> str:
    """The smallest and the largest figure."""
    low, high = min(kernel[key] for kernel in kernels), max(kernel[key] for kernel in kernels)
    return str(low) if low == high else f"{low} to {high}"


def loop_cells(kernel: Kernel) -> list[str]:
    memory = ", ".join(f"{count} {name}" for name, count in kernel["loop"]["memory"].items())
    name = f"{kernel['language']}: {kernel['kernel']} {kernel['variant']}"
    found = f"{kernel['special_per_element']:g}"
    return [
        *map(escape, (kernel["op"], name, found, str(kernel["counted"]), kernel["counted_as"])),
        str(kernel["loop"]["float32"]),
        memory,
    ]


def version(command: list[str]) -> str:
    text = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d[\w.]*)", text)[1]


def main() -> None:
    """Compiles everything and writes FILE."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise SystemExit('triton is not installed: pip install ".[triton]" in a checkout of mlfast') from error
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    tools = {"triton": triton.__version__, "cuobjdump": version([cuobjdump])}
    with tempfile.TemporaryDirectory() as name:
        kernels = list(triton_kernels(Path(name), cuobjdump))
        if nvcc := compilers.find_nvcc():
            tools["nvcc"] = version([nvcc])
            kernels += cuda_kernels(nvcc, Path(name), cuobjdump)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(kernel) for kernel in kernels)
    FILE.write_text(f'{{"tools": {json.dumps(tools)}, "commit": "{commit()}", "kernels": [\n{lines}\n]}}\n')
    print(f"written: {FILE.relative_to(ROOT)}, {len(kernels)} kernels")


if __name__ == "__main__":
    main()
