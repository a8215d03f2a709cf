"""asymmetric_loss: every backend against float64, by the policy of docs/correctness.md.

The frame it shares with aam_loss (shapes, layouts, autograd, compile) is tested in full there, and here once.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import mlfast
from mlfast.functional import asymmetric_loss
from mlfast.ops.asymmetric_loss import Options
from tests.ops.loss_cases import GAMMAS, example
from tests.ops.loss_cases import assert_as_good_as_pytorch as compare
from tests.ops.loss_cases import loss_and_grad as evaluate
from tests.ops.policy import FLOATS, assert_bit_equal, over_threads

loss_and_grad = functools.partial(evaluate, asymmetric_loss)
assert_as_good_as_pytorch = functools.partial(compare, asymmetric_loss)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["hard", "soft", torch.int8])
def test_formula(backend, device, dtype, kind):
    scores, target = example(7, 81, dtype, kind, device)
    for (gamma_neg, gamma_pos), clip, detach in itertools.product(GAMMAS, (0.0, 0.05), (False, True)):
        options = dict(gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, detach_focus=detach)
        assert_as_good_as_pytorch(scores * 6, target, **options)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, "hard", "soft"])
def test_targets_and_reductions(backend, device, reduction, kind):
    scores, target = example(5, 33, torch.float32, kind, device)
    weight = torch.linspace(0.1, 3, 33, device=device)
    assert_as_good_as_pytorch(scores * 6, target, reduction=reduction)
    assert_as_good_as_pytorch(scores * 6, target, reduction=reduction, class_weight=weight, label_smoothing=0.1)


LOGITS = torch.tensor([[2.0, -1.0, 0.3, -3.0], [0.0, 1.5, -2.0, 0.7]], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]])


@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip", "expected"),
    [
        (4.0, 0.0, 0.05, 2.6771924284),
        (4.0, 1.0, 0.05, 2.1471882181),
        (0.0, 0.0, 0.0, 5.4678068131),
        (7.0, 0.0, 0.05, 2.4988386992),
    ],
)
def test_values_of_the_public_code(backend, device, gamma_neg, gamma_pos, clip, expected):
    loss = asymmetric_loss(LOGITS.to(device), LABELS.to(device), gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("options", [dict(gamma_neg=4.0, gamma_pos=1.0, clip=0.05), dict(gamma_neg=2.0, clip=0.0)])
def test_parity_with_timm(backend, device, options):
    from mlfast.torchvision_compat import import_torchvision

    import_torchvision()
    from timm.loss import AsymmetricLossMultiLabel

    scores, target = example(9, 40, torch.float32, torch.bool, device)
    logits = (scores * 5).requires_grad_()
    settings = {"gamma_pos": 0.0} | options
    criterion = AsymmetricLossMultiLabel(**settings)
    # An image at a time: some versions of timm take the sum over a batch, others the mean over its images.
    theirs = sum(map(criterion, logits.split(1), target.float().split(1)))
    mine = asymmetric_loss(logits, target, **settings)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (mine, theirs)), rtol=1e-4, atol=1e-5)


def test_binary_cross_entropy_is_the_case_without_focus(backend, device):
    scores, target = example(9, 40, torch.float32, torch.bool, device)
    mine = asymmetric_loss(scores * 8, target, gamma_neg=0.0, clip=0.0, reduction="mean")
    torch.testing.assert_close(mine, F.binary_cross_entropy_with_logits(scores * 8, target.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_never_nan(backend, device, dtype):
    logits = torch.tensor([[-1e4, -80.0, -40.0, -1.0, 0.0, 1.0, 40.0, 80.0, 1e4]], device=device).to(dtype)
    for y, (gamma_neg, gamma_pos), clip in itertools.product((0.0, 0.4, 1.0), [*GAMMAS, (0.05, 0.05)], (0.0, 0.05)):
        options = dict(gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
        loss, grad = loss_and_grad(logits, torch.full_like(logits, y), reduction="none", **options)
        assert loss.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, dict(gamma_neg=0.0, clip=0.0), dict(detach_focus=True, label_smoothing=0.1)])
def test_nan_in_the_target_shows(backend, device, options):
    scores, target = example(2, 300, torch.float32, torch.float32, device)
    target[0, 7] = torch.nan
    results = loss_and_grad(scores, target, reduction="none", **options)
    assert all(torch.equal(result.isnan(), target.isnan().cpu()) for result in results)
    assert asymmetric_loss(scores, target, **options).isnan()


def test_clipped_negatives_have_exactly_no_loss(backend, device):
    loss, grad = loss_and_grad(
        torch.tensor([[-3.0, -9.0, 0.0]], device=device), torch.zeros(1, 3, device=device), reduction="none"
    )
    assert (loss[0, :2] == 0).all()
    assert (grad[0, :2] == 0).all()
    assert loss[0, 2] > 0


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("options", [{}, dict(gamma_neg=1.5, gamma_pos=0.5), dict(clip=0.0, gamma_pos=1.0)])
def test_gradcheck(kind, options):
    scores, target = example(3, 5, torch.float64, kind)
    function = functools.partial(asymmetric_loss, target=target.double(), reduction="none", **options)
    assert torch.autograd.gradcheck(function, (scores * 3).requires_grad_())


def test_detached_focus_keeps_the_loss_and_changes_the_gradient(backend, device):
    scores, target = example(5, 20, torch.float32, "hard", device)
    whole, detached = (loss_and_grad(scores * 4, target, detach_focus=detach) for detach in (False, True))
    torch.testing.assert_close(whole[0], detached[0])
    assert not torch.allclose(whole[1], detached[1])


def test_bit_equal_over_threads():
    scores, target = example(300, 601, torch.float32, "hard")
    assert_bit_equal(over_threads(lambda: loss_and_grad(scores, target)))


def test_compile_whole_and_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("has no custom op")
    scores, target = example(6, 20, torch.float32, "hard", device)
    numbers = Options(4.0, 0.0, 0.05, 0.0, False, "sum")
    torch.library.opcheck(torch.ops.mlfast.asymmetric_loss, (scores, target, None, None, *numbers, True))
    compiled = torch.compile(asymmetric_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = loss_and_grad(scores, target)
    # What the compiler makes of the incoming gradient may be rounded otherwise; these are float32 results as float64.
    torch.testing.assert_close(evaluate(compiled, scores, target), expected, rtol=1.3e-6, atol=1e-5)


def test_module_is_the_function():
    scores, target = example(5, 20, torch.float32, "hard")
    options = dict(gamma_neg=2.0, gamma_pos=1.0, clip=0.1, detach_focus=True, label_smoothing=0.05, reduction="mean")
    module = mlfast.AsymmetricLoss(**options, class_weight=torch.rand(20))
    expected = asymmetric_loss(scores, target, **options, class_weight=module.class_weight)
    assert torch.equal(module(scores, target), expected)
    assert "gamma_neg=2.0" in repr(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gamma_neg=-1.0), "asymmetric_loss: gamma_neg must be >= 0, got -1.0"),
        (dict(clip=1.0), r"asymmetric_loss: clip must be in \[0, 1\)"),
        (dict(reduction="avg"), "asymmetric_loss: reduction must be one of"),
        (dict(class_weight=torch.ones(2)), "asymmetric_loss: class_weight must have one value per class"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        asymmetric_loss(torch.zeros(2, 3), torch.ones(2, 3), **change)
