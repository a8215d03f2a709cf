"""aam_loss: every backend against float64, by the policy of docs/correctness.md."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfast.functional import aam_loss
from mlfast.ops.aam_loss import Options, reference
from tests.ops.loss_cases import GAMMAS, example
from tests.ops.loss_cases import assert_as_good_as_pytorch as compare
from tests.ops.loss_cases import loss_and_grad as evaluate
from tests.ops.policy import FLOATS, assert_bit_equal, assert_written, guarded, over_threads

loss_and_grad = functools.partial(evaluate, aam_loss)
assert_as_good_as_pytorch = functools.partial(compare, aam_loss)

DEFAULTS = Options(23.0, 0.0, 0.7, 1.0, 0.0, 0.0, 0.0, "sum")


# ----------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["hard", "soft", torch.int8])
def test_formula(backend, device, dtype, kind):
    cos, target = example(7, 81, dtype, kind, device)
    for (gamma_neg, gamma_pos), margin, shift, scale in itertools.product(
        GAMMAS, (0.0, 0.35), (0.0, 0.05), (23.0, 100.0)
    ):
        assert_as_good_as_pytorch(
            cos, target, scale=scale, margin=margin, gamma_neg=gamma_neg, gamma_pos=gamma_pos, prob_shift=shift
        )


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, "hard", "soft"])
def test_targets_and_reductions(backend, device, reduction, kind):
    cos, target = example(5, 33, torch.float32, kind, device)
    weight = torch.linspace(0.1, 3, 33, device=device)
    assert_as_good_as_pytorch(cos, target, reduction=reduction)
    assert_as_good_as_pytorch(cos, target, reduction=reduction, class_weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float_target_types(backend, device, target_dtype):
    for kind in ("hard", "soft"):
        cos, target = example(5, 33, torch.float32, kind, device)
        assert_as_good_as_pytorch(cos, target.to(target_dtype))


COS = torch.tensor([[0.8, -0.3, 0.1, -0.9], [0.0, 0.5, -0.5, 0.2]], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]])
RELEASED = dict(scale=23.0, k=0.7, gamma_neg=1.0, prob_shift=0.05)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(scale=23.0, gamma_neg=0.0), 0.4504315070),
        (RELEASED, 0.4134547910),
        (dict(scale=17.0, gamma_neg=2.0, gamma_pos=1.0, prob_shift=0.05), 0.4139447842),
        (dict(scale=23.0, gamma_neg=2.0, gamma_pos=1.0, prob_shift=0.05), 0.4090280892),
        (dict(scale=25.0, prob_shift=0.05), 0.4107825175),
        (dict(scale=23.0), 0.4424522000),
        (dict(scale=23.0, gamma_neg=2.0, gamma_pos=1.0), 0.4370078185),
        (dict(scale=30.0, margin=0.35, k=0.8, gamma_neg=0.0), 0.9616375919),
    ],
)
def test_values_of_the_released_code(backend, device, options, expected):
    dtype = torch.float32 if backend == "triton" else torch.float64
    loss = aam_loss(COS.to(device, dtype), LABELS.to(device), **options)
    assert loss.item() == pytest.approx(expected, rel=3e-7 if dtype == torch.float32 else 1e-9)


def test_gradient_of_the_released_code(backend, device):
    cos = COS.clone().to(device).requires_grad_()
    aam_loss(cos, LABELS.to(device), **RELEASED).backward()
    expected = [[-1e-8, 0, 0.20866664, 0], [0.11301959, -7.09e-6, -0.69999291, 0.05713110]]
    torch.testing.assert_close(cos.grad.cpu(), torch.tensor(expected, dtype=torch.float64), atol=2e-8, rtol=1e-6)


def test_unknown_and_smoothing_of_the_released_code(backend, device):
    unknown = torch.tensor([[1, 0, -1, 0], [0, 1, 1, -1]], device=device)
    assert aam_loss(COS.to(device), unknown, **RELEASED).item() == pytest.approx(0.3538995538, rel=1e-7)
    smoothed = aam_loss(COS.to(device), LABELS.to(device), label_smoothing=0.1, **RELEASED)
    assert smoothed.item() == pytest.approx(0.3833886678, rel=1e-7)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize(
    "options", [{}, dict(margin=0.3, gamma_pos=0.5), dict(gamma_neg=4.0, gamma_pos=2.0, prob_shift=0.05)]
)
def test_gradcheck(kind, options):
    cos, target = example(3, 5, torch.float64, kind)
    assert torch.autograd.gradcheck(
        lambda c: aam_loss(c, target.double(), scale=7.0, reduction="none", **options), cos.requires_grad_()
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_for_every_cosine(backend, device, dtype):
    cos = torch.linspace(-1, 1, 65).to(device, dtype).expand(3, -1).contiguous()
    target = torch.tensor([[0.0], [0.3], [1.0]], device=device).expand(-1, 65)
    for (gamma_neg, gamma_pos), margin, shift in itertools.product([*GAMMAS, (0.05, 0.05)], (0.0, 1.0), (0.0, 0.05)):
        options = dict(scale=100.0, margin=margin, gamma_neg=gamma_neg, gamma_pos=gamma_pos, prob_shift=shift)
        loss, grad = loss_and_grad(cos, target, reduction="none", **options)
        assert loss.isfinite().all()
        assert grad.isfinite().all()


def test_discarded_negatives_have_exactly_no_loss(backend, device):
    cos = torch.tensor([[-0.2, -0.9, 0.0]], device=device)
    loss, grad = loss_and_grad(cos, torch.zeros_like(cos), prob_shift=0.05, reduction="none")
    assert (loss[0, :2] == 0).all()
    assert (grad[0, :2] == 0).all()
    assert loss[0, 2] > 0


def test_nan_is_not_hidden(backend, device):
    cos = torch.tensor([[0.1, float("nan"), 0.3]], device=device)
    assert aam_loss(cos, torch.tensor([[1, 0, 0]], device=device)).isnan()


@pytest.mark.parametrize("options", [{}, dict(gamma_neg=0.0), dict(gamma_neg=1.5, prob_shift=0.05), dict(margin=-0.2)])
def test_nan_in_the_target_shows(backend, device, options):
    cos, target = example(2, 300, torch.float32, "hard", device)
    target = target.float()
    target[0, 7] = torch.nan
    for smoothing in (0.0, 0.1):
        results = loss_and_grad(cos, target, reduction="none", label_smoothing=smoothing, **options)
        assert all(torch.equal(result.isnan(), target.isnan().cpu()) for result in results)
        assert aam_loss(cos, target, label_smoothing=smoothing, **options).isnan()


# ------------------------------------------------------------------------------------------------- shapes and layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 7), (2, 3, 5), (1, 511), (1, 512), (1, 513), (17, 61), (2, 4099)])
def test_shapes_with_poisoned_memory(backend, device, shape):
    cos, target = example(1, torch.Size(shape).numel(), torch.float32, "hard", device)
    cos, target = cos.view(shape), target.view(shape)
    assert_as_good_as_pytorch(cos, target)
    assert_as_good_as_pytorch(cos.bfloat16(), target, reduction="none")


def test_layouts(backend, device):
    cos, target = example(12, 40, torch.float32, "hard", device)
    expected = loss_and_grad(cos, target)
    wide = torch.full((12, 100), torch.nan, device=device)
    wide[:, 30:70] = cos
    for same in (cos.t().contiguous().t(), wide[:, 30:70], cos.flip(0).flip(0)):
        got = loss_and_grad(same, target.t().contiguous().t())
        torch.testing.assert_close(got, expected)
    row = cos[:1].expand(12, -1)
    torch.testing.assert_close(loss_and_grad(row, target), loss_and_grad(row.contiguous(), target))


def test_misaligned(backend, device):
    cos, target = example(1, 203, torch.float32, torch.int8, device)
    for offset in (1, 2, 3):
        assert_as_good_as_pytorch(cos.flatten()[offset:], target.flatten()[offset:])


def test_guard_bands(backend, device):
    if backend == "reference":
        pytest.skip("allocates its own outputs")
    from mlfast.ops._workspace import workspace_for
    from mlfast.ops.aam_loss import LOSS
    from mlfast.ops.elementwise_loss import LAUNCH, kernel_numbers

    for n, dtype in itertools.product((1, 7, 64, 515), (torch.float32, torch.bfloat16)):
        cos, target = example(1, n, dtype, "soft", device)
        buffers, (loss, grad) = zip(*(guarded((n,), kind, device) for kind in (torch.float32, dtype)), strict=True)
        numbers = kernel_numbers(LOSS, DEFAULTS._replace(reduction="none"), 1)
        LAUNCH[backend]("aam_loss", workspace_for, cos, target, None, None, loss, grad, None, numbers)
        assert_written(buffers)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
def test_empty(backend, device, shape, reduction):
    cos = torch.zeros(shape, device=device, requires_grad=True)
    loss = aam_loss(cos, torch.zeros(shape, device=device), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0
    assert cos.grad.shape == shape


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_all_unknown(backend, device, reduction):
    cos = torch.rand(3, 5, device=device, requires_grad=True)
    loss = aam_loss(cos, torch.full((3, 5), -1, device=device), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0
    assert (cos.grad == 0).all()


def test_more_than_two_to_the_31_elements():
    numpy = pytest.importorskip("numpy")
    rows, classes = 2**16 + 1, 2**15
    # calloc gives pages of zeros that take no memory until they are written to
    cos = torch.from_numpy(numpy.zeros((rows, classes), dtype=numpy.float16))
    target = torch.from_numpy(numpy.zeros((rows, classes), dtype=numpy.int8))
    assert aam_loss(cos, target, reduction="mean").item() == pytest.approx(0.3 / 23 * 0.5 * 0.69314718, rel=1e-6)
    # A shift of 0.5 leaves negatives at cosine 0 without any loss, so the last label alone makes the sum.
    cos[-1, -1], target[-1, -1] = -1.0, 1
    expected = reference(cos[-1:, -1:], target[-1:, -1:], None, DEFAULTS._replace(prob_shift=0.5))
    assert expected > 0.5
    assert aam_loss(cos, target, prob_shift=0.5).item() == pytest.approx(expected.item(), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    # Enough elements that PyTorch's largest error is no matter of luck; tiny shapes are tested above.
    rows=st.integers(4, 16),
    classes=st.integers(16, 70),
    scale=st.floats(1, 100),
    margin=st.floats(0, 1),
    k=st.floats(0, 1),
    gamma_neg=st.floats(0, 8),
    gamma_pos=st.sampled_from([0.0, 1.0, 2.5]),
    shift=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_any_numbers(data, rows, classes, scale, margin, k, gamma_neg, gamma_pos, shift):
    kind = data.draw(st.sampled_from(["hard", "soft", torch.int8]))
    cos, target = example(rows, classes, torch.float32, kind, seed=data.draw(st.integers(0, 99)))
    options = dict(scale=scale, margin=margin, k=k, gamma_neg=gamma_neg, gamma_pos=gamma_pos, prob_shift=shift)
    assert_as_good_as_pytorch(cos, target, **options)


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_bit_equal_over_repeats_and_threads(reduction):
    cos, target = example(300, 601, torch.float32, "hard")
    assert_bit_equal(over_threads(lambda: loss_and_grad(cos, target, reduction=reduction)))


def test_bit_equal_over_repeats(backend, device):
    cos, target = example(9, 131, torch.float32, "hard", device)
    first = loss_and_grad(cos, target)
    for _ in range(3):
        assert all(map(torch.equal, loss_and_grad(cos, target), first))
