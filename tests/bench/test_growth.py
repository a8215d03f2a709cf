"""Exponents of growth, on times whose law is known."""

import json
import random

import pytest

from bench import growth, readme

SIZES = [20, 80, 500, 2000, 9605, 21841]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_fit_finds_a_power_law(exponent):
    fitted = growth.fit([(n, 3.0 * n**exponent) for n in SIZES])
    assert fitted.exponent == pytest.approx(exponent) and fitted.error == pytest.approx(0, abs=1e-6)
    assert fitted.constant == pytest.approx(3.0) and fitted.smallest == 2000


def test_fixed_costs_do_not_hide_growth():
    assert growth.fit([(n, 50.0 + 0.1 * n) for n in SIZES]).exponent == pytest.approx(1, abs=0.1)


def test_the_error_tells_of_noise():
    noise = random.Random(0)
    fitted = growth.fit([(n, n**2 * noise.lognormvariate(0, 0.1)) for n in SIZES])
    assert 0 < abs(fitted.exponent - 2) < 3 * fitted.error < 0.5


def test_a_size_that_was_measured_often_is_one_size():
    assert growth.fit([(n, 3.0 * n) for n in [*SIZES, *[SIZES[-1]] * 9]]).exponent == pytest.approx(1)


def sweep(over="K", curve="training", sizes=SIZES):
    for n in sizes:
        times = {"mlfast": 0.5 * n, "eager": 0.01 * n**2}
        yield {"op": "graph_attention", "growth": {"over": over, "at": n, "curve": curve}, "median_us": times}


def test_curves_are_rows_of_one_op_and_name():
    density = [{**row, "growth": [row["growth"], {"over": "density", "at": 0.1, "curve": "K"}]} for row in sweep()]
    found = growth.curves([*density, *sweep(curve="forward", sizes=SIZES[:2]), {"op": "x", "median_us": {"mlfast": 1}}])
    (curve,) = found  # forward has two sizes, density one
    assert (curve.op, curve.over, curve.name) == ("graph_attention", "K", "training")
    assert [size for size, _ in curve.points["eager"]] == SIZES
    (line,) = growth.lines(density)
    assert line.endswith("from K = 2,000 on, grows as its power 1.00 ± 0.00 (mlfast), 2.00 ± 0.00 (eager)")


def test_a_contestant_that_was_raced_at_one_size_has_no_curve():
    rows = [*sweep(), *sweep(sizes=SIZES[:1])]
    rows[0]["median_us"]["eager gather"] = 1.0
    (curve,) = growth.curves(rows)
    assert list(curve.points) == ["mlfast", "eager"]


@pytest.mark.parametrize("path", readme.machines(), ids=lambda path: path.stem)
def test_the_growth_of_every_committed_result_can_be_told(path):
    assert len(growth.lines(json.loads(path.read_text())["rows"])) >= 5
