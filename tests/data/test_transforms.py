"""Augmentation on Pillow's images."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mlfast.data.transforms import ImageTransform, crop_to, cutout


def ramp(width=40, height=40):
    """Each pixel says where it was."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 77)], -1).astype(np.uint8))


def drawn(transform, image, seed):
    torch.manual_seed(seed)
    return np.array(transform(image))


def test_nothing_by_default():
    image = ramp()
    assert ImageTransform()(image) is image


def test_flip_mirrors_half_of_the_images():
    image = ramp()
    plain = np.array(image)
    results = [drawn(ImageTransform(augment="flip"), image, seed) for seed in range(40)]
    mirrored = [np.array_equal(result, plain[:, ::-1]) for result in results]
    assert all(flag or np.array_equal(result, plain) for flag, result in zip(mirrored, results, strict=True))
    assert 10 < sum(mirrored) < 30


def test_cutout_paints_one_rectangle_of_one_colour_in_half_of_the_images():
    image = ramp(60, 40)
    before = np.array(image)
    touched = 0
    for seed in range(60):
        result = drawn(ImageTransform(cutout=0.4), image, seed)
        changed = (result != before).any(-1)
        if not changed.any():
            continue
        touched += 1
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        inside = result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].reshape(-1, 3)
        assert (inside == inside[0]).all()
        assert len(rows) <= 16 and len(columns) <= 24  # 0.4 of 40 and of 60
    assert 18 < touched < 42
    assert np.array_equal(np.array(image), before)


def test_cutout_reaches_its_full_size_away_from_the_edges():
    torch.manual_seed(0)
    sizes = {tuple((np.array(cutout(ramp(60, 40), 0.4)) != np.array(ramp(60, 40))).any(-1).nonzero()[0][[0, -1]])
             for _ in range(50)}  # fmt: skip
    assert 15 in {bottom - top for top, bottom in sizes}


@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_crop_keeps_the_aspect(size):
    middle = np.array(crop_to(ramp(*size), 40)).astype(int)
    assert middle.shape == (40, 40, 3)
    left, top = (size[0] - 40) // 2, (size[1] - 40) // 2
    assert np.array_equal(middle, np.array(ramp(*size)).astype(int)[top : top + 40, left : left + 40])
    places = {drawn(ImageTransform(40, "flip"), ramp(*size), seed)[20, 20].tobytes() for seed in range(10)}
    assert len(places) > 4


def test_randaugment_repeats_with_its_seed_and_in_another_process():
    transform = pickle.loads(pickle.dumps(ImageTransform(None, "randaugment", 0.4)))
    results = [drawn(transform, ramp(), seed) for seed in range(12)]
    assert len({result.tobytes() for result in results}) > 8
    assert all(result.shape == (40, 40, 3) and result.dtype == np.uint8 for result in results)
    assert np.array_equal(drawn(transform, ramp(), 5), results[5])
