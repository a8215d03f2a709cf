import json
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mlfast.data import BrokenImagesError, DigitScenes, ImageDataset, load_annotations


@pytest.fixture
def make(write, jpeg):
    """Annotations of images n.jpg whose red is 10 n and whose label is n % 3; `broken` replaces files."""

    def annotations(count, broken=None):
        files = {f"{n}.jpg": jpeg((10 * n, 0, 0)) for n in range(count)} | (broken or {})
        images = [[name, [str(n % 3)]] for n, name in enumerate(files)]
        files = {name: content for name, content in files.items() if content is not None}
        return load_annotations(
            "json", write({**files, "t.json": json.dumps({"classes": ["0", "1", "2"], "images": images})}), "t"
        )

    return annotations


def test_items(make):
    images = ImageDataset(make(5), size=(6, 4))
    image, target = images[4]
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (3, 6, 4), True)
    assert target.dtype == torch.int8 and target.tolist() == [0, 1, 0]
    assert abs(int(image[0, 0, 0]) - 40) < 4 and len(images) == 5 and images.classes == ("0", "1", "2")
    assert ImageDataset(make(5))[0][0].shape == (3, 8, 8)
    with pytest.raises(IndexError):
        images[5]


def double(image):
    return image.resize((16, 16))


def floats(image):
    return torch.zeros(3, 4, 4)


def test_transform(make):
    assert ImageDataset(make(2), size=8, transform=double)[0][0].shape == (3, 16, 16)
    assert ImageDataset(make(2), transform=lambda _: torch.ones(3, 2, 2, dtype=torch.uint8))[0][0].sum() == 12
    with pytest.raises(ValueError, match=r"transform: gave torch.float32 \[3, 4, 4\], expected uint8"):
        ImageDataset(make(2), transform=floats)[0]
    for size in (0, (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match="size: got"):
            ImageDataset(make(2), size=size)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_absent_image_is_never_a_negative_one(make, jpeg):
    broken = {"1.jpg": b"", "3.jpg": jpeg()[:100], "absent.jpg": None}
    images = ImageDataset(make(5, broken), size=8)
    for index, reason in ((1, "the file is empty"), (3, "Truncated"), (5, "No such file")):
        with pytest.warns(UserWarning, match=rf"root/.*\.jpg is left out: .*({reason})"):
            image, target = images[index]
        assert target.tolist() == [-1, -1, -1] and image.shape == (3, 8, 8) and image.float().std() < 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # named once
        assert images[1][1].tolist() == [-1, -1, -1]
    assert images.broken() == ["1.jpg", "3.jpg", "absent.jpg"]
    assert images[4][1].tolist() == [0, 1, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_too_many_broken_images_stop(make):
    images = ImageDataset(make(6, {f"{n}.jpg": b"" for n in range(4)}), size=8, max_broken=2)
    for _ in range(2):  # an image that comes again counts once
        images[0], images[1]
    with pytest.raises(
        BrokenImagesError, match=r"3 of 6 images cannot be read, more than max_broken=2: 0.jpg, 1.jpg, 2.jpg"
    ):
        images[2]
    with pytest.raises(BrokenImagesError, match="1 of 6"):
        ImageDataset(images.annotations, size=8, max_broken=0)[3]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_spawned_workers_share_the_count(make):
    images = ImageDataset(make(12, {"2.jpg": b"", "3.jpg": b""}), size=8)
    loader = DataLoader(images, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    targets = torch.cat([target for _, target in batches])
    assert targets[2:4].tolist() == [[-1] * 3] * 2 and (targets >= 0).all(1).sum() == 10
    assert images.broken() == ["2.jpg", "3.jpg"]


def test_digits_have_their_own_class():
    a = load_annotations("digits", None, "val", size=20)
    np.testing.assert_array_equal(a.targets(np.arange(20)), DigitScenes("val", size=20).targets)
    with pytest.raises(ValueError, match=r"use mlfast.data.DigitScenes"):
        ImageDataset(a)
