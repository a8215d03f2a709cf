"""Both losses where most labels are negative: backends may take whole stretches of them another way."""

import pytest
import torch

from mlfast.functional import aam_loss, asymmetric_loss
from tests.ops.loss_cases import assert_as_good_as_pytorch

CLASSES = 1100  # four tiles of 256 and part of a fifth
PLACES = (0, 255, 256, 700, 1099)

losses = pytest.mark.parametrize("loss", [aam_loss, asymmetric_loss], ids=lambda loss: loss.__name__)


def scores():
    return torch.rand(1, CLASSES, generator=torch.Generator().manual_seed(0)) * 2 - 1


@losses
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float64], ids=str
)
def test_one_positive(backend, device, loss, dtype):
    for place in PLACES:
        target = torch.zeros(1, CLASSES)
        target[0, place] = 1
        assert_as_good_as_pytorch(loss, scores().to(device), target.to(device, dtype), reduction="none")


@losses
@pytest.mark.parametrize("label", [-1.0, 0.3, -0.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_unknown_soft_or_negative_zero(backend, device, loss, label, reduction):
    for place in PLACES:
        target = torch.zeros(1, CLASSES, device=device)
        target[0, place] = label
        assert_as_good_as_pytorch(loss, scores().to(device), target, reduction=reduction)


@losses
def test_no_positive_at_all(backend, device, loss):
    weight = torch.linspace(0.1, 3, CLASSES, device=device)
    for options in ({}, {"label_smoothing": 0.1}, {"class_weight": weight}, {"gamma_neg": 1.5}):
        target = torch.zeros(1, CLASSES, device=device)
        assert_as_good_as_pytorch(loss, scores().to(device), target, reduction="none", **options)


@losses
def test_one_nan_shows(backend, device, loss):
    target = torch.zeros(1, CLASSES, device=device)
    target[0, 700] = torch.nan
    found = loss(scores().to(device), target, reduction="none")
    assert found.isnan().nonzero().tolist() == [[0, 700]]


@losses
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_a_loss_scale_saves_small_gradients_of_half(backend, device, loss, reduction):
    """Each element, not only the largest, is as precise as float16 can hold it after the scaling."""
    x = (scores() * 6).to(device, torch.float16)
    target = torch.zeros(1, CLASSES, device=device)
    target[0, 700] = 1
    x_half, x_double = x.clone().requires_grad_(), x.double().requires_grad_()
    for leaf in (x_half, x_double):
        (loss(leaf, target, reduction=reduction) * 2.0**10).backward()
    normal = x_double.grad.abs() > torch.finfo(torch.float16).smallest_normal
    assert normal.sum() > 100
    error = (x_half.grad.double() - x_double.grad).abs() / x_double.grad.abs()
    assert error[normal].max() < 2e-3  # half a unit in the last place is 5e-4, of a float32 gradient
