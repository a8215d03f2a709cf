"""Options of ``pytest bench/``, and the table at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import machine

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("mlfast")
    group.addoption("--quick", action="store_true", help="few sizes, few rounds: minutes instead of tens of minutes")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads for every contestant")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where tensors live")
    group.addoption("--save-results", action="store_true", help="write bench/results/<machine>.json")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))
    config.mlfast_rows = []
    config.mlfast_notes = {}


@pytest.fixture
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture
def record(request, benchmark):
    """Adds a row to the table and to pytest-benchmark's own file."""

    def add(**row):
        benchmark.extra_info.update(row)
        request.config.mlfast_rows.append(row)

    return add


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def bandwidth(request, device):
    """Copy bandwidth of this machine in bytes per second, measured in this run."""
    value = machine.copy_bandwidth(device)
    request.config.mlfast_notes["copy_bandwidth_GBps"] = round(value / 1e9, 1)
    return value


def pytest_terminal_summary(terminalreporter, config):
    rows = config.mlfast_rows
    if not rows:
        return
    terminalreporter.section("mlfast")
    about = machine.description(torch.device(config.getoption("--device"))) | config.mlfast_notes
    for key, value in about.items():
        terminalreporter.line(f"{key:>20}  {value}")
    for line in table(rows):
        terminalreporter.line(line)
    if config.getoption("--save-results"):
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{machine.slug(about['processor'])}.json"
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        terminalreporter.line(f"written: {path}")


def table(rows):
    """Median microseconds of every contestant, with how many times slower than mlfast it is."""
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        names = list(of_op[0]["median_us"])
        yield ""
        yield f"{op + ', median microseconds':<38}" + "".join(f"{name:>17}" for name in names) + "   of copy bandwidth"
        for row in of_op:
            mine = row["median_us"]["mlfast"]
            cells = "".join(f"{us:>9.0f} ({us / mine:>4.1f}x)" for us in row["median_us"].values())
            share = row.get("percent_of_copy_bandwidth")
            yield f"{row['case']:<38}{cells}" + ("" if share is None else f"{share:>15.0f} %")
