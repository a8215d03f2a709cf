"""``mlfast info``."""

from __future__ import annotations

import argparse
from typing import Any

from mlfast.cli.arguments import either_dash, names_of

_DEFAULTS: dict[str, Any] = {
    "backbone": "tf_efficientnetv2_s.in21k",
    "head": "ml_decoder",
    "graph": "none",
    "image_size": 448,
}
_CLASSES = {"coco": 80, "voc2007": 20, "nus_wide": 81, "vg500": 500, "openimages": 601}


def main(argv: list[str]) -> int:
    """Print what a model costs beside the paper's figure for it, or the table of all."""
    parser = _parser()
    options = parser.parse_args(either_dash(argv, names_of(parser)))
    if options.paper:
        return _print_paper()
    from mlfast.models.macs import TOOL, count

    given = {name: value for name, value in vars(options).items() if name in _DEFAULTS and value is not None}
    settings, printed = _recipe(options.recipe, bool(given) or options.num_classes is not None)
    of_data = _CLASSES.get(settings.get("data", "coco"), 80)
    num_classes = of_data if options.num_classes is None else options.num_classes
    settings = _DEFAULTS | settings | given
    for name, value in (("--num-classes", num_classes), ("--image-size", settings["image_size"])):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    graph = None if settings["graph"] == "none" else settings["graph"]
    cost = count(
        settings["backbone"],
        settings["head"],
        num_classes,
        settings["image_size"],
        graph,
        head_args=settings.get("head_args"),
        graph_args=settings.get("graph_args"),
    )
    behind = f" behind {graph}" if graph else ""
    print(f"{settings['backbone']}, {settings['head']}{behind}, {num_classes} labels, {settings['image_size']} pixels")
    print(f"{cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e9:.2f} GMACs by {TOOL}{printed}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlfast info",
        description="Count the trained parameters of a model, and its multiply-accumulates (MACs) for one image.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="one of mlfast recipes; options go over it")
    parser.add_argument("--backbone", help=f"timm model  [{_DEFAULTS['backbone']}]")
    parser.add_argument("--head", help="gap, ml_decoder, q2l, csra, ml_gcn or gatn  [ml_decoder]")
    parser.add_argument("--graph", help="gat_reweight or gcn_reweight  [none]")
    parser.add_argument(
        "--num-classes", type=int, metavar="K", help="number of labels  [the recipe's data set's, or 80]"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="height and width  [448]")
    parser.add_argument("--paper", action="store_true", help="the models of the paper, beside the figures it prints")
    return parser


def _recipe(name: str | None, changed: bool) -> tuple[dict[str, Any], str]:
    """Its settings, and what to say of the paper's figure for it."""
    if name is None:
        return {}, ""
    from mlfast.training.recipes import find_recipe, read_recipe

    if find_recipe(name) is None:
        raise ValueError(f"{name!r} is no recipe; mlfast recipes lists them, and options describe any other model")
    recipe = read_recipe(name)
    if changed:
        return recipe.settings, "; the paper's figure is for the recipe as it is"
    if recipe.gmacs == "not stated":
        return recipe.settings, "; the paper's figure is not in our sources"
    return recipe.settings, f"; the paper prints {recipe.gmacs} (docs/models.md says by which tools)"


def _print_paper() -> int:
    from mlfast.models.macs import PAPER_ROWS, TOOL, count, paper_line

    print(paper_line())
    for row in PAPER_ROWS:
        cost = count(row.backbone, row.head, row.num_classes, row.image_size, row.graph)
        print(paper_line(row, cost), flush=True)
    print(
        f"GMACs are counted by {TOOL}. docs/models.md says where the paper's figures come from; - is not known to us."
    )
    return 0
