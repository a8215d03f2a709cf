"""Runs on data sets of image files."""

import csv
import json
import signal
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlfast import cli
from mlfast.data import KINDS, BrokenImagesError, ImageDataset, load_annotations
from mlfast.training import (
    CheckpointError,
    ConfigError,
    Interrupted,
    TrainConfig,
    TrainingError,
    fit,
    load_model,
    resume,
)
from mlfast.training.config import field_types
from mlfast.training.data import create_data
from mlfast.training.data_settings import DEFAULT_SPLITS
from mlfast.training.loader import LoaderBatches
from tests.training.runs import assert_same, at_step, final_state, untimed

CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def draw(path: Path, names: list[str], random: np.random.Generator) -> None:
    """A grey JPEG of any aspect, with a patch of each colour."""
    width, height = random.integers(40, 64, 2).tolist()
    pixels = random.integers(90, 160, (height, width, 3)).astype(np.uint8)
    for name in names:
        y, x = int(random.integers(height - 20)), int(random.integers(width - 20))
        pixels[y : y + 20, x : x + 20] = COLOURS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


def write_csv(root: Path, train: int = 48, val: int = 16) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "labels", "split"])
        for number in range(train + val):
            names = [name for name in COLOURS if random.random() < 0.5]
            draw(root / f"images/{number:03d}.jpg", names, random)
            split = "train" if number < train else "val"
            writer.writerow([f"images/{number:03d}.jpg", "|".join(names), split])
    return root


@pytest.fixture(scope="module")
def csv_root(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "csv")


@pytest.fixture
def on_files(tiny, csv_root):
    """The configuration of a short run on the CSV data set."""

    def make(**settings):
        files = {"data": "csv", "data_root": str(csv_root), "data_args": {"file": "labels.csv"}, "workers": 0}
        return tiny(**{"train_images": None, "val_images": None, "epochs": 2} | files | settings)

    return make


# Settings


def test_every_kind_can_be_named_and_has_its_splits():
    assert set(typing.get_args(field_types()["data"])) == set(KINDS) == set(DEFAULT_SPLITS)


def test_data_problems_come_with_all_others():
    values = {"data": "csv", "data_root": "/no/such/folder", "data_args": {"fil": "x"}, "train_images": 5, "lr": -1}
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert [problem.split(": got")[0] for problem in caught.value.problems] == [
        "lr",
        "train_images",
        "data_root",
        "data_args",
    ]
    assert "Did you mean 'file'?" in str(caught.value) and "'/no/such/folder', expected a folder" in str(caught.value)
    with pytest.raises(ConfigError, match="data_root: got nothing, expected the folder of the data set"):
        TrainConfig(data="coco")
    with pytest.raises(ConfigError, match=r"val_split: got 'x', expected nothing: the digits are built in"):
        TrainConfig(val_split="x")


