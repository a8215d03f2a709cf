import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from mlfast.files import atomic_write, write_text
from mlfast.models import create_model
from mlfast.models.checkpoint import save_model
from mlfast.training import CheckpointError, TrainConfig, load_model
from mlfast.training.checkpoint import describe_model, load_state, save_state

CLASSES = ["cat", "dog", "eel"]
CONFIG = TrainConfig(backbone="test_resnet", backbone_args={"drop_path_rate": 0.1}, scale=17.0, image_size=48)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = create_model("test_resnet", 3, scale=17.0).to(memory_format=torch.channels_last)
    model(torch.randn(4, 3, 64, 64))  # batch norm statistics that are not the initial ones
    return model.eval()


def save(folder, model):
    save_model(folder, model, describe_model(CONFIG, model, CLASSES), {"epoch": "3"})


def scores(model):
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.probabilities(model(model.prepare(images)))


def test_round_trip_gives_the_same_probabilities(tmp_path, model):
    save(tmp_path / "best", model)
    loaded, description = load_model(tmp_path / "best")
    torch.testing.assert_close(scores(loaded), scores(model), rtol=0, atol=1e-6)
    assert scores(model).std() > 0.01
    assert not loaded.training
    assert description["classes"] == CLASSES
    assert (description["scale"], description["image_size"], description["head"]) == (17.0, 48, "gap")
    assert description["mean"] == [0.5, 0.5, 0.5]
    with safe_open(tmp_path / "best" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"epoch": "3"}


@pytest.mark.parametrize(
    ("backbone", "head", "head_args"),
    [
        ("test_resnet", "ml_decoder", {"embed_dim": 64, "num_groups": 2, "bias": True}),
        ("test_resnet", "q2l", {"embed_dim": 32}),
        ("test_resnet", "csra", {"num_heads": 2, "lam": 0.3}),
        ("test_vit", "ml_decoder", {"embed_dim": 64}),
    ],
)
def test_every_head_is_built_again(tmp_path, backbone, head, head_args):
    config = TrainConfig(backbone=backbone, head=head, head_args=head_args, scale=17.0, image_size=48)
    torch.manual_seed(0)
    model = create_model(backbone, 3, head=head, head_args=head_args, image_size=48, scale=17.0)
    model(torch.randn(4, 3, 48, 48))
    save_model(tmp_path, model.eval(), describe_model(config, model, CLASSES), {})
    loaded, description = load_model(tmp_path)
    torch.testing.assert_close(scores(loaded), scores(model), rtol=0, atol=1e-6)
    assert (description["head"], description["head_args"]) == (head, head_args)


@pytest.mark.parametrize(
    ("head", "graph", "graph_args"),
    [
        ("gap", "gat_reweight", {"hidden_features": 5, "sigmoid": False}),
        ("gap", "gcn_reweight", {"pooling": "mean"}),
        ("ml_gcn", "none", {}),
        ("gatn", "none", {}),
        ("gap", "gatn", {}),
        ("gatn", "gat_reweight", {}),
    ],
)
def test_every_graph_is_built_again(tmp_path, head, graph, graph_args):
    config = TrainConfig(
        backbone="test_resnet", head=head, graph=graph, graph_args=graph_args, scale=17.0, image_size=48
    )
    torch.manual_seed(0)
    counts = torch.tensor([[5, 4, 0], [4, 9, 1], [0, 1, 2]])
    branch = None if graph == "none" else graph
    model = create_model(
        "test_resnet", 3, head=head, graph=branch, graph_args=graph_args, cooccurrence=counts, scale=17.0
    )
    model(torch.randn(4, 3, 48, 48))
    save_model(tmp_path, model.eval(), describe_model(config, model, CLASSES), {})
    loaded, description = load_model(tmp_path)
    torch.testing.assert_close(scores(loaded), scores(model), rtol=0, atol=1e-6)
    assert (description["graph"], description["graph_args"]) == (graph, graph_args)


def test_a_file_from_before_there_were_head_arguments(tmp_path, model):
    save(tmp_path, model)
    description = json.loads((tmp_path / "config.json").read_text())
    del description["head_args"], description["graph"], description["graph_args"]
    (tmp_path / "config.json").write_text(json.dumps(description))
    torch.testing.assert_close(scores(load_model(tmp_path)[0]), scores(model), rtol=0, atol=1e-6)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file") as file:
        file.write(b"half of the n" + bytes(1 // 0))
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_process_killed_while_it_writes_leaves_the_old_state(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"epoch": 1, "weights": torch.arange(1000)})
    code = f"""
import os, torch
from pathlib import Path
from mlfast.files import atomic_write
with atomic_write(Path({str(path)!r})) as file:
    torch.save({{"epoch": 2}}, file)
    file.flush()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert load_state(path)["epoch"] == 1
    assert (tmp_path / "state.pt.partial").exists()
    save_state(path, {"epoch": 2})  # what the killed process left is not in the way
    assert load_state(path) == {"epoch": 2}
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_or_missing_model_files_are_named(tmp_path, model, name):
    save(tmp_path, model)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"no readable model in {tmp_path}"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"no readable model in {tmp_path}.*{name}"):
        load_model(tmp_path)


def test_another_format_is_refused(tmp_path, model):
    save(tmp_path, model)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, expected 1"):
        load_model(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path, model):
    save(tmp_path, model)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | {"classes": ["one"]}))
    with pytest.raises(CheckpointError, match="do not fit 'test_resnet'"):
        load_model(tmp_path)


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="is missing"):
        load_state(path)
    save_state(path, {"weights": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(path)
