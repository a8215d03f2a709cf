"""Writes the tables of measured speeds into README.md: ``python -m bench.readme``. A test fails when they differ."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured speeds: written by python -m bench.readme -->", "<!-- end of measured speeds -->"


def fastest(median_us: dict[str, float], kind: str) -> float:
    """The fastest contestant of a kind: ``eager`` stands for all eager forms, ``compile`` for all compiled ones."""
    return min(us for name, us in median_us.items() if name.split()[0] == kind)


def section(path: Path) -> list[str]:
    """One machine's tables: a training step of every op at every size."""
    results = json.loads(path.read_text())
    about, rows = results["machine"], results["rows"]
    lines = [
        f"**{about['processor']}**, torch {about['torch']}, commit {about['commit']}, {about['date']}, "
        f"copy bandwidth {about['copy_bandwidth_GBps']} GB/s. All rows, forward alone among them: "
        f"[{path.name}]({path.relative_to(ROOT)}).",
        "",
        "| forward + backward, float32 | mlfast | against eager | against torch.compile | of copy bandwidth |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["case"].endswith(" training") or row["op"] == "call_overhead":
            continue
        us = row["median_us"]
        lines.append(
            f"| {row['op']}, {row['case'].removesuffix(' training')} | {us['mlfast']:.0f} µs | "
            f"{fastest(us, 'eager') / us['mlfast']:.1f}x | {fastest(us, 'compile') / us['mlfast']:.1f}x | "
            f"{row['percent_of_copy_bandwidth']:.0f} % |"
        )
    for row in rows:
        if row["op"] == "call_overhead":
            mine, smallest = row["median_us"]["mlfast"], row["median_us"]["x.sum()"]
            lines += ["", f"One label, forward + backward: {mine:.0f} µs; PyTorch's `x.sum()`: {smallest:.0f} µs."]
    return lines


def tables() -> str:
    """The tables of every machine in bench/results/."""
    paths = sorted((ROOT / "bench" / "results").glob("*.json"))
    return "\n".join([BEGIN, "", *(line for path in paths for line in [*section(path), ""]), END])


def with_tables(readme: str) -> str:
    """README.md with the present tables in the place of the old ones."""
    before, rest = readme.split(BEGIN)
    return before + tables() + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
