import numpy as np
import pytest
from torch.utils.data import DataLoader

from mlfast.data import ImageDataset, ShardStream, load_annotations, shards
from mlfast.data.annotations import Shards
from mlfast.data.shards import BlockReader, read_image, shard_order, shuffled_in_windows
from tests.data.test_webdataset import labels, tar


@pytest.fixture
def images(write, jpeg):
    """Seven shards of 3 images, whose number is their red."""
    files = {}
    for shard in range(7):
        members = []
        for n in range(3 * shard, 3 * shard + 3):
            members += [(f"{n:02}.jpg", jpeg((10 * n, 0, 0))), (f"{n:02}.json", labels(str(n % 2)))]
        files[f"t-{shard}.tar"] = tar(*members)
    return ImageDataset(load_annotations("webdataset", write(files), "t"), size=4)


@pytest.fixture
def blocks_read(monkeypatch):
    """The blocks that readers have read."""
    calls = []
    real = BlockReader._read_block
    monkeypatch.setattr(BlockReader, "_read_block", lambda self, block: calls.append(block) or real(self, block))
    return calls


def numbers(stream):
    return [round(int(image[0, 0, 0]) / 10) for image, _ in stream]


# Order


def test_shards_come_in_random_order_and_each_from_front_to_back():
    # Out of order in the arrays; the third shard has no image in this split.
    shard, offset = np.array([1, 0, 3, 0, 1, 3]), np.array([512, 9000, 7, 100, 0, 3])
    places = Shards("tar", tuple("abcd"), shard.astype(np.int32), np.stack([offset, np.ones(6, int)], 1))
    assert shard_order(places).tolist() == [3, 1, 4, 0, 5, 2]
    orders = {tuple(shard_order(places, np.random.default_rng(seed)).tolist()) for seed in range(50)}
    assert len(orders) == 6
    assert all(order.index(3) + 1 == order.index(1) and order.index(4) + 1 == order.index(0) for order in orders)


def test_row_groups_are_the_shards_of_parquet_files():
    position = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1]])
    places = Shards("parquet", ("a", "b"), np.array([0, 0, 0, 0, 1, 1], np.int32), position, "image")
    orders = {tuple(shard_order(places, np.random.default_rng(seed)).tolist()) for seed in range(50)}
    assert len(orders) == 6 and (2, 3, 4, 5, 0, 1) in orders


def test_windows():
    rows = np.arange(100, 150)
    order = shuffled_in_windows(rows, np.random.default_rng(0), 20)
    assert [sorted(order[i : i + 20]) for i in (0, 20, 40)] == [list(rows[i : i + 20]) for i in (0, 20, 40)]
    assert order[:20].tolist() != rows[:20].tolist()
    assert shuffled_in_windows(rows, np.random.default_rng(0), 1).tolist() == rows.tolist()


# Reading


def test_every_block_is_read_once(images, blocks_read, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK_BITS", 11)  # two or three blocks a shard
    reader = BlockReader(images.annotations, patience=10)
    order = shuffled_in_windows(shard_order(images.annotations.shards), np.random.default_rng(0), 5)
    assert all(reader.read(int(row)) == read_image(images.annotations, int(row)) for row in order)
    assert 14 <= len(blocks_read) == len(set(blocks_read)) and not reader._held


def test_what_nobody_asks_for_is_let_go_of(images, blocks_read):
    reader = BlockReader(images.annotations, patience=5)
    rows = shard_order(images.annotations.shards).tolist()
    for row in rows[:21:3]:  # of every shard the first: another reader has the rest
        reader.read(row)
    assert len(reader._held) == 6 and len(blocks_read) == 7
    reader.read(rows[4])
    assert len(blocks_read) == 7
    reader.read(rows[1])
    assert len(blocks_read) == 8


def test_part_of_a_split_reads_only_its_images(images):
    part = images.annotations.subset([20, 3, 4])
    reader = BlockReader(part)
    assert [reader.read(row) == read_image(part, row) for row in (1, 0, 2)] == [True] * 3
    assert reader.read(1) == read_image(part, 1)  # again, though it was handed out


def test_only_shards_have_blocks(write, jpeg):
    write({"a.jpg": jpeg(), "t.json": '{"classes": ["x"], "images": [["a.jpg", ["x"]]]}'})
    files = load_annotations("json", write({}), "t")
    with pytest.raises(ValueError, match="json is not in shards"):
        BlockReader(files)
    with pytest.raises(ValueError, match="json is not in shards"):
        ShardStream(ImageDataset(files))


# The stream


def test_one_worker_sees_every_image_once_in_a_new_order_each_epoch(images, blocks_read):
    stream = ShardStream(images, seed=3, window=4)
    first, again = numbers(stream), numbers(stream)
    assert len(blocks_read) == 2 * 7
    stream.set_epoch(1)
    assert sorted(first) == list(range(21)) and first == again != numbers(stream)
    ordered = numbers(ShardStream(images, window=1))
    assert all(ordered[i : i + 3] == list(range(ordered[i], ordered[i] + 3)) for i in range(0, 21, 3))


@pytest.mark.parametrize(("ranks", "workers", "each"), [(2, 0, 10), (1, 2, 10), (5, 0, 4), (8, 0, 2)])
def test_ranks_and_workers_share_the_images_out(images, ranks, workers, each):
    parts = [
        numbers(DataLoader(ShardStream(images, rank=rank, world_size=ranks), None, num_workers=workers))
        for rank in range(ranks)
    ]
    assert [len(part) for part in parts] == [each * max(workers, 1)] * ranks  # equal, so that ranks stay in step
    assert len(set().union(*parts)) == sum(map(len, parts))
    if ranks < 8:  # a part of 10 or 4 images touches four or two neighbours in the order of the shards
        assert all(len({n // 3 for n in part}) <= each / 3 + 2 for part in parts if not workers)


def test_wrong_ranks(images):
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        ShardStream(images, rank=2, world_size=2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lost_shard_is_a_broken_image(images):
    (images.annotations.root / "t-3.tar").unlink()
    targets = [target for _, target in ShardStream(images)]
    assert len(images.broken()) == 3 and sum((t == -1).all().item() for t in targets) == 3
