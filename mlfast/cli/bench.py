"""``mlfast bench``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from mlfast.cli import USER_ERROR, bench_deployed

_NO_BENCH = """\
the benchmarks are not part of the installed package: they need the repository's folder bench/. In a checkout:
  pip install --editable ".[bench]"
  mlfast bench"""


def main(argv: list[str]) -> int:
    """Run the checkout's benchmarks, or time trained models."""
    if "--deployed" in argv:
        return bench_deployed.main(argv)
    parser = argparse.ArgumentParser(
        prog="mlfast bench",
        allow_abbrev=False,
        description="Time every op on this machine against plain PyTorch, and say which gain nothing here: about three "
        "minutes. What it does not know goes on to pytest, such as -k aam_loss or --device cuda.",
    )
    parser.add_argument(
        "--deployed", action="store_true", help="time trained models instead: mlfast bench --deployed --help"
    )
    parser.add_argument("--full", action="store_true", help="every size: about half an hour")
    known, others = parser.parse_known_args(argv)
    folder = Path(__file__).resolve().parents[2] / "bench"
    if not (folder / "bench_aam_loss.py").exists():
        print(f"mlfast bench: {_NO_BENCH}", file=sys.stderr)
        return USER_ERROR
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'mlfast bench: {missing[0]} is not installed: pip install ".[bench]" in a checkout of mlfast',
            file=sys.stderr,
        )
        return USER_ERROR
    quick = [] if known.full else ["--quick"]
    command = [sys.executable, "-m", "pytest", "bench", *quick, "-q", "--benchmark-quiet", "-p", "no:warnings", *others]
    # Two threads that spin while they wait for each other cost more than they bring: PyTorch too is faster this way.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    return subprocess.run(command, cwd=folder.parent, env=environment, check=False).returncode
