"""Which labelled images a command works on: those of the run that made the model, or those that its options name."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfast.deploy.model_info import ModelInfo
    from mlfast.deploy.splits import LabelledImages

_ROLES = ("train", "val")
_HELD_OUT = "held_out"


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
        held_out: the names of the images that the run held out of its training split, which make a split
            ``"held_out"``; None where this is no data of a run, or one that held none out.
    """

    kind: str
    root: str | None
    options: dict[str, Any]
    splits: dict[str, str]
    sizes: dict[str, int]
    held_out: list[str] | None = None

    def split(self, name: str) -> str:
        """The split that is meant: ``"train"`` and ``"val"`` are those of the run, anything else is a name.

        ``"val"`` is ``"held_out"`` where the run validated on that.
        """
        return self.splits.get(name, name)

    def read(self, name: str, info: ModelInfo, images: int | None = None) -> LabelledImages:
        """The labelled images of a split, in the model's size and order of classes.

        The training split is without the images that the run held out of it: the model was not trained on them.
        """
        from mlfast.deploy.splits import read_split

        split = self.split(name)
        if split == _HELD_OUT and self.held_out is not None:
            whole, only = self.split("train"), self.held_out[:images]
            return read_split(
                self.kind, self.root, whole, info, images=self.sizes.get(whole), only=only, **self.options
            )
        count = self.sizes.get(split) if images is None else images
        without = self.held_out or () if split == self.split("train") else ()
        return read_split(self.kind, self.root, split, info, images=count, without=without, **self.options)


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
    run_dir = (model if model.is_dir() else model.parent).resolve().parent
    settings = _run_settings(run_dir) if options.data is None else {"data": options.data}
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
    root = options.data_root or settings.get("data_root")
    held_out = _held_out(run_dir) if options.data is None else None
    if held_out is not None and not _has_val(settings, kind, root, splits["val"], arguments):
        splits["val"] = _HELD_OUT  # as the run had it
    return DataChoice(kind, root, arguments, splits, sizes, held_out)


def _has_val(settings: dict[str, Any], kind: str, root: str | None, split: str, arguments: dict[str, Any]) -> bool:
    """Whether the run had a split to validate on, beside the images that it held out."""
    from mlfast.training.splits import has_split

    return kind == "digits" or settings.get("val_split") is not None or has_split(kind, root, split, arguments)


def _held_out(run_dir: Path) -> list[str] | None:
    """The names of the images that a run held out of its training split, if it did."""
    from mlfast.training.data_settings import HELD_OUT_FILE

    path = run_dir / HELD_OUT_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); say --data KIND to measure on a split of that") from error


def _run_settings(run_dir: Path) -> dict[str, Any]:
    """The settings of a run; empty where the folder is none."""
    import yaml

    path = run_dir / "config.yaml"
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
