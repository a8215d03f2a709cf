"""Whole runs: learning, stopping, continuing, and what lies in the run folder."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import mlfast
from mlfast.data.digits import DigitScenes
from mlfast.evaluation.metrics import multilabel_metrics
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
from mlfast.training.fit import _new_run_dir
from mlfast.training.trainer import Trainer
from tests.training.runs import assert_same, at_step, fail, final_state, untimed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_overfits_32_images(tiny, optimizer):
    lr = {"sgd": 0.5, "adamw": 0.01}[optimizer]
    settings = {"backbone_args": {}, "optimizer": optimizer, "lr": lr, "ema_decay": 0}
    config = tiny(train_images=32, val_images=8, batch_size=16, epochs=25, **settings)
    result = fit(config, quiet=True)
    model, _ = load_model(result.run_dir / "last")
    train = DigitScenes("train", 32, 32)
    with torch.no_grad():
        probabilities = model.probabilities(model(model.prepare(train.images)))
    assert multilabel_metrics(probabilities, train.targets).mAP > 0.95
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 5


@pytest.mark.parametrize("head", ["ml_decoder", "q2l", "csra"])
def test_every_head_trains_and_resumes(tiny, head):
    width = {"head_args": {"embed_dim": 64}} if head != "csra" else {}
    result = fit(tiny(head=head, epochs=2, **width), quiet=True)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert resume(result.run_dir, quiet=True) == result
    model, description = load_model(result.run_dir / "best")
    assert description["head"] == head and model.training is False


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(
    ("head", "graph", "vectors"),
    [("gap", "gat_reweight", "cooccurrence"), ("ml_gcn", "gcn_reweight", "vectors.npy")],
)
def test_graph_branches_train_and_resume(tiny, tmp_path, head, graph, vectors):
    if vectors != "cooccurrence":
        vectors = str(tmp_path / vectors)
        np.save(vectors, np.random.default_rng(0).normal(size=(40, 12)))
    result = fit(tiny(head=head, graph=graph, label_vectors=vectors, epochs=2), quiet=True)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert resume(result.run_dir, quiet=True) == result
    model, description = load_model(result.run_dir / "last")
    assert description["graph"] == graph
    assert model.graph_branch.kind == graph[:3]
    assert model.graph_branch.vectors.shape == (40, 40 if vectors == "cooccurrence" else 12)


def test_label_vectors_that_cannot_be_read(tiny, tmp_path):
    (tmp_path / "wrong.npy").write_text("no array")
    with pytest.raises(
        ConfigError, match=r"label_vectors: got '.*wrong.npy', expected vectors of the labels: .*(magic|pickle)"
    ):
        fit(tiny(graph="gat_reweight", label_vectors=str(tmp_path / "wrong.npy")), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(tiny):
    runs = [fit(tiny(name=f"run{number}", seed=seed), quiet=True) for number, seed in enumerate((0, 0, 1))]
    first, second, other = (untimed(run.history) for run in runs)
    assert first == second != other


@pytest.mark.parametrize("stop_after", [1, 4, 6])  # in the first epoch, at the end of one, in the middle of the second
def test_interrupt_and_resume_equal_an_uninterrupted_run_bit_for_bit(tiny, monkeypatch, stop_after):
    whole = fit(tiny(name="whole"), quiet=True)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, stop_after, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match=r"mlfast train --resume .*parts") as stopped:
            fit(tiny(name="parts"), quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    state = final_state(stopped.value.run_dir)
    assert 4 * state["epoch"] + state["step"] == stop_after
    torch.manual_seed(1234)  # whatever the new process's random state is
    parts = resume(stopped.value.run_dir, quiet=True)
    assert untimed(parts.history) == untimed(whole.history)
    assert parts.best == whole.best
    assert_same(final_state(parts.run_dir), final_state(whole.run_dir))
    for name in ("best", "last"):
        assert_same(*(load_file(run.run_dir / name / "model.safetensors") for run in (whole, parts)))


def test_a_run_of_so_many_updates_and_its_continuation(tiny, monkeypatch):
    whole = fit(tiny(name="whole", steps=10), quiet=True)  # two epochs of 4 steps, and a half
    state = final_state(whole.run_dir)
    assert len(whole.history) == state["epoch"] == 3 and state["schedule"]["last_epoch"] == 9
    assert state["optimizer"]["param_groups"][0]["lr"] < 1e-5 < whole.history[1]["lr"]
    with monkeypatch.context() as patch:
        at_step(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(tiny(name="parts", steps=10), quiet=True)
    parts = resume(whole.run_dir.with_name("parts"), quiet=True)
    assert untimed(parts.history) == untimed(whole.history)
    assert_same(final_state(parts.run_dir)["model"], state["model"])


def test_a_crashed_run_continues_from_its_last_epoch(tiny, monkeypatch):
    whole = fit(tiny(name="whole"), quiet=True)
    with monkeypatch.context() as patch:
        at_step(patch, 10, fail)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tiny(name="parts"), quiet=True)
    run_dir = whole.run_dir.with_name("parts")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')  # the crash came in the middle of a line
    parts = resume(run_dir, quiet=True)
    assert untimed(parts.history) == untimed(whole.history)
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == parts.history
    assert_same(final_state(run_dir), final_state(whole.run_dir))


def test_resume_of_a_finished_run_changes_nothing(tiny):
    done = fit(tiny(epochs=1), quiet=True)
    before = (done.run_dir / "state.pt").read_bytes()
    again = resume(done.run_dir, quiet=True)
    assert again == done
    assert (done.run_dir / "state.pt").read_bytes() == before


def test_the_run_folder(tiny, capsys):
    result = fit(tiny(epochs=2))
    names = sorted(str(path.relative_to(result.run_dir)) for path in result.run_dir.rglob("*") if path.is_file())
    assert names == [
        "best/config.json",
        "best/model.safetensors",
        "config.yaml",
        "curves.png",
        "last/config.json",
        "last/model.safetensors",
        "metrics.jsonl",
        "state.pt",
    ]
    assert TrainConfig.from_dict(yaml.safe_load((result.run_dir / "config.yaml").read_text())) == tiny(epochs=2)
    assert (result.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["epoch"] for line in lines] == [1, 2]
    keys = {"loss", "lr", "images_per_second", "seconds", "val_loss", "mAP", "OF1", "CF1", "ema_mAP", "ema_val_loss"}
    assert keys <= set(lines[0])
    shown = capsys.readouterr().out
    assert "last EMA" in shown and str(result.run_dir / "curves.png") in shown


def test_best_is_the_better_of_weights_and_average_over_all_epochs(tiny):
    result = fit(tiny(), quiet=True)
    scores = [(record[prefix + "mAP"], record["epoch"], prefix) for record in result.history for prefix in ("", "ema_")]
    assert result.best["mAP"] == pytest.approx(
        max(score for score, _, _ in scores), abs=1e-4
    )  # the later of equal ones
    assert (result.best["mAP"], result.best["epoch"], result.best["prefix"]) in scores
    model, description = load_model(result.run_dir / "best")
    val = DigitScenes("val", 32, 32)
    with torch.no_grad():
        probabilities = model.probabilities(model(model.prepare(val.images)))
    assert multilabel_metrics(probabilities, val.targets).mAP == pytest.approx(result.best["mAP"], abs=1e-6)
    assert description["classes"] == val.classes


def test_of_equal_epochs_the_later_is_kept(tiny, monkeypatch):
    scores = iter([(0.5, 0.3), (0.50004, 0.49), (0.2, 0.50002), (0.4, 0.4)])
    original = Trainer._finish_epoch

    def finish(self, record):
        record["mAP"], record["ema_mAP"] = next(scores)
        original(self, record)

    monkeypatch.setattr(Trainer, "_finish_epoch", finish)
    result = fit(tiny(epochs=4), quiet=True)
    assert result.best == {"mAP": 0.50002, "epoch": 3, "prefix": "ema_"}


def test_without_average(tiny):
    result = fit(tiny(epochs=1, ema_decay=0), quiet=True)
    assert not any(key.startswith("ema_") for key in result.history[0])
    assert final_state(result.run_dir)["ema"] is None


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tiny, monkeypatch):
    class Breaks(mlfast.AAMLoss):
        calls = 0

        def forward(self, cos, target):
            Breaks.calls += cos.requires_grad
            return super().forward(cos, target) * (math.nan if Breaks.calls >= 6 else 1)

    monkeypatch.setattr(mlfast, "AAMLoss", Breaks)
    with pytest.raises(TrainingError, match=r"^the loss became nan in epoch 2, by step 4 .*try a lower lr"):
        fit(tiny(), quiet=True)
    run_dir = tiny().runs_dir + "/tiny"
    state = torch.load(run_dir + "/state.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_an_existing_run_is_never_overwritten(tiny):
    first = fit(tiny(epochs=1), quiet=True)
    before = {path: path.read_bytes() for path in first.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"exists already.*--resume"):
        fit(tiny(epochs=1), quiet=True)
    assert {path: path.read_bytes() for path in first.run_dir.rglob("*") if path.is_file()} == before
    names = [fit(tiny(epochs=1, name=None), quiet=True).run_dir.name for _ in range(2)]
    assert names == ["digits-test_resnet-1", "digits-test_resnet-2"]


@pytest.mark.parametrize("settings", [{"backbone": "resnet51"}, {"device": "cuda:99"}, {"device": "gpu"}])
def test_a_run_that_cannot_start_leaves_no_folder(tiny, settings, tmp_path):
    with pytest.raises(ValueError, match=r"unknown backbone|device: got"):
        fit(tiny(**settings), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a run folder: it has no config\.yaml"):
        resume(tmp_path)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"channels_last": False}, {"deterministic": True}])
def test_options_that_change_the_arithmetic_still_train(tiny, settings):
    usual = fit(tiny(name="usual", epochs=2), quiet=True)
    changed = fit(tiny(name="changed", epochs=2, **settings), quiet=True)
    assert changed.history[-1]["loss"] == pytest.approx(usual.history[-1]["loss"], rel=0.1)
    if "precision" in settings:
        assert changed.history[-1]["loss"] != usual.history[-1]["loss"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_runs_without_a_name_take_a_number_each(tmp_path):
    """Before data are read: one that begins while another prepares must not share its folder."""
    config = TrainConfig(backbone="test_resnet", runs_dir=str(tmp_path))
    taken = [_new_run_dir(config) for _ in range(2)]
    assert [path.name for path in taken] == ["digits-test_resnet-1", "digits-test_resnet-2"]
    assert all(path.is_dir() for path in taken)


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no_such_model"):
        fit(TrainConfig(backbone="no_such_model", runs_dir=str(tmp_path)), quiet=True)
    assert list(tmp_path.iterdir()) == []
