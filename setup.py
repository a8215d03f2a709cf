"""Build of mlfast._native: csrc/ compiled by ninja, with CUDA where nvcc is found. Neither torch nor triton is needed.

Environment:
    MLFAST_NATIVE         1: insist on the compiled module; 0: leave it out; unset: go on without it if it fails
    MLFAST_CUDA           1: insist on CUDA, fail where it cannot be built; 0: leave it out; unset: if nvcc is found
    MLFAST_CUDA_ARCHS     compute capabilities, e.g. "80;90"; PTX of the last one is added for later chips
    CXX, NVCC             the compilers; CXXFLAGS is appended to the C++ flags, LDFLAGS to the command that links
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80;90;100"
CXX_FLAGS = (
    # IEEE results, but products may be fused into sums where the processor can, so the clones for several instruction
    # sets differ in last bits. Floating-point exceptions and errno are not observable, without which no loop with a
    # conditional vectorises.
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=fast"
)


def find_nvcc() -> tuple[str | None, str]:
    """The CUDA compiler to use; or None to build without CUDA, and why."""
    wish = os.environ.get("MLFAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MLFAST_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "MLFAST_CUDA=0 left it out"
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or (str(toolkit) if toolkit.exists() else None)
    if nvcc is None and wish == "1":
        raise SystemExit("MLFAST_CUDA=1 but nvcc was not found: install the CUDA toolkit, or set NVCC or CUDA_HOME")
    return nvcc, "nvcc was not found"


def cuda_arch_flags(nvcc: str) -> tuple[str, list[str]]:
    """The compute capabilities to build for, and nvcc's flags for them."""
    try:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{nvcc} --list-gpu-arch failed: {error}") from error
    known = {line.removeprefix("compute_") for line in listing.split()}
    wish = os.environ.get("MLFAST_CUDA_ARCHS")
    archs = [a.strip().replace(".", "") for a in (wish or DEFAULT_CUDA_ARCHS).split(";") if a.strip()]
    if wish and not set(archs) <= known:
        raise SystemExit(f"MLFAST_CUDA_ARCHS={wish!r}: {nvcc} knows {', '.join(sorted(known, key=int))}")
    archs = [a for a in archs if a in known]
    if not archs:
        raise CompileError(f"no compute capability to build for: set MLFAST_CUDA_ARCHS to some of {';'.join(known)}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return ";".join(archs), [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cxx_flags() -> list[str]:
    import pybind11

    flags = CXX_FLAGS.split()
    if sysconfig.get_platform().endswith("x86_64"):
        flags.append("-mprefer-vector-width=512")  # in the clone for AVX-512, where GCC prefers 256 by itself
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")
    flags += [f"-isystem {quote(path)}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    return flags + os.environ.get("CXXFLAGS", "").split()


class NinjaBuild(build_ext):
    """Compiles with ninja: in parallel, and anew only what changed, headers included."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, why_no_cuda = find_nvcc()
        try:
            self.run_ninja(ext, nvcc, why_no_cuda)
        except CompileError as error:
            if nvcc is None or os.environ.get("MLFAST_CUDA") == "1":
                raise
            print(f"mlfast: the build with CUDA failed ({error}); building the CPU kernels alone", file=sys.stderr)
            self.run_ninja(ext, None, f"{nvcc} failed")

    def run_ninja(self, ext: Extension, nvcc: str | None, why_no_cuda: str) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target, folder, nvcc, why_no_cuda))
        try:
            subprocess.run([find_ninja(), "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # The extension is optional: on this error setuptools warns and installs the rest.
            raise CompileError(f"mlfast: csrc/ was not compiled: {error}") from error


def find_ninja() -> str:
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_file(target: Path, folder: Path, nvcc: str | None, why_no_cuda: str) -> str:
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if cxx is None:
        raise CompileError("mlfast: no C++ compiler found (g++, clang++ or $CXX)")
    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    link = f"{cxx} -shared -fopenmp" if sys.platform.startswith("linux") else f"{cxx} -bundle -undefined dynamic_lookup"
    rules = []
    if nvcc:
        archs, arch_flags = cuda_arch_flags(nvcc)
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        defines = ["-DMLFAST_CUDA", define("MLFAST_CUDA_ARCHS", archs)]
        link = f"{quote(nvcc)} -ccbin {cxx} -shared -cudart static -Xcompiler -fopenmp"
        # Float division to 2 ulp and subnormal floats as 0: otherwise every reciprocal and exponential is scaled twice,
        # which is a quarter of a loss's instructions. No formula relies on subnormal numbers.
        flags = f"-std=c++17 -O3 -prec-div=false -ftz=true -Xcompiler -fPIC {' '.join(arch_flags)}"
        rules.append(ninja_rule("cuda", f"{quote(nvcc)} -ccbin {cxx} {flags}"))
    else:
        defines = [define("MLFAST_WHY_NO_CUDA", why_no_cuda)]
    rules.append(ninja_rule("cxx", " ".join([cxx, *cxx_flags(), "$defines"])))
    link += f" -o $out $in {os.environ.get('LDFLAGS', '')}"
    rules.append(f"rule link\n  command = {link}\n  description = link $out\n")
    objects = [folder / source.relative_to(ROOT).with_suffix(source.suffix + ".o") for source in sources]
    builds = [
        f"build {escape(obj)}: {'cuda' if source.suffix == '.cu' else 'cxx'} {escape(source)}"
        for source, obj in zip(sources, objects, strict=True)
    ]
    builds.insert(1, f"  defines = {' '.join(defines)}")  # only the bindings know whether there is CUDA
    builds.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    return "\n".join([*rules, *builds, ""])


def ninja_rule(name: str, command: str) -> str:
    """Compiles one source, and records the headers it includes."""
    return (
        f"rule {name}\n  command = {command} -MD -MF $out.d -c $in -o $out\n"
        f"  depfile = $out.d\n  deps = gcc\n  description = {name} $in\n"
    )


def define(name: str, text: str) -> str:
    """A string macro, as an argument of a command."""
    return quote(f"-D{name}={json.dumps(text)}")


def quote(argument: str) -> str:
    """An argument of a command, quoted for the shell and for ninja."""
    return shlex.quote(argument).replace("$", "$$")


def escape(path: Path) -> str:
    """A path in a list of ninja's."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


native = os.environ.get("MLFAST_NATIVE", "")
if native not in ("", "0", "1"):
    raise SystemExit(f"MLFAST_NATIVE must be 0, 1 or unset, got {native!r}")
insists = "1" in (native, os.environ.get("MLFAST_CUDA"))
setup(
    ext_modules=[] if native == "0" else [Extension("mlfast._native", sources=[], optional=not insists)],
    cmdclass={"build_ext": NinjaBuild},
)
