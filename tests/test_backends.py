"""Which backend runs, and what a user is told when one is missing."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import mlfast
from mlfast.backends import BackendError, choose

ROOT = Path(__file__).resolve().parents[1]


def test_every_backend_is_listed_with_words():
    names = [b.name for b in mlfast.backends()]
    assert names == ["reference", "cpu", "triton", "cuda"]
    assert all(b.detail for b in mlfast.backends())
    assert str(mlfast.backends()).count("\n") == 3


def test_the_cpu_kernels_are_built_here():
    assert choose(torch.device("cpu")) == "cpu"


def test_threads_are_those_of_torch():
    from mlfast import _native

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _native.max_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_request_holds_inside_its_block_only():
    with mlfast.use_backend("reference"):
        assert choose(torch.device("cpu")) == "reference"
        with mlfast.use_backend("cpu"):
            assert choose(torch.device("cpu")) == "cpu"
        assert choose(torch.device("cpu")) == "reference"
    assert choose(torch.device("cpu")) == "cpu"


def test_a_device_without_kernels_takes_the_reference():
    assert choose(torch.device("meta")) == "reference"


def test_an_op_without_a_kernel_for_a_backend(monkeypatch):
    module = sys.modules["mlfast.backends"]  # mlfast.backends is the function
    monkeypatch.setitem(module._BUILT, "cuda", ("cuda", "triton"))
    assert choose(torch.device("cuda")) == "cuda"
    assert choose(torch.device("cuda"), ("cpu", "triton")) == "triton"
    assert choose(torch.device("cuda"), ("cpu",)) == "reference"
    monkeypatch.setattr(module, "_requested", "cuda")
    assert choose(torch.device("cuda")) == "cuda"
    with pytest.raises(BackendError, match=r"no CUDA C\+\+ kernel; ask for one of 'cpu', 'triton', 'reference'"):
        choose(torch.device("cuda"), ("cpu", "triton"))


def test_an_unknown_backend_is_named():
    with (
        pytest.raises(ValueError, match="expected one of reference, cpu, triton, cuda, got 'openvino'"),
        mlfast.use_backend("openvino"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the backend is available")
def test_a_missing_backend_raises_and_says_why():
    with pytest.raises(BackendError, match=r"'cuda' is not available here: .*(GPU|CUDA)"), mlfast.use_backend("cuda"):
        pass


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_environment_variable_chooses():
    code = "import torch; from mlfast.backends import choose; print(choose(torch.device('cpu')))"
    assert run_python(code, MLFAST_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, MLFAST_BACKEND="cpu").stdout.strip() == "cpu"
    failed = run_python(code, MLFAST_BACKEND="gpu")
    assert failed.returncode != 0
    assert "MLFAST_BACKEND: expected one of" in failed.stderr


def test_without_compiled_kernels_everything_runs_on_the_reference():
    code = (
        "import sys; sys.modules['mlfast._native'] = None\n"
        "import mlfast, torch\n"
        "print(mlfast.functional.aam_loss(torch.zeros(2, 3), torch.ones(2, 3)).item())\n"
        "print(mlfast.backends())"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "- cpu" in result.stdout
    assert "apt-get install g++" in result.stdout
    assert f"pip install --no-deps --editable {ROOT}" in result.stdout


@pytest.mark.parametrize(("capability", "runs"), [
    ((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 0), True),
])  # fmt: skip
def test_cuda_is_taken_on_the_gpus_that_it_was_built_for(monkeypatch, capability, runs):
    """Machine code for 80 and 90, and PTX of 90."""
    backends = sys.modules["mlfast.backends"]  # mlfast.backends is the function
    monkeypatch.setattr(backends, "_native", types.SimpleNamespace(cuda_archs="80;90"))
    monkeypatch.setitem(backends._BUILT, "cuda", ("cuda", "triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    backends._built_for.cache_clear()
    device = torch.device("cuda", 0)
    assert backends.choose(device) == ("cuda" if runs else "triton")
    assert backends._state("cuda")[0] == runs
    monkeypatch.setattr(backends, "_requested", "cuda")
    if not runs:
        with pytest.raises(BackendError, match=r"some GPU has 75.*MLFAST_CUDA_ARCHS"):
            backends.choose(device)
    backends._built_for.cache_clear()
