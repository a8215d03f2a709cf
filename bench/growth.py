"""How time grows with size: exponents fitted to the rows of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Point = tuple[float, float]  # size, microseconds


class Curve(NamedTuple):
    """The times of one op over one size."""

    op: str
    over: str
    name: str
    points: dict[str, list[Point]]  # of each contestant, by size


class Fit(NamedTuple):
    """time = constant * size ^ exponent, and the standard error of the exponent."""

    exponent: float
    error: float
    constant: float
    smallest: float  # of the sizes that the fit was made from


def curves(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """The sweeps among the rows, with the contestants that were raced at three sizes or more."""
    found: dict[tuple[str, str, str], Curve] = {}
    for row in rows:
        growth = row.get("growth", [])
        for step in growth if isinstance(growth, list) else [growth]:
            key = (row["op"], step["over"], step["curve"])
            curve = found.setdefault(key, Curve(*key, {}))
            for name, us in row["median_us"].items():
                curve.points.setdefault(name, []).append((step["at"], us))
    swept = [curve._replace(points=enough(curve.points)) for curve in found.values()]
    return [curve for curve in swept if curve.points]


def enough(points: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """The contestants, by size, whose growth can be fitted: from two sizes one learns no error."""
    return {name: sorted(of_one) for name, of_one in points.items() if len({size for size, _ in of_one}) >= 3}


def fit(points: Sequence[Point]) -> Fit:
    """Least squares on logarithms over the larger half of the sizes, at least three: below, fixed costs hide growth."""
    sizes = sorted({size for size, _ in points})
    smallest = sizes[-max(3, math.ceil(len(sizes) / 2)) :][0]
    used = [(size, us) for size, us in points if size >= smallest]
    x = [math.log(size) for size, _ in used]
    y = [math.log(us) for _, us in used]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - exponent * mean_x
    rest = sum((b - intercept - exponent * a) ** 2 for a, b in zip(x, y, strict=True))
    return Fit(exponent, math.sqrt(rest / (len(x) - 2) / spread), math.exp(intercept), smallest)


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The exponents in words, a line for each curve."""
    found = []
    for curve in curves(rows):
        fits = {name: fit(points) for name, points in curve.points.items()}
        exponents = ", ".join(f"{f.exponent:.2f} ± {f.error:.2f} ({name})" for name, f in fits.items())
        start = max(f.smallest for f in fits.values())
        found.append(f"{curve.op}, {curve.name}, from {curve.over} = {start:,} on, grows as its power {exponents}")
    return found
