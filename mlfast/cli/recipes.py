"""``mlfast recipes``."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """List the recipes."""
    argparse.ArgumentParser(
        prog="mlfast recipes",
        description="List the recipes beside the mAP and GMACs that the paper prints. mlfast train NAME --data_root "
        "FOLDER trains one; docs/recipes.md describes them.",
    ).parse_args(argv)
    from mlfast.training.recipes import read_recipe, recipe_names

    line = "{:28}  {:>4}  {:>6}  {:>10}  {:>10}  {}".format
    print(line("name", "size", "lr", "mAP", "GMACs", "the paper's"))
    for recipe in map(read_recipe, recipe_names()):
        size, lr = (recipe.settings[key] for key in ("image_size", "lr"))
        print(line(recipe.name, size, f"{lr:g}", recipe.mAP, recipe.gmacs, recipe.title))
    print(
        "\nNone of them has been trained with mlfast. mAP and GMACs are the paper's, as far as our sources tell them."
    )
    return 0
