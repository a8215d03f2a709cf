import json
import shutil

import numpy as np
import pytest

from mlfast.deploy.evaluate import predict_split, table, tune
from mlfast.deploy.runtimes import open_model
from mlfast.deploy.thresholds import NAME, read_thresholds, rounded_down, write_thresholds
from mlfast.evaluation import Predictions, multilabel_metrics, tune_thresholds


def test_predict_split_is_the_model_on_every_image(model_folder, scenes):
    predictions = predict_split(open_model(model_folder[0]), scenes, batch_size=20)
    assert predictions.num_images == 48
    expected = multilabel_metrics(model_folder[2], scenes.targets.numpy())
    assert predictions.metrics().mAP == pytest.approx(expected.mAP, abs=1e-6)
    assert pytest.approx(expected.OF1, abs=1e-6) == predictions.metrics().OF1


def test_classes_in_another_order_are_refused(model_folder, scenes):
    class Other:
        classes = scenes.classes[::-1]

    with pytest.raises(ValueError, match="class 0 of the model is 'red 0', that of the data 'yellow 9'"):
        predict_split(open_model(model_folder[0]), Other())
    Other.classes = scenes.classes[:3]
    with pytest.raises(ValueError, match="model has 40 classes, the data 3"):
        predict_split(open_model(model_folder[0]), Other())


def test_tuned_thresholds_are_better_where_they_were_tuned():
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 6)) < 0.2).astype(np.int8)
    scores = np.clip(0.2 + 0.2 * targets + 0.1 * rng.standard_normal((400, 6)), 0.001, 0.999)
    predictions = Predictions(6)
    predictions.add(scores, targets)
    tuned = tune(predictions)
    exact = tune_thresholds(scores.astype(np.float32), targets)
    assert (tuned.values <= exact.values).all() and np.allclose(tuned.values, exact.values, rtol=1e-3)
    at_half, adaptive = predictions.metrics(), predictions.metrics(threshold=tuned.values)
    assert adaptive.CF1 > at_half.CF1 + 0.2
    text = table({"0.5": at_half, "adaptive": adaptive})
    assert [len(line) for line in text.splitlines()] == [8 + 7 * 7] * 3
    assert text.splitlines()[2].split()[-1] == f"{100 * adaptive.CF1:.1f}"


def test_rounded_down():
    values = np.array([1.0, 0.5, 0.3, 0.123456, 0.0099999, 3.14159e-7, 0.99999999])
    expected = [1.0, 0.5, 0.3, 0.1234, 0.009999, 3.141e-7, 0.9999]
    nothing = np.full(len(values), np.nan)
    np.testing.assert_allclose(rounded_down(values, nothing), expected, rtol=1e-12)
    random = np.random.default_rng(0).random(1000)
    rounded = rounded_down(random, np.full(1000, np.nan))
    assert (rounded <= random).all() and (rounded > random * 0.998).all()


def test_rounding_keeps_clear_of_the_next_score():
    values, below = np.array([0.99996, 0.50003, 0.3, 0.2]), np.array([0.99993, 0.50002, np.nextafter(0.3, 0), 0.1])
    rounded = rounded_down(values, below)
    np.testing.assert_allclose(rounded, [0.999945, 0.500025, 0.3, 0.2], rtol=1e-12)
    pairs = np.sort(1 - np.random.default_rng(0).random((1000, 2)) ** 4 * 1e-3)
    rounded = rounded_down(pairs[:, 1], pairs[:, 0])
    assert (rounded <= pairs[:, 1]).all() and (rounded > pairs.mean(axis=1) - 1e-15).all()


def test_saturated_scores_keep_their_f1_and_precision():
    predictions = Predictions(1)
    predictions.add(np.float32([[0.99997], [0.99996], [0.99993], [0.99991]]), np.int8([[1], [1], [0], [0]]))
    for options in ({}, {"min_precision": 0.95}):
        tuned = tune(predictions, **options)
        assert predictions.metrics(threshold=tuned.values).CF1 == 1, options


def test_thresholds_file(tmp_path, model_folder, scenes):
    folder = shutil.copytree(model_folder[0], tmp_path / "best")
    assert read_thresholds(folder, scenes.classes) is None
    scores, targets = model_folder[2], scenes.targets.numpy().copy()
    targets[:, 3] = 0
    tuned = tune_thresholds(scores, targets)
    write_thresholds(folder, scenes.classes, tuned, tuned.values, "48 images")
    np.testing.assert_array_equal(read_thresholds(folder, scenes.classes).values, tuned.values)
    assert read_thresholds(folder, scenes.classes).chosen_on == "48 images"
    stored = json.loads((folder / NAME).read_text())
    assert (stored["chosen_on"], stored["chosen_for"]) == ("48 images", "F1")
    missing = stored["classes"][3]
    assert missing == {"name": "red 3", "threshold": 0.5, "reached": None, "positives": 0, "doubt": "default"}
    few = [k for k, entry in enumerate(stored["classes"]) if entry.get("doubt") == "few positives"]
    assert few == tuned.unreliable and len(few) > 0
    assert {path.name for path in folder.iterdir()} == {NAME, "config.json", "model.safetensors"}
