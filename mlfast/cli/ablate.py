"""``mlfast ablate``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from mlfast.cli.arguments import either_dash, names_of


def main(argv: list[str]) -> int:
    """Run the ablation, or draw the losses alone."""
    parser = argparse.ArgumentParser(
        prog="mlfast ablate",
        description="Train on the built-in digits with each part of the paper's method (Table 7), with each loss, and "
        "with other scales, margins and gammas (Figures 3 and 4, Table 8); write the tables into ablation.md and draw "
        "pictures beside it. What lies in runs_dir is not trained again, so a call that was stopped goes on.",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each configuration  [%(default)s]")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="of each run  [%(default)s]")
    parser.add_argument("--images", type=int, default=1500, metavar="N", help="training images  [%(default)s]")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="X", help="begin no run after these")
    parser.add_argument("--out", default="ablation", metavar="FOLDER", help="for tables and pictures  [%(default)s]")
    parser.add_argument("--runs_dir", default="runs/ablation", metavar="FOLDER", help="[%(default)s]")
    parser.add_argument("--figures", action="store_true", help="only draw loss-curves.png, the paper's Figure 2")
    options = parser.parse_args(either_dash(argv, names_of(parser)))
    for name in ("seeds", "epochs", "images"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, expected at least 1")
    from mlfast.training.ablation import Ablation
    from mlfast.training.ablation_page import draw_loss_curves, write_results

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_loss_curves(out / "loss-curves.png")
    if not options.figures:
        results = Ablation(options.seeds, options.epochs, options.images, options.runs_dir, options.minutes).run()
        seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
        size = f"{options.epochs} epochs of {options.images} images in batches of 32"
        missing = "" if results.complete else " Not finished: what was not measured yet says so."
        write_results(results, f"{seeds}, {size}, 1000 validation images, no average of the weights.{missing}", out)
        print("complete" if results.complete else "not complete; the same command goes on")
    print(f"written: {out}")
    return 0
