"""Losses and layers that look like what `mlfast.accelerate` knows, and are or are not."""

import pytest
import torch
from torch import nn

import mlfast
from tests import published
from tests.test_accelerate import assert_same, reason, swap

pytestmark = pytest.mark.usefixtures("one_thread")


class Masking(nn.BCEWithLogitsLoss):
    """Leaves out what is marked."""

    def forward(self, input, target):
        return super().forward(input[target != 255], target[target != 255])


class Smoothing(published.AsymmetricLossOptimized):
    """As people write it: in training alone."""

    def forward(self, x, y):
        return super().forward(x, y * 0.9 + 0.05 if self.training else y)


class OfABatch(published.AsymmetricLossOptimized):
    """Divides by the batch, and multiplies by 4."""

    def forward(self, x, y):
        return super().forward(x, y) * 4 / len(x)


class Weighing(published.AsymmetricLossOptimized):
    """Takes one argument more."""

    def forward(self, x, y, weight=None):
        return super().forward(x, y)


@pytest.mark.parametrize(
    ("kind", "name", "note"),
    [
        (Masking, "BCEWithLogitsLoss", "its class computes it in a way of its own"),
        (Smoothing, "AsymmetricLoss", "it gives other outputs"),
        (OfABatch, "AsymmetricLoss", "it gives other outputs"),
        (Weighing, "AsymmetricLoss", "its call takes other arguments"),
    ],
)
def test_losses_of_the_same_name_that_compute_otherwise_are_left(kind, name, note):
    loss = kind()
    loss.__class__ = type(name, (kind,), {})
    assert note in reason(loss)


def test_a_plain_loss_with_attributes_of_its_own_is_left():
    loss = nn.BCEWithLogitsLoss()
    loss.temperature = 2.0
    assert "attributes that are not known: temperature" in reason(loss)


def test_a_layer_that_cannot_be_tried_is_left_and_the_rest_is_swapped():
    class GroupFC(nn.Module):
        def forward(self, h, duplicate_pooling, out_extrap):
            raise RuntimeError("only for 768")

    model, report = mlfast.accelerate(nn.ModuleList([GroupFC(), nn.BCEWithLogitsLoss()]))
    assert isinstance(model[1], mlfast.AsymmetricLoss)
    assert "it could not be tried: RuntimeError: only for 768" in report.left[0].note


def test_a_batch_of_one_without_dimensions():
    theirs, ours = swap(nn.BCEWithLogitsLoss())
    assert_same(theirs, ours, torch.tensor(0.3), torch.tensor(1.0))


def test_losses_are_swapped_in_inference_mode_too():
    with torch.inference_mode():
        swap(nn.BCEWithLogitsLoss())
