"""``mlfast data``."""

from __future__ import annotations

_USAGE = """\
usage: mlfast data check KIND ROOT    statistics, and what is wrong
       mlfast data split KIND ROOT    divide it, with the frequency of every class kept

mlfast data check --help explains the first, mlfast data split --help the second."""


def main(argv: list[str]) -> int:
    """Check or divide a data set."""
    from mlfast.cli import data_check, data_split

    commands = {"check": data_check.main, "split": data_split.main}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if not argv or argv[0] not in ("-h", "--help"):
        raise ValueError(f"got {argv[0] if argv else 'nothing'}, expected check or split\n{_USAGE}")
    print(_USAGE)
    return 0
