"""Writes the measured speeds into README.md, docs/measured.md and the ops' pages: ``python -m bench.readme``.

A test fails when they differ from the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench import rows
from bench.rows import Row

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured speeds: written by python -m bench.readme -->", "<!-- end of measured speeds -->"
PAGES = {  # and the ops whose rows on every CPU they show
    "aam_loss": ["aam_loss"],
    "asymmetric_loss": ["asymmetric_loss"],
    "cosine_linear": ["cosine_linear"],
    "graph_attention": ["graph_attention", "graph_attention_layer"],
    "graph_attention_complete": ["graph_attention_complete"],
    "group_linear": ["group_linear"],
    "reweight_pool": ["reweight_pool"],
}


def against(us: dict[str, float | None], kind: str) -> str:
    """The ratio to the fastest of a kind: ``eager`` stands for all eager forms, ``compile`` for all compiled ones."""
    of_kind = [value for name, value in us.items() if name.split()[0] == kind and value]
    if not of_kind or not us["mlfast"]:
        return "-"
    ratio = min(of_kind) / us["mlfast"]
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def times(us: dict[str, float | None]) -> list[str]:
    """mlfast's time, and how many times as long the fastest eager and the fastest compiled form take."""
    return [f"{us['mlfast']:.0f} µs", against(us, "eager"), against(us, "compile")]


def memory(row: Row) -> str:
    """mlfast's peak memory, and how many times as much the thriftiest other contestant takes."""
    peaks = row["peak_bytes"]
    other = min(value for name, value in peaks.items() if rows.is_rival(name))
    return f"{rows.quantity(peaks['mlfast'], 'B')} ({other / max(peaks['mlfast'], 1):.1f}x)"


# Columns that not every row has, nor older results at all: key of a row, title, text.
COLUMNS = (
    ("percent_of_copy_bandwidth", "of copy bandwidth", lambda row: rows.percent(row["percent_of_copy_bandwidth"])),
    ("percent_of_roofline", "of roofline", lambda row: rows.percent(row["percent_of_roofline"])),
    ("peak_bytes", "peak memory (thriftiest other)", memory),
)


def table(training: list[Row]) -> list[str]:
    """A line for each training step that is shown; below it, the same in a loop of its own or as kernels alone."""
    columns = [column for column in COLUMNS if any(column[0] in row for row in training)]
    titles = ["forward + backward, float32", "mlfast", "against eager", "against torch.compile"]
    titles += [title for _, title, _ in columns]
    lines = []
    for row in shown(training):
        name = f"{row['op']}, {name_of(row)}{rows.age(row)}"
        lines.append([name, *times(row["median_us"]), *(text(row) if key in row else "-" for key, _, text in columns)])
        for key, what in (("hot_us", "in a loop of its own"), ("kernel_us", "kernels alone")):
            if key in row:
                lines.append([f"{name}, {what}", *times(row[key]), *[""] * len(columns)])
    return [as_row(titles), "|" + "---|" * len(titles), *map(as_row, lines)]


def shown(training: list[Row]) -> Iterator[Row]:
    """Of each op two sizes, whichever way they came out: COCO's (else the first one), and the one with most bytes."""
    for of_op in rows.by_op(training).values():
        usual = next((row for row in of_op if row["case"].startswith("COCO ")), of_op[0])
        largest = max(of_op, key=lambda row: row.get("bytes", 0))
        yield usual
        if largest is not usual:
            yield largest


