import json
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mlfast.data import BrokenImagesError, DigitScenes, ImageDataset, ShardStream, load_annotations
from tests.data.test_webdataset import labels, tar


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


@pytest.fixture
def shards(write, jpeg):
    """Seven shards of 3 images, whose number is their red."""
    files = {}
    for shard in range(7):
        members = []
        for n in range(3 * shard, 3 * shard + 3):
            members += [(f"{n}.jpg", jpeg((10 * n, 0, 0))), (f"{n}.json", labels(str(n % 2)))]
        files[f"t-{shard}.tar"] = tar(*members)
    return ImageDataset(load_annotations("webdataset", write(files), "t"), size=4)


def numbers(stream):
    return [round(int(image[0, 0, 0]) / 10) for image, _ in stream]


def test_one_worker_sees_every_image_once_in_a_new_order_each_epoch(shards):
    stream = ShardStream(shards, seed=3, buffer_size=4)
    first, again = numbers(stream), numbers(stream)
    stream.set_epoch(1)
    assert sorted(first) == list(range(21)) and first == again != numbers(stream)
    ordered = numbers(ShardStream(shards, buffer_size=1))
    assert all(ordered[i : i + 3] == list(range(ordered[i], ordered[i] + 3)) for i in range(0, 21, 3))


def test_ranks_and_workers_share_the_shards_out(shards):
    per_rank = [
        numbers(DataLoader(ShardStream(shards, rank=rank, world_size=2, buffer_size=5), None, num_workers=0))
        for rank in (0, 1)
    ]
    assert [len(part) for part in per_rank] == [10, 10]  # equal, so that ranks make the same number of steps
    assert not set(per_rank[0]) & set(per_rank[1])
    two = numbers(DataLoader(ShardStream(shards), batch_size=None, num_workers=2))
    assert len(two) == 20 and len(set(two)) >= 19


def test_a_worker_with_too_few_images_begins_again(shards):
    parts = [numbers(ShardStream(shards, rank=rank, world_size=5)) for rank in range(5)]
    assert [len(part) for part in parts] == [4] * 5  # of two workers with two shards and three with one


def test_shards_for_fewer_workers_than_asked(shards, make):
    with pytest.raises(ValueError, match="There are 7 shards for 8 processes x 1 workers"):
        next(iter(ShardStream(shards, world_size=8)))
    with pytest.raises(ValueError, match="json is not in shards"):
        ShardStream(ImageDataset(make(2)))
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        ShardStream(shards, rank=2, world_size=2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lost_shard_is_a_broken_image(shards):
    (shards.annotations.root / "t-3.tar").unlink()
    targets = [target for _, target in ShardStream(shards)]
    assert len(shards.broken()) == 3 and sum((t == -1).all().item() for t in targets) == 3
