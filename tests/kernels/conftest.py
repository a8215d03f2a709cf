"""The judge of the losses' kernels for GPUs: float64 formulas, guard bands, bounds on errors. And Triton's compiler."""

import functools
import itertools
import json
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlfast import SparseTargets
from mlfast.ops import aam_loss, asymmetric_loss
from tests.kernels import compilers

GUARD = 64  # elements on either side of every output
GUARD_VALUE = 7.0
GAMMAS = ((0.0, 0.0), (0.0, 1.0), (2.0, 7.0), (0.5, 1.5))


class Loss(NamedTuple):
    """What the tests know of a loss: ``formula(scores, y, numbers)``, and the numbers that reach every variant."""

    name: str
    formula: Callable[[Tensor, Tensor, Any], Tensor]
    defaults: Any
    spread: float  # scores lie in [-spread, spread]
    extreme: float  # the largest ones that must not overflow
    steep: dict[str, float]  # the numbers with which that is hardest
    closing: dict[str, float]  # what gives easy negatives exactly zero loss
    variants: list[dict[str, Any]]

    def numbers(self, **changes: Any) -> Any:
        return self.defaults._replace(**changes)


def variants(**choices: tuple) -> list[dict[str, Any]]:
    """Every combination of gammas and of these choices."""
    combinations = itertools.product(GAMMAS, *choices.values())
    return [
        dict(zip(("gamma_pos", "gamma_neg", *choices), (*gammas, *chosen), strict=True))
        for gammas, *chosen in combinations
    ]


def focused(y: Tensor, base_pos: Tensor, base_neg: Tensor, o: Any) -> Tensor:
    """The focusing weight."""
    base = torch.where(y == 1, base_pos, torch.where(y == 0, base_neg, base_pos * y + base_neg * (1 - y)))
    return base ** (o.gamma_pos * y + o.gamma_neg * (1 - y))


def aam(cos: Tensor, y: Tensor, o: Any) -> Tensor:
    u, v = o.scale * (cos - o.margin), -o.scale * (cos + o.margin)
    q, log_q = v.sigmoid(), logsigmoid(v)
    if o.prob_shift > 0:
        q = (q + o.prob_shift).clamp(max=1)
        log_q = q.log()
    terms = o.weight_pos * y * logsigmoid(u) + o.weight_neg * (1 - y) * log_q
    return -focused(y, q, u.sigmoid(), o) * terms / o.scale


def asl(logit: Tensor, y: Tensor, o: Any) -> Tensor:
    log_q = (logit.neg().sigmoid() + o.clip).clamp(max=1).log() if o.clip > 0 else logsigmoid(-logit)
    focus = focused(y, logit.neg().sigmoid(), (logit.sigmoid() - o.clip).clamp(min=1e-37), o)
    terms = o.weight_pos * y * logsigmoid(logit) + o.weight_neg * (1 - y) * log_q
    return -(focus.detach() if o.detach_focus else focus) * terms


AAM_DEFAULTS = aam_loss.KernelNumbers(
    scale=23.0,
    margin=0.0,
    weight_pos=0.7,
    weight_neg=0.3,
    gamma_pos=0.0,
    gamma_neg=1.0,
    prob_shift=0.0,
    label_smoothing=0.0,
    elementwise=False,
)
ASL_DEFAULTS = asymmetric_loss.KernelNumbers(
    weight_pos=1.0,
    weight_neg=0.5,
    gamma_pos=0.0,
    gamma_neg=4.0,
    clip=0.05,
    label_smoothing=0.0,
    detach_focus=False,
    elementwise=False,
)
AAM = Loss(
    "aam_loss",
    aam,
    AAM_DEFAULTS,
    spread=1.0,
    extreme=1.0,
    steep=dict(scale=100.0),
    closing=dict(prob_shift=0.05),
    variants=variants(margin=(0.0, 0.4), prob_shift=(0.0, 0.05)),
)
ASL = Loss(
    "asymmetric_loss",
    asl,
    ASL_DEFAULTS,
    spread=6.0,
    extreme=1e4,
    steep={},
    closing=dict(clip=0.05),
    variants=variants(clip=(0.0, 0.05), detach_focus=(False, True)),
)
LOSSES = (AAM, ASL)


def loss_and_grad(loss: Loss, scores: Tensor, target: Tensor, class_weight: Tensor | None, o: Any, dtype: torch.dtype):
    """Loss per element and its gradient, in plain PyTorch and autograd, in ``dtype``."""
    x = scores.detach().to(dtype).requires_grad_()
    unknown = target < 0
    y = target.to(dtype) if target.is_floating_point() else (target > 0).to(dtype)
    y = torch.where(y == 0, o.label_smoothing, y * (1 - o.label_smoothing))
    y = torch.where(unknown, 0.0, y)
    values = loss.formula(x, y, o)
    if class_weight is not None:
        values = values * class_weight.to(dtype)
    values = torch.where(unknown, 0.0, values)
    (grad,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), grad


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


