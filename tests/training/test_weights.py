"""Runs that start from weights: of another run, of other classes, and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlfast.models import create_model
from mlfast.training import ConfigError, TrainConfig, fit, resume
from mlfast.training.initial_weights import load_initial_weights


@pytest.fixture
def first(tiny):
    return fit(tiny(name="first", epochs=1), quiet=True).run_dir


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_run_starts_from_the_weights_of_another_and_says_so(tiny, first, capsys):
    settings = {"name": "second", "epochs": 1, "lr": 1e-9, "ema_decay": 0}
    second = fit(tiny(weights=str(first / "last"), **settings))
    told = capsys.readouterr().out
    assert "weights of " in told and "(100.0%)" in told and f"initial weights: {first / 'last'};" in told
    before, after = (load_file(run / "last" / "model.safetensors") for run in (first, second.run_dir))
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before if name.endswith("conv.weight"))
    assert TrainConfig.from_dict(tiny(weights=str(first / "last")).to_dict()).weights == str(first / "last")
    for path in (first / "last").iterdir():
        path.unlink()
    assert resume(second.run_dir, quiet=True).history == second.history  # its own state is all that it needs


def model_of(classes, head="gap"):
    torch.manual_seed(0)
    args = {"embed_dim": 64} if head == "ml_decoder" else {}
    return create_model("test_resnet", classes, head=head, head_args=args, image_size=32)


def test_what_belongs_to_other_classes_begins_anew(first):
    model = model_of(40)
    own, theirs = tensors_of(model), load_file(first / "last" / "model.safetensors")
    told = load_initial_weights(model, str(first / "last"), [f"class {n}" for n in range(40)], 0.9)
    assert "other classes, so what belongs to single classes begins anew: classifier" in told
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name] if name.startswith("backbone.") else own[name]), name
    fewer = model_of(7)
    assert "wrong shape" in load_initial_weights(fewer, str(first / "last"), [f"class {n}" for n in range(7)], 0.9)
    assert torch.equal(fewer.state_dict()["backbone.conv1.0.weight"], theirs["backbone.conv1.0.weight"])


def test_a_decoder_is_kept_and_its_groups_are_not(tmp_path):
    (tmp_path / "config.json").write_text('{"classes": ["a", "b", "c"]}')
    source = model_of(3, "ml_decoder")
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(1)
    save_file(tensors_of(source), tmp_path / "model.safetensors")
    model = model_of(3, "ml_decoder")
    own, theirs = tensors_of(model), source.state_dict()
    told = load_initial_weights(model, str(tmp_path), ["x", "y", "z"], 0.9)
    anew = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, theirs[name])}
    assert anew and all(torch.equal(model.state_dict()[name], own[name]) and name in told for name in anew)
    assert all(3 in own[name].shape or "group" in name for name in anew)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_what_is_refused(tiny, first, tmp_path, capsys):
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    torch.save({"state_dict": Code()}, tmp_path / "code2.pth")
    save_file({"backbone.conv1.0.weight": torch.zeros(3)}, tmp_path / "little.safetensors")
    for path, message in (
        (tmp_path / "absent", "weights: got '.*absent', expected a model folder or a file that exists"),
        (tmp_path, "expected a model folder or a file that exists .*model.safetensors"),
        (tmp_path / "code.pth", "code.pth (holds more than data|is damaged)"),
        (tmp_path / "code2.pth", "holds more than data .*mlfast.load_checkpoint"),
        (tmp_path / "little.safetensors", "which gives 0.0% of the model, expected at least min_match, 0.9"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(tiny(weights=str(path)), quiet=True)
    assert "run" not in capsys.readouterr().out
    assert not (tmp_path / "runs" / "tiny").exists()
    with pytest.raises(ConfigError, match="weights: got 'x' with pretrained true, expected one of the two"):
        tiny(weights="x", pretrained=True)
