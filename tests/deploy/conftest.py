"""A small model in a folder, with thresholds beside it, and its exports."""

import numpy as np
import pytest
import torch

from mlfast.data import DigitScenes
from mlfast.deploy import export_model
from mlfast.deploy.thresholds import rounded_down, write_thresholds
from mlfast.evaluation import tune_thresholds
from mlfast.models import create_model
from mlfast.models.checkpoint import save_model

SIZE = 32
HEAD_ARGS = {"embed_dim": 64, "feedforward_dim": 64, "num_groups": 20}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep the generated images out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def every_test_has_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def scenes():
    return DigitScenes("val", 48, SIZE)


@pytest.fixture(scope="session")
def arrays(scenes):
    """The scenes as a user has them: uint8 [H, W, 3]."""
    return list(scenes.images.permute(0, 2, 3, 1).numpy())


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, scenes):
    """Write a model that nobody trained, but whose batch norms have seen images: its scores are spread."""

    def make(scale=20.0):
        torch.manual_seed(0)
        model = create_model("test_resnet", 40, head="ml_decoder", head_args=HEAD_ARGS, scale=scale).train()
        for _ in range(3):
            model(model.prepare(scenes.images))
        description = {
            "format": 1,
            "backbone": "test_resnet",
            "backbone_args": {},
            "head": "ml_decoder",
            "head_args": HEAD_ARGS,
            "classes": scenes.classes,
            "scale": scale,
            "image_size": SIZE,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        }
        folder = tmp_path_factory.mktemp("run") / "best"
        save_model(folder, model.eval(), description, {})
        return folder, model

    return make


@pytest.fixture(scope="session")
def model_folder(make_folder, scenes):
    """Folder and model, and the probabilities [48, 40] that it gives to the scenes; no thresholds."""
    folder, model = make_folder()
    with torch.no_grad():
        truth = model.probabilities(model(model.prepare(scenes.images))).numpy()
    assert truth.std() > 0.05 and 0.2 < (truth > 0.5).mean() < 0.8
    return folder, model, truth


@pytest.fixture(scope="session")
def tuned_folder(make_folder, scenes, model_folder):
    """The same model with tuned thresholds, and these as an array."""
    folder, _ = make_folder()
    tuned = tune_thresholds(model_folder[2], scenes.targets.numpy())
    values = rounded_down(tuned.values, tuned.below)
    write_thresholds(folder, scenes.classes, tuned, values, "the test")
    assert len(np.unique(values)) > 20
    return folder, values


@pytest.fixture(scope="session")
def exported(tuned_folder):
    """The files of both runtimes, written once; thresholds are in the metadata, OpenVINO's are folded."""
    made = {}

    def export(file_format):
        for package in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}[
            file_format
        ]:
            pytest.importorskip(package)
        if file_format not in made:
            made[file_format] = export_model(tuned_folder[0], file_format, fold_thresholds=file_format == "openvino")
        return made[file_format]

    return export
