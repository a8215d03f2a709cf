"""The scripts in examples/ run; where their packages are missing, they compile at least."""

import importlib.util
import io
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the generated images out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_compiles(path):
    compile(path.read_text(), path, "exec")


def test_timm_loop_learns(capsys):
    from mlfast.torchvision_compat import import_torchvision

    import_torchvision()  # the example imports timm first, which a mismatched torchvision would break
    metrics = load("timm_loop").main(["--images", "256", "--steps", "21", "--batch-size", "16"])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert 0.05 < metrics.mAP < 1


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
    assert load("gradio_page").page(str(model)) is not None
