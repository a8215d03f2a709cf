"""The CUDA sources, compiled by nvcc for every target: no warning or spill waits for a GPU."""

import re
import subprocess

import pytest

from tests.kernels.compilers import CUDA_SOURCES, NVCC_FLAGS, cuda_archs, find_nvcc


@pytest.fixture(scope="session")
def nvcc():
    found = find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found: install the CUDA toolkit, or set NVCC or CUDA_HOME")
    return found


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_do_not_spill(nvcc, source, tmp_path):
    archs = cuda_archs(nvcc)
    assert archs, f"{nvcc} compiles for none of the targets"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = [nvcc, *NVCC_FLAGS, "--threads", "0", *codes, "-c", str(source), "-o", str(tmp_path / "out.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(spills) > len(archs), "ptxas reported nothing"
    assert set(spills) == {("0", "0")}, run.stderr
