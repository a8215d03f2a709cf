"""Regressions: which ratios to other contestants fell from one run to another by more than noise explains.

Only ratios are compared, never times: both contestants of a ratio took turns in one run, so a slower machine or a busy
one slows both. They are taken round by round (``ratio_quartiles`` of a row), which leaves out what disturbed both; the
tables show the ratio of the medians instead, which a reader can check. A ratio fell where

- its median fell by more than 15 %,
- the middle halves of the rounds of the two runs do not overlap,
- and most other ratios of the row fell as well: where mlfast became slower, all do. A ratio that fell alone says that
  the other contestant became faster, or had been unlucky in the older run; it is named, and is no failure.

What a run cannot see of itself, such as memory that lies badly all along, remains. So ``--compare`` measures what fell
once more, in a process of its own, and reports what fell again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.rows import is_race, ratios

TOLERANCE = 0.15


class Fall(NamedTuple):
    """A ratio that fell."""

    op: str
    case: str
    contestant: str
    before: float
    after: float

    def __str__(self) -> str:
        less = 100 * (1 - self.after / self.before)
        name = f"{self.op}, {self.case}, against {self.contestant}"
        return f"{name}: {self.before:.2f}x -> {self.after:.2f}x (-{less:.0f} %)"


class Comparison(NamedTuple):
    """How many ratios were compared, and what fell."""

    compared: int
    falls: list[Fall]
    alone: list[Fall]  # those whose neighbours in the row did not fall
    left_out: list[str]  # rows that could not be compared, with the reason


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Comparison:
    """Compares the rows that both runs have, by op and case."""
    old_rows = {(row["op"], row["case"]): row for row in before}
    found = Comparison(0, [], [], [])
    for row in filter(is_race, after):
        old = old_rows.get((row["op"], row["case"]))
        if old is None or "ratio_quartiles" not in old:
            why = "not in the older run" if old is None else "the older run has no spread of rounds"
            found.left_out.append(f"{row['op']}, {row['case']}: {why}")
            continue
        names = [name for name in ratios(row) if name in old["ratio_quartiles"]]
        fallen = [fall for name in names if (fall := fell(old, row, name))]
        (found.falls if 2 * len(fallen) > len(names) else found.alone).extend(fallen)
        found = found._replace(compared=found.compared + len(names))
    return found


def fell(old: dict[str, Any], new: dict[str, Any], name: str) -> Fall | None:
    """The fall of one ratio, if it is one."""
    lowest_before, before, _ = old["ratio_quartiles"][name]
    _, after, highest_after = new["ratio_quartiles"][name]
    if after < (1 - TOLERANCE) * before and highest_after < lowest_before:
        return Fall(new["op"], new["case"], name, before, after)
    return None


def confirmed(first: Comparison, second: Comparison) -> Comparison:
    """The first comparison with those falls alone that the second, of the same rows measured again, has as well."""
    again = {fall[:3] for fall in second.falls}
    return first._replace(falls=[fall for fall in first.falls if fall[:3] in again])
