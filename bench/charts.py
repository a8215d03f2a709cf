"""Pictures of results: ratios, the roofline, growth. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import growth, readme, rows
from bench.rows import Row

MINE, LOST, LIMIT = "#1b7f5c", "#c0392b", "#444444"
PALETTE = ("#3b6fb6", "#e08a1e", "#8e5ea2", "#7f7f7f", "#5aa9a3", "#b5651d", "#a83279")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "mlfast"})


def ratio_bars(of_op: Sequence[Row]) -> Figure:
    """How many times as long as mlfast every other contestant takes, a group of bars for each case."""
    names = list(dict.fromkeys(name for row in of_op for name in rows.ratios(row)))
    figure, axes = plt.subplots(figsize=(9, 0.8 + len(of_op) * (0.12 + 0.14 * len(names))), layout="constrained")
    height = 0.84 / len(names)
    for i, name in enumerate(names):
        found = [(k, rows.ratios(row)[name]) for k, row in enumerate(of_op) if name in rows.ratios(row)]
        at = [k + (i - (len(names) - 1) / 2) * height for k, _ in found]
        _bars(axes, at, [ratio for _, ratio in found], height=height, label=name, color=PALETTE[i % len(PALETTE)])
    axes.set_yticks(range(len(of_op)), [row["case"] + rows.age(row) for row in of_op])
    axes.invert_yaxis()
    _mark_one(axes)
    axes.set_xlabel("times as long as mlfast (logarithmic); left of the line mlfast loses")
    axes.legend(fontsize=8)
    return figure


def _bars(axes: Axes, at: Sequence[float], ratios: Sequence[float], **look: Any) -> None:
    """Bars that begin at 1: to the right of it mlfast is faster."""
    drawn = axes.barh(at, [ratio - 1 for ratio in ratios], left=1, **look)
    axes.bar_label(drawn, [f"{ratio:.1f}" for ratio in ratios], padding=2, fontsize=7)


def _mark_one(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color=LIMIT, linewidth=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def roofline(all_rows: Sequence[Row], machine: dict[str, Any]) -> Figure:
    """Operations per second over operations per byte, below what memory and arithmetic of the machine allow."""
    counted = [row for row in all_rows if row.get("operations") and row.get("bytes")]
    memory, compute = machine["copy_bandwidth_GBps"], machine["matrix_rate_GFLOPs"]
    intensity = [row["operations"] / row["bytes"] for row in counted]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ridge = compute / memory
    span = [min([*intensity, ridge]) / 2, ridge, max([*intensity, ridge]) * 4]
    axes.plot(span, [min(memory * x, compute) for x in span], color=LIMIT, label="roofline, measured")
    for i, (op, of_op) in enumerate(rows.by_op(counted).items()):
        for training, marker in ((True, "o"), (False, "^")):
            drawn = [row for row in of_op if rows.is_training(row) is training]
            axes.scatter(
                [row["operations"] / row["bytes"] for row in drawn],
                [row["operations"] / rows.measured_us(row) / 1e3 for row in drawn],
                marker=marker,
                color=PALETTE[i % len(PALETTE)],
                label=f"{op}, {'training' if training else 'forward'}" if drawn else None,
            )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10^9 operations per second")
    axes.legend(fontsize=8)
    return figure


def growth_curve(curve: growth.Curve) -> Figure:
    """Time over size, with the fitted exponent of each contestant."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, points) in enumerate(curve.points.items()):
        color = MINE if name == "mlfast" else PALETTE[i % len(PALETTE)]
        fitted = growth.fit(points)
        label = f"{name}: ^{fitted.exponent:.2f} ± {fitted.error:.2f}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, color=color, label=label)
        used = [size for size, _ in points if size >= fitted.smallest]
        axes.plot(used, [fitted.constant * size**fitted.exponent for size in used], ":", color=color)
    axes.set(xscale="log", yscale="log", xlabel=curve.over, ylabel="microseconds", title=f"{curve.op}, {curve.name}")
    axes.legend(fontsize=8)
    return figure


def summary(results: Sequence[dict[str, Any]]) -> Figure:
    """For the README: in training, how many times as fast as the fastest other contestant; a panel for each machine."""
    panels = [
        list(readme.shown([row for row in r["rows"] if rows.is_race(row) and rows.is_training(row)])) for r in results
    ]
    heights = [0.6 + 0.22 * len(panel) for panel in panels]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axes, of_machine, result in zip(grid[:, 0], panels, results, strict=True):
        ratios = [rows.fastest_other(row)[1] for row in of_machine]
        colors = [LOST if rows.verdict(row) == "loses" else MINE for row in of_machine]
        _bars(axes, range(len(of_machine)), ratios, color=colors)
        axes.set_yticks(range(len(of_machine)), [_label(row) for row in of_machine])
        axes.invert_yaxis()
        _mark_one(axes)
        about = result["machine"]
        axes.set_title(f"{about['processor']}, commit {about['commit']}: forward + backward", fontsize=9)
        axes.set_xlabel("times as fast as the fastest other way, eager or compiled")
    return figure


def _label(row: Row) -> str:
    return f"{row['op']}, {readme.name_of(row)}{rows.age(row)}"


def save(figure: Figure, path: Path) -> None:
    """As a PNG, the same bytes for the same picture."""
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
