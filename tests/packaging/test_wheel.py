"""A wheel works outside the checkout; so does an install without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# An editable install of the checkout would supply what a wheel lacks, so its finder goes first.
CHECK = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import mlfast, torch
from mlfast.ops.aam_loss import reference
cos = torch.linspace(-1, 1, 12, requires_grad=True)
loss = mlfast.AAMLoss()(cos, cos > 0)
loss.backward()
print(mlfast.__file__, mlfast.kernels.__name__ if hasattr(mlfast, "kernels") else "", round(loss.item(), 6))
print(mlfast.backends())
"""


def copy_source(folder: Path) -> Path:
    """A copy, so that nothing of the checkout's own build is reused."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "runs", "__pycache__")
    return shutil.copytree(ROOT, folder / "source", ignore=ignored)


@pytest.fixture(scope="module")
def compiled_source(tmp_path_factory):
    """A copy that whoever builds it first has compiled for all."""
    return copy_source(tmp_path_factory.mktemp("compiled"))


def build_wheel(tmp_path: Path, source: Path | None = None, **environment: str) -> Path:
    """Builds from a copy of the source; the build sees no torch."""
    pytest.importorskip("pybind11")
    source = source or copy_source(tmp_path)
    (tmp_path / "no_torch" / "torch").mkdir(parents=True)
    (tmp_path / "no_torch" / "torch" / "__init__.py").write_text("raise ImportError('the build must not need torch')")
    variables = os.environ | {"MLFAST_CUDA": "0", "PYTHONPATH": str(tmp_path / "no_torch")} | environment
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(command, check=True, env=variables, capture_output=True)
    return next(tmp_path.glob("*.whl"))


def run_installed(wheel: Path, tmp_path: Path) -> str:
    """Unpacks a wheel beside the installed torch, and runs CHECK from a folder that is not the checkout."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    variables = os.environ | {"PYTHONPATH": str(site)}
    variables.pop("MLFAST_BACKEND", None)
    result = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout
    return result.stdout


def test_wheel_outside_the_checkout(tmp_path, compiled_source):
    wheel = build_wheel(tmp_path, compiled_source)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("mlfast/_native") for name in names)
    assert "mlfast/kernels/aam_loss.py" in names
    assert "mlfast/recipes/coco-effnetv2s-mld.yaml" in names
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"mlfast"}
    assert "+ cpu" in run_installed(wheel, tmp_path)


def test_without_a_compiler_the_install_still_works(tmp_path):
    wheel = build_wheel(tmp_path, CXX="no-such-compiler")
    output = run_installed(wheel, tmp_path)
    assert "- cpu" in output
    assert "Install a C++ compiler" in output


def test_a_broken_cuda_compiler_leaves_the_kernels_for_the_cpu(tmp_path, compiled_source):
    folder = tmp_path / "a compiler's $folder"
    folder.mkdir()
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    output = run_installed(build_wheel(tmp_path, compiled_source, MLFAST_CUDA="", NVCC=str(nvcc)), tmp_path)
    assert "+ cpu" in output
    assert f"because {nvcc} failed" in output


def test_insisting_on_cuda_fails_without_its_compiler(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_wheel(tmp_path, MLFAST_CUDA="1", NVCC="no-such-nvcc")
    assert b"no-such-nvcc" in failure.value.output + failure.value.stderr


def test_insisting_on_the_compiled_module_fails_without_a_compiler(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_wheel(tmp_path, CXX="no-such-compiler", MLFAST_NATIVE="1")
    assert b"no-such-compiler" in failure.value.output + failure.value.stderr