def as_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def section(path: Path) -> list[str]:
    """One machine's table: a training step of every op at two sizes, and in words every row where mlfast loses."""
    results = json.loads(path.read_text())
    about, all_rows = results["machine"], results["rows"]
    raced = [row for row in all_rows if rows.is_race(row)]
    rate = f", matrix rate {about['matrix_rate_GFLOPs']} GFLOP/s" if "matrix_rate_GFLOPs" in about else ""
    lines = [
        f"## {about['processor']}",
        "",
        f"torch {about['torch']}, commit {about['commit']}, {about['date']}, "
        f"copy bandwidth {about['copy_bandwidth_GBps']} GB/s{rate}. Two sizes of each op; every row: "
        f"{link(path)}.",
        "",
        *table([row for row in raced if rows.is_training(row)]),
    ]
    for row in all_rows:
        if row["op"] == rows.FLOOR:
            mine, smallest = row["median_us"]["mlfast"], row["median_us"]["x.sum()"]
            lines += ["", f"One label, forward + backward: {mine:.0f} µs; PyTorch's `x.sum()`: {smallest:.0f} µs."]
    if lost := [row for row in raced if "ratio_quartiles" in row and rows.verdict(row) == "loses"]:
        lines += ["", "**Where mlfast loses**, and how many times as long it takes as the fastest other:", ""]
        lines += [f"- {op}: {'; '.join(map(loss, of_op))}" for op, of_op in rows.by_op(lost).items()]
    if lost := [row for row in map(of_kernels, filter(has_kernels, raced)) if rows.fastest_other(row)[1] < 0.995]:
        lines += ["", "The same of the kernels alone, replayed:", ""]
        lines += [f"- {op}: {'; '.join(map(loss, of_op))}" for op, of_op in rows.by_op(lost).items()]
    return lines


def has_kernels(row: Row) -> bool:
    """Whether mlfast's kernels were replayed, and a rival's."""
    us = row.get("kernel_us", {})
    return bool(us.get("mlfast")) and any(value and rows.is_rival(name) for name, value in us.items())


def of_kernels(row: Row) -> Row:
    """A row whose times are those of the kernels."""
    return row | {"median_us": {name: value for name, value in row["kernel_us"].items() if value}}


def loss(row: Row) -> str:
    name, ratio = rows.fastest_other(row)
    return f"{row['case']}{rows.age(row)}, {1 / ratio:.2f} ({name})"


def machines() -> dict[Path, dict[str, str]]:
    """What each file of results says of its machine, the latest first."""
    dated = {path: json.loads(path.read_text())["machine"] for path in (ROOT / "bench" / "results").glob("*.json")}
    return dict(sorted(dated.items(), key=lambda item: (item[1]["date"], item[0].name), reverse=True))


def shown_files() -> list[Path]:
    """The results of the CPU and of the GPU that were measured last."""
    dated = machines()
    latest = (next((path for path in dated if is_gpu(dated[path]) is gpu), None) for gpu in (False, True))
    return [path for path in latest if path]


def sections() -> str:
    """Every machine, CPUs first."""
    lines = [BEGIN, ""]
    for path in cpus_first():
        lines += [*section(path), ""]
    return "\n".join([*lines, END])


def overview() -> str:
    """A line for each training step that is shown of any machine, with a column for each; then what the columns are."""
    columns = [column for path in cpus_first() for column in columns_of(path)]
    cases = list(dict.fromkeys(case for _, found in columns for case in found))
    ops = list(dict.fromkeys(op for op, _ in cases))
    cases.sort(key=lambda case: ops.index(case[0]))
    lines = [
        as_row(["forward + backward, float32", *(title for title, _ in columns)]),
        "|---" * (len(columns) + 1) + "|",
    ]
    for case in cases:
        lines.append(as_row([", ".join(case), *(measured(found.get(case)) for _, found in columns)]))
    lines += ["", *(about_machine(path) for path in cpus_first())]
    return "\n".join([BEGIN, "", *lines, "", END])


def columns_of(path: Path) -> Iterator[tuple[str, dict[tuple[str, str], Row]]]:
    """A title, and the rows by op and case: of a CPU the calls, of a GPU these and the kernels alone."""
    results = json.loads(path.read_text())
    raced = [row for row in results["rows"] if rows.is_race(row) and rows.is_training(row)]
    found = {(row["op"], name_of(row)): row for row in shown(raced)}
    processor = results["machine"]["processor"]
    yield processor, found
    if is_gpu(results["machine"]):
        yield f"{processor}, kernels alone", {case: of_kernels(row) for case, row in found.items() if has_kernels(row)}


def name_of(row: Row) -> str:
    return row["case"].removesuffix(" training").rstrip(",")


