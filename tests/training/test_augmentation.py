"""Augmentation on the device: what the workers would have done to the same images."""

import pytest
import torch

from mlfast.training import ConfigError, TrainConfig, fit
from mlfast.training.data import create_data
from tests.training.runs import assert_same, final_state

CPU = torch.device("cpu")


def batches(tiny, place, **settings):
    return list(create_data(tiny(augment_on=place, workers=0, **settings), CPU).train.epoch(1))


@pytest.mark.parametrize("settings", [{"augment": "flip"}, {"cutout": 0.4}, {"augment": "flip", "cutout": 0.7}])
def test_flip_and_cutout_are_those_of_the_workers_bit_for_bit(tiny, settings):
    plain = batches(tiny, "device")
    changed = batches(tiny, "device", **settings)
    for one, other, original in zip(changed, batches(tiny, "workers", **settings), plain, strict=True):
        assert all(map(torch.equal, one, other))
        assert 4 <= (one.images != original.images).flatten(1).any(1).sum() <= 16  # about half of 16, or three quarters


def test_randaugment_takes_the_same_operations(tiny):
    settings = {"augment": "randaugment", "cutout": 0.2}
    pairs = zip(batches(tiny, "device", **settings), batches(tiny, "workers", **settings), strict=True)
    distances = torch.cat([(one.images.float() - other.images.float()).abs().mean((1, 2, 3)) for one, other in pairs])
    plain = torch.cat([batch.images for batch in batches(tiny, "device")])
    changed = torch.cat([batch.images for batch in batches(tiny, "device", **settings)])
    moved = (plain.float() - changed.float()).abs().mean((1, 2, 3))
    assert distances.median() < 1 and moved.median() > 8  # of 255


def test_an_epoch_can_begin_in_the_middle_and_the_random_state_is_left_alone(tiny):
    data = create_data(tiny(augment_on="device", augment="randaugment", cutout=0.4), CPU).train
    state = torch.get_rng_state()
    whole, rest = list(data.epoch(3)), list(data.epoch(3, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(all(map(torch.equal, *pair)) for pair in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0].images, next(data.epoch(4)).images)
    assert data.name(3) == "image 3" and data.num_images == 64 and len(data) == 4


def test_a_run_is_the_same_wherever_its_images_are_flipped(tiny):
    runs = [
        fit(tiny(name=place, augment_on=place, augment="flip", cutmix=0.5, workers=0, epochs=1), quiet=True)
        for place in ("workers", "device")
    ]
    assert_same(*(final_state(run.run_dir)["model"] for run in runs))


def test_a_crop_is_the_workers_business():
    with pytest.raises(ConfigError, match="augment_on: got 'device' with resize crop, expected workers"):
        TrainConfig(augment_on="device", resize="crop")
