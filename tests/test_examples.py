"""The scripts in examples/ run; where their packages are missing, they compile at least."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def skip_without(*packages):
    """Without an import, which the example itself shall do first."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the generated images out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_compiles(path):
    compile(path.read_text(), path, "exec")


def test_timm_loop_learns():
    """As a user starts it, in a process that has not yet seen torchvision."""
    arguments = ["--images", "256", "--steps", "21", "--batch-size", "16"]
    command = [sys.executable, str(EXAMPLES / "timm_loop.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *steps, last = done.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert 5 < float(last.removeprefix("mAP ")) < 100


def test_lightning_module_learns():
    skip_without("lightning")
    example = load("lightning_module")
    from lightning import Callback

    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            losses.append(float(outputs["loss"]))

    trainer = example.main(["--images", "512", "--epochs", "2"], callbacks=[Losses()])
    assert len(losses) == 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert 0.05 < trainer.callback_metrics["mAP"] < 1


def test_huggingface_trainer_learns(tmp_path):
    skip_without("transformers", "accelerate")
    arguments = ["--images", "512", "--epochs", "2", "--output", str(tmp_path)]
    losses, found = load("huggingface_trainer").main(arguments)
    assert len(losses) == 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert 0.05 < found["eval_mAP"] < 1


@pytest.fixture
def model(tmp_path):
    from mlfast.models import create_model
    from mlfast.models.checkpoint import save_model

    description = {"format": 1, "backbone": "test_resnet", "backbone_args": {}, "head": "gap", "scale": 20.0}
    description |= {"classes": ["cat", "dog"], "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_model(tmp_path / "best", create_model("test_resnet", 2, scale=20.0), description, {})
    return tmp_path / "best"


def test_fastapi_service(model, monkeypatch):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("python_multipart", reason="python-multipart is not installed")
    from fastapi.testclient import TestClient
    from PIL import Image

    monkeypatch.setenv("MODEL", str(model))
    client = TestClient(load("fastapi_service").app)
    assert client.get("/labels").json() == {"cat": 0.5, "dog": 0.5}
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "PNG")
    answer = client.post("/predict", files={"image": picture.getvalue()})
    assert answer.status_code == 200 and set(answer.json()) <= {"cat", "dog"}
    answer = client.post("/predict", files={"image": b"no image"})
    assert answer.status_code == 422 and "cannot identify" in answer.json()["detail"]


def test_gradio_page(model):
    pytest.importorskip("gradio", reason="gradio is not installed")
    page = load("gradio_page").page(str(model))
    predict = page.fn
    assert predict(None, 0) == {}
    picture = np.zeros((40, 40, 3), np.uint8)
    assert set(predict(picture, 0.001)) == {"cat", "dog"} and set(predict(picture, 0)) <= {"cat", "dog"}
