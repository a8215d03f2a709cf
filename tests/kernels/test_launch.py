"""launch_kernel finds a compiled kernel again by what Triton compiles it for: never one for other arguments."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from mlfast.kernels.launch import cdiv, next_power_of_2
from tests.kernels.compilers import ROOT

# In a process of its own, since this one may interpret Triton. The driver takes every launch and does nothing: what it
# is given shows which compiled kernel would run, and with what.
LAUNCHES = """
import itertools, json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import triton.language as tl

launched = []

class Driver:
    def __init__(self):
        self.utils = self
    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            plain = [a.data_ptr() if torch.is_tensor(a) else a for a in arguments]
            launched.append((id(source), (x, y, z), plain))
        return launch
    def load_binary(self, *unused):
        return 1, 1, 32, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self):
        return torch.device("cpu")

driver.set_active(Driver())
from mlfast.kernels import launch
from mlfast.kernels.launch import launch_kernel

@triton.jit(do_not_specialize=["n"])
def kernel(x, y, out, n: tl.int32, stride: tl.int64, factor: tl.float64, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    if y is not None:
        value += tl.load(y + at, mask=at < n)
    if FLAG:
        value *= factor
    tl.store(out + at, value, mask=at < n)

memory = torch.zeros(64)
choices = dict(
    x=[memory, memory[1:], memory.double()],
    y=[None, memory, memory[2:]],
    out=[memory],
    n=[1, 16, 17],
    stride=[1, 16, 17, 48],
    factor=[1.0, 0.5, 16.0],
    flag=[True, False],
    BLOCK=[32, 64],
)
differ = []
cases = list(itertools.product(*choices.values()))
for order in (cases, cases[::-1]):
    for x, y, out, n, stride, factor, flag, block in order:
        kernel[(3, 2)](x, y, out, n, stride, factor, flag, BLOCK=block, num_warps=1)
        launch_kernel(kernel, (3, 2), (x, y, out), (n, stride, factor, flag), BLOCK=block, num_warps=1)
        theirs, ours = launched[-2:]
        if theirs != ours:
            differ.append(str((theirs, ours)))
kernels = {found for found, _, _ in launched}
found = {"launches": len(launched), "kernels": len(kernels), "differ": differ[:3]}
launch._compiled.clear()
for n in range(1000, 1100):
    launch_kernel(kernel, (3, 2), (memory, None, memory), (n, 1, 0.5, True), BLOCK=32, num_warps=1)
found["remembered_for_sizes"] = len(launch._compiled)
launch.MOST_REMEMBERED = 10
for stride in range(1000, 1100):
    launch_kernel(kernel, (3, 2), (memory, None, memory), (16, stride, 0.5, True), BLOCK=32, num_warps=1)
print(json.dumps(found | {"remembered": len(launch._compiled)}))
"""


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    (folder / "launches.py").write_text(LAUNCHES)
    command = [sys.executable, "launches.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_kernel_and_its_arguments_are_those_of_triton(launches):
    assert launches["launches"] == 2 * 2 * 3 * 3 * 3 * 4 * 3 * 2 * 2  # two ways, in two orders, of all combinations
    assert launches["differ"] == []


def test_there_is_a_kernel_for_each_thing_that_triton_compiles_for(launches):
    """Of x three, of y three, of the stride three (1, multiples of 16, others), of each constant two."""
    assert launches["kernels"] == 3 * 3 * 3 * 2 * 2


def test_numbers_that_never_come_again_do_not_fill_the_memory(launches):
    assert launches["remembered_for_sizes"] == 1  # no code depends on n
    assert 0 < launches["remembered"] <= 10


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (2**33, 4, 2**31)])
def test_cdiv(a, b, expected):
    assert cdiv(a, b) == expected


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (2**20 + 1, 2**21)])
def test_next_power_of_2(n, expected):
    assert next_power_of_2(n) == expected
