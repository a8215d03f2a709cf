"""Training on tar and parquet shards, which are read from front to back."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mlfast.data import load_annotations
from mlfast.data.annotations import Shards
from mlfast.data.shards import BlockReader
from mlfast.training import ConfigError, Interrupted, fit, resume
from mlfast.training.batches import ShardRows
from mlfast.training.data import create_data
from tests.data.test_webdataset import tar
from tests.training.runs import assert_same, at_step, final_state, untimed
from tests.training.test_data import COLOURS, draw

CPU = torch.device("cpu")


def places(*lengths):
    """Tar shards of so many images."""
    shard = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.concatenate([np.arange(length) for length in lengths])
    position = np.stack([offset, np.ones(len(shard), int)], 1)
    return Shards("tar", tuple(map(str, range(len(lengths)))), shard.astype(np.int32), position)


def dealt(shards, batch_size, epoch=0, seed=0, world_size=1, lanes=1):
    """The rows of every batch of every process."""
    processes = [ShardRows(shards, batch_size, seed, rank, world_size, lanes) for rank in range(world_size)]
    batches = [[rows.tolist() for rows in process.epoch(epoch)] for process in processes]
    assert [len(process) for process in processes] == list(map(len, batches))
    return batches


SHARDS = places(17, 1, 40, 8, 30, 11)  # 107 images


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [6, 48])
def test_processes_share_an_epoch_out_and_stay_in_step(world_size, lanes, batch_size):
    for epoch in range(3):
        batches = dealt(SHARDS, batch_size, epoch, world_size=world_size, lanes=lanes)
        assert [list(map(len, own)) for own in batches] == [
            [batch_size // world_size] * (107 // batch_size)
        ] * world_size
        rows = [row for own in batches for batch in own for row in batch]
        assert len(rows) == len(set(rows)) == 107 // batch_size * batch_size


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 10, 200])
def test_in_evaluation_every_image_counts_once(world_size, lanes, batch_size):
    batches = dealt(SHARDS, batch_size, seed=None, world_size=world_size, lanes=lanes)
    assert sorted(row for own in batches for batch in own for row in batch) == list(range(107))
    assert all(len(batch) == batch_size for own in batches for batch in own[:-1])
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert dealt(places(1, 1), 4, seed=None, world_size=3, lanes=lanes) == [[], [[0]], [[1]]]


def test_every_lane_has_shards_of_its_own():
    shards = places(*[20] * 12)
    for own in dealt(shards, 8, world_size=2, lanes=3):
        read = [{row // 20 for batch in own[lane::3] for row in batch} for lane in range(3)]
        assert all(len(lane) <= 3 for lane in read)  # 40 images: two shards, or one and two parts
        assert sum(map(len, read)) <= 6 + 3


def test_an_epoch_depends_on_its_number_and_can_begin_anywhere():
    rows = ShardRows(SHARDS, 6, seed=5, lanes=4)
    one, two = ([batch.tolist() for batch in rows.epoch(number)] for number in (0, 1))
    assert one != two and [batch.tolist() for batch in rows.epoch(0, 7)] == one[7:]
    assert [batch.tolist() for batch in ShardRows(SHARDS, 6, seed=6, lanes=4).epoch(0)] != one


def write_tars(root: Path, train: int = 48, val: int = 17) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    for split, count in (("train", train), ("val", val)):
        for first in range(0, count, 8):
            members = []
            for number in range(first, min(first + 8, count)):
                names = [name for name in COLOURS if random.random() < 0.5]
                draw(root / "image.jpg", names, random)
                members += [(f"{number:03}.jpg", (root / "image.jpg").read_bytes())]
                members += [(f"{number:03}.json", json.dumps({"labels": names}).encode())]
            (root / f"{split}-{first:03}.tar").write_bytes(tar(*members))
    (root / "image.jpg").unlink()
    return root


def write_parquet(root: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    tars = write_tars(root)
    for split in ("train", "val"):
        annotations = load_annotations("webdataset", tars, split)
        contents = [BlockReader(annotations).read(row) for row in range(len(annotations))]
        names = [[annotations.classes[k] for k in annotations.positive[row]] for row in range(len(annotations))]
        images = [{"bytes": data, "path": None} for data in contents]
        path = root / f"{split}-0.parquet"
        pyarrow.parquet.write_table(pa.table({"image": images, "labels": names}), path, row_group_size=5)
    return root


@pytest.fixture(scope="module", params=["webdataset", "parquet"])
def on_shards(request, tmp_path_factory):
    make = {"webdataset": write_tars, "parquet": write_parquet}[request.param]
    root = make(tmp_path_factory.mktemp("data") / "shards")
    return {"data": request.param, "data_root": str(root), "train_images": None, "val_images": None, "epochs": 2}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_interrupted_a_run_ends_bit_for_bit_as_if_it_had_not_been(tiny, on_shards, monkeypatch):
    settings = on_shards | {"workers": None, "augment": "flip", "ema_decay": 0.0}
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    whole = fit(tiny(name="whole", **settings), quiet=True)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            fit(tiny(name="parts", **settings), quiet=True)
    monkeypatch.setattr("os.cpu_count", lambda: 3)  # another machine
    with pytest.raises(ConfigError, match="workers: got 1, expected None as in"):
        fit(tiny(name="parts", **settings | {"workers": 1}), resume=True, quiet=True)
    parts = resume(Path(tiny().runs_dir) / "parts", quiet=True)
    assert untimed(parts.history) == untimed(whole.history)
    assert_same(final_state(parts.run_dir), final_state(whole.run_dir))


def test_an_epoch_reads_every_block_once_and_validation_every_image(tiny, on_shards, monkeypatch):
    calls = []
    real = BlockReader._read_block
    monkeypatch.setattr(BlockReader, "_read_block", lambda self, block: calls.append(block) or real(self, block))
    data = create_data(tiny(workers=0, batch_size=8, **on_shards), CPU)
    blocks = {"webdataset": (6, 3), "parquet": (10, 4)}[on_shards["data"]]
    for batches, expected in ((data.train, blocks[0]), (data.val, blocks[1])):
        calls.clear()
        rows = torch.cat([batch.rows for batch in batches.epoch(0)])
        assert sorted(rows.tolist()) == list(range(batches.num_images))
        assert sorted(calls) == list(range(expected))
