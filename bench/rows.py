"""What a row of results says: ratios, the roofline, verdicts in words, and the table on the terminal.

A row is what a benchmark hands to the fixture ``record``, as it stands in bench/results/*.json:

    op, case                    its name: the op, the size (of a paper's data set where it is one), what is timed
    median_us                   {contestant: microseconds}, taking turns; "mlfast" is ours, "mlfast ..." a variant;
                                "... alone" is a part that nobody can do without: a floor, no rival
    bytes, operations           that the op must move and compute, by the formula of its page in docs/; multiply_adds
                                in the place of operations count as two each
    commit                      optional: of an earlier run that the row was taken over from; `age` says so beside it
    growth                      optional: {"over": "K", "at": 500, "curve": "training"}, or a list of such: a point of a
                                sweep; points of one op with the same "over" and "curve" make a curve

`complete` adds the roofline; `bench.race.details` says what the race adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

# Not a race: its second contestant does less, and shows what a call costs at the least. It has no bytes to speak of.
FLOOR = "call_overhead"


def complete(row: Row, race: Row, bandwidth: float, matrix_rate: float) -> Row:
    """The row with all that follows from it and from the machine's limits, in bytes and operations per second.

    The least time is that in which the machine moves the bytes, or computes the operations, whichever is longer. The
    roofline's share is the least time over the measured one.
    """
    raced = race.get("peak_bytes", {}).keys() >= row["median_us"].keys()  # not rows that were made of another race
    row = row | race if raced else dict(row)
    if "multiply_adds" in row:
        row.setdefault("operations", 2 * row["multiply_adds"])
    if "bytes" not in row:
        return row
    memory_us, compute_us = row["bytes"] / bandwidth * 1e6, row.get("operations", 0) / matrix_rate * 1e6
    row.setdefault("percent_of_copy_bandwidth", round(100 * memory_us / measured_us(row), 1))
    if "operations" in row:
        row["bound_by"] = "memory" if memory_us > compute_us else "arithmetic"
        row["percent_of_roofline"] = round(100 * max(memory_us, compute_us) / measured_us(row), 1)
    return row


def age(row: Row) -> str:
    """What stands behind the name of a row that an earlier run measured."""
    return f" (at {row['commit']})" if "commit" in row else ""


def measured_us(row: Row) -> float:
    """mlfast's time as the roofline takes it: of the kernel where that is known, else of the call."""
    return (row.get("kernel_us") or {}).get("mlfast") or row["median_us"]["mlfast"]


def is_rival(name: str) -> bool:
    """Whether a contestant computes the same and is not mlfast itself."""
    return name.split()[0] != "mlfast" and not name.endswith(" alone")


def ratios(row: Row) -> dict[str, float]:
    """How many times as long as mlfast each rival takes."""
    us = row["median_us"]
    return {name: value / us["mlfast"] for name, value in us.items() if is_rival(name)}


def is_race(row: Row) -> bool:
    """Whether there is a rival."""
    return row["op"] != FLOOR and bool(ratios(row))


def is_training(row: Row) -> bool:
    """Whether forward and backward were timed: as ``mode`` says, or the last word of the case."""
    return row.get("mode", row["case"].split()[-1]) == "training"


def fastest_other(row: Row) -> tuple[str, float]:
    """The contestant to beat, and how many times as long as mlfast it takes."""
    return min(ratios(row).items(), key=lambda item: item[1])


def verdict(row: Row, name: str | None = None) -> str:
    """``wins``, ``loses``, or ``no gain`` against a contestant, by default the fastest one.

    A win or a loss is one that the middle half of the rounds shares.
    """
    name = name or fastest_other(row)[0]
    ratio = ratios(row)[name]
    low, _, high = row.get("ratio_quartiles", {}).get(name, [ratio] * 3)
    if min(low, ratio) > 1:
        return "wins"
    return "loses" if max(high, ratio) < 1 else "no gain"


def contestants(of_op: list[Row]) -> list[str]:
    """All of an op's contestants, in order; a row may lack some."""
    return list(dict.fromkeys(name for row in of_op for name in row["median_us"]))


def by_op(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each op, in the order of the run."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["op"], []).append(row)
    return grouped


def in_words(rows: list[Row]) -> Iterator[str]:
    """For each op a sentence: by how much it gains on this machine, and where it gains nothing."""
    for op, of_op in by_op([row for row in rows if is_race(row)]).items():
        won = [fastest_other(row)[1] for row in of_op if verdict(row) == "wins"]
        rest = [row for row in of_op if verdict(row) != "wins"]
        if not won:
            yield f"{op} gains nothing on this machine:"
        else:
            span = f"{min(won):.1f} to {max(won):.1f} times" if len(won) > 1 else f"{won[0]:.1f} times"
            yield f"{op}: {span} as fast as the fastest other in {len(won)} of {len(of_op)} cases" + (
                "; it gains nothing in:" if rest else "."
            )
        for row in rest:
            name, ratio = fastest_other(row)
            lost = f"it takes {1 / ratio:.2f} times as long as {name}"
            even = f"{ratio:.2f}x against {name}, which is within the noise"
            yield f"    {row['case']}: {lost if verdict(row) == 'loses' else even}"


def table(rows: list[Row]) -> Iterator[str]:
    """Median microseconds of every contestant, with how many times slower than mlfast it is, and what mlfast does."""
    for op, of_op in by_op(rows).items():
        names = contestants(of_op)
        width = max(34, *(len(row["case"]) for row in of_op))
        yield ""
        yield (
            f"{op + ', median microseconds':<{width}}" + "".join(f"{name:>18}" for name in names) + f"   {WORK_HEADER}"
        )
        for row in of_op:
            lost = "  LOSES" if is_race(row) and verdict(row) == "loses" else ""
            yield f"{row['case']:<{width}}{times(row['median_us'], names)}   {work(row)}{lost}"
            for key, label in (("hot_us", "the same in a loop of its own"), ("kernel_us", "kernels alone, cold")):
                if key in row:
                    yield f"{'  ' + label:<{width}}{times(row[key], names)}"


def times(us: dict[str, float | None], names: list[str]) -> str:
    """Every contestant's time, and how many times that of mlfast it is."""
    return "".join(f"{with_ratio(us.get(name), us['mlfast']):>18}" for name in names)


def with_ratio(us: float | None, mine: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.0f} ({us / mine:>4.1f}x)" if mine else f"{us:.0f}"


WORK_HEADER = f"{'bytes':>9}{'operations':>12}{'of copy rate':>14}{'of roofline':>13}{'peak memory':>13}"


def work(row: Row) -> str:
    """Bytes and operations by formula, what share of the machine they use, and mlfast's peak memory."""
    cells = (
        (quantity(row.get("bytes"), "B"), 9),
        (quantity(row.get("operations"), ""), 12),
        (percent(row.get("percent_of_copy_bandwidth")), 14),
        (percent(row.get("percent_of_roofline")), 13),
        (quantity(row.get("peak_bytes", {}).get("mlfast"), "B"), 13),
    )
    return "".join(f"{text:>{width}}" for text, width in cells)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def quantity(value: float | None, unit: str) -> str:
    """1234567 as 1.2 M."""
    if value is None:
        return "-"
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()
