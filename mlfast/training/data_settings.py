"""The settings of a run that are about its data: what goes together, without reading a label."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlfast.data.loading import check_options

# kind -> the splits to train on and to evaluate on, where the settings name none.
DEFAULT_SPLITS = {
    "digits": ("train", "val"),
    "coco": ("train", "val"),
    "csv": ("train", "val"),
    "folder": ("train", "val"),
    "json": ("train", "val"),
    "nus_wide": ("train", "test"),
    "openimages": ("train", "validation"),
    "parquet": ("train", "val"),
    "vg500": ("train", "test"),
    "voc2007": ("trainval", "test"),
    "webdataset": ("train", "val"),
}
DEFAULT_DIGITS = {"train_images": 8000, "val_images": 1000}
HELD_OUT_FILE = "held_out.json"  # in the folder of a run: the names of the images that it held out, a JSON list

_SETTINGS = ("data", "data_root", "train_split", "val_split", "data_args", "train_images", "val_images")


def data_problems(values: Mapping[str, Any], wrong: Mapping[str, str]) -> list[str]:
    """What does not go together, of settings whose own problems are in ``wrong``."""
    if "data" in wrong:
        return []
    check = _digits_problems if values["data"] == "digits" else _file_problems
    return [f"{name}: {text}" for name, text in check(values).items() if name not in wrong]


def _digits_problems(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"got {values[name]!r}, expected nothing: the digits are built in"
        for name in ("data_root", "train_split", "val_split", "data_args", "max_broken")
        if values[name]
    }


def _file_problems(values: Mapping[str, Any]) -> dict[str, str]:
    kind, root = values["data"], values["data_root"]
    problems = {
        name: f"got {values[name]!r}, expected nothing: of {kind} all images are taken"
        for name in DEFAULT_DIGITS
        if values[name] is not None
    }
    if root is None:
        problems["data_root"] = f"got nothing, expected the folder of the data set ({kind})"
    elif isinstance(root, str) and not Path(root).expanduser().is_dir():
        problems["data_root"] = f"got {root!r}, expected a folder that exists"
    if isinstance(values["data_args"], dict):
        try:
            check_options(kind, values["data_args"])
        except ValueError as error:
            problems["data_args"] = f"got {values['data_args']!r}, expected options of the reader: {error}"
    return problems
