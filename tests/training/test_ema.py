import copy

import pytest
import torch
from torch import nn

from mlfast.training.ema import EMA


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def change(model):
    model(torch.randn(2, 3, 8, 8))  # batch norm statistics move
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_follows_the_formula_with_warm_up():
    model = make_model()
    ema = EMA(model, decay=0.6)
    expected = copy.deepcopy(model.state_dict())
    decays = []
    for step in range(1, 8):
        change(model)
        ema.update()
        decays.append(min(0.6, 1 - (step + 1) ** (-2 / 3)))
        for name, value in model.state_dict().items():
            average = value.is_floating_point()
            expected[name] = decays[-1] * expected[name] + (1 - decays[-1]) * value if average else value.clone()
    assert decays[0] < 0.4 and decays[-1] == 0.6  # both branches were taken
    torch.testing.assert_close(dict(ema.model.state_dict()), dict(expected))
    assert ema.model.state_dict()["1.num_batches_tracked"] == 7


def test_statistics_are_averaged_not_copied():
    model = make_model()
    ema = EMA(model, decay=0.9)
    change(model)
    ema.update()
    assert not torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[1].running_mean.abs().sum() > 0


def test_the_followed_model_is_not_touched_and_the_average_takes_no_gradient():
    model = make_model()
    ema = EMA(model, decay=0.9)
    change(model)
    before = copy.deepcopy(model.state_dict())
    ema.update()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not ema.model.training


def test_memory_format_is_kept():
    model = make_model().to(memory_format=torch.channels_last)
    ema = EMA(model, decay=0.9)
    change(model)
    ema.update()
    assert ema.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_state_continues():
    model, other = make_model(), make_model()
    ema, continued = EMA(model, 0.9), EMA(other, 0.9)
    change(model)
    ema.update()
    continued.load_state_dict(copy.deepcopy(ema.state_dict()))
    other.load_state_dict(model.state_dict())
    for follower in (ema, continued):
        follower.update()
    torch.testing.assert_close(dict(continued.model.state_dict()), dict(ema.model.state_dict()), rtol=0, atol=0)
    assert continued.step == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match="decay must be"):
        EMA(make_model(), decay)
