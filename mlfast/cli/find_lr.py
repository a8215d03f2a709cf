"""``mlfast find-lr``."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from mlfast.cli.arguments import either_dash, names_of
from mlfast.cli.train import read_settings, with_config_option


def main(argv: list[str]) -> int:
    """Search for the learning rate, show what was tried, and print ``lr: RATE`` as the last line."""
    parser = argparse.ArgumentParser(
        prog="mlfast find-lr",
        usage="mlfast find-lr [CONFIG.yaml | RECIPE] [--mode tpe|range] [--KEY VALUE ...]",
        description="Search for the lr of a run that mlfast train would start with the same arguments. Nothing is kept "
        "but a picture. docs/recipes.md describes both modes.",
        allow_abbrev=False,
    )
    parser.add_argument("--mode", choices=("tpe", "range"), default="tpe", help="tpe: short runs; range: 100 steps")
    parser.add_argument("--trials", type=int, default=15, help="tpe: short runs  [%(default)s]")
    parser.add_argument("--trial_epochs", type=int, default=3, help="tpe: epochs of each  [%(default)s]")
    parser.add_argument("--low", type=float, help="lowest rate; the default depends on loss and optimizer")
    parser.add_argument("--high", type=float, help="highest rate")
    parser.add_argument("--picture", default="lr_search.png", metavar="FILE", help="[%(default)s]")
    options, others = parser.parse_known_args(either_dash(argv, names_of(parser)))
    for name, value in (("trials", options.trials), ("trial_epochs", options.trial_epochs)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    _search(options, read_settings(with_config_option(others)))
    return 0


def _search(options: argparse.Namespace, settings: dict[str, object]) -> None:
    from mlfast.training import TrainConfig
    from mlfast.training.distributed import ONE_PROCESS
    from mlfast.training.fit import create_trainer
    from mlfast.training.lr_search import RangeTest, TrialSearch, range_test, tpe_search

    found: RangeTest | TrialSearch
    with tempfile.TemporaryDirectory() as folder:
        config = replace(TrainConfig.from_dict(settings), runs_dir=folder, name="search")
        with closing(create_trainer(config, Path(folder) / "search", ONE_PROCESS, quiet=True)) as trainer:
            if options.mode == "range":
                found = range_test(trainer, options.low, options.high)
            else:
                found = tpe_search(trainer, options.trials, options.trial_epochs, options.low, options.high)
    if isinstance(found, TrialSearch):
        print("      lr  mAP after each epoch")
        for trial in found.trials:
            scores = "  ".join(f"{100 * score:5.1f}" for score in trial.scores)
            print(f"{trial.lr:8.4g}  {scores}{'  pruned' if trial.pruned else ''}")
    elif found.still_falls:
        print(f"the loss still falls at the highest rate, {found.rates[-1]:.3g}; a higher --high may find more")
    try:
        found.draw(Path(options.picture))
        print(f"picture: {options.picture}")
    except OSError as error:  # what took minutes to find is shown all the same
        print(f"picture: none, as {options.picture} cannot be written: {error.strerror}")
    print(f"lr: {found.lr:.3g}")
