"""Options of ``pytest bench/``, the fixtures of the benchmarks, and what is printed and written at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bench import growth, machine, race, rows
from bench.compare import compare, confirmed
from bench.memory import keep_memory

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("mlfast")
    group.addoption("--quick", action="store_true", help="few sizes, few rounds: minutes instead of tens of minutes")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads for every contestant")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where tensors live")
    group.addoption("--save-results", action="store_true", help="write bench/results/<machine>.json, from a whole run")
    group.addoption("--json", type=Path, metavar="FILE", help="write the results there")
    group.addoption("--compare", type=Path, metavar="FILE", help="fail where ratios fell since these results")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--quick"):
        race.most_seconds = 2.0
    if config.getoption("--save-results") and (config.getoption("--quick") or config.getoption("-k")):
        raise pytest.UsageError("--save-results wants a whole run: leave out --quick and -k, or write to --json FILE")
    if (old := config.getoption("--compare")) and not old.is_file():
        raise pytest.UsageError(f"--compare {old}: there is no such file")
    config.mlfast_memory = keep_memory()
    config.mlfast_rows = []
    config.mlfast_nodes = {}  # which benchmark made a row
    config.mlfast_limits = {}


@pytest.fixture
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def bandwidth(request, device):
    """Copy bandwidth of this machine in bytes per second, measured in this run."""
    value = machine.copy_bandwidth(device)
    request.config.mlfast_limits["copy_bandwidth_GBps"] = round(value / 1e9, 1)
    return value


@pytest.fixture(scope="session")
def matrix_rate(request, device):
    """Operations per second of a large float32 matrix product on this machine, measured in this run."""
    value = machine.matrix_rate(device)
    request.config.mlfast_limits["matrix_rate_GFLOPs"] = round(value / 1e9, 1)
    return value


@pytest.fixture
def record(request, benchmark, bandwidth, matrix_rate):
    """Adds a row to the results; `bench.rows` says what a row is."""

    def add(**row):
        row = rows.complete(row, benchmark.extra_info.get("race", {}), bandwidth, matrix_rate)
        benchmark.extra_info.update(row)
        request.config.mlfast_rows.append(row)
        request.config.mlfast_nodes[row["op"], row["case"]] = request.node.nodeid

    return add


def results(config):
    about = machine.description(torch.device(config.getoption("--device"))) | config.mlfast_limits
    about["freed_memory"] = config.mlfast_memory
    return {"machine": about, "rows": config.mlfast_rows}


def pytest_sessionfinish(session):
    config = session.config
    if not config.mlfast_rows:
        return
    found = results(config)
    paths = [config.getoption("--json")]
    if config.getoption("--save-results") and session.testsfailed == 0:
        paths.append(RESULTS / f"{machine.slug(found['machine']['processor'])}.json")
    for path in filter(None, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    if old := config.getoption("--compare"):
        before = json.loads(old.read_text())["rows"]
        comparison = compare(before, found["rows"])
        if comparison.falls:
            comparison = confirmed(comparison, compare(before, measured_again(config, comparison.falls)))
        config.mlfast_comparison = comparison
        if comparison.falls:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def measured_again(config, falls):
    """The rows of these falls, from a process of its own."""
    nodes = sorted({config.mlfast_nodes[fall.op, fall.case] for fall in falls})
    options = [f"--{name}={config.getoption(name)}" for name in ("threads", "device")]
    options += ["--quick"] if config.getoption("--quick") else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.json"
        command = [sys.executable, "-m", "pytest", *nodes, *options, f"--json={path}", "--benchmark-quiet", "-q"]
        subprocess.run(command, cwd=config.rootpath, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())["rows"]


def pytest_terminal_summary(terminalreporter, config):
    if not config.mlfast_rows:
        return
    terminalreporter.section("mlfast")
    found = results(config)
    for key, value in found["machine"].items():
        terminalreporter.line(f"{key:>20}  {value}")
    for line in [*rows.table(found["rows"]), "", *growth.lines(found["rows"]), "", *rows.in_words(found["rows"])]:
        terminalreporter.line(line)
    if comparison := getattr(config, "mlfast_comparison", None):
        report_comparison(terminalreporter, config.getoption("--compare"), comparison)


def report_comparison(terminalreporter, path, comparison):
    terminalreporter.section(f"ratios, compared with {path}")
    for line in comparison.left_out:
        terminalreporter.line(f"not compared: {line}")
    for fall in comparison.alone:
        terminalreporter.line(f"the other contestant is faster now, or was slow then: {fall}")
    for fall in comparison.falls:
        terminalreporter.line(f"FELL: {fall}", red=True)
    terminalreporter.line(
        f"{len(comparison.falls)} of {comparison.compared} ratios fell by more than noise explains, twice"
    )
