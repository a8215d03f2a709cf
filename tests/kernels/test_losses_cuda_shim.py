"""The CUDA sources of the losses, built by g++ against tests/cuda_shim and run on the CPU, against float64 formulas.

It executes what a GPU would: indexing, vector and scalar accesses, shuffles, barriers and the ticket, with blocks and
threads in several orders. Intrinsics and the memory model are not covered: the kernels were not tested on a GPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mlfast.ops import _dtypes

ROOT = Path(__file__).parents[2]
# Kernels see uint8 and bool as int8.
CODES = {dtype: code for dtype, code in _dtypes.CODES.items() if dtype not in (torch.uint8, torch.bool)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LossTask(ctypes.Structure):
    """mlfast::LossTask."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("scores_type", ctypes.c_int),
        ("target", ctypes.c_void_p),
        ("target_type", ctypes.c_int),
        ("indptr", ctypes.c_void_p),
        ("class_weight", ctypes.c_void_p),
        ("label_smoothing", ctypes.c_double),
        ("loss", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("inv_known", ctypes.c_void_p),
        ("elementwise", ctypes.c_bool),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    path = tmp_path_factory.mktemp("cuda_shim") / "losses.so"
    # An access of 16 bytes that is not aligned, which a GPU refuses, is reported and aborts.
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
    shim = ROOT / "tests" / "cuda_shim"
    subprocess.run([compiler, *flags, f"-I{shim}", str(shim / "losses.cpp"), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    for function in (loaded.shim_aam_loss, loaded.shim_asymmetric_loss, loaded.shim_scale_grad):
        function.restype = ctypes.c_char_p
    loaded.shim_workspace_bytes.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def workspace(library):
    return torch.zeros(library.shim_workspace_bytes(), dtype=torch.uint8)


def address(tensor):
    return ctypes.c_uint64(tensor.data_ptr())


@pytest.fixture
def run(library, workspace):
    """Launches the kernel; the ticket must be back at 0 after it."""

    def launch(case, scores, target, indptr, class_weight, loss, grad, inv_known, numbers):
        classes = scores.shape[-1]
        task = LossTask(
            scores.numel() // classes,
            classes,
            scores.data_ptr(),
            CODES[scores.dtype],
            target.data_ptr(),
            CODES[target.dtype],
            None if indptr is None else indptr.data_ptr(),
            None if class_weight is None else class_weight.data_ptr(),
            numbers.label_smoothing,
            loss.data_ptr(),
            None if grad is None else grad.data_ptr(),
            None if inv_known is None else inv_known.data_ptr(),
            numbers.elementwise,
        )
        values = (ctypes.c_double * len(numbers))(*numbers)
        error = getattr(library, f"shim_{case.name}")(ctypes.byref(task), values, address(workspace))
        if error is not None:
            raise RuntimeError(error.decode())
        assert (workspace[:16] == 0).all()

    library.shim_order(0)
    return launch


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_every_variant(run, judge, random_problem, variant, dtype, target_dtype):
    loss, numbers = variant
    scores, target = random_problem(loss, 3, 701, dtype, target_dtype, soft=target_dtype.is_floating_point)
    judge(run, loss, scores, target, numbers, class_weight=torch.rand(701) + 0.5, mean=True)


@pytest.mark.parametrize("target_dtype", CODES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_types(run, judge, random_problem, loss, target_dtype, smoothing):
    for dtype in (torch.float32, torch.bfloat16):
        scores, target = random_problem(loss, 5, 81, dtype, target_dtype)
        judge(run, loss, scores, target, loss.numbers(label_smoothing=smoothing, gamma_pos=1.0, gamma_neg=4.0))


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 7), (8, 256), (41, 125), (3, 2731)])
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sizes(run, judge, random_problem, loss, rows, classes, elementwise, dtype):
    scores, target = random_problem(loss, rows, classes, dtype, torch.int8)
    numbers = loss.numbers(elementwise=elementwise)
    judge(run, loss, scores, target, numbers, class_weight=torch.rand(classes), mean=not elementwise)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float64], ids=str)
def test_misaligned_tensors(run, judge, random_problem, one_loss, offset, dtype, target_dtype):
    whole = random_problem(one_loss, 1, 3001 + offset, dtype, target_dtype)
    scores, target = (t.flatten()[offset:].view(1, -1) for t in whole)
    judge(run, one_loss, scores, target, one_loss.numbers(elementwise=True), offset=offset)
    judge(run, one_loss, scores, target, one_loss.numbers(), offset=16)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (37, 3), (41, 125), (3, 2731)])
def test_sparse_targets(run, judge, sparse_problem, loss, rows, classes, dtype, index_dtype):
    scores, target = sparse_problem(loss, rows, classes, dtype)
    weight = torch.rand(classes) + 0.5
    for numbers in (loss.numbers(), loss.numbers(label_smoothing=0.1), loss.numbers(gamma_pos=0.5, elementwise=True)):
        mean = not numbers.elementwise
        judge(run, loss, scores, target, numbers, class_weight=weight, mean=mean, sparse=index_dtype)


def test_more_elements_than_the_grid_covers_at_once(run, judge, random_problem, one_loss):
    # 1103 tiles for at most 1024 blocks
    scores, target = random_problem(one_loss, 1100, 256 * 4 + 3, torch.float32, torch.int8)
    judge(run, one_loss, scores, target, one_loss.numbers(), class_weight=torch.rand(scores.shape[1]), mean=True)


def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(library, run, judge, random_problem, loss):
    scores, target = random_problem(loss, 9, 1001, torch.float32, torch.int8)  # 9 blocks
    first = judge(run, loss, scores, target, loss.numbers(gamma_neg=2.0), mean=True)
    for order in range(1, 8):
        library.shim_order(order)
        again = judge(run, loss, scores, target, loss.numbers(gamma_neg=2.0), mean=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_grad(run, judge, random_problem, loss):
    scores, target = random_problem(loss, 7, 601, torch.bfloat16, torch.int8)
    judge(run, loss, scores, target, loss.numbers(), grad=False)


@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_all_unknown_and_no_elements(run, one_loss, target_dtype):
    for rows in (2, 0):
        scores, target = torch.rand(rows, 600), torch.full((rows, 600), -1, dtype=target_dtype)
        value, grad, inv_known = torch.empty(()), torch.empty_like(scores), torch.empty(())
        run(one_loss, scores, target, None, None, value, grad, inv_known, one_loss.numbers())
        assert value == 0
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


def test_errors_become_exceptions(library, run, loss):
    scores, target, value = torch.rand(1, 4), torch.ones(1, 4, dtype=torch.int8), torch.empty(())
    library.shim_fail_next_launch()
    with pytest.raises(RuntimeError, match="CUDA launch failed"):
        run(loss, scores, target, None, None, value, None, None, loss.numbers())
    with pytest.raises(RuntimeError, match="floating point"):
        run(loss, target, target, None, None, value, None, None, loss.numbers())
