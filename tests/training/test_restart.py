"""Runs that are killed, at any moment and in any way, and started again."""

import errno
import io
import json
import multiprocessing
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mlfast import cli
from mlfast.training import (
    CheckpointError,
    ConfigError,
    Interrupted,
    TrainConfig,
    TrainingError,
    checkpoint,
    fit,
    resume,
)
from mlfast.training.data_settings import HELD_OUT_FILE
from mlfast.training.trainer import Trainer
from tests.training.runs import assert_same, at_step, fail, final_state, untimed


def run(settings):
    """In a process of its own; one thread, which a killed one leaves nothing behind of."""
    torch.set_num_threads(1)
    fit(TrainConfig(**settings), resume=True, quiet=True)


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported, so that they train within a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.imports"])
    return context


def test_killed_at_ten_moments_the_run_ends_as_if_it_had_not_been(tiny, processes):
    settings = {"epochs": 12, "sam_rho": 0.05}
    whole, config = fit(tiny(name="whole", **settings), quiet=True), tiny(name="parts", **settings)
    moments = random.Random(0)
    for _ in range(10):
        process = processes.Process(target=run, args=(config.to_dict(),))
        process.start()
        process.join(timeout=moments.uniform(0.05, 0.5))
        assert process.is_alive(), "the run was over before it could be killed; give it more epochs"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    parts = fit(config, resume=True, quiet=True)
    assert untimed(parts.history) == untimed(whole.history)
    assert_same(final_state(parts.run_dir), final_state(whole.run_dir))


def test_sigterm_saves_and_stops(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(tiny(), quiet=True)
    assert final_state(tiny_dir(tiny))["step"] == 2


def tiny_dir(tiny):
    return Path(tiny().runs_dir) / "tiny"


def test_auto_starts_what_has_not_begun_and_refuses_other_settings(tiny):
    first = fit(tiny(), resume=True, quiet=True)
    assert fit(tiny(), resume=True, quiet=True).history == first.history  # finished: nothing is left to do
    with pytest.raises(ConfigError, match=r"lr: got 0.2, expected 0.1 as in .*config.yaml"):
        fit(tiny(lr=0.2), resume=True, quiet=True)
    with pytest.raises(ConfigError, match="name: got nothing"):
        fit(tiny(name=None), resume=True, quiet=True)
    before = {path: path.read_bytes() for path in first.run_dir.glob("*.*") if path.name != "state.pt"}
    (first.run_dir / "state.pt").unlink()
    with pytest.raises(ConfigError, match=r"name: .*tiny holds something, but no state.pt to go on from"):
        fit(tiny(), resume=True, quiet=True)
    assert {path: path.read_bytes() for path in first.run_dir.glob("*.*")} == before


def test_what_a_kill_at_the_first_save_leaves_does_not_keep_the_run_from_starting(tiny):
    run_dir = tiny_dir(tiny)
    run_dir.mkdir(parents=True)
    for name in ("config.yaml", "state.pt.partial"):
        (run_dir / name).write_text("")
    assert len(fit(tiny(epochs=1), resume=True, quiet=True).history) == 1


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"text"])
def test_damaged_settings_are_named(tiny, content):
    run_dir = fit(tiny(epochs=1), quiet=True).run_dir
    (run_dir / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        resume(run_dir, quiet=True)


def test_a_state_of_other_settings_is_refused(tiny):
    run_dir = fit(tiny(epochs=1), quiet=True).run_dir
    before = (run_dir / "state.pt").read_bytes()
    settings = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(settings.replace("lr: 0.1", "lr: 0.2").replace("epochs: 1", "epochs: 4"))
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*epochs: got 4, expected 1 as in .*state.pt"):
        resume(run_dir, quiet=True)
    assert (run_dir / "state.pt").read_bytes() == before
    (run_dir / "config.yaml").write_text(settings.replace("workers: null", "workers: 0"))
    assert len(resume(run_dir, quiet=True).history) == 1  # the number of workers changes nothing


def test_what_is_missing_in_a_run_folder_is_named(tiny):
    run_dir = fit(tiny(epochs=1), quiet=True).run_dir
    state = final_state(run_dir)
    other_weights = state["model"] | {"classifier.weight": torch.zeros(2, 2)}
    for wrong, message in (
        (
            {key: value for key, value in state.items() if key != "schedule"},
            "state.pt .* it has no 'schedule'; start a new",
        ),
        (state | {"model": other_weights}, r"state.pt .* Error\(s\) in loading state_dict .*; start a new run"),
        (state | {"processes": state["processes"] * 2}, "trained by 2 processes"),
        ([state], "state.pt is not the state of a run: it holds a list; start a new run"),
    ):
        torch.save(wrong, run_dir / "state.pt")
        with pytest.raises(CheckpointError, match=message):
            resume(run_dir, quiet=True)
    torch.save(state, run_dir / "state.pt")
    metrics = run_dir / "metrics.jsonl"
    for text, message in (
        ('{"epoch": 1, "lo', r"cannot be read \("),
        ("", "has 0 of 1 epochs"),
        (None, "No such file"),
    ):
        metrics.unlink() if text is None else metrics.write_text(text)
        with pytest.raises(CheckpointError, match=f"metrics.jsonl .*{message}.*; put that of the run back"):
            resume(run_dir, quiet=True)


def test_a_full_disk_leaves_the_checkpoint_before(tiny, monkeypatch):
    original, calls = checkpoint.save_state, 0

    def full(path, state):
        nonlocal calls
        calls += 1
        if calls == 3:  # the start, the first epoch, the second
            with checkpoint.atomic_write(path) as file:
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        original(path, state)

    monkeypatch.setattr("mlfast.training.trainer.save_state", full)
    with pytest.raises(TrainingError, match=r"No space left on device\. What .*make room, then: mlfast train --resume"):
        fit(tiny(), quiet=True)
    assert final_state(tiny_dir(tiny))["epoch"] == 1
    monkeypatch.undo()
    assert len(resume(tiny_dir(tiny), quiet=True).history) == 3


def test_a_file_that_takes_no_more_says_so_and_not_what_torch_made_of_it(tmp_path):
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise OSError(errno.EFBIG, "File too large")
            return super().write(data)

    @contextmanager
    def full(path):
        yield Full()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "atomic_write", full)
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save_state(tmp_path / "state.pt", {"weights": torch.zeros(10_000)})


