import time

import numpy as np
import pytest

from mlfast import cli
from mlfast.deploy import speed
from mlfast.deploy.model_info import ModelInfo
from mlfast.models.checkpoint import load_model


def test_contestants_agree_and_are_timed(tuned_folder, exported):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, description = load_model(tuned_folder[0])
    info = ModelInfo.from_mapping(description)
    file = exported("onnx").path
    found = speed.measure(model, info, runtimes=("eager", "onnxruntime"), files=(file,), batch_size=4, seconds=0.01)
    assert [result.name for result in found] == [
        "PyTorch eager, as trained",
        "PyTorch eager, folded",
        "ONNX Runtime, as trained",
        "ONNX Runtime, folded",
        "model.onnx",
    ]
    for result in found:
        assert result.problem == "" and 0 < result.latency < 1 and result.throughput > 1
        assert result.difference < 1e-5
    assert found[0].difference == 0


def test_the_clock_tells_the_slow_from_the_quick():
    calls = {"quick": lambda inputs: inputs, "slow": lambda inputs: (time.sleep(0.003), inputs)[1]}
    found = speed.take_turns(calls, np.zeros(1), 0.02)
    assert found["quick"] < 0.001 and 0.003 <= found["slow"] < 0.03


def test_what_does_not_run_is_named_and_the_rest_is_measured(tuned_folder, monkeypatch, capsys):
    def broken(model):
        raise RuntimeError("no compiler here\nand many more lines")

    monkeypatch.setattr(speed, "_compiled", broken)
    arguments = ["--runtimes", "eager,compiled", "--seconds", "0.01", "--batch-size", "2"]
    assert cli.main(["bench", "--deployed", str(tuned_folder[0]), *arguments]) == 0
    out = capsys.readouterr().out
    assert f"{tuned_folder[0]}: test_resnet, ml_decoder, 40 labels, 32 px, mAP unknown" in out
    assert "torch.compile, folded      not measured: RuntimeError: no compiler here\n" in out
    assert "threads; torch 2" in out and "batch of 2" in out
    row = next(line for line in out.splitlines() if line.startswith("PyTorch eager, folded"))
    assert float(row.split()[3]) > 0 and row.endswith(("e+00", "e-07", "e-08"))
