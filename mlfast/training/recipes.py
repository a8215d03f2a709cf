"""The recipes: a YAML file of settings for each row of the paper's tables, in ``mlfast/recipes``."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent.parent / "recipes"
_FIGURES = re.compile(r"^# Paper: mAP (?P<mAP>[^,]+), GMACs (?P<gmacs>[^;\n]+)", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """One file.

    Attributes:
        name: of the file, without ``.yaml``.
        title: its first line: where it comes from.
        mAP, gmacs: the figures that the paper prints for it, as text; ``"not stated"`` where our sources do not tell.
        settings: keys of `TrainConfig`.
    """

    name: str
    title: str
    mAP: str
    gmacs: str
    settings: dict[str, Any]


def recipe_names() -> list[str]:
    """All names, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path | None:
    """The file of a recipe, or None for what looks like the name of a file.

    Raises:
        ValueError: there is no such recipe; close names are given.
    """
    if "/" in name or "." in name:
        return None
    if name in recipe_names():
        return _FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, recipe_names(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "mlfast recipes lists them"
    raise ValueError(f"{name!r} is neither a file nor a recipe; {hint}")


def read_recipe(name: str) -> Recipe:
    """Read one of `recipe_names`."""
    import yaml

    text = (_FOLDER / f"{name}.yaml").read_text()
    figures = _FIGURES.search(text)
    if figures is None:
        raise ValueError(f"the recipe {name} has no line '# Paper: mAP ..., GMACs ...'")
    title = text.splitlines()[0].removeprefix("# ")
    return Recipe(name, title, figures["mAP"], figures["gmacs"], yaml.safe_load(text))
