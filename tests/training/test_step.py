"""One step: parts of a batch, SAM, clipping, half precision, steps that are left out."""

import pytest
import torch
from torch import nn

from mlfast.training import TrainConfig
from mlfast.training.sam import SAM
from mlfast.training.step import Step

BATCH = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_step(dtype=torch.float64, norm=False, **settings):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Step(model, model, nn.MSELoss(reduction="sum"), optimizer, TrainConfig(**settings))


def weights_after(step, steps=3, targets=TARGETS):
    results = [step(BATCH.to(step.weights[0].dtype), targets.to(step.weights[0].dtype)) for _ in range(steps)]
    return results, [weight.detach().clone() for weight in step.weights]


def test_a_step_is_that_of_plain_pytorch():
    (results, mine), plain = weights_after(make_step()), make_step()
    losses, norms = [], []
    for _ in range(3):
        plain.optimizer.zero_grad()
        loss = plain.loss(plain.model(BATCH), TARGETS) / 8
        loss.backward()
        norms.append(torch.cat([weight.grad.flatten() for weight in plain.weights]).norm())
        losses.append(loss.detach())
        plain.optimizer.step()
    torch.testing.assert_close(mine, [weight.detach() for weight in plain.weights])
    torch.testing.assert_close(results, list(zip(losses, norms, strict=True)))


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_parts_of_a_batch_come_to_the_whole(micro_batch, sam_rho):
    whole = weights_after(make_step(sam_rho=sam_rho))
    torch.testing.assert_close(weights_after(make_step(sam_rho=sam_rho, micro_batch=micro_batch)), whole)


def test_sam_takes_the_gradient_at_the_climbed_point():
    step, by_hand = make_step(sam_rho=0.1), make_step()
    _, mine = weights_after(step)
    sam = SAM(by_hand.optimizer, 0.1)
    for _ in range(3):
        (by_hand.loss(by_hand.model(BATCH), TARGETS) / 8).backward()
        sam.climb()
        (by_hand.loss(by_hand.model(BATCH), TARGETS) / 8).backward()
        sam.descend()
        by_hand.optimizer.zero_grad()
    torch.testing.assert_close(mine, [weight.detach() for weight in by_hand.weights])
    assert not torch.equal(mine[0], weights_after(make_step())[1][0])


def test_batch_norm_sees_a_batch_once():
    counts = []
    for rho in (0.0, 0.05):
        step = make_step(norm=True, sam_rho=rho)
        step(BATCH, TARGETS)
        counts.append((step.model[1].num_batches_tracked.item(), step.model[1].running_mean.clone()))
    assert counts[0][0] == counts[1][0] == 1
    torch.testing.assert_close(counts[0][1], counts[1][1])


def test_the_gradient_is_clipped_but_its_norm_is_told():
    step = make_step(clip_grad=0.01)
    _, norm = step(BATCH, TARGETS)
    assert norm > 0.01
    clipped = torch.cat([weight.grad.flatten() for weight in step.weights]).norm()
    assert clipped == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_the_scale_of_half_precision_cancels(sam_rho):
    expected = weights_after(make_step(torch.float32, sam_rho=sam_rho))
    torch.testing.assert_close(weights_after(make_step(torch.float32, sam_rho=sam_rho, precision="fp16")), expected)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_an_overflow_leaves_the_weights_and_lowers_the_scale(sam_rho):
    step = make_step(torch.float32, sam_rho=sam_rho, precision="fp16")
    before, scale = [weight.detach().clone() for weight in step.weights], step.scaler.get_scale()
    step(BATCH.float(), torch.full((8, 3), torch.inf))
    assert all(map(torch.equal, before, step.weights))
    assert step.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_bad_steps_are_left_out_and_counted_on_request(sam_rho):
    step = make_step(sam_rho=sam_rho, skip_bad_steps=2)
    before = [weight.detach().clone() for weight in step.weights]
    step(BATCH, torch.full((8, 3), torch.nan))
    assert all(map(torch.equal, before, step.weights))
    assert step.skipped == 1
    step(BATCH, TARGETS)
    assert step.skipped == 1
    assert not torch.equal(before[0], step.weights[0])
    assert all(weight.isfinite().all() for weight in step.weights)


def test_the_state_goes_on():
    step, other = (make_step(torch.float32, precision="fp16", skip_bad_steps=3) for _ in range(2))
    step(BATCH.float(), torch.full((8, 3), torch.nan))
    other.load_state_dict(step.state_dict())
    assert other.state_dict() == step.state_dict() and other.skipped == 1
