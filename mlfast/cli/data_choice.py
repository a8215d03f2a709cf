"""Which labelled images a command works on: those of the run that made the model, or those that its options name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfast.deploy.model_info import ModelInfo
    from mlfast.deploy.splits import LabelledImages

_ROLES = ("train", "val")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """``--data``, ``--data_root``, ``--data_args`` and ``--images``, named and meant as in ``mlfast train``."""
    group = parser.add_argument_group("data (by default those of the run that MODEL lies in)")
    group.add_argument("--data", metavar="KIND", help="digits, csv, folder, coco, ...: see docs/data.md")
    group.add_argument("--data_root", "--data-root", metavar="FOLDER", help="of the data set; none for digits")
    group.add_argument("--data_args", "--data-args", metavar="{...}", help="options of the reader, as YAML or JSON")
    group.add_argument("--images", type=int, metavar="N", help="the first N of a split; by default all")


@dataclass(frozen=True)
class DataChoice:
    """A data set and the names of its two splits.

    Attributes:
        kind, root, options: as `mlfast.deploy.splits.read_split` takes them.
        splits: the names of the splits that training and validation took, by ``"train"`` and ``"val"``.
        sizes: how many images of these, where not all.
        held_out: whether the run held images out of its training split, and would validate on them where no split is
            named for it.
    """

    kind: str
    root: str | None
    options: dict[str, Any]
    splits: dict[str, str]
    sizes: dict[str, int]
    held_out: bool = False

    def split(self, name: str) -> str:
        """The split that is meant: ``"train"`` and ``"val"`` are those of the run, anything else is a name."""
        return self.splits.get(name, name)

    def read(self, name: str, info: ModelInfo, images: int | None = None) -> LabelledImages:
        """The labelled images of a split, in the model's size and order of classes."""
        from mlfast.deploy.splits import read_split
        from mlfast.training.splits import has_split

        split = self.split(name)
        if self.held_out and name == "val" and not has_split(self.kind, self.root, split, self.options):
            raise ValueError(
                f"val: {self.root} has no split {split!r}; the run validated on images held out of its training split, "
                "and its report.html shows what they gave. Name another split with --split or --data"
            )
        count = self.sizes.get(split) if images is None else images
        return read_split(self.kind, self.root, split, info, images=count, **self.options)


def chosen_data(options: argparse.Namespace, model: Path) -> DataChoice:
    """What the options say, and where they say nothing, the settings of the run.

    Raises:
        ValueError: there is no model, neither names a data set, or an option has no sense.
    """
    from mlfast.data import KINDS
    from mlfast.models.checkpoint import check_path
    from mlfast.training.data_settings import DEFAULT_DIGITS, DEFAULT_SPLITS

    check_path(model)
    if options.images is not None and options.images < 1:
        raise ValueError(f"--images: got {options.images}, expected at least 1")
    settings = _run_settings(model) if options.data is None else {"data": options.data}
    kind = settings.get("data")
    if kind is None:
        raise ValueError(
            f"{model} lies in no run of mlfast train, which would say what data: give --data KIND --data_root FOLDER"
        )
    if kind not in KINDS:
        raise ValueError(f"--data: got {kind!r}, expected one of {', '.join(KINDS)}")
    splits = {
        role: settings.get(f"{role}_split") or name for role, name in zip(_ROLES, DEFAULT_SPLITS[kind], strict=True)
    }
    sizes = {}
    if kind == "digits":
        sizes = {role: settings.get(f"{role}_images") or DEFAULT_DIGITS[f"{role}_images"] for role in _ROLES}
    arguments = settings.get("data_args") or {} if options.data_args is None else _mapping(options.data_args)
    return DataChoice(
        kind, options.data_root or settings.get("data_root"), arguments, splits, sizes, _holds_out(settings)
    )


def _holds_out(settings: dict[str, Any]) -> bool:
    chosen = settings.get("val_split") is None and settings.get("data") != "digits"
    share = settings.get("held_out")
    return chosen and bool(settings.get("patience") if share is None else share)


def _run_settings(model: Path) -> dict[str, Any]:
    """The settings of the run that a model folder, or a file in one, belongs to; empty where there is none."""
    import yaml

    folder = model if model.is_dir() else model.parent
    path = folder.resolve().parent / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read, so say --data KIND: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _mapping(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--data_args: got {text!r}, expected a mapping such as '{{file: labels.csv}}'")
    return value
