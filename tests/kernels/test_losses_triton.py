"""The Triton kernels of aam_loss, interpreted on the CPU, against a float64 formula."""

import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton decorates the kernels
pytest.importorskip("triton", reason="triton is not installed")

from mlfast.kernels import aam_loss as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GAMMAS = ((0.0, 0.0), (0.0, 1.0), (2.0, 7.0), (0.5, 1.5))


@pytest.fixture
def workspace():
    return torch.zeros(kernel.WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)


@pytest.fixture
def run(workspace):
    """The launcher on tensors of the CPU, wherever the kernel runs; the ticket must be back at 0 after it."""

    def launch(*tensors_and_options):
        *tensors, options = tensors_and_options
        there = [t if t is None else t.to(DEVICE) for t in tensors]
        kernel.aam_loss(*there, workspace, options)
        for tensor, copy in zip(tensors, there, strict=True):
            if tensor is not None and tensor.data_ptr() != copy.data_ptr():
                tensor.copy_(copy)
        assert (workspace[:16] == 0).all()

    return launch


@pytest.fixture(name="judge")
def judge_fixture(judge):
    """Triton's interpreter cuts off where a GPU rounds to bfloat16: a whole unit in the last place may be missing."""
    return functools.partial(judge, ulps=0.5 if torch.cuda.is_available() else 1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("gammas", GAMMAS, ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.4])
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_every_variant(run, judge, random_problem, Options, dtype, target_dtype, gammas, margin, shift):
    cos, target = random_problem(3, 701, dtype, target_dtype, soft=target_dtype.is_floating_point)
    options = Options(margin=margin, gamma_pos=gammas[0], gamma_neg=gammas[1], prob_shift=shift)
    judge(run, cos, target, options, class_weight=torch.rand(701) + 0.5, mean=True)


@pytest.mark.parametrize(
    "target_dtype",
    [torch.int8, torch.int16, torch.int32, torch.int64, torch.float64, torch.float16, torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_types(run, judge, random_problem, Options, target_dtype, smoothing):
    cos, target = random_problem(5, 81, torch.float32, target_dtype)
    judge(run, cos, target, Options(label_smoothing=smoothing, gamma_pos=1.0, gamma_neg=4.0))


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 511), (32, 32), (41, 25), (3, 2731)])
@pytest.mark.parametrize("elementwise", [False, True])
def test_sizes(run, judge, random_problem, Options, rows, classes, elementwise):
    cos, target = random_problem(rows, classes, torch.bfloat16, torch.int8)
    options = Options(elementwise=elementwise)
    judge(run, cos, target, options, class_weight=torch.rand(classes), mean=not elementwise)


@pytest.mark.parametrize("options", [{"elementwise": True}, {}], ids=str)
def test_loss_is_the_same_without_grad(run, judge, random_problem, Options, options):
    cos, target = random_problem(7, 601, torch.float32, torch.int8)
    without, _, _ = judge(run, cos, target, Options(**options), grad=False)
    with_grad, _, _ = judge(run, cos, target, Options(**options))
    assert torch.equal(without, with_grad)


def test_more_tiles_than_programs(run, judge, random_problem, Options, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_PROGRAMS", 4)
    cos, target = random_problem(11, 1000, torch.float32, torch.int8)
    judge(run, cos, target, Options(), class_weight=torch.rand(1000), mean=True)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_value", [0.0, 1e-30, 0.5, 1.0])
def test_extreme_scores_stay_finite(run, Options, scale, dtype, target_value):
    cos = torch.tensor([-1.5, -1.0, -0.999, -1e-6, 0.0, 1e-6, 0.999, 1.0, 1.5], dtype=dtype)
    for gammas in GAMMAS:
        for shift in (0.0, 0.05):
            options = Options(scale, 0.4, 0.7, 0.3, *gammas, shift, 0.0, True)
            loss = torch.empty(cos.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            grad = torch.empty_like(cos)
            run(cos, torch.full(cos.shape, target_value), None, loss, grad, None, options)
            assert loss.isfinite().all()
            assert grad.isfinite().all()
            assert (loss >= 0).all()


@pytest.mark.parametrize("shift", [0.0, 0.05])
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_nan_scores_show_unless_unknown(run, Options, shift, target_dtype):
    cos = torch.full((3,), float("nan"))
    target = torch.tensor([0, 1, -1]).to(target_dtype)
    for gammas in GAMMAS:
        options = Options(gamma_pos=gammas[0], gamma_neg=gammas[1], prob_shift=shift, elementwise=True)
        loss, grad = torch.zeros(3), torch.zeros(3)
        run(cos, target, None, loss, grad, None, options)
        assert loss.isnan().tolist() == [True, True, False]
        assert grad.isnan().tolist() == [True, True, False]


def test_closed_negatives_are_exactly_zero(run, Options):
    cos = torch.full((5,), -0.9)
    loss, grad = torch.empty(5), torch.empty(5)
    options = Options(prob_shift=0.05, elementwise=True)
    run(cos, torch.zeros(5, dtype=torch.int8), None, loss, grad, None, options)
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_all_unknown(run, Options):
    cos, target = torch.rand(2, 600), torch.full((2, 600), -1, dtype=torch.int8)
    loss, grad, inv_known = torch.empty(()), torch.empty_like(cos), torch.empty(())
    run(cos, target, None, loss, grad, inv_known, Options())
    assert loss == 0
    assert inv_known == 1
    assert (grad == 0).all()


def test_bit_equal_over_repeats(run, judge, random_problem, Options):
    cos, target = random_problem(9, 701, torch.float32, torch.int8)
    first = judge(run, cos, target, Options(gamma_neg=2.0), mean=True)
    for _ in range(3):
        again = judge(run, cos, target, Options(gamma_neg=2.0), mean=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 512, 1700])
def test_scale_grad(dtype, n):
    factor = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    buffer = torch.randn(n + 128).to(dtype)
    grad = buffer[64 : 64 + n].to(DEVICE)
    expected = buffer.clone()
    expected[64 : 64 + n] = (expected[64 : 64 + n].to(factor.dtype) * factor).to(dtype)
    kernel.scale_grad(grad, factor.to(DEVICE))
    buffer[64 : 64 + n] = grad.cpu()
    truncated = dtype == torch.bfloat16 and DEVICE == "cpu"  # by Triton's interpreter
    torch.testing.assert_close(buffer, expected, rtol=torch.finfo(dtype).eps if truncated else 0, atol=0)


def test_scale_grad_by_one_touches_nothing():
    signalling = torch.full((2500,), 0x7F800001, dtype=torch.int32, device=DEVICE)  # a NaN that arithmetic makes quiet
    kernel.scale_grad(signalling.view(torch.float32), torch.ones((), device=DEVICE))
    assert (signalling == 0x7F800001).all()
