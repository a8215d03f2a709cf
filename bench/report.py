"""The report: one HTML file for each machine's results, with its pictures inside, and docs/speed.png for the README.

python -m bench.report                  all of bench/results/*.json, and docs/speed.png
python -m bench.report FILE.json ...    these files alone; FILE.html stands beside each
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench import charts, gpu_static, growth, readme, rows
from bench.rows import Row, percent, quantity

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: 2px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
td.loses { background: #f8d7d3 }
img { max-width: 100% } .note { color: #555 }
"""
HOW_TO_READ = """
<p>Every contestant ran in the same process, on the same inputs, with the same threads, and was first checked to give
the same result. They took turns, call by call, over rotating inputs, so each finds the caches as the others left
them. A time is the median of the rounds, in microseconds; in brackets, how many times as long as mlfast. <em>In a
loop of its own</em> is the same call repeated alone on one set of inputs, for those below 1 MB and a millisecond: hot
caches. Both are true: the first is nearer to a training step. Bytes and operations are counted by the formulas of the
op's page in docs/. The share of the roofline is the time in which this machine could move the bytes, or compute the
operations, whichever is longer, over the time taken; its copy bandwidth and its rate (a large float32 matrix product)
were measured in the same run. Peak memory is what PyTorch's allocator held at the most during a call, above what it
held before. A red cell is a loss.</p>
"""


def page(results: dict[str, Any], static: dict[str, Any] | None) -> str:
    """The whole report of one machine."""
    machine, all_rows = results["machine"], results["rows"]
    raced = [row for row in all_rows if rows.is_race(row)]
    parts = [
        f"<h1>mlfast on {escape(machine['processor'])}</h1>",
        html_table(["", "measured on"], [[escape(key), escape(str(value))] for key, value in machine.items()]),
        "<h2>In words</h2>",
        f"<pre>{escape(chr(10).join(rows.in_words(all_rows)))}</pre>",
        "<h2>How to read it</h2>",
        HOW_TO_READ,
    ]
    for op, of_op in rows.by_op(all_rows).items():
        parts += [f"<h2>{escape(op)}</h2>", op_table(of_op)]
        if of_race := [row for row in of_op if rows.is_race(row)]:
            parts.append(picture(charts.ratio_bars(of_race), f"{op}: ratios"))
    if "matrix_rate_GFLOPs" in machine and any("percent_of_roofline" in row for row in raced):
        parts += ["<h2>Roofline</h2>", picture(charts.roofline(raced, machine), "roofline")]
    if curves := growth.curves(all_rows):
        parts += ["<h2>Growth</h2>", "<p>Exponents are fitted to the larger half of the sizes (dotted).</p>"]
        parts += [picture(charts.growth_curve(curve), f"growth of {curve.op}") for curve in curves]
    if static:
        parts += ["<h2>GPU kernels: static figures, no speeds</h2>", *gpu_static.html(static, html_table)]
    title = f"mlfast on {escape(machine['processor'])}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def op_table(of_op: list[Row]) -> str:
    """Every contestant's time and ratio, the work, and peak memory; below small cases, their hot loops."""
    names = rows.contestants(of_op)
    header = ["case", *names, "bytes", "operations", "of copy rate", "of roofline", "peak memory, mlfast", "others"]
    return html_table(header, [cells for row in of_op for cells in op_rows(row, names)])


def op_rows(row: Row, names: list[str]) -> Iterator[list[str]]:
    lost = {name for name in rows.ratios(row) if rows.is_race(row) and rows.verdict(row, name) == "loses"}
    peaks = {name: value for name, value in row.get("peak_bytes", {}).items() if rows.is_rival(name)}
    yield [
        escape(row["case"] + rows.age(row)),
        *(cell(row["median_us"], name, name in lost) for name in names),
        quantity(row.get("bytes"), "B"),
        quantity(row.get("operations"), ""),
        percent(row.get("percent_of_copy_bandwidth")),
        percent(row.get("percent_of_roofline")),
        quantity(row.get("peak_bytes", {}).get("mlfast"), "B"),
        f"{quantity(min(peaks.values()), 'B')} to {quantity(max(peaks.values()), 'B')}" if peaks else "-",
    ]
    for key, label in (("hot_us", "in a loop of its own"), ("kernel_us", "kernels alone, cold caches")):
        if key in row:
            yield [f"&nbsp;&nbsp;{label}", *(cell(row[key], name, False) for name in names), *[""] * 6]


def cell(us: dict[str, float | None], name: str, lost: bool) -> str:
    text = f"{us[name]:.0f}" if name == "mlfast" and us[name] else rows.with_ratio(us.get(name), us["mlfast"])
    return f"<b>loses</b> {text}" if lost else text


def html_table(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{text}</th>" for text in header)
    lines = ["".join(_td(text) for text in cells) for cells in body]
    return f"<table><tr>{top}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _td(text: str) -> str:
    return f'<td class="loses">{text}</td>' if text.startswith("<b>loses") else f"<td>{text}</td>"


def picture(figure: Figure, alt: str) -> str:
    """The figure as an image within the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    return (
        f'<p><img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></p>'
    )


def main(arguments: list[str]) -> None:
    """Writes the reports."""
    paths = [Path(argument) for argument in arguments] or sorted(RESULTS.glob("*.json"))
    static = json.loads(gpu_static.FILE.read_text()) if gpu_static.FILE.exists() else None
    results = [json.loads(path.read_text()) for path in paths]
    for path, result in zip(paths, results, strict=True):
        html = path.with_suffix(".html")
        html.write_text(page(result, static))
        print(f"written: {html}")
    if not arguments:
        shown = [json.loads(path.read_text()) for path in readme.shown_files()]
        charts.save(charts.summary(shown), ROOT / "docs" / "speed.png")
        print("written: docs/speed.png")


if __name__ == "__main__":
    main(sys.argv[1:])
