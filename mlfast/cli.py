"""The ``mlfast`` command."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

_USAGE = "mlfast [-h] [--version] COMMAND ..."
_COMMANDS = """\
commands:
  train       train a model; without arguments, on built-in scenes of handwritten digits
  backends    show which kernels can run on this machine, and why the others cannot
  bench       time every op on this machine against plain PyTorch, and say which gain nothing here

mlfast COMMAND --help explains a command.
"""
_TRAIN_USAGE = "mlfast train [CONFIG.yaml] [--KEY VALUE ...]\n       mlfast train --resume RUN_DIR"
_TRAIN_TEXT = """\
Train a multi-label classifier with the AAM loss and evaluate it after every epoch. Without arguments it trains on
built-in scenes of handwritten digits. Settings come from a YAML file of KEY: VALUE lines, and options go over it.
"""
_TRAIN_EXAMPLES = """\
examples:
  mlfast train                                     the demonstration, about two minutes on two CPU cores
  mlfast train --print_config > my.yaml            all settings, to edit
  mlfast train my.yaml --lr 0.2 --name second      the file, with two settings changed
  mlfast train --resume runs/second                continue a run that was stopped by Ctrl-C or a crash
"""

_METAVARS = {int: "N", float: "X", bool: "true|false", dict[str, Any]: "{...}", str: "TEXT", str | None: "TEXT"}

_NO_BENCH = """\
the benchmarks are not part of the installed package: they need the repository's folder bench/. In a checkout:
  pip install --editable ".[bench]"
  mlfast bench"""

_USER_ERROR = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the texts, and every option on one line."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **settings | {"max_help_position": 28, "width": 118})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 training failed, 2 wrong use, 130 stopped by Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mlfast",
        usage=_USAGE,
        description="Fast multi-label image classification.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", choices=("train", "backends", "bench"), help=argparse.SUPPRESS)
    known = parser.parse_args(argv[:1])  # what follows belongs to the command
    if known.version:
        return _show_version()
    if known.command == "train":
        return _train(argv[1:])
    if known.command == "backends":
        return _show_backends(argv[1:])
    if known.command == "bench":
        return _bench(argv[1:])
    parser.print_help()
    return 0


def _show_version() -> int:
    import mlfast

    print(f"mlfast {mlfast.__version__}")
    return 0


def _show_backends(argv: list[str]) -> int:
    argparse.ArgumentParser(
        prog="mlfast backends", description="Show which kernels can run on this machine, and why the others cannot."
    ).parse_args(argv)
    import mlfast

    print(mlfast.backends())
    return 0


def _bench(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mlfast bench",
        description="Time every op on this machine against plain PyTorch, and say which gain nothing here: about three "
        "minutes. What it does not know goes on to pytest, such as -k aam_loss or --device cuda.",
    )
    parser.add_argument("--full", action="store_true", help="every size: about half an hour")
    known, others = parser.parse_known_args(argv)
    folder = Path(__file__).resolve().parents[1] / "bench"
    if not (folder / "bench_aam_loss.py").exists():
        print(f"mlfast bench: {_NO_BENCH}", file=sys.stderr)
        return _USER_ERROR
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        print(f'mlfast bench: {missing[0]} is not installed: pip install "mlfast[bench]"', file=sys.stderr)
        return _USER_ERROR
    quick = [] if known.full else ["--quick"]
    command = [sys.executable, "-m", "pytest", "bench", *quick, "-q", "--benchmark-quiet", "-p", "no:warnings", *others]
    # Two threads that spin while they wait for each other cost more than they bring: PyTorch too is faster this way.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    return subprocess.run(command, cwd=folder.parent, env=environment, check=False).returncode


def _train(argv: list[str]) -> int:
    from mlfast.training.errors import CheckpointError, Interrupted, TrainingError

    try:
        _run_training(argv)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return _INTERRUPTED
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was saved since the last finished epoch", file=sys.stderr)
        return _INTERRUPTED
    except TrainingError as error:
        return _fail(error, 1)
    except (ValueError, CheckpointError) as error:
        return _fail(error, _USER_ERROR)
    except ModuleNotFoundError as error:
        if "mlfast[train]" not in str(error):
            raise
        return _fail(error, _USER_ERROR)
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"mlfast train: {error}", file=sys.stderr)
    return status


def _run_training(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    from mlfast.training import TrainConfig, fit, resume

    settings = _train_parser().parse_args(argv).as_dict()
    del settings["config"]
    run_dir = settings.pop("resume", None)
    if run_dir is None:
        fit(TrainConfig.from_dict(settings))
    elif len(argv) > (1 if "=" in argv[0] else 2):  # --resume=DIR or --resume DIR, and nothing else
        raise ValueError("--resume continues a run with its own settings; it goes with no other option")
    else:
        resume(run_dir)


def _train_parser() -> Any:
    """The options of ``mlfast train``, read off the fields of TrainConfig."""
    try:
        import jsonargparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'mlfast train needs {error.name}, which is not installed: pip install "mlfast[train]"', name=error.name
        ) from error
    from mlfast.training.config import TrainConfig, field_default, field_types

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ValueError(_clearer(message)) from ex

    parser = Parser(
        prog="mlfast train",
        usage=_TRAIN_USAGE,
        description=_TRAIN_TEXT,
        epilog=_TRAIN_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--resume", default=argparse.SUPPRESS, metavar="RUN_DIR", help="continue a stopped run")
    types = field_types()
    groups = {title: parser.add_argument_group(title) for title in _groups(TrainConfig)}
    for item in fields(TrainConfig):
        kind, default = types[item.name], field_default(item)
        groups[item.metadata["group"]].add_argument(
            f"--{item.name}",
            # TrainConfig checks the values, so that all problems appear at once; here only text is told from the rest.
            type=str | Any if kind in (str, str | None) else Any,
            default=default,
            metavar=_METAVARS.get(kind, "NAME"),
            help=item.metadata["help"] + ("" if default is None else f"  [{json.dumps(default).strip(chr(34))}]"),
        )
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.metavar, action.help = "", "print all settings as YAML and exit"
    return parser


def _groups(config: type) -> dict[str, None]:
    return dict.fromkeys(item.metadata["group"] for item in fields(config))


def _clearer(message: str) -> str:
    """jsonargparse's message, in the words of the settings where it is about one that does not exist."""
    from mlfast.training.config import unknown_key

    found = re.search(r"unrecognized arguments: --([\w-]+)|Option '([\w-]+)' is not accepted", message)
    return unknown_key(found[1] or found[2]) if found else message.removeprefix('Parser key "config": ')