def judge(
    run, case, scores, target, numbers, class_weight=None, mean=False, grad=True, offset=0, ulps=0.5, sparse=None
):
    """Runs a kernel on guarded, poisoned outputs, compares all it wrote with float64, and returns it.

    ``run(case, scores, target, indptr, class_weight, loss, grad, inv_known, numbers)`` runs the kernel of the loss
    ``case``. Where ``sparse`` names a type of indices, the kernel gets the positives of the target as CSR.
    """
    computing = torch.float64 if scores.dtype == torch.float64 else torch.float32
    loss, loss_buffer = guarded(scores.shape if numbers.elementwise else (), computing, offset)
    slope, slope_buffer = guarded(scores.shape, scores.dtype, offset) if grad else (None, None)
    inv_known, inv_buffer = guarded((), computing) if mean else (None, None)
    class_weight = None if class_weight is None else class_weight.to(computing)
    labels, indptr = target, None
    if sparse is not None:
        csr = SparseTargets.from_dense(target)
        labels, indptr = csr.indices.to(sparse), csr.indptr
    run(case, scores, labels, indptr, class_weight, loss, slope, inv_known, numbers)

    truth, truth_grad = loss_and_grad(case, scores, target, class_weight, numbers, torch.float64)
    eager, eager_grad = loss_and_grad(case, scores, target, class_weight, numbers, computing)
    assert_guards(loss_buffer, loss.numel(), offset)
    if numbers.elementwise:
        assert_close(loss, truth, eager, computing, ulps)
    else:
        factor = 1 / max(int((~(target < 0)).sum()), 1) if mean else 1.0
        assert_close(loss, truth.sum() * factor, eager.sum() * factor, computing, ulps)
    if mean:
        assert_guards(inv_buffer, 1)
        torch.testing.assert_close(inv_known.double(), torch.tensor(factor).double(), rtol=1e-7, atol=0)
    if grad:
        assert_guards(slope_buffer, slope.numel(), offset)
        assert_close(slope, truth_grad, eager_grad, scores.dtype, ulps)
    return loss, slope, inv_known


def sparse_problem(case, rows, classes, dtype, share=0.1):
    """Random scores and labels, all known: rows without and with all positives are among them."""
    scores, _ = random_problem(case, rows, classes, dtype, torch.int8)
    target = (torch.rand(rows, classes, generator=torch.Generator().manual_seed(classes)) < share).to(torch.int8)
    target[rows // 2], target[rows // 3] = 0, 1
    return scores, target


def random_problem(case, rows, classes, dtype, target_dtype, soft=False):
    """Random scores, and targets of which a third are unknown; soft ones lie anywhere in [0, 1] in between."""
    generator = torch.Generator().manual_seed(rows * 1000003 + classes)
    scores = (torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 2 - 1) * case.spread
    target = torch.randint(-1, 2, (rows, classes), generator=generator).double()
    if soft:
        blend = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
        target = torch.where((target == 1) & (blend < 0.8), blend, target)
    return scores.to(dtype), target.to(target_dtype)


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.name)
def loss(request):
    """Each loss in turn."""
    return request.param


@pytest.fixture
def one_loss():
    """For what the frame of the losses does, whatever the formula."""
    return AAM


@pytest.fixture(
    params=[
        pytest.param((case, v), id=f"{case.name}-{'-'.join(map(str, v.values()))}")
        for case in LOSSES
        for v in case.variants
    ]
)
def variant(request):
    """A loss, and numbers with which it takes one of its variants."""
    case, changes = request.param
    return case, case.numbers(**changes)


@pytest.fixture(name="judge")
def judge_fixture():
    return judge


@pytest.fixture(name="sparse_problem")
def sparse_problem_fixture():
    return sparse_problem


@pytest.fixture(name="random_problem")
def random_problem_fixture():
    return random_problem


@pytest.fixture(scope="session")
def compile_triton(tmp_path_factory):
    """Compiles jobs for a target; AMD's compiler may be absent from a build of Triton."""
    pytest.importorskip("triton", reason="triton is not installed")
    folder = tmp_path_factory.mktemp("triton")

    @functools.cache
    def compiled(jobs: str, target: tuple):
        try:
            return compilers.compile_ahead(json.loads(jobs), target, folder)
        except subprocess.CalledProcessError as error:
            if target[0] == "hip" and compilers.NO_COMPILER in error.stderr:
                pytest.skip("this build of Triton has no compiler for AMD GPUs")
            pytest.fail(error.stderr)

    return lambda jobs, target: compiled(json.dumps(jobs), target)
