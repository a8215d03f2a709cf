"""`mlfast evaluate` on the user's own files."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mlfast import cli
from mlfast.deploy import Predictor
from mlfast.deploy.runtimes import open_model
from mlfast.deploy.splits import batches, read_split
from mlfast.evaluation import multilabel_metrics


@pytest.fixture
def run(tmp_path, model_folder, scenes, arrays):
    """A run folder whose settings name a folder of pictures: 30 to train on, 18 to validate on, no label for one."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = ["image,labels,split"]
    for row, array in enumerate(arrays):
        Image.fromarray(array).save(pictures / f"{row}.png")
        labels = "|".join(scenes.classes[k] for k in scenes.targets[row].nonzero()[:, 0])
        lines.append(f"{row}.png,{labels},{'train' if row < 30 else 'dev'}")
    (pictures / "labels.csv").write_text("\n".join(lines))
    settings = {"data": "csv", "data_root": str(pictures), "data_args": {"file": "labels.csv"}, "val_split": "dev"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    shutil.copytree(model_folder[0], tmp_path / "run" / "best")
    return tmp_path / "run" / "best"


def evaluated(capsys, *arguments):
    assert cli.main(["evaluate", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_measured_on_its_own_data(run, model_folder, scenes, capsys):
    found = evaluated(capsys, str(run))
    expected = multilabel_metrics(model_folder[2][30:], scenes.targets[30:].numpy())
    assert (found["data"], found["images"]) == ("csv/dev", 18)
    assert found["metrics"]["0.5"]["mAP"] == pytest.approx(expected.mAP, abs=1e-6)
    assert found["metrics"]["0.5"]["CF1"] == pytest.approx(expected.CF1, abs=1e-6)
    assert [entry["positives"] for entry in found["classes"]] == scenes.targets[30:].sum(0).tolist()
    absent = [entry["name"] for entry in found["classes"] if entry["AP"] is None]
    assert len(absent) == 40 - expected.num_classes_evaluated > 0
    assert any(f"{len(absent)} of 40 classes have no positive here: left out" in note for note in found["notes"])
    zero = evaluated(capsys, str(run), "--absent", "zero", "--f1", "macro")["metrics"]["0.5"]
    same = multilabel_metrics(model_folder[2][30:], scenes.targets[30:].numpy(), absent="zero", f1="macro")
    assert (zero["mAP"], zero["CF1"]) == pytest.approx((same.mAP, same.CF1), abs=1e-6)


def test_thresholds_are_chosen_on_a_split_of_it(run, model_folder, scenes, capsys):
    assert cli.main(["evaluate", str(run), "--tune", "train", "--per-class"]) == 0
    out = capsys.readouterr().out
    assert "thresholds chosen on csv/train, 30 images, for F1" in out
    values = Predictor(run).thresholds
    expected = multilabel_metrics(model_folder[2][30:], scenes.targets[30:].numpy(), values)
    row = next(line for line in out.splitlines() if line.startswith("adaptive"))
    assert row.split()[1:] == [
        f"{100 * getattr(expected, name):.1f}" for name in ("mAP", "OP", "OR", "OF1", "CP", "CR", "CF1")
    ]
    last = out.splitlines()[-1].split()
    assert last[:2] == ["yellow", "9"] and float(last[-1]) == pytest.approx(values[-1], rel=1e-3)


def test_options_name_other_data(run, capsys):
    root = str(run.parent.parent / "pictures")
    arguments = ("--data", "csv", "--data_root", root, "--data_args", "{file: labels.csv}", "--split", "train+dev")
    assert evaluated(capsys, str(run), *arguments)["images"] == 48
    assert evaluated(capsys, str(run), *arguments, "--images", "7")["images"] == 7


def test_a_label_that_the_model_does_not_know_is_named(run, capsys):
    path = run.parent.parent / "pictures" / "labels.csv"
    path.write_text(path.read_text().replace("red 6", "red six"))
    assert cli.main(["evaluate", str(run)]) == 2
    assert "the label 'red six' is not one of the 40 classes" in capsys.readouterr().err


def test_broken_images_count_nowhere_and_are_named(run, model_folder, scenes, capsys):
    (run.parent.parent / "pictures" / "31.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"31\.png is left out"):
        found = evaluated(capsys, str(run))
    kept = [30, *range(32, 48)]
    expected = multilabel_metrics(model_folder[2][kept], scenes.targets[kept].numpy())
    assert found["metrics"]["0.5"]["mAP"] == pytest.approx(expected.mAP, abs=1e-6)
    assert any("1 of them could not be read and count nowhere: 31.png" in note for note in found["notes"])
    for row in range(48):
        (run.parent.parent / "pictures" / f"{row}.png").write_text("no image")
    with pytest.warns(UserWarning, match="left out"):
        assert cli.main(["evaluate", str(run)]) == 2
    assert "images cannot be read, more than max_broken" in capsys.readouterr().err


def test_mostly_unknown_labels(tmp_path, model_folder, scenes, arrays, capsys):
    """As in Open Images: what nobody verified counts nowhere."""
    known = np.random.default_rng(0).random((48, 40)) < 0.3
    targets = np.where(known, scenes.targets.numpy(), -1)
    images = []
    for row, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{row}.png")
        present, absent = ([scenes.classes[k] for k in np.flatnonzero(targets[row] == flag)] for flag in (1, 0))
        images.append([f"{row}.png", present, absent])
    (tmp_path / "val.json").write_text(json.dumps({"classes": scenes.classes, "images": images}))
    found = evaluated(capsys, str(model_folder[0]), "--data", "json", "--data_root", str(tmp_path))
    expected = multilabel_metrics(model_folder[2], targets)
    assert found["metrics"]["0.5"]["mAP"] == pytest.approx(expected.mAP, abs=1e-6)
    assert found["metrics"]["0.5"]["OF1"] == pytest.approx(expected.OF1, abs=1e-6)


def test_batches_are_in_order_and_whole(scenes):
    found = list(batches(scenes, 20))
    assert [len(pixels) for pixels, _ in found] == [20, 20, 8]
    np.testing.assert_array_equal(np.concatenate([t for _, t in found]), scenes.targets.numpy())
    np.testing.assert_array_equal(np.concatenate([p for p, _ in found]), scenes.images.permute(0, 2, 3, 1).numpy())


def test_a_model_of_crops_is_measured_on_crops(run, arrays):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resize": "crop"}))
    wide = np.pad(arrays[0], ((0, 0), (16, 16), (0, 0)))
    Image.fromarray(wide).save(run.parent.parent / "pictures" / "0.png")
    info = open_model(run).info
    images = read_split("csv", str(run.parent.parent / "pictures"), "train", info, file="labels.csv")
    np.testing.assert_array_equal(images[0][0].permute(1, 2, 0).numpy(), arrays[0])
