"""``mlfast backends``."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Print the table of backends."""
    argparse.ArgumentParser(
        prog="mlfast backends", description="Show which kernels can run on this machine, and why the others cannot."
    ).parse_args(argv)
    import mlfast

    print(mlfast.backends())
    return 0
