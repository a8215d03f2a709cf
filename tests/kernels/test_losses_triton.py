"""The Triton kernels of the losses, interpreted on the CPU, against float64 formulas."""

import functools
import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton decorates the kernels
pytest.importorskip("triton", reason="triton is not installed")

from mlfast.kernels import elementwise_loss as frame

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def workspace():
    return torch.zeros(frame.WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)


@pytest.fixture
def run(workspace):
    """The launcher on tensors of the CPU, wherever the kernel runs; the ticket must be back at 0 after it."""

    def launch(case, *tensors_and_numbers):
        *tensors, numbers = tensors_and_numbers
        there = [t if t is None else t.to(DEVICE) for t in tensors]
        kernel = importlib.import_module(f"mlfast.kernels.{case.name}")
        getattr(kernel, case.name)(*there, workspace, numbers)
        for tensor, copy in zip(tensors, there, strict=True):
            if tensor is not None and tensor.data_ptr() != copy.data_ptr():
                tensor.copy_(copy)
        assert (workspace[:16] == 0).all()

    return launch


@pytest.fixture(name="judge")
def judge_fixture(judge):
    """Triton's interpreter cuts off where a GPU rounds to bfloat16: a whole unit in the last place may be missing."""
    return functools.partial(judge, ulps=0.5 if torch.cuda.is_available() else 1.0)


@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_every_variant(run, judge, random_problem, variant, target_dtype):
    loss, numbers = variant
    scores, target = random_problem(loss, 3, 701, torch.float32, target_dtype, soft=target_dtype.is_floating_point)
    judge(run, loss, scores, target, numbers, class_weight=torch.rand(701) + 0.5, mean=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int8, torch.bfloat16], ids=str)
def test_score_types(run, judge, random_problem, loss, dtype, target_dtype):
    scores, target = random_problem(loss, 3, 701, dtype, target_dtype, soft=target_dtype.is_floating_point)
    for closing in ({}, loss.closing):
        judge(run, loss, scores, target, loss.numbers(gamma_pos=0.5, gamma_neg=1.5, **closing))


@pytest.mark.parametrize(
    "target_dtype",
    [torch.int8, torch.int16, torch.int32, torch.int64, torch.float64, torch.float16, torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_types(run, judge, random_problem, one_loss, target_dtype, smoothing):
    scores, target = random_problem(one_loss, 5, 81, torch.float32, target_dtype)
    judge(run, one_loss, scores, target, one_loss.numbers(label_smoothing=smoothing, gamma_pos=1.0, gamma_neg=4.0))


def test_tiles_of_hard_and_of_soft_labels(run, judge, random_problem, loss):
    scores, target = random_problem(loss, 2, 1024, torch.float32, torch.float32)
    target[1, 700] = 0.3  # one of four tiles
    judge(run, loss, scores, target, loss.numbers(elementwise=True))


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 511), (32, 32), (41, 25), (3, 2731)])
@pytest.mark.parametrize("elementwise", [False, True])
def test_sizes(run, judge, random_problem, one_loss, rows, classes, elementwise):
    scores, target = random_problem(one_loss, rows, classes, torch.bfloat16, torch.int8)
    numbers = one_loss.numbers(elementwise=elementwise)
    judge(run, one_loss, scores, target, numbers, class_weight=torch.rand(classes), mean=not elementwise)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (37, 3), (5, 512), (3, 701)])
def test_sparse_targets(run, judge, sparse_problem, loss, rows, classes, index_dtype):
    scores, target = sparse_problem(loss, rows, classes, torch.float32)
    weight = torch.rand(classes) + 0.5
    for numbers in (loss.numbers(), loss.numbers(label_smoothing=0.1), loss.numbers(gamma_pos=0.5, elementwise=True)):
        mean = not numbers.elementwise
        judge(run, loss, scores, target, numbers, class_weight=weight, mean=mean, sparse=index_dtype)


@pytest.mark.parametrize("elementwise", [False, True])
def test_loss_is_the_same_without_grad(run, judge, random_problem, loss, elementwise):
    scores, target = random_problem(loss, 7, 601, torch.float32, torch.int8)
    numbers = loss.numbers(elementwise=elementwise)
    without, _, _ = judge(run, loss, scores, target, numbers, grad=False)
    with_grad, _, _ = judge(run, loss, scores, target, numbers)
    assert torch.equal(without, with_grad)


