"""Batches, optimiser, schedule and history."""

import json
import math

import pytest
import torch
from torch import nn

import mlfast
from mlfast.models import create_model
from mlfast.training import TrainConfig
from mlfast.training.batches import TensorBatches
from mlfast.training.history import History
from mlfast.training.optimization import create_loss, create_optimizer, create_schedule, parameter_groups

CPU = torch.device("cpu")


def numbers(batches, epoch, start=0):
    """The images that an epoch gives, batch by batch; every image holds its own number."""
    return [images[:, 0, 0, 0].tolist() for images, *_ in batches.epoch(epoch, start)]


def make_batches(count, size, seed):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return TensorBatches(images, torch.arange(count, dtype=torch.int8).view(-1, 1), size, device=CPU, seed=seed)


def test_without_a_seed_every_image_comes_once_in_order():
    batches = make_batches(10, 4, None)
    assert numbers(batches, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3


def test_with_a_seed_epochs_are_shuffled_full_batches():
    batches = make_batches(10, 4, seed=3)
    assert len(batches) == 2
    first, second = numbers(batches, 0), numbers(batches, 1)
    assert [len(batch) for batch in first] == [4, 4]
    assert len({number for batch in first for number in batch}) == 8
    assert first != second
    assert first == numbers(make_batches(10, 4, seed=3), 0)
    assert first != numbers(make_batches(10, 4, seed=4), 0)


def test_starting_inside_an_epoch_gives_the_rest_of_it():
    batches = make_batches(20, 4, seed=0)
    assert numbers(batches, 5, start=2) == numbers(batches, 5)[2:]


def test_images_and_targets_stay_together():
    for images, targets, _ in make_batches(20, 4, seed=0).epoch(0):
        assert images[:, 0, 0, 0].tolist() == targets[:, 0].tolist()


def test_biases_and_norms_do_not_decay_and_biases_have_their_own_rate():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    groups = parameter_groups(model, TrainConfig(weight_decay=0.1, lr=0.5, bias_lr=2.0))
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.1, 0.5), (0.0, 1.0), (0.0, 0.5)]
    expected = [[model[0].weight], [model[0].bias, model[1].bias, model[2].bias], [model[1].weight]]
    assert [list(map(id, group["params"])) for group in groups] == [list(map(id, weights)) for weights in expected]


def test_tokens_positions_and_queries_do_not_decay():
    def spared(backbone, **settings):
        model = create_model(backbone, 5, image_size=160, **settings)
        names = {id(weight): name for name, weight in model.named_parameters()}
        groups = parameter_groups(model, TrainConfig(weight_decay=0.1))
        assert sum(len(group["params"]) for group in groups) == len(names)
        kept = [names[id(weight)] for group in groups if not group["weight_decay"] for weight in group["params"]]
        return {name for name in kept if model.get_parameter(name).ndim > 1}

    learned = {"queries": "learned"}
    of_tokens = {"backbone.cls_token", "backbone.pos_embed", "classifier.queries"}
    assert spared("test_vit", head="ml_decoder", head_args=learned) == of_tokens
    assert spared("test_resnet", head="q2l") == {"classifier.queries"}


def test_the_losses():
    g = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(6, 5, generator=g) * 2 - 1, (torch.rand(6, 5, generator=g) < 0.3).to(torch.int8)
    numbers = {"gamma_neg": 2.0, "gamma_pos": 1.0, "prob_shift": 0.05}
    aam = create_loss(TrainConfig(scale=17.0, k=0.6, label_smoothing=0.1, **numbers))
    expected = mlfast.AAMLoss(scale=17.0, k=0.6, label_smoothing=0.1, **numbers)
    assert torch.equal(aam(scores, targets), expected(scores, targets))
    asl = create_loss(TrainConfig(loss="asl", **numbers))
    assert torch.equal(asl(scores, targets), mlfast.AsymmetricLoss(2.0, 1.0, clip=0.05)(scores, targets))
    bce = create_loss(TrainConfig(loss="bce", **numbers))
    plain = nn.functional.binary_cross_entropy_with_logits(scores, targets.float(), reduction="sum")
    torch.testing.assert_close(bce(scores, targets), plain)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_learning_rate_rises_to_its_peak_and_falls(name):
    config = TrainConfig(optimizer=name, lr=0.4, momentum=0.8, warmup=0.25)
    optimizer = create_optimizer(nn.Linear(2, 2), config)
    schedule = create_schedule(optimizer, config, total_steps=40)
    rates, momenta = [], set()
    for _ in range(40):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        momenta.add(group["momentum"] if name == "sgd" else group["betas"][0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.4) and rates.index(max(rates)) == 9  # a quarter of 40, counted from 0
    assert rates[0] == pytest.approx(0.004) and rates[-1] < 1e-5
    assert momenta == {0.8}


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0.5), (4, 0.25), (5, 0.2), (10, 0.1), (20, 0.05)])
def test_a_rise_of_one_step(steps, warmup):
    optimizer = create_optimizer(nn.Linear(2, 2), config := TrainConfig(lr=0.4, warmup=warmup))
    schedule = create_schedule(optimizer, config, total_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.004) and rates[-1] < 1e-5
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[1] < 0.4


def test_the_momentum_cycles_on_request():
    optimizer = create_optimizer(nn.Linear(2, 2), config := TrainConfig(cycle_momentum=True, warmup=0.5))
    schedule = create_schedule(optimizer, config, total_steps=20)
    momenta = []
    for _ in range(20):
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        schedule.step()
    assert momenta[0] == pytest.approx(0.95) and min(momenta) == pytest.approx(0.85) and momenta[-1] > 0.94


def test_history_writes_json_lines_and_null_for_nan(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.append({"epoch": 1, "mAP": math.nan, "loss": 0.5})
    history.append({"epoch": 2, "mAP": 0.25, "loss": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == history.records
    assert history.records[0] == {"epoch": 1, "mAP": None, "loss": 0.5}
    assert history.records[1]["loss"] is None


def test_history_continues_after_the_epochs_that_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3, "m')
    history = History(path)
    history.restore(epochs=2)
    assert [record["epoch"] for record in history.records] == [1, 2]
    history.append({"epoch": 3})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n'


def test_history_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = History(tmp_path / "metrics.jsonl", tensorboard=True)
    history.append({"epoch": 1, "mAP": 0.25, "loss": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["mAP"]
    assert [(event.step, event.value) for event in events.Scalars("mAP")] == [(1, 0.25)]


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_picture(tmp_path, epochs):
    history = History(tmp_path / "metrics.jsonl")
    for epoch in range(1, epochs + 1):
        scores = {"mAP": 0.1 * epoch, "ema_mAP": None}
        history.append({"epoch": epoch, "loss": 1 / epoch, "val_loss": 1.2 / epoch, **scores})
    history.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
