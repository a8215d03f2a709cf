"""The CUDA source of aam_loss, built by g++ against tests/cuda_shim and run on the CPU, against a float64 formula.

It executes what a GPU would: indexing, vector and scalar accesses, shuffles, barriers and the ticket, with blocks and
threads in several orders. Intrinsics and the memory model are not covered: the kernels were not tested on a GPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GAMMAS = ((0.0, 0.0), (0.0, 1.0), (2.0, 7.0), (0.5, 1.5))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    path = tmp_path_factory.mktemp("cuda_shim") / "aam_loss.so"
    # An access of 16 bytes that is not aligned, which a GPU refuses, is reported and aborts.
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
    shim = ROOT / "tests" / "cuda_shim"
    subprocess.run([compiler, *flags, f"-I{shim}", str(shim / "aam_loss.cpp"), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.shim_aam_loss.restype = loaded.shim_scale_grad.restype = ctypes.c_char_p
    loaded.shim_workspace_bytes.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def workspace(library):
    return torch.zeros(library.shim_workspace_bytes(), dtype=torch.uint8)


def address(tensor):
    return ctypes.c_uint64(0 if tensor is None else tensor.data_ptr())


@pytest.fixture
def run(library, workspace):
    """Launches the kernel; the ticket must be back at 0 after it."""

    def launch(cos, target, class_weight, loss, grad, inv_known, options):
        *numbers, elementwise = options
        error = library.shim_aam_loss(
            address(cos),
            CODES[cos.dtype],
            address(target),
            CODES[target.dtype],
            *map(address, (class_weight, loss, grad, inv_known, workspace)),
            elementwise,
            ctypes.c_int64(cos.numel() // cos.shape[-1]),
            ctypes.c_int64(cos.shape[-1]),
            (ctypes.c_double * 8)(*numbers),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        assert (workspace[:16] == 0).all()

    library.shim_order(0)
    return launch


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("gammas", GAMMAS, ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.4])
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_every_variant(run, judge, random_problem, Options, dtype, target_dtype, gammas, margin, shift):
    cos, target = random_problem(3, 701, dtype, target_dtype, soft=target_dtype.is_floating_point)
    options = Options(margin=margin, gamma_pos=gammas[0], gamma_neg=gammas[1], prob_shift=shift)
    judge(run, cos, target, options, class_weight=torch.rand(701) + 0.5, mean=True)


@pytest.mark.parametrize("target_dtype", CODES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_types(run, judge, random_problem, Options, target_dtype, smoothing):
    for dtype in (torch.float32, torch.bfloat16):
        cos, target = random_problem(5, 81, dtype, target_dtype)
        judge(run, cos, target, Options(label_smoothing=smoothing, gamma_pos=1.0, gamma_neg=4.0))


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 7), (8, 256), (41, 125), (3, 2731)])
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sizes(run, judge, random_problem, Options, rows, classes, elementwise, dtype):
    cos, target = random_problem(rows, classes, dtype, torch.int8)
    options = Options(elementwise=elementwise)
    judge(run, cos, target, options, class_weight=torch.rand(classes), mean=not elementwise)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float64], ids=str)
def test_misaligned_tensors(run, judge, random_problem, Options, offset, dtype, target_dtype):
    cos, target = (t.flatten()[offset:].view(1, -1) for t in random_problem(1, 3001 + offset, dtype, target_dtype))
    judge(run, cos, target, Options(elementwise=True), offset=offset)
    judge(run, cos, target, Options(), offset=16)


def test_more_elements_than_the_grid_covers_at_once(run, judge, random_problem, Options):
    cos, target = random_problem(1100, 256 * 4 + 3, torch.float32, torch.int8)  # 1103 tiles for at most 1024 blocks
    judge(run, cos, target, Options(), class_weight=torch.rand(cos.shape[1]), mean=True)


def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(library, run, judge, random_problem, Options):
    cos, target = random_problem(9, 1001, torch.float32, torch.int8)  # 9 blocks
    first = judge(run, cos, target, Options(gamma_neg=2.0), mean=True)
    for order in range(1, 8):
        library.shim_order(order)
        again = judge(run, cos, target, Options(gamma_neg=2.0), mean=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_grad(run, judge, random_problem, Options):
    cos, target = random_problem(7, 601, torch.bfloat16, torch.int8)
    judge(run, cos, target, Options(), grad=False)


@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_all_unknown_and_no_elements(run, Options, target_dtype):
    for rows in (2, 0):
        cos, target = torch.rand(rows, 600), torch.full((rows, 600), -1, dtype=target_dtype)
        loss, grad, inv_known = torch.empty(()), torch.empty_like(cos), torch.empty(())
        run(cos, target, None, loss, grad, inv_known, Options())
        assert loss == 0
        assert inv_known == 1
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 1024, 2501])
@pytest.mark.parametrize("offset", [0, 1])
def test_scale_grad(library, dtype, n, offset):
    factor = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    buffer = torch.randn(n + 128).to(dtype)
    grad = buffer[64 + offset : 64 + offset + n]
    expected = buffer.clone()
    expected[64 + offset : 64 + offset + n] = (grad.to(factor.dtype) * factor).to(dtype)
    size = ctypes.c_int64(n)
    library.shim_scale_grad(address(grad), CODES[dtype], address(factor), CODES[factor.dtype], size)
    assert torch.equal(buffer, expected)


def test_scale_grad_by_one_touches_nothing(library):
    signalling = torch.full((2500,), 0x7F800001, dtype=torch.int32)  # a NaN that arithmetic makes quiet
    one = torch.ones(())
    library.shim_scale_grad(address(signalling), 0, address(one), 0, ctypes.c_int64(2500))
    assert (signalling == 0x7F800001).all()


def test_errors_become_exceptions(library, run, Options):
    cos, target, loss = torch.rand(1, 4), torch.ones(1, 4, dtype=torch.int8), torch.empty(())
    library.shim_fail_next_launch()
    with pytest.raises(RuntimeError, match="CUDA launch failed"):
        run(cos, target, None, loss, None, None, Options())
    with pytest.raises(RuntimeError, match="floating point"):
        run(target, target, None, loss, None, None, Options())
