import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import mlfast
from mlfast.data.images import ImageError
from mlfast.deploy import Predictor
from mlfast.models.checkpoint import CheckpointError, load_model


def probabilities(predictions):
    return np.stack([prediction.probabilities for prediction in predictions])


def test_predicts_what_the_model_says(model_folder, arrays):
    folder, _, truth = model_folder
    predictor = mlfast.Predictor(folder, batch_size=7)
    results = predictor(arrays)
    np.testing.assert_allclose(probabilities(results), truth, atol=1e-6)
    for result, row in zip(results, truth, strict=True):
        expected = {predictor.classes[k]: row[k] for k in np.argsort(-row) if row[k] >= 0.5}
        assert list(result.labels) == list(expected)
        assert result.labels == pytest.approx(expected, abs=1e-6)


def test_one_image_many_kinds(tmp_path, model_folder, arrays):
    predictor = Predictor(model_folder[0])
    Image.fromarray(arrays[0]).save(tmp_path / "a.png")
    alone = predictor(arrays[0])
    assert isinstance(alone.labels, dict)
    mixed = predictor([tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(arrays[0]), arrays[0]])
    for prediction in [*mixed, predictor(tmp_path / "a.png"), predictor(Image.fromarray(arrays[0]))]:
        np.testing.assert_allclose(prediction.probabilities, alone.probabilities, atol=1e-6)
    assert predictor([]) == []
    assert len(predictor(image for image in arrays[:3])) == 3
    assert predictor(np.kron(arrays[0], np.ones((4, 3, 1), np.uint8))).probabilities.shape == (40,)


def test_thresholds(tuned_folder, model_folder, arrays):
    folder, values = tuned_folder
    _, _, truth = model_folder
    predictor = Predictor(folder)
    np.testing.assert_array_equal(predictor.thresholds, values)
    for result, row in zip(predictor(arrays), truth, strict=True):
        assert set(result.labels) == {predictor.classes[k] for k in np.flatnonzero(row >= values)}
    assert len(Predictor(folder, threshold=0.0)(arrays[0]).labels) == 40
    assert Predictor(folder, threshold=1.0)(arrays[0]).labels == {}
    with pytest.raises(ValueError, match="threshold: got 2, expected a probability"):
        Predictor(folder, threshold=2)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        Predictor(folder, batch_size=0)


def test_bad_images_are_named_and_leave_the_others_alone(tmp_path, model_folder, arrays):
    predictor = Predictor(model_folder[0], batch_size=2)
    (tmp_path / "bad.jpg").write_text("no image")
    images = [arrays[0], tmp_path / "bad.jpg", np.zeros((2, 2)), np.zeros((3, 3)), arrays[1]]
    results = list(predictor.stream(images))
    assert [isinstance(result, ImageError) for result in results] == [False, True, True, True, False]
    assert str(results[1]).startswith(f"{tmp_path}/bad.jpg: cannot identify")
    assert str(results[3]).startswith("images[3]: the array is float64")
    np.testing.assert_allclose(results[4].probabilities, model_folder[2][1], atol=1e-6)
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        predictor(images)
    with pytest.raises(TypeError, match="got int"):
        predictor(7)


@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino"])
def test_threads_share_a_predictor(runtime, tuned_folder, exported, arrays):
    predictor = Predictor(tuned_folder[0] if runtime == "torch" else exported(runtime).path, batch_size=5)
    alone = [predictor(image).probabilities for image in arrays[:16]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda turn: probabilities(predictor(arrays[turn : turn + 8])), [0, 8] * 4))
    for turn, found in enumerate(together):
        np.testing.assert_allclose(found, alone[8 * (turn % 2) : 8 * (turn % 2) + 8], atol=1e-6)


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_unread(tmp_path, model_folder):
    mark = tmp_path / "code-has-run"
    for name in ("model.pt", "model.pth", "model.ckpt", "model.pkl", "model.pth.tar"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(mark)))
        with pytest.raises(CheckpointError, match="runs whatever code is in it: refused"):
            Predictor(tmp_path / name)
    # A description that asks for weights from a pickle.
    torch.save(Evil(mark), tmp_path / "evil.pth")
    folder = shutil.copytree(model_folder[0], tmp_path / "best")
    description = json.loads((folder / "config.json").read_text())
    overlay = {"file": str(tmp_path / "evil.pth")}
    for other_weights in (
        {"checkpoint_path": str(tmp_path / "evil.pth")},
        {"pretrained": True, "pretrained_cfg_overlay": overlay},
        {"pretrained": True, "pretrained_cfg": overlay},
    ):
        (folder / "config.json").write_text(json.dumps(description | {"backbone_args": other_weights}))
        Predictor(folder)
        assert not mark.exists()


