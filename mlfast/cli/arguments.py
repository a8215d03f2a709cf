"""Options on the command line: spelled with either dash, and those of a data format, read off its reader."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlfast.data.loading import READERS, options_of, reader


def either_dash(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    """The arguments with every option spelled as it is in ``names``: ``--batch-size`` and ``--batch_size`` are one."""
    spelled = {name.replace("-", "_"): name for name in names if name.startswith("--")}
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)  # behind it are no options
    return [_spelled(word, spelled) if word.startswith("--") else word for word in words[:end]] + words[end:]


def _spelled(word: str, spelled: Mapping[str, str]) -> str:
    name, sign, value = word.partition("=")
    return spelled.get(name.replace("-", "_"), name) + sign + value


def names_of(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser, such as ``--split``."""
    return [name for action in parser._actions for name in action.option_strings]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments of a parser with a positional `kind`, and the options of that format in its reader's types."""
    argv = either_dash(argv, names_of(parser))
    if {"-h", "--help"} & set(argv):  # whatever else is missing
        kind = next((argument for argument in argv if argument in READERS), "digits")
        _with_reader_options(parser, kind).parse_args(["--help"])
    known = parser.parse_known_args(argv)[0]
    parser = _with_reader_options(parser, known.kind)
    arguments = parser.parse_args(either_dash(argv, names_of(parser)))
    return arguments, _reader_options(arguments, known.kind)


def _with_reader_options(parser: argparse.ArgumentParser, kind: str) -> argparse.ArgumentParser:
    if kind != "digits":
        group = parser.add_argument_group(f"options of {kind}")
        texts = _argument_texts(reader(kind).read.__doc__)
        for name, option in options_of(reader(kind)).items():
            text = texts[name].replace("%", "%%") + (f"  [{option.default}]" if option.default else "")
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="VALUE", help=text)
    return parser


def _argument_texts(docstring: str) -> dict[str, str]:
    """What the Args section of a docstring says about every argument."""
    texts: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Args:\n")[2].splitlines():
        if found := re.match(r" {8}(\w+): (.*)", line):
            name, texts[found[1]] = found[1], found[2]
        elif name and line.startswith(" " * 12):
            texts[name] += " " + line.strip()
    return texts


def _reader_options(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The options of the format that were given, in the types of its reader."""
    if kind == "digits":
        return {}
    types = typing.get_type_hints(reader(kind).read)
    given = {name: getattr(arguments, name) for name in options_of(reader(kind)) if hasattr(arguments, name)}
    return {name: _converted(name, text, types[name]) for name, text in given.items()}


def _converted(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: got {text!r}, expected true or false")
        return text.lower() == "true"
    if kind is int:
        if not text.isdecimal():
            raise ValueError(f"{name}: got {text!r}, expected a number")
        return int(text)
    if "Sequence" in str(kind):
        return [part.strip() for part in text.split(",")]
    return text
