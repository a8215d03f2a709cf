"""The ablation: every configuration is one that trains, and the table says what came out."""

import itertools
import re
import sys

import pytest

from mlfast import cli
from mlfast.training import TrainConfig, ablation
from mlfast.training.ablation import LADDER, LOSSES, Row, run_ablation, write_results


@pytest.fixture
def fake_fit(monkeypatch):
    """Runs in place of trained ones: their mAP is 0.1 for each part of the method, and 0.01 for the seed."""
    configs = []

    def run(config, *, resume, quiet):
        assert resume and quiet
        configs.append(config)
        parts = (config.sam_rho > 0) + (config.head == "ml_decoder") + (config.loss == "aam") + (config.gamma_neg == 1)
        return type("Result", (), {"history": [{"mAP": 0.1 * parts + 0.01 * config.seed}]})

    monkeypatch.setattr(sys.modules["mlfast.training.fit"], "fit", run)  # the package has a function of its name
    return configs


def test_every_configuration_runs_once_a_seed(fake_fit):
    rows = run_ablation(2, 3, 100, "runs", say=lambda line: None)
    assert [row.name for row in rows] == [*LADDER, *LOSSES]
    assert len(fake_fit) == 2 * (len(LADDER) + len(LOSSES) - 1)  # the baseline is also the first of the losses
    assert len({config.name for config in fake_fit}) == len(fake_fit)
    assert rows[0].scores == rows[len(LADDER)].scores
    assert rows[1].scores == pytest.approx([20.0, 21.0])


def test_each_rung_adds_one_part():
    rungs = list(LADDER.values())
    for lower, upper in itertools.pairwise(rungs[:3]):
        assert lower.keys() <= upper.keys() and lower["loss"] == upper["loss"]
    assert [rung["loss"] for rung in rungs] == ["bce", "bce", "bce", "aam", "aam", "aam"]
    assert {key for key in rungs[4] if rungs[3].get(key) != rungs[4][key]} == {"gamma_neg"}


def test_the_table_replaces_an_older_one_and_keeps_the_page(tmp_path):
    page = tmp_path / "ablation.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    rows = [Row("ladder", "baseline", 0.2, [10.0, 12.0]), Row("losses", "BCE", 0.5, [11.0])]
    write_results(rows, "2 seeds", tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| baseline | 0.2 | 11.0 | 1.4 | 10.0, 12.0 |" in text
    assert "| BCE | 0.5 | 11.0 | - | 11.0 |" in text
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_goes_on_with_finished_runs(fake_fit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", "--seeds", "1", "--images", "100"]) == 0
    assert re.search(r"losses: AAM, seed 0: mAP 20.0", capsys.readouterr().out)
    assert "1 seed, 8 epochs of 100 images" in (tmp_path / "ablation/ablation.md").read_text()
    assert cli.main(["ablate", "--seeds", "0"]) == 2


def test_all_configurations_are_valid():
    for settings in (*LADDER.values(), *LOSSES.values()):
        TrainConfig(**ablation._SETTINGS | settings)


def test_figures_only(tmp_path):
    assert cli.main(["ablate", "--figures", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss-curves.png"]