def test_statistics_are_those_that_were_saved(tmp_path, model_folder, arrays):
    folder = shutil.copytree(model_folder[0], tmp_path / "best")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"mean": [0.1, 0.2, 0.3], "std": [1, 0.5, 2]}))
    model, _ = load_model(folder)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == [1, 0.5, 2]
    assert abs(Predictor(folder)(arrays[0]).probabilities - model_folder[2][0]).max() > 1e-3  # rounding is 1e-6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "does not exist"),
        ("model.pt2", b"", "torch.export.load"),
        ("model.safetensors", b"", "pass the folder"),
        ("photo.jpg", b"", "is not a model"),
        ("model.onnx", b"not onnx", "not a readable ONNX model"),
        ("model.xml", b"<not openvino>", "not a readable OpenVINO model"),
    ],
)
def test_what_is_no_model(tmp_path, name, content, message):
    for suffix, package in ((".onnx", "onnxruntime"), (".xml", "openvino")):
        if name.endswith(suffix):
            pytest.importorskip(package)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Predictor(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "holds list"),
        ({"classes": None}, "classes is None, expected list"),
        ({"classes": [1]}, "classes must be names"),
        ({"scale": "x"}, "scale is 'x', expected float or int"),
        ({"scale": float("nan")}, "scale is nan, expected a finite number"),
        ({"cosine": "no"}, "cosine is 'no', expected bool"),
        ({"image_size": True}, "image_size is True, expected int"),
        ({"head_args": [1]}, r"head_args is \[1\], expected dict or NoneType"),
        ({"backbone_args": {"head": "gap"}}, "describes no model: .* multiple values for keyword argument 'head'"),
        ({"mean": [1]}, r"mean is \[1\], expected three numbers"),
        ({"resize": "letterbox"}, "contradicts itself"),
        ({"std": [0, 1, 1]}, "contradicts itself"),
    ],
)
def test_a_damaged_description(tmp_path, model_folder, change, message):
    folder = shutil.copytree(model_folder[0], tmp_path / "best")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | change if change else change))
    with pytest.raises(CheckpointError, match=message):
        Predictor(folder)


def test_a_model_of_crops_gets_the_middle_of_an_image(tmp_path, model_folder, arrays):
    folder = shutil.copytree(model_folder[0], tmp_path / "best")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"resize": "crop"}))
    wide = np.concatenate([np.zeros((32, 20, 3), np.uint8), arrays[0], np.full((32, 20, 3), 255, np.uint8)], 1)
    found = Predictor(folder)([wide, wide.transpose(1, 0, 2)])
    np.testing.assert_allclose(found[0].probabilities, model_folder[2][0], atol=1e-6)
    turned = Predictor(model_folder[0])(np.ascontiguousarray(arrays[0].transpose(1, 0, 2)))
    np.testing.assert_allclose(found[1].probabilities, turned.probabilities, atol=1e-6)


def test_thresholds_of_other_weights_are_refused(tmp_path, tuned_folder):
    folder = shutil.copytree(tuned_folder[0], tmp_path / "best")
    path = folder / "thresholds.json"
    stored = json.loads(path.read_text())
    for change, message in [
        ({"weights_sha256": "0"}, "tuned for other weights"),
        ({"classes": stored["classes"][1:]}, "belongs to other classes"),
        ({"format": 9}, "of format 1"),
        ({"classes": 3}, "is damaged"),
        ({"classes": [entry | {"threshold": 1.5} for entry in stored["classes"]]}, "something else than thresholds"),
    ]:
        path.write_text(json.dumps(stored | change))
        with pytest.raises(CheckpointError, match=message):
            Predictor(folder)


def test_devices(model_folder, exported):
    with pytest.raises(ValueError, match="device: got 'no'"):
        Predictor(model_folder[0], device="no")
    with pytest.raises(ValueError, match="exported files run on the CPU"):
        Predictor(exported("onnx").path, device="cuda")