def measured(row: Row | None) -> str:
    """mlfast's time, and how many times as long the fastest other way takes."""
    if row is None:
        return ""
    us, ratio = row["median_us"]["mlfast"], rows.fastest_other(row)[1]
    return f"{us:.0f} µs, {times_as_long(ratio)}" if us < 9_950 else f"{us / 1000:.0f} ms, {times_as_long(ratio)}"


def times_as_long(ratio: float) -> str:
    """Two digits; a loss is bold."""
    text = f"{ratio:.2g}x" if ratio < 0.995 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
    return f"**{text}**" if ratio < 0.995 else text


def about_machine(path: Path) -> str:
    """What stands below the overview: versions, and in how many rows mlfast wins and loses."""
    results = json.loads(path.read_text())
    about = results["machine"]
    older = [row["commit"] for row in results["rows"] if "commit" in row]
    taken_over = f" {len(older)} rows are of {', '.join(sorted(set(older)))}." if older else ""
    verdicts = [rows.verdict(row) for row in results["rows"] if rows.is_race(row)]
    return (
        f"- {about['processor']}: torch {about['torch']}, commit {about['commit']}, {about['date']}, copy bandwidth "
        f"{about['copy_bandwidth_GBps']} GB/s. Of {len(verdicts)} rows, forward alone among them, mlfast wins "
        f"{verdicts.count('wins')} and loses {verdicts.count('loses')}, taking whole calls.{taken_over}"
    )


def cpus_first() -> list[Path]:
    """All results: CPUs, then GPUs, each by name."""
    found = machines()
    return sorted(found, key=lambda path: (is_gpu(found[path]), path.name))


def is_gpu(machine: dict[str, str]) -> bool:
    return "CUDA" in machine["processor"]


def link(path: Path) -> str:
    """From a page in docs/."""
    return f"[{path.name}](../{path.relative_to(ROOT)})"


def with_tables(text: str, written: str) -> str:
    """A page with the present tables in the place of the old ones."""
    before, rest = text.split(BEGIN)
    return before + written + rest.split(END)[1]


def of_page(ops: list[str]) -> str:
    """Every row of these ops on every CPU."""
    found = machines()
    lines = [line for path in cpus_first() if not is_gpu(found[path]) for line in of_machine(path, ops)]
    return "\n".join([BEGIN, "", *lines, END])


def of_machine(path: Path, ops: list[str]) -> Iterator[str]:
    """Every row of these ops on one machine, in milliseconds."""
    results = json.loads(path.read_text())
    about, by_op = results["machine"], rows.by_op(results["rows"])
    yield (
        f"{about['processor']}, torch {about['torch']}, commit {about['commit']}, {about['date']}, copy bandwidth "
        f"{about['copy_bandwidth_GBps']} GB/s; milliseconds, and how many times as long as mlfast "
        "([how](benchmarks.md))."
    )
    for op in ops:
        names = rows.contestants(by_op[op])
        yield from ("", as_row([op, *names, "of copy bandwidth"]), "|" + "---|" * (len(names) + 2))
        for row in by_op[op]:
            times = [milliseconds(row["median_us"], name) for name in names]
            yield as_row([row["case"], *times, rows.percent(row.get("percent_of_copy_bandwidth"))])
    yield ""


def milliseconds(us: dict[str, float], name: str) -> str:
    """A contestant's time, and the ratio to mlfast's."""
    if name not in us:
        return "-"
    time = f"{us[name] / 1000:.3g}" if us[name] < 999_500 else f"{us[name] / 1000:.0f}"
    return time if name == "mlfast" else f"{time} ({us[name] / us['mlfast']:.2g}x)"


def written() -> dict[Path, str]:
    """Every page that shows speeds, with the present ones."""
    found = {ROOT / "README.md": overview(), ROOT / "docs" / "measured.md": sections()}
    found |= {ROOT / "docs" / f"{op}.md": of_page(ops) for op, ops in PAGES.items()}
    return {path: with_tables(path.read_text(), text) for path, text in found.items()}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