def test_a_run_that_failed_in_its_first_epoch_gives_its_name_back(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, fail)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tiny(), quiet=True)
    with pytest.raises(CheckpointError, match=r"state.pt is missing.*start it again, it may have the same name"):
        resume(tiny_dir(tiny), quiet=True)
    assert len(fit(tiny(lr=0.2, epochs=1), quiet=True).history) == 1
    with pytest.raises(ConfigError, match="exists already"):
        fit(tiny(lr=0.2), quiet=True)


def test_an_interrupted_first_epoch_is_kept(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            fit(tiny(epochs=1), quiet=True)
        at_step(patch, 1, fail)
        with pytest.raises(RuntimeError, match="power cut"):
            resume(tiny_dir(tiny), quiet=True)
    assert final_state(tiny_dir(tiny))["step"] == 2
    with pytest.raises(ConfigError, match="exists already"):
        fit(tiny(epochs=1), quiet=True)


def test_a_damaged_state_names_the_next_step(tiny):
    run_dir = fit(tiny(epochs=1), quiet=True).run_dir
    (run_dir / "state.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"damaged.*start another --name, with --weights .*last to begin from"):
        resume(run_dir, quiet=True)


def test_early_stopping_and_what_decided_are_told(tiny, capsys, monkeypatch):
    monkeypatch.setattr("mlfast.training.early_stopping.EarlyStopping.should_stop", bad_after_one)
    result = fit(tiny(patience=1, epochs=6, held_out=0.25))
    out = capsys.readouterr().out
    assert "data   digits: 49 images of train to train on, 32 of val to validate on, 15 held out of train" in out
    assert "test_resnet, head gap, initial weights: random; loss aam; sgd, lr 0.1, 6 epochs; cpu, fp32" in out
    assert "held-out  EMA held-out" in out
    assert "\nstopped early: no better held-out mAP for 1 epoch (patience 1)\n" in out
    best = result.best
    line = next(line for line in out.splitlines() if line.startswith("best by held-out mAP: "))
    assert f"epoch {best['epoch']}" in line and line.endswith(f" {100 * best['mAP']:.1f}")
    fit(tiny(name="other", epochs=1))
    out = capsys.readouterr().out
    assert "held" not in out and "stopped" not in out


def bad_after_one(self, score, warmed_up):
    self.bad_epochs, self.smoothed = int(self.smoothed > 0), 1.0
    return self.bad_epochs == 1


def test_early_stopping_ends_the_run_and_stays_ended(tiny, monkeypatch):
    monkeypatch.setattr("mlfast.training.early_stopping.EarlyStopping.should_stop", lambda self, score, warm: warm)
    result = fit(tiny(patience=1, epochs=6, warmup=0.5, held_out=0.25), quiet=True)
    assert len(result.history) == 3
    assert {"held_out_mAP", "held_out_ema_mAP"} <= result.history[-1].keys()
    assert resume(result.run_dir, quiet=True).history == result.history


def test_images_that_are_held_out_are_not_trained_on(tiny, monkeypatch, capsys):
    seen = set()
    original = Trainer._train_step

    def step(self, batch):
        seen.update(batch.rows.tolist())
        assert abs(self.held_out.num_images - 16) <= 2 and self.held_out.num_images + self.train.num_images == 64
        held = {image.numpy().tobytes() for image in self.held_out.images}
        assert not held & {image.numpy().tobytes() for image in batch.images}
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", step)
    run = fit(tiny(held_out=0.25, epochs=2), quiet=True)
    assert 46 <= len(seen) <= 50
    assert cli.main(["evaluate", str(run.run_dir / "best"), "--split", "held_out", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 64 - len(seen)
    assert found["metrics"]["0.5"]["mAP"] == pytest.approx(run.best["mAP"], abs=1e-6)
    assert cli.main(["evaluate", str(run.run_dir / "best"), "--split", "train", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(seen)  # without those held out


def test_a_loss_that_is_not_finite_leaves_a_report(tiny, monkeypatch):
    original = Trainer._train_step

    def step(self, batch):
        if self.step == 2:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", step)
    with pytest.raises(TrainingError, match=r"loss became nan .* Its images, norms and rates: .*bad_step\.json"):
        fit(tiny(held_out=0.5, train_images=256), quiet=True)
    report = json.loads((tiny_dir(tiny) / "bad_step.json").read_text())
    held_out = json.loads((tiny_dir(tiny) / HELD_OUT_FILE).read_text())
    assert report["step"] == 2 and report["loss"] != report["loss"]
    assert len(report["images"]) == 16 and report["images"][0].startswith("image ")
    assert not set(report["images"]) & set(held_out)
    assert report["weight_norms"] and report["lr"]
