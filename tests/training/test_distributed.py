"""Two processes on gloo against one."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from mlfast.data.digits import DigitScenes
from mlfast.training import CheckpointError, ConfigError, TrainConfig, fit, load_model, resume
from mlfast.training.distributed import Processes, joined_processes
from mlfast.training.optimization import create_loss
from tests.training.runs import final_state, untimed

# Batch norm would see half a batch in each process, and random depth another one.
SETTINGS = {"backbone_args": {"norm_layer": "layernorm2d"}, "epochs": 2, "lr": 0.05}


def process(rank, port, settings, continued):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if continued:
        resume(continued)
    else:
        fit(TrainConfig(**settings))


@pytest.fixture(scope="module")
def two_processes():
    """Runs fit, or resume, in two processes; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.imports"])

    def run(settings=None, continued=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = [context.Process(target=process, args=(rank, port, settings, continued)) for rank in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join(timeout=120)
        return [one.exitcode for one in both]

    return run


def test_two_processes_train_as_one_and_continue(tiny, two_processes):
    settings = SETTINGS | {"sam_rho": 0.05, "micro_batch": 4, "val_images": 37}
    one, config = fit(tiny(name="one", **settings), quiet=True), tiny(name="two", **settings)
    assert two_processes(config.to_dict()) == [0, 0]
    run_dir = Path(config.runs_dir) / "two"
    together, alone = final_state(run_dir), final_state(one.run_dir)
    assert len(together["processes"]) == 2
    for name, weight in alone["model"].items():
        torch.testing.assert_close(together["model"][name], weight, rtol=1e-3, atol=1e-4)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # the first process alone has written
    for mine, theirs in zip(map(json.loads, lines), untimed(one.history), strict=True):
        for key in ("loss", "val_loss", "ema_val_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3)
        assert mine["mAP"] == pytest.approx(theirs["mAP"], abs=0.02)  # near-equal scores may change places
    assert two_processes(continued=str(run_dir)) == [0, 0]
    assert all(torch.equal(weight, final_state(run_dir)["model"][name]) for name, weight in together["model"].items())
    with pytest.raises(CheckpointError, match="trained by 2 processes, and now there are 1"):
        resume(run_dir, quiet=True)


def test_the_first_gradient_of_sam_can_stay_each_processs_own(tiny, two_processes):
    """With a backbone that has weights behind its features, whose gradients nobody may wait for."""
    settings = {"backbone": "test_convnext", "backbone_args": {}, "epochs": 1, "lr": 0.05, "val_images": 8}
    config = tiny(name="own", sam_rho=0.05, sam_average=False, **settings)
    assert two_processes(config.to_dict()) == [0, 0]


def test_with_batch_norm_the_metrics_are_those_of_the_models_that_are_saved(tiny, two_processes):
    """Each process has running statistics of its own; the first one's are saved."""
    config = tiny(name="norm", backbone_args={}, epochs=1, val_images=37, ema_decay=0.5, report=True)
    assert two_processes(config.to_dict()) == [0, 0]
    run_dir = Path(config.runs_dir) / "norm"
    (record,) = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    (model, _), scenes = load_model(run_dir / "last"), DigitScenes("val", 37, 32)
    for prefix, weights in (("", None), ("ema_", final_state(run_dir)["ema"]["model"])):
        if weights:
            model.load_state_dict(weights)
        with torch.no_grad():
            output = model.eval()(model.prepare(scenes.images))
        loss = create_loss(config)(output, scenes.targets).item() / 37
        assert record[f"{prefix}val_loss"] == pytest.approx(loss, rel=1e-5)
    page = (run_dir / "report.html").read_text()
    assert "on 37 validation images" in page
    assert f">{100 * max(record['mAP'], record['ema_mAP']):.1f}</td>" in page


@pytest.mark.parametrize(("device", "backend"), [("auto", "nccl"), ("cuda:0", "nccl"), ("cpu", "gloo")])
def test_processes_talk_over_what_their_device_has(monkeypatch, device, backend):
    chosen = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.distributed.init_process_group", chosen.append)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    with joined_processes(device) as processes:
        assert processes.is_first and chosen == [backend]


def test_a_batch_that_cannot_be_dealt_out_is_refused(tiny, monkeypatch):
    class Three(Processes):
        def gather(self, value):
            return [value]

    monkeypatch.setattr(sys.modules[fit.__module__], "joined_processes", lambda _: contextlib.nullcontext(Three(0, 3)))
    with pytest.raises(ConfigError, match="expected a multiple of the number of processes, 3"):
        fit(tiny(), quiet=True)
