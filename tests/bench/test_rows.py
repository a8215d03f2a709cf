"""Rows, the roofline, verdicts, and the comparison of two runs."""

import random

import pytest

from bench import compare, rows
from bench.race import quartiles


def row(other_times, my_times, name="eager", case="COCO 56 x 80 training", **more):
    """A row as the race makes it, from the seconds of every round."""
    median = {
        label: sorted(times)[len(times) // 2] * 1e6 for label, times in (("mlfast", my_times), (name, other_times))
    }
    return {"op": "aam_loss", "case": case, "median_us": median} | {
        "ratio_quartiles": {name: quartiles(other_times, my_times)},
        **more,
    }


def rounds(seed, mine, other, noise=0.1, number=101):
    """Seconds of both contestants, each round disturbed by itself and by what disturbs both."""
    generator = random.Random(seed)

    def disturbed(seconds, both):
        return seconds * both * generator.lognormvariate(0, noise)

    shared = [generator.lognormvariate(0, 0.5) for _ in range(number)]
    return [disturbed(other, both) for both in shared], [disturbed(mine, both) for both in shared]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("number", [5, 15, 300])
def test_a_fall_of_30_percent_is_reported(seed, number):
    before = row(*rounds(seed, 1e-3, 5e-3, number=number, noise=0.05))
    after = row(*rounds(seed + 100, 1e-3 / 0.7, 5e-3, number=number, noise=0.05))
    result = compare.compare([before], [after])
    assert result.compared == 1
    (fall,) = result.falls
    assert fall.contestant == "eager" and fall.after / fall.before == pytest.approx(0.7, rel=0.12)
    assert "FELL" not in str(fall) and "aam_loss, COCO 56 x 80 training, against eager: " in str(fall)


def test_noise_is_not_reported():
    for seed in range(100):
        before, after = (row(*rounds(s, 1e-3, 5e-3, noise=0.3, number=15)) for s in (seed, seed + 1000))
        assert compare.compare([before], [after]).falls == []


def test_a_fall_within_the_spread_of_the_rounds_is_not_reported():
    before, after = row(*rounds(1, 1e-3, 5e-3, noise=0.5)), row(*rounds(2, 1e-3 / 0.8, 5e-3, noise=0.5))
    assert after["ratio_quartiles"]["eager"][1] < 0.85 * before["ratio_quartiles"]["eager"][1]
    assert compare.compare([before], [after]).falls == []


def test_a_slower_machine_is_no_regression():
    others, mine = rounds(3, 1e-3, 5e-3)
    slower = row([3 * s for s in others], [3 * s for s in mine])
    assert compare.compare([row(others, mine)], [slower]).falls == []


def two(times_a, times_b, mine):
    """A row with two rivals."""
    made, other = row(times_a, mine), row(times_b, mine, name="compile")
    for key in ("median_us", "ratio_quartiles"):
        made[key] |= other[key]
    return made


def test_mlfast_is_slower_where_most_ratios_fell():
    before = two([4e-3] * 5, [2e-3] * 5, [1e-3] * 5)
    slower = compare.compare([before], [two([4e-3] * 5, [2e-3] * 5, [1.5e-3] * 5)])
    assert {fall.contestant for fall in slower.falls} == {"eager", "compile"} and not slower.alone
    faster_rival = compare.compare([before], [two([4e-3] * 5, [1e-3] * 5, [1e-3] * 5)])
    assert [fall.contestant for fall in faster_rival.alone] == ["compile"] and not faster_rival.falls


def test_what_does_not_fall_again_is_not_reported():
    before, slow = (row([4e-3] * 5, [mine] * 5) for mine in (1e-3, 2e-3))
    first = compare.compare([before], [slow])
    assert compare.confirmed(first, compare.compare([before], [slow])) == first
    assert compare.confirmed(first, compare.compare([before], [before])).falls == []


def test_a_small_or_an_opposite_change_is_not_reported():
    before = row(*rounds(1, 1e-3, 5e-3, noise=0.01))
    for factor in (0.9, 1, 3):
        assert compare.compare([before], [row(*rounds(2, 1e-3 / factor, 5e-3, noise=0.01))]).falls == []


def test_what_cannot_be_compared_is_said():
    old, new = row([5.0] * 5, [1.0] * 5), row([5.0] * 5, [1.0] * 5, case="another")
    assert compare.compare([old], [new]).left_out == ["aam_loss, another: not in the older run"]
    del old["ratio_quartiles"]
    assert "no spread" in compare.compare([old], [old]).left_out[0]
    assert compare.compare([old | {"op": "call_overhead"}], [old | {"op": "call_overhead"}]) == (0, [], [], [])


def test_the_roofline_is_the_longer_of_memory_and_arithmetic():
    plain = {"op": "o", "case": "c", "median_us": {"mlfast": 100.0, "eager": 200.0}, "bytes": 1000, "operations": 4000}
    race = {"rounds": 5, "peak_bytes": {"mlfast": 1, "eager": 2}}
    assert "rounds" not in rows.complete(plain, race | {"peak_bytes": {"K 80": 1}}, 1.0, 1.0)  # another race
    by_memory = rows.complete(plain, race, bandwidth=20e6, matrix_rate=1e9)
    assert by_memory["rounds"] == 5 and by_memory["bound_by"] == "memory"
    assert by_memory["percent_of_roofline"] == by_memory["percent_of_copy_bandwidth"] == 50
    by_arithmetic = rows.complete(plain, {}, bandwidth=20e6, matrix_rate=50e6)
    assert by_arithmetic["bound_by"] == "arithmetic" and by_arithmetic["percent_of_roofline"] == 80
    of_kernel = rows.complete(plain, race | {"kernel_us": {"mlfast": 90.0}}, bandwidth=20e6, matrix_rate=50e6)
    assert of_kernel["percent_of_roofline"] == 88.9


def test_verdicts_and_words():
    win, even, loss = (row([t, t * 0.97, t * 1.03], [1e-3] * 3, case=f"{t}") for t in (2e-3, 1e-3, 0.5e-3))
    assert [rows.verdict(r) for r in (win, even, loss)] == ["wins", "no gain", "loses"]
    words = list(rows.in_words([win, even, loss]))
    assert words[0] == "aam_loss: 2.0 times as fast as the fastest other in 1 of 3 cases; it gains nothing in:"
    assert words[1:] == [
        "    0.001: 1.00x against eager, which is within the noise",
        "    0.0005: it takes 2.00 times as long as eager",
    ]
    assert next(rows.in_words([loss])) == "aam_loss gains nothing on this machine:"
    lines = list(rows.table([win, loss]))
    assert "LOSES" in lines[-1] and "LOSES" not in lines[-2]


def test_a_part_alone_is_no_rival_and_rows_may_lack_contestants():
    part = row([1e-3] * 3, [2e-3] * 3, name="products alone")
    part["median_us"]["eager"] = 6e3
    assert rows.fastest_other(part) == ("eager", 3.0) and rows.verdict(part) == "wins"
    header, *lines = list(rows.table([part, row([3e-3] * 3, [1e-3] * 3, name="loop")]))[1:]
    assert [header.count(name) for name in ("products alone", "eager", "loop")] == [1, 1, 1]
    assert lines[1].split()[-3:] == ["-"] * 3 and "3.0x" in lines[1]
    assert rows.complete(part | {"bytes": 8, "multiply_adds": 4}, {}, 1e9, 1e9)["operations"] == 8


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (53760, "53.8 kB"), (29506560, "29.5 MB"), (1.5e12, "1.5 TB")]
)
def test_quantities(value, text):
    assert rows.quantity(value, "B") == text
