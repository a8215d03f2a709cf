"""``mlfast data``."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Check a data set."""
    from mlfast.data import check

    return check.main(argv)