def test_more_tiles_than_programs(run, judge, random_problem, one_loss, monkeypatch):
    monkeypatch.setattr(frame, "MAX_PROGRAMS", 4)
    scores, target = random_problem(one_loss, 11, 1000, torch.float32, torch.int8)
    judge(run, one_loss, scores, target, one_loss.numbers(), class_weight=torch.rand(1000), mean=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_extreme_scores_stay_finite(run, variant, dtype):
    loss, numbers = variant
    ends = torch.tensor([-1.5, -1.0, -0.999, -1e-6, 0.0, 1e-6, 0.999, 1.0, 1.5]) * loss.extreme
    scores, target = (t.flatten() for t in torch.meshgrid(ends, torch.tensor([0.0, 1e-30, 0.5, 1.0]), indexing="ij"))
    scores = scores.to(dtype)
    value = torch.empty(scores.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad = torch.empty_like(scores)
    for targets in (target, (target > 0).to(torch.int8)):
        run(loss, scores, targets, None, None, value, grad, None, numbers._replace(elementwise=True, **loss.steep))
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert (value >= 0).all()


@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_nan_scores_show_unless_unknown(run, variant, target_dtype):
    loss, numbers = variant
    scores, target = torch.full((3,), float("nan")), torch.tensor([0, 1, -1]).to(target_dtype)
    value, grad = torch.zeros(3), torch.zeros(3)
    run(loss, scores, target, None, None, value, grad, None, numbers._replace(elementwise=True))
    assert value.isnan().tolist() == [True, True, False]
    assert grad.isnan().tolist() == [True, True, False]


def test_nan_targets_show(run, loss):
    value, grad = torch.zeros(3), torch.zeros(3)
    run(
        loss,
        torch.zeros(3),
        torch.full((3,), float("nan")),
        None,
        None,
        value,
        grad,
        None,
        loss.numbers(elementwise=True),
    )
    assert value.isnan().all()


def test_closed_negatives_are_exactly_zero(run, loss):
    scores, target = torch.full((5,), -0.9 * loss.spread), torch.zeros(5, dtype=torch.int8)
    value, grad = torch.empty(5), torch.empty(5)
    run(loss, scores, target, None, None, value, grad, None, loss.numbers(elementwise=True, **loss.closing))
    assert (value == 0).all()
    assert (grad == 0).all()


def test_all_unknown(run, one_loss):
    scores, target = torch.rand(2, 600), torch.full((2, 600), -1, dtype=torch.int8)
    value, grad, inv_known = torch.empty(()), torch.empty_like(scores), torch.empty(())
    run(one_loss, scores, target, None, None, value, grad, inv_known, one_loss.numbers())
    assert value == 0
    assert inv_known == 1
    assert (grad == 0).all()


def test_bit_equal_over_repeats(run, judge, random_problem, loss):
    scores, target = random_problem(loss, 9, 701, torch.float32, torch.int8)
    first = judge(run, loss, scores, target, loss.numbers(gamma_neg=2.0), mean=True)
    for _ in range(3):
        again = judge(run, loss, scores, target, loss.numbers(gamma_neg=2.0), mean=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 512, 1700])
def test_scale_grad(dtype, n):
    factor = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    buffer = torch.randn(n + 128).to(dtype)
    grad = buffer[64 : 64 + n].to(DEVICE)
    expected = buffer.clone()
    expected[64 : 64 + n] = (expected[64 : 64 + n].to(factor.dtype) * factor).to(dtype)
    frame.scale_grad(grad, factor.to(DEVICE))
    buffer[64 : 64 + n] = grad.cpu()
    truncated = dtype == torch.bfloat16 and DEVICE == "cpu"  # by Triton's interpreter
    torch.testing.assert_close(buffer, expected, rtol=torch.finfo(dtype).eps if truncated else 0, atol=0)


def test_scale_grad_by_one_touches_nothing():
    signalling = torch.full((2500,), 0x7F800001, dtype=torch.int32, device=DEVICE)  # a NaN that arithmetic makes quiet
    frame.scale_grad(signalling.view(torch.float32), torch.ones((), device=DEVICE))
    assert (signalling == 0x7F800001).all()
