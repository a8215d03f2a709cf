"""One step: parts of a batch, SAM, clipping, half precision, steps that are left out."""

import pytest
import torch
from torch import nn

import mlfast
from mlfast.models import create_model
from mlfast.training import TrainConfig, TrainingError
from mlfast.training.optimization import create_optimizer
from mlfast.training.sam import SAM
from mlfast.training.step import Step, autocast

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


@pytest.mark.parametrize("momentum", ["fresh", "used"])
def test_a_fused_optimizer_starts_again_after_an_overflow(momentum):
    """The momentum that a fused step is to begin with must not be whatever lies in the memory."""
    config = TrainConfig(precision="fp16", optimizer="sgd", momentum=0.9)
    step, plain = make_step(torch.float32, precision="fp16"), make_step(torch.float32)
    step.optimizer = create_optimizer(step.model, config)
    plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, fused=False)
    assert step.optimizer.param_groups[0]["fused"]
    plain.optimizer.param_groups[0]["weight_decay"] = 0.0
    for group in step.optimizer.param_groups:
        group["weight_decay"] = 0.0
    if momentum == "used":
        weights_after(step, 1), weights_after(plain, 1)
    junk = [torch.full_like(weight, torch.nan) for weight in step.weights]
    del junk  # what an uninitialised buffer would find
    step(BATCH.float(), torch.full((8, 3), torch.inf))
    torch.testing.assert_close(weights_after(step), weights_after(plain))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_steps_are_the_others_within_rounding(optimizer):
    results = []
    for fused in (True, False):
        step = make_step(torch.float32)
        step.optimizer = create_optimizer(step.model, TrainConfig(optimizer=optimizer, lr=0.01))
        for group in step.optimizer.param_groups:
            group["fused"] = fused
        results.append(weights_after(step))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_half_precision_go_the_way_of_the_others(precision, sam_rho):
    moves = []
    for kind in (precision, "fp32"):
        torch.manual_seed(0)
        model = create_model("test_resnet", 3).train()
        config = TrainConfig(sam_rho=sam_rho, precision=kind, clip_grad=0.5, micro_batch=3, lr=0.01)

        def forward(images, model=model, kind=kind):
            with autocast(images.device, kind):
                return model(images)

        step = Step(model, forward, mlfast.AAMLoss(20.0), create_optimizer(model, config), config)
        before = torch.cat([weight.detach().flatten() for weight in step.weights])
        images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        _, norm = step(images, (TARGETS[:6] > 0).to(torch.int8))
        assert norm > 0.5  # so it was clipped
        moves.append(torch.cat([weight.detach().flatten() for weight in step.weights]) - before)
    assert torch.cosine_similarity(*moves, dim=0) > 0.9
    assert moves[0].norm() == pytest.approx(moves[1].norm().item(), rel=0.02)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_recomputed_activations_change_nothing(sam_rho):
    """Gradients and batch norm's statistics bit for bit, in both passes of SAM; and the activations are recomputed."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model("test_resnet", 3, drop_path_rate=0.3)
        config = TrainConfig(sam_rho=sam_rho, grad_checkpointing=checkpointing)
        calls = []
        if checkpointing:
            model.backbone.set_grad_checkpointing(True)
        model.backbone.layer4[0].conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        step = Step(model.train(), model, nn.MSELoss(reduction="sum"), create_optimizer(model, config), config)
        images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            step(images, TARGETS[:4].float())
        assert len(calls) == 2 * (1 + bool(sam_rho)) * (1 + checkpointing)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_compiled_models_can_compute_their_activations_again():
    """Weights and batch norm's statistics are those of an eager model that keeps its activations, with SAM."""
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = create_model("test_resnet", 3, cosine=False).double().train()
        config = TrainConfig(sam_rho=0.05, grad_checkpointing=compiled, compile=compiled, lr=0.01)
        if compiled:
            model.backbone.set_grad_checkpointing(True)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        step = Step(model, forward, nn.MSELoss(reduction="sum"), create_optimizer(model, config), config)
        images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(2):
            step(images, TARGETS[:4])
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_bad_steps_are_left_out_and_counted_on_request(sam_rho):
    step = make_step(sam_rho=sam_rho, skip_bad_steps=2, norm=True)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    step(BATCH * torch.nan, TARGETS)
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(before[name], tensor), name  # the running statistics too
    assert step.skipped == 1
    step(BATCH, TARGETS)
    assert step.skipped == 1
    assert not any(torch.equal(before[name], step.model.state_dict()[name]) for name in ("0.weight", "1.running_mean"))
    assert all(tensor.isfinite().all() for tensor in step.model.state_dict().values())


class Steep(nn.Module):
    """A loss of 0 whose gradient overflows where its scale is above 2; ``broken``: whatever its scale."""

    def __init__(self, broken=False):
        super().__init__()
        self.slope = torch.inf if broken else torch.finfo(torch.float32).max / 2

    def forward(self, output, targets):
        loss = output.sum()
        loss.register_hook(lambda gradient: gradient * 8 * self.slope)  # the loss is divided by the 8 images
        return loss - loss.detach()


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_overflows_of_half_precision_are_no_bad_steps(sam_rho):
    step = make_step(torch.float32, sam_rho=sam_rho, precision="fp16", skip_bad_steps=1)
    step.loss = Steep()
    (results, _), scale = weights_after(step), step.scaler.get_scale()
    assert not any(norm.isfinite() for _, norm in results)
    assert scale == 2.0**13 and step.skipped == 0
    step.loss = nn.MSELoss(reduction="sum")
    step(BATCH.float(), torch.full((8, 3), torch.nan))
    assert step.skipped == 1


def test_a_gradient_that_overflows_at_every_scale_stops_the_run():
    step = make_step(torch.float32, precision="fp16", skip_bad_steps=1)
    step.loss = Steep(broken=True)
    weights_after(step, steps=29)
    step.check_scale()
    weights_after(step, steps=1)
    with pytest.raises(TrainingError, match="overflows float16 even with the loss scaled to 6e-05"):
        step.check_scale()
    make_step().check_scale()


def test_the_state_goes_on():
    step, other = (make_step(torch.float32, precision="fp16", skip_bad_steps=3) for _ in range(2))
    step(BATCH.float(), torch.full((8, 3), torch.nan))
    other.load_state_dict(step.state_dict())
    assert other.state_dict() == step.state_dict() and other.skipped == 1
