"""``mlfast info``."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Print what a model costs, or the paper's models beside its figures."""
    parser = argparse.ArgumentParser(
        prog="mlfast info",
        description="Count the trained parameters of a model, and its multiply-accumulates (MACs) for one image.",
    )
    parser.add_argument("--backbone", default="tf_efficientnetv2_s.in21k", help="timm model  [%(default)s]")
    parser.add_argument("--head", default="ml_decoder", help="gap, ml_decoder, q2l or csra  [%(default)s]")
    parser.add_argument("--num-classes", type=int, default=80, metavar="K", help="number of labels  [%(default)s]")
    parser.add_argument("--image-size", type=int, default=448, metavar="N", help="height and width  [%(default)s]")
    parser.add_argument("--paper", action="store_true", help="the models of the paper, beside the figures it prints")
    options = parser.parse_args(argv)
    from mlfast.models.macs import PAPER_ROWS, count, paper_line

    if not options.paper:
        cost = count(options.backbone, options.head, options.num_classes, options.image_size)
        print(f"{cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e9:.2f} GMACs")
        return 0
    print(paper_line())
    for row in PAPER_ROWS:
        print(paper_line(row, count(row.backbone, row.head, row.num_classes, row.image_size)), flush=True)
    print("docs/models.md says where the paper's figures come from.")
    return 0
