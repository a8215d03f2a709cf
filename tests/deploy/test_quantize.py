import shutil

import numpy as np
import pytest
import torch

from mlfast import cli
from mlfast.deploy import Export, Predictor, quantize
from mlfast.deploy.evaluate import predict_split
from mlfast.deploy.runtimes import open_model


def test_int8(tuned_folder, tmp_path, scenes, capsys):
    pytest.importorskip("nncf", reason="nncf is not installed")
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    folder = shutil.copytree(
        tuned_folder[0], tmp_path / "best", ignore=shutil.ignore_patterns("model.xml", "model.bin")
    )
    arguments = ["--format", "openvino", "--int8", "--data", "digits", "--images", "48", "--max-drop", "100"]
    assert cli.main(["export", str(folder), *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}/model-int8.xml: calibrated with 48 images of digits/train;")
    assert "48 images of digits/val" in out and "Statistics" not in out
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".xml", ".bin")) == [
        "model-int8.bin",
        "model-int8.xml",
    ]
    model = openvino.Core().read_model(folder / "model-int8.xml")
    assert sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()) > 10
    assert model.get_rt_info(["model_info", "labels"]).astype(str).startswith("red_0 ")
    predictor = Predictor(folder / "model-int8.xml")
    np.testing.assert_array_equal(predictor.thresholds, tuned_folder[1])
    # What was printed is what a user gets.
    for title, path in (("float32", folder), ("int8", folder / "model-int8.xml")):
        predictions = predict_split(open_model(path), scenes)
        row = next(line for line in out.splitlines() if line.startswith(title)).split()
        metrics = predictions.metrics(tuned_folder[1])
        assert float(row[1]) == pytest.approx(100 * metrics.mAP, abs=0.06)
        assert float(row[-1]) == pytest.approx(100 * metrics.CF1, abs=0.06)


def test_a_model_that_got_worse_is_refused_and_leaves_nothing(
    tuned_folder, model_folder, exported, tmp_path, scenes, monkeypatch
):
    pytest.importorskip("nncf", reason="nncf is not installed")
    file = exported("openvino").path

    def copied(path):
        shutil.copy(file, path)
        shutil.copy(file.with_suffix(".bin"), path.with_suffix(".bin"))
        return Export(path, 0.0, 16)

    middle = np.median(model_folder[2], axis=0)  # half of the images have each class

    class Worse:
        """Images whose labels are what the model sees, and the second time the opposite."""

        classes, turns = scenes.classes, 0

        def __len__(self):
            return len(scenes)

        def __getitem__(self, row):
            self.turns += 1
            seen = torch.from_numpy(model_folder[2][row] > middle).to(torch.int8)
            return scenes[row][0], seen if self.turns <= len(scenes) else 1 - seen

    monkeypatch.setattr(quantize, "export_model", lambda folder, kind, path, **_: copied(path))
    monkeypatch.setattr(quantize, "_quantize", lambda whole, path, calibration: copied(path).images)
    output = tmp_path / "new" / "int8.xml"
    with pytest.raises(
        ValueError, match=r"mAP falls from 100.00 to [\d.]+ on 48 images, by more than 1 points.*--max-drop"
    ):
        quantize.export_int8(tuned_folder[0], scenes, Worse(), output)
    assert list(output.parent.iterdir()) == []
    same = quantize.export_int8(tuned_folder[0], scenes, scenes, output)
    assert same.before.mAP == same.after.mAP and Predictor(output).classes == scenes.classes


def test_a_missing_package_is_named(tuned_folder, scenes, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'int8 needs nncf: pip install "\.\[int8\]" in a checkout of mlfast'):
        quantize.export_int8(tuned_folder[0], scenes, scenes)
