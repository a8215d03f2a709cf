"""The ablation: every configuration is one that trains, and the table says what came out."""

import itertools
import math
import re
import sys

import pytest

from mlfast import cli
from mlfast.training import Diverged, TrainConfig, TrainingError, ablation
from mlfast.training.ablation import FIRST_RATES, TABLES, Ablation, Results, Row
from mlfast.training.ablation_page import write_results

PLAIN = {"bce": 20.0, "asl": 30.0, "aam": 40.0}


@pytest.fixture
def runs(monkeypatch):
    """Runs in place of trained ones: a mAP for the loss, 1 more for a later seed, less for a rate away from 0.3."""
    configs = {}

    def run(config, *, resume, quiet):
        assert resume and quiet and config.name not in configs
        configs[config.name] = config
        score = PLAIN[config.loss] + min(config.seed, 5) - abs(math.log(config.lr / 0.3))
        return type("Result", (), {"history": [{"mAP": score / 100, "held_out_mAP": score / 100}]})

    monkeypatch.setattr(sys.modules["mlfast.training.fit"], "fit", run)  # the package has a function of its name
    finished = ablation._finished

    def found(config, metric):
        known = configs.get(config.name)
        return finished(config, metric) if known is None else run_score(known)

    def run_score(config):
        return (PLAIN[config.loss] + min(config.seed, 5) - abs(math.log(config.lr / 0.3))) / 100

    monkeypatch.setattr(ablation, "_finished", found)
    return configs


def measure(folder, **settings):
    defaults = {"seeds": 2, "epochs": 3, "images": 100, "runs_dir": str(folder), "say": lambda line: None}
    return Ablation(**defaults | settings).run()


def test_every_configuration_runs_once_a_seed(runs, tmp_path):
    results = measure(tmp_path)
    assert results.complete
    names = [(table, name) for table, settings in TABLES.items() for name in settings]
    assert [(row.table, row.name) for row in results.rows] == names
    assert all(len(row.scores) == 2 for row in results.rows)
    trained = [config for config in runs.values() if config.seed < 1000]
    different = {str(TrainConfig(**settings)) for rows in TABLES.values() for settings in rows.values()}
    assert len(trained) == 2 * len(different)  # what two tables share is trained once
    baseline, *_ = results.rows
    assert baseline.scores[1] - baseline.scores[0] == pytest.approx(1)
    assert all(config.held_out == 0.2 and config.sam_rho == 0 for config in runs.values() if config.seed == 1000)


def test_the_search_for_a_rate_ends_inside_of_what_it_tried(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(FIRST_RATES, ("bce", "gap"), 0.003)
    results = measure(tmp_path)
    for key, scores in results.rates.items():
        best = max(scores, key=scores.get)
        assert min(scores) < best < max(scores), key
        assert abs(math.log(best / 0.3)) <= math.log(3) / 2 + 0.1
    assert len(results.rates["bce", "gap"]) > 4
    assert {row.lr for row in results.rows if row.name.startswith("baseline")} == {
        max(results.rates["bce", "gap"], key=results.rates["bce", "gap"].get)
    }


def test_when_the_time_is_over_a_later_call_goes_on(runs, tmp_path):
    first = measure(tmp_path, minutes=-1)
    assert not first.complete and not runs and all(math.isnan(row.mean) for row in first.rows)
    complete = measure(tmp_path)
    number = len(runs)
    assert measure(tmp_path, minutes=-1) == complete and len(runs) == number


def test_a_run_that_diverges_counts_as_nothing_and_is_not_repeated(tiny, tmp_path, monkeypatch):
    def diverges(config, **_):
        (tmp_path / config.name).mkdir()
        raise Diverged("the loss became nan")

    monkeypatch.setattr(sys.modules["mlfast.training.fit"], "fit", diverges)
    config = tiny(runs_dir=str(tmp_path))
    assert ablation._finished(config, "mAP") is None
    assert ablation._train(config, "mAP") == 0
    assert ablation._finished(config, "mAP") == 0


def test_each_rung_adds_one_part():
    rungs = list(TABLES["ladder"].values())
    for lower, upper in itertools.pairwise(rungs[:3]):
        assert lower.keys() <= upper.keys() and lower["loss"] == upper["loss"]
    assert [rung["loss"] for rung in rungs] == ["bce", "bce", "bce", "aam", "aam", "aam"]
    assert {key for key in rungs[4] if rungs[3].get(key) != rungs[4][key]} == {"gamma_neg"}
    for name in ("scale", "margin"):
        assert all(settings.keys() - {name} == {"loss", "gamma_neg"} for settings in TABLES[name].values())


def test_the_table_replaces_an_older_one_and_keeps_the_page(tmp_path):
    page = tmp_path / "ablation.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    rows = [Row("ladder", "baseline", 0.2, [10.0, 12.0]), Row("losses", "BCE", 0.5, [11.0]), Row("scale", "s = 5")]
    write_results(Results(rows, {("bce", "gap"): {0.1: 30.0, 0.03: 20.0}}, False), "2 seeds", tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| baseline | 0.2 | 11.0 | 1.4 | 10.0, 12.0 |" in text
    assert "| BCE | 0.5 | 11.0 | - | 11.0 |" in text
    assert "| s = 5 | - | - | - | not measured |" in text
    assert "| bce, gap | 0.03: 20.0, 0.1: 30.0 |" in text
    for name in ("ablation.png", "ablation-sweeps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_is_missing(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlfast.training.ablation_page.draw_loss_curves", lambda path: None)
    assert cli.main(["ablate", "--seeds", "1", "--images", "100"]) == 0
    assert re.search(r"loss=aam gamma_neg=1.0 lr=0.5 seed=0: mAP 39.5", capsys.readouterr().out)
    page = (tmp_path / "ablation/ablation.md").read_text()
    assert "1 seed, 8 epochs of 100 images" in page and "Not finished" not in page
    runs.clear()
    assert cli.main(["ablate", "--seeds", "1", "--images", "100", "--minutes", "0", "--out", "other"]) == 0
    assert "not complete; the same command goes on" in capsys.readouterr().out
    assert "Not finished" in (tmp_path / "other/ablation.md").read_text()
    assert cli.main(["ablate", "--seeds", "0"]) == 2


def test_all_configurations_are_valid():
    for settings in (settings for rows in TABLES.values() for settings in rows.values()):
        TrainConfig(**ablation._COMMON | settings | ablation._TUNING)
        assert ablation._key(settings) in FIRST_RATES


def test_figures_only(tmp_path):
    assert cli.main(["ablate", "--figures", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss-curves.png"]


def test_a_disk_without_room_is_no_divergence(tiny, tmp_path, monkeypatch):
    def no_room(config, **_):
        raise TrainingError("cannot write")

    monkeypatch.setattr(sys.modules["mlfast.training.fit"], "fit", no_room)
    config = tiny(runs_dir=str(tmp_path))
    with pytest.raises(TrainingError, match="cannot write"):
        ablation._train(config, "mAP")
    assert ablation._finished(config, "mAP") is None
