"""``mlfast train``."""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from mlfast.cli import FAILED, INTERRUPTED
from mlfast.cli.arguments import either_dash, names_of

_TRAIN_USAGE = "mlfast train [CONFIG.yaml | RECIPE] [--KEY VALUE ...]\n       mlfast train --resume RUN_DIR"
_TRAIN_TEXT = """\
Train a multi-label classifier with the AAM loss and evaluate it after every epoch. Without arguments it trains on
built-in scenes of handwritten digits. Settings come from a YAML file of KEY: VALUE lines, and options go over it.
"""
_TRAIN_EXAMPLES = """\
examples:
  mlfast train                                     the demonstration, about two minutes on two CPU cores
  mlfast train --print_config > my.yaml            all settings, to edit
  mlfast train my.yaml --lr 0.2 --name second      the file, with two settings changed
  mlfast train RECIPE --data_root ~/coco           a recipe of the paper, see mlfast recipes
  mlfast train --resume runs/second                continue a run that was stopped by Ctrl-C or a crash
  mlfast train my.yaml --name x --resume auto      start it, or continue it: for jobs that may be killed
"""

_FLAGS = ("--print_config", "--print-config", "-h", "--help")  # options without a value
_METAVARS = {
    int: "N",
    int | None: "N",
    float: "X",
    float | None: "X",
    bool: "BOOL",
    dict[str, Any]: "{...}",
    str: "TEXT",
    str | None: "TEXT",
}


_MOST_CHOICES = 12  # characters, to stay on the line


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the texts, and every option on one line."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **settings | {"max_help_position": 28, "width": 118})


def main(argv: list[str]) -> int:
    """Start or continue a run."""
    from mlfast.training.errors import Interrupted, TrainingError

    try:
        _run_training(argv)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was saved since the last finished epoch", file=sys.stderr)
        return INTERRUPTED
    except TrainingError as error:
        print(f"mlfast train: {error}", file=sys.stderr)
        return FAILED
    return 0


def _run_training(argv: list[str]) -> None:
    from mlfast.training import TrainConfig, fit, resume

    argv = with_config_option(argv)
    settings = read_settings(argv)
    run_dir = settings.pop("resume", None)
    if run_dir in (None, "auto"):
        fit(TrainConfig.from_dict(settings), resume=run_dir == "auto")
    elif len(argv) > (1 if "=" in argv[0] else 2):  # --resume=DIR or --resume DIR, and nothing else
        raise ValueError("--resume continues a run with its own settings; it goes with no other option")
    else:
        resume(run_dir)


def with_config_option(argv: list[str]) -> list[str]:
    """The arguments with the file or name of a recipe, before or behind the options, as ``--config FILE`` in front."""
    places = _places_of_files(argv)
    if not places:
        return argv
    if len(places) > 1:
        raise ValueError(f"got {' and '.join(argv[place] for place in places)}, expected one file or recipe")
    from mlfast.training.recipes import find_recipe

    file = argv[places[0]]
    recipe = None if Path(file).exists() else find_recipe(file)
    return ["--config", str(recipe or file), *argv[: places[0]], *argv[places[0] + 1 :]]


def _places_of_files(argv: Sequence[str]) -> list[int]:
    """Where words stand that are neither an option nor the value of one."""
    found, option = [], ""
    for place, word in enumerate(argv):
        if word.startswith("--") or word == "-h":
            option = "" if word in _FLAGS or "=" in word else word
        elif option == "--set" and "=" in word:
            continue  # it takes several
        elif not option or option == "--set":
            found.append(place)
        else:
            option = ""
    return found


def read_settings(argv: list[str]) -> dict[str, Any]:
    """The settings that a file and options give, by their keys.

    Keys that do not exist are among them, for `TrainConfig.from_dict` to report with every other problem.
    """
    parser = _train_parser()
    names = names_of(parser)
    argv = either_dash(argv, names)
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    files.add_argument("--set", action="extend", nargs="+", default=[])
    found, argv = files.parse_known_args(argv)
    argv += [f"--{setting}" for setting in found.set]
    from_files = {key: value for path in found.config for key, value in _read_file(path).items()}
    options, unknown = _known_options(argv, names)
    keys = {action.dest for action in parser._actions}
    unknown |= {key: value for key, value in from_files.items() if key not in keys}
    parser.set_defaults({key: value for key, value in from_files.items() if key in keys})
    if unknown:  # a message is on its way: nothing may end the command before it
        options = [option for option in options if option not in ("--print_config", "-h", "--help")]
    settings = parser.parse_args(options).as_dict()
    del settings["config"]
    return settings | unknown


def _read_file(path: str) -> dict[str, Any]:
    from jsonargparse import get_loader

    try:
        values = get_loader("yaml")(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: there is no such file, nor a recipe of that name ({error.strerror})") from error
    except Exception as error:  # whatever its reader raises
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected lines of KEY: VALUE")
    return values


def _known_options(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The options that exist with their values, and the others by their keys."""
    known, unknown, inside = [], {}, ""
    for word in argv:
        key = word.split("=")[0]
        if key.startswith("--"):
            inside = "" if key in names else key.removeprefix("--")
            if inside:
                unknown[inside] = word.partition("=")[2]
        elif inside:
            unknown[inside], inside = word, ""
            continue
        if not inside:
            known.append(word)
    return known, unknown


def _train_parser() -> Any:
    """The options of ``mlfast train``, read off the fields of TrainConfig."""
    try:
        import jsonargparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'mlfast train needs {error.name}, which is not installed: pip install ".[train]" in a checkout of mlfast',
            name=error.name,
        ) from error
    from mlfast.training.config import TrainConfig, field_default, field_types

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ValueError(message) from ex

    parser = Parser(
        prog="mlfast train",
        usage=_TRAIN_USAGE,
        description=_TRAIN_TEXT,
        epilog=_TRAIN_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--set", default=argparse.SUPPRESS, metavar="KEY=VALUE", help="the same as --KEY VALUE; takes several"
    )
    parser.add_argument(
        "--resume",
        default=argparse.SUPPRESS,
        metavar="RUN_DIR",
        help="continue a stopped run; auto: the run of this --name, if it has begun",
    )
    types = field_types()
    groups = {title: parser.add_argument_group(title) for title in _groups(TrainConfig)}
    for item in fields(TrainConfig):
        kind, default = types[item.name], field_default(item)
        groups[item.metadata["group"]].add_argument(
            f"--{item.name}",
            # TrainConfig checks the values, so that all problems appear at once; here only text is told from the rest.
            type=str | Any if kind in (str, str | None) else Any,
            default=default,
            metavar=_metavar(kind),
            help=item.metadata["help"] + ("" if default is None else f"  [{json.dumps(default).strip(chr(34))}]"),
        )
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.metavar, action.help = "", "print all settings as YAML and exit"
    return parser


def _metavar(kind: Any) -> str:
    """What stands for a value: the choices, where they are few."""
    choices = "|".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else ""
    return _METAVARS.get(kind) or (choices if 0 < len(choices) <= _MOST_CHOICES else "NAME")


def _groups(config: type) -> dict[str, None]:
    return dict.fromkeys(item.metadata["group"] for item in fields(config))
