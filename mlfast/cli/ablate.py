"""``mlfast ablate``."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the ablation, or draw the losses alone."""
    parser = argparse.ArgumentParser(
        prog="mlfast ablate",
        description="Train on the built-in digits with each part of the paper's method (Table 7) and with each loss, "
        "and write the table ablation.md and the picture ablation.png. A call that was stopped goes on where it was.",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each configuration  [%(default)s]")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="of each run  [%(default)s]")
    parser.add_argument("--images", type=int, default=8000, metavar="N", help="training images  [%(default)s]")
    parser.add_argument("--out", default="ablation", metavar="FOLDER", help="for table and pictures  [%(default)s]")
    parser.add_argument("--runs_dir", default="runs/ablation", metavar="FOLDER", help="[%(default)s]")
    parser.add_argument("--figures", action="store_true", help="only draw loss-curves.png, the paper's Figure 2")
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs", "images"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, expected at least 1")
    from mlfast.training.ablation import draw_loss_curves, run_ablation, write_results

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_loss_curves(out / "loss-curves.png")
    if not options.figures:
        rows = run_ablation(options.seeds, options.epochs, options.images, options.runs_dir, print)
        seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
        size = f"{options.epochs} epochs of {options.images} images"
        write_results(rows, f"{seeds}, {size}, 1000 validation images, no average of the weights.", out)
    print(f"written: {out}")
    return 0
