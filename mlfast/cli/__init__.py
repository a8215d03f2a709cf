"""The ``mlfast`` command: one file a command, each with ``main(argv) -> exit status``.

`arguments` and `data_choice` are shared; `data_check`, `data_split` and `bench_deployed` are parts of a command.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COMMANDS = {
    "train": "train a model; without arguments, on built-in scenes of handwritten digits",
    "find-lr": "search for the learning rate of a training run",
    "recipes": "list the recipes of the paper, to train by their names",
    "data": "check a data set: statistics, missing files, broken images, speed",
    "graph": "show and draw which labels occur together",
    "evaluate": "measure a model on a split, and choose a threshold for each class",
    "predict": "find the labels of images",
    "export": "write a model as ONNX, OpenVINO IR (int8 too) or a PyTorch program, verified",
    "info": "count the parameters and multiply-accumulates of a model",
    "backends": "show which kernels can run on this machine, and why the others cannot",
    "ablate": "train on the built-in digits with each part of the method, and draw its losses",
    "bench": "time every op on this machine against plain PyTorch; --deployed: trained models in every runtime",
}
FAILED, USER_ERROR = 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 wrong use, 130 stopped by Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mlfast",
        usage="mlfast [-h] [--version] COMMAND ...",
        description="Fast multi-label image classification.",
        epilog=f"commands:\n{lines}\n\nmlfast COMMAND --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    known = parser.parse_args(argv[:1])  # what follows belongs to the command
    if known.version:
        return _show_version()
    if known.command and known.command not in COMMANDS:
        near = difflib.get_close_matches(known.command, COMMANDS, n=1)
        parser.error(
            f"{known.command!r} is no command; " + (f"did you mean {near[0]}?" if near else "see mlfast --help")
        )
    if known.command:
        return _run(known.command, argv[1:])
    parser.print_help()
    return 0


def _run(command: str, argv: list[str]) -> int:
    """The command's exit status; what a user can mend becomes one message instead of a traceback."""
    try:
        with _plain_warnings(command):
            return importlib.import_module(f"mlfast.cli.{command.replace('-', '_')}").main(argv)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # ours name the remedy
            raise
        message: Exception = error
    except (ValueError, OSError) as error:
        message = error
    except KeyboardInterrupt:
        print(f"\nmlfast {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"mlfast {command}: {message}", file=sys.stderr)
    return USER_ERROR


@contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Show a warning as one line, without the line of source code that it came from."""

    def line(message: Warning | str, *_: object, **__: object) -> str:
        return f"mlfast {command}: warning: {message}\n"

    before = warnings.formatwarning
    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _show_version() -> int:
    import mlfast

    print(f"mlfast {mlfast.__version__}")
    return 0
