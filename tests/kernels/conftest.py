"""The judge of the aam_loss kernels for GPUs: a float64 formula of its own, guard bands, and the bounds on errors."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

GUARD = 64  # elements on either side of every output
GUARD_VALUE = 7.0


class Options(NamedTuple):
    """What the kernels' launchers expect, with the defaults of most tests."""

    scale: float = 23.0
    margin: float = 0.0
    weight_pos: float = 0.7
    weight_neg: float = 0.3
    gamma_pos: float = 0.0
    gamma_neg: float = 1.0
    prob_shift: float = 0.0
    label_smoothing: float = 0.0
    elementwise: bool = False


def formula(cos: Tensor, target: Tensor, class_weight: Tensor | None, o: Options, dtype: torch.dtype):
    """Loss per element and its gradient, in plain PyTorch and autograd, in ``dtype``."""
    c = cos.detach().to(dtype).requires_grad_()
    unknown = target < 0
    y = target.to(dtype) if target.is_floating_point() else (target > 0).to(dtype)
    y = torch.where(y == 0, o.label_smoothing, y * (1 - o.label_smoothing))
    y = torch.where(unknown, 0.0, y)
    u, v = o.scale * (c - o.margin), -o.scale * (c + o.margin)
    p_plus, q, log_q = u.sigmoid(), v.sigmoid(), logsigmoid(v)
    if o.prob_shift > 0:
        q = (q + o.prob_shift).clamp(max=1)
        log_q = q.log()
    base = torch.where(y == 1, q, torch.where(y == 0, p_plus, q * y + p_plus * (1 - y)))
    focus = base ** (o.gamma_pos * y + o.gamma_neg * (1 - y))
    loss = -focus * (o.weight_pos * y * logsigmoid(u) + o.weight_neg * (1 - y) * log_q) / o.scale
    if class_weight is not None:
        loss = loss * class_weight.to(dtype)
    loss = torch.where(unknown, 0.0, loss)
    (grad,) = torch.autograd.grad(loss.sum(), c)
    return loss.detach(), grad


def guarded(shape, dtype, offset=0):
    """A tensor of NaN in the midst of a guard band, and the whole buffer. The offset is a misalignment in elements."""
    n = torch.Size(shape).numel()
    buffer = torch.full((n + 2 * GUARD,), GUARD_VALUE, dtype=dtype)
    inner = buffer[GUARD + offset : GUARD + offset + n]
    inner.fill_(float("nan"))
    return inner.view(shape), buffer


def assert_guards(buffer: Tensor, n: int, offset: int = 0) -> None:
    """Nothing was written beyond the tensor."""
    assert (buffer[: GUARD + offset] == GUARD_VALUE).all()
    assert (buffer[GUARD + offset + n :] == GUARD_VALUE).all()


def assert_close(actual: Tensor, truth: Tensor, eager: Tensor, stored: torch.dtype, ulps: float) -> None:
    """The error is at most twice that of plain PyTorch, plus a floor, plus ``ulps`` of the type it is stored in."""
    floor = 1e-13 if eager.dtype == torch.float64 else 2e-6
    bound = 2 * (eager.double() - truth).abs().max() + floor * truth.abs().max()
    if stored != eager.dtype:
        bound = bound + ulps * torch.finfo(stored).eps * truth.abs() + torch.finfo(stored).tiny
    error = (actual.double() - truth).abs()
    assert (error <= bound).all(), f"error {error.max()}, plain PyTorch has {(eager.double() - truth).abs().max()}"


def judge(run, cos, target, options, class_weight=None, mean=False, grad=True, offset=0, ulps=0.5):
    """Runs a kernel on guarded, poisoned outputs, compares all it wrote with float64, and returns it.

    ``run(cos, target, class_weight, loss, grad, inv_known, options)`` is the kernel under test.
    """
    computing = torch.float64 if cos.dtype == torch.float64 else torch.float32
    loss, loss_buffer = guarded(cos.shape if options.elementwise else (), computing, offset)
    slope, slope_buffer = guarded(cos.shape, cos.dtype, offset) if grad else (None, None)
    inv_known, inv_buffer = guarded((), computing) if mean else (None, None)
    class_weight = None if class_weight is None else class_weight.to(computing)
    run(cos, target, class_weight, loss, slope, inv_known, options)

    truth, truth_grad = formula(cos, target, class_weight, options, torch.float64)
    eager, eager_grad = formula(cos, target, class_weight, options, computing)
    assert_guards(loss_buffer, loss.numel(), offset)
    if options.elementwise:
        assert_close(loss, truth, eager, computing, ulps)
    else:
        factor = 1 / max(int((~(target < 0)).sum()), 1) if mean else 1.0
        assert_close(loss, truth.sum() * factor, eager.sum() * factor, computing, ulps)
    if mean:
        assert_guards(inv_buffer, 1)
        torch.testing.assert_close(inv_known.double(), torch.tensor(factor).double(), rtol=1e-7, atol=0)
    if grad:
        assert_guards(slope_buffer, slope.numel(), offset)
        assert_close(slope, truth_grad, eager_grad, cos.dtype, ulps)
    return loss, slope, inv_known


def random_problem(rows, classes, dtype, target_dtype, soft=False):
    """Scores in [-1, 1] and targets of which a third are unknown; soft ones lie anywhere in [0, 1] in between."""
    generator = torch.Generator().manual_seed(rows * 1000003 + classes)
    cos = (torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)
    target = torch.randint(-1, 2, (rows, classes), generator=generator).double()
    if soft:
        blend = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
        target = torch.where((target == 1) & (blend < 0.8), blend, target)
    return cos, target.to(target_dtype)


@pytest.fixture(name="Options")
def options_fixture():
    return Options


@pytest.fixture(name="judge")
def judge_fixture():
    return judge


@pytest.fixture(name="random_problem")
def random_problem_fixture():
    return random_problem