def test_what_only_reading_shows_is_reported_before_a_folder_appears(on_files, csv_root, tmp_path):
    lines = (csv_root / "labels.csv").read_text().splitlines()
    without = [",,".join(line.split(",")[::2]) if line.endswith(",val") else line for line in lines]
    (csv_root / "empty.csv").write_text("\n".join(without))
    wrong = [
        ({"train_split": "trian", "val_split": "vla"}, r"2 problems.*\n  train_split: .*\n  val_split: "),
        ({"data_args": {"file": "labels.csv", "image_folder": "elsewhere"}}, "elsewhere/.* does not exist, nor others"),
        ({"data_args": {"file": "labels.csv", "unlabelled": "bin"}}, "data_args: .*bin"),
        ({"batch_size": 64}, "batch_size: got 64, expected at most 48"),
        ({"data_args": {"file": "empty.csv"}}, "val_split: none of the 16 images of 'val' to measure on has a label"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            fit(on_files(**settings), quiet=True)
    assert not (tmp_path / "runs").exists()


# Runs


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_with_augmentation_a_run_ends_bit_for_bit_as_if_it_had_not_been(on_files, monkeypatch, workers):
    settings = {"workers": workers, "augment": "randaugment", "cutout": 0.4, "mixup": 0.2, "cutmix": 0.5}
    whole = fit(on_files(name="whole", **settings | {"workers": 0}), quiet=True)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            fit(on_files(name="parts", **settings), quiet=True)
    torch.manual_seed(1234)
    parts = resume(Path(on_files().runs_dir) / "parts", quiet=True)
    assert untimed(parts.history) == untimed(whole.history)
    assert_same(final_state(parts.run_dir), final_state(whole.run_dir))
    assert 0 < parts.history[-1]["data_seconds"] <= parts.history[-1]["seconds"]


def test_a_run_learns_the_colours_of_files_and_holds_out_a_stratified_part(on_files):
    config = on_files(epochs=8, lr=0.3, augment="flip", held_out=0.25, resize="crop", backbone_args={}, ema_decay=0)
    result = fit(config, quiet=True)
    _, description = load_model(result.run_dir / "best")
    assert description["classes"] == sorted(COLOURS) and description["resize"] == "crop"
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    data = create_data(config, CPU)
    shares = []
    for batches in (data.train, data.held_out):
        targets = torch.cat([batch.targets for batch in batches.epoch(0)])
        shares.append(targets.float().mean(0))
    assert (shares[0] - shares[1]).abs().max() < 0.13  # 12 images: within an image or two
    assert not set(data.train.names) & set(data.held_out.names)
    assert data.train.num_images + data.held_out.num_images == 48


def test_folders_train_and_another_list_of_classes_is_refused(tiny, tmp_path):
    random = np.random.default_rng(1)
    for split, names in {"train": list(COLOURS), "val": ["red", "blue"]}.items():
        for name in names:
            for number in range(8):
                draw(tmp_path / "folder" / split / name / f"{number}.jpg", [name], random)
    files = {"data": "folder", "data_root": str(tmp_path / "folder"), "train_images": None, "val_images": None}
    result = fit(tiny(epochs=1, batch_size=8, workers=0, **files), quiet=True)
    assert load_model(result.run_dir / "last")[1]["classes"] == sorted(COLOURS)  # val alone has two of the three
    draw(tmp_path / "folder/train/amber/0.jpg", [], random)
    with pytest.raises(CheckpointError, match=r"class 0 is 'amber' \(4 classes\), expected 'blue' \(3\)"):
        resume(result.run_dir, quiet=True)


def test_the_digits_are_augmented_too(tiny):
    data = create_data(tiny(augment="flip", workers=0), CPU)
    assert isinstance(data.train, LoaderBatches) and data.train.name(3) == "image 3"
    plain = create_data(tiny(), CPU).train
    batch = next(data.train.epoch(0))
    for image, row in zip(batch.images, batch.rows, strict=True):
        assert torch.equal(image, plain.images[row]) or torch.equal(image.flip(-1), plain.images[row])
    assert torch.equal(batch.rows, next(plain.epoch(0)).rows)


def test_the_rest_may_be_unknown(on_files, tmp_path):
    (tmp_path / "partial").mkdir()
    root = tmp_path / "partial"
    with open(root / "labels.json", "w") as file:
        rows = [
            [f"{number}.jpg", ["red"], ["blue"]] if number % 2 else [f"{number}.jpg", ["green", "blue"], []]
            for number in range(16)
        ]
        file.write(json.dumps({"classes": sorted(COLOURS), "images": rows}))
    for number in range(16):
        draw(root / f"{number}.jpg", ["red"], np.random.default_rng(number))
    files = {"data": "json", "data_root": str(root), "data_args": {"file": "labels.json"}}
    config = on_files(**files, epochs=1, batch_size=8, mixup=0.2, held_out=0.5)
    data = create_data(config, CPU)
    assert data.val.mostly_unknown and data.train.mostly_unknown
    assert (next(data.val.epoch(0)).targets == -1).sum(1).tolist() == [1] * 8
    assert fit(config, quiet=True).history[0]["mAP"] > 0


# Broken images


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_left_out_and_too_many_stop_the_run_by_name(tmp_path, workers):
    root = write_csv(tmp_path / "csv", train=16, val=1)
    (root / "images/003.jpg").write_bytes(b"\xff\xd8 not an image")
    annotations = load_annotations("csv", root, "train", file="labels.csv")

    def batches(max_broken):
        images = ImageDataset(annotations, 32, max_broken=max_broken)
        return LoaderBatches(images, 4, names=annotations.paths, device=CPU, workers=workers)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = next(batches(1).epoch(0))
        assert (first.targets[3] == -1).all() and (first.targets[:3] >= 0).all()
        with pytest.raises(TrainingError, match=r"^1 of 16 images cannot be read, .*images/003\.jpg") as caught:
            list(batches(0).epoch(0))
    assert isinstance(caught.value.__cause__, BrokenImagesError) and "Traceback" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_how_many_images_may_be_broken_is_a_setting(on_files, tmp_path):
    root = write_csv(tmp_path / "csv", train=16, val=1)
    (root / "images/003.jpg").write_bytes(b"")
    for max_broken in (1, 0):
        data = create_data(on_files(data_root=str(root), batch_size=4, max_broken=max_broken), CPU)
        if max_broken:
            assert len(list(data.train.epoch(0))) == 4
            continue
        with pytest.raises(TrainingError, match=r"more than max_broken=0: images/003\.jpg"):
            list(data.train.epoch(0))
    with pytest.raises(ConfigError, match="max_broken: got 3, expected nothing: the digits are built in"):
        TrainConfig(max_broken=3)


# Splits that are not apart, or not there


@pytest.fixture
def no_split(csv_root):
    """The same images in a list without a split column, which is there only for as long as a test takes."""
    rows = list(csv.reader((csv_root / "labels.csv").open()))
    with open(csv_root / "nosplit.csv", "w", newline="") as file:
        csv.writer(file).writerows(row[:2] for row in rows)
    yield {"data_args": {"file": "nosplit.csv"}}
    (csv_root / "nosplit.csv").unlink()


def test_splits_that_share_images_are_refused_with_the_remedy(on_files, no_split, csv_root, tmp_path):
    remedy = f"mlfast data split csv {csv_root} --file {{}} --split {{}} --into train=0.8 val=0.2"
    for settings, count, arguments in (
        (no_split | {"val_split": "val"}, "share 64 images, such as images/000.jpg", ("nosplit.csv", "train")),
        ({"train_split": "train+val"}, "share 16 images, such as images/048.jpg", ("labels.csv", "train+val")),
    ):
        with pytest.raises(ConfigError) as caught:
            fit(on_files(**settings), quiet=True)
        assert count in str(caught.value) and remedy.format(*arguments) in str(caught.value)
        assert "--held_out 0.2" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_where_there_is_no_other_split_held_out_images_validate(on_files, no_split, csv_root, capsys):
    with pytest.raises(
        ConfigError, match=r"val_split: .* has no split 'val'; .*--held_out 0.2.*mlfast data split csv "
    ):
        fit(on_files(**no_split), quiet=True)
    data = create_data(on_files(held_out=0.25, **no_split), CPU)
    assert data.held_out is None and data.train.num_images + data.val.num_images == 64
    assert abs(data.val.num_images - 16) <= 2
    images = [{row for batch in part.epoch(0) for row in map(bytes, batch.images.numpy())} for part in data[:2]]
    assert not images[0] & images[1]
    assert "held out of train to validate on, as there is no other split" in data.summary
    run = fit(on_files(held_out=0.25, epochs=1, **no_split), quiet=True)
    assert "held_out_mAP" not in run.history[0]
    for split in ("val", "held_out"):
        assert cli.main(["evaluate", str(run.run_dir / "best"), "--split", split, "--format", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["data"], found["images"]) == ("csv/held_out", data.val.num_images)
        assert found["metrics"]["0.5"]["mAP"] == pytest.approx(run.best["mAP"], abs=1e-6)
    table = csv_root / "nosplit.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[-1].replace("063", "none")]))
    assert cli.main(["evaluate", str(run.run_dir / "best")]) == 0  # images that came later change nothing
    table.write_text("\n".join(lines[:32]))
    assert cli.main(["evaluate", str(run.run_dir / "best")]) == 2
    assert "images that the run held out are not there any more, such as images/0" in capsys.readouterr().err
