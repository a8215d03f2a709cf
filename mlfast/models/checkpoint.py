"""A model on disk: a folder of ``model.safetensors`` and ``config.json``, no pickle, readable by other programs.

Every file is written beside the old one and renamed over it, so a killed process leaves the old file or the new one,
never half of one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlfast.files import atomic_write, write_text
from mlfast.models.classifier import MultilabelClassifier, create_model
from mlfast.models.label_inputs import saved_label_inputs

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint or model file that is missing, damaged or of another format; the message names the file."""


def save_model(
    folder: Path, model: MultilabelClassifier, description: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Write ``model.safetensors``, with the metadata in its header, and ``config.json`` into a folder.

    The description is the same for a whole run and is written first, so the two files cannot disagree.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as file:
        file.write(save(tensors, metadata=metadata))


def check_path(path: Path) -> None:
    """Check that there may be a model.

    Raises:
        CheckpointError: there is nothing under this path, or a run rather than one of its models.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a model, such as runs/NAME/best")
    if (path / "model.safetensors").exists() or not (path / "config.yaml").exists():
        return
    models = [str(path / name) for name in ("best", "last") if (path / name / "model.safetensors").exists()]
    verb = "models are" if len(models) > 1 else "model is"
    found = f"its {verb} {' and '.join(models)}" if models else "it has no model yet"
    raise CheckpointError(f"{path} is a run; {found}")


def load_model(folder: str | Path) -> tuple[MultilabelClassifier, dict[str, Any]]:
    """Read a model folder, such as ``runs/NAME/best``.

    Returns:
        The model on the CPU in evaluation mode, and its description (keys ``classes``, ``image_size``, ``scale``,
        ``mean``, ``std``, ``backbone``, ...). Probabilities of uint8 images ``[B, 3, image_size, image_size]`` are
        ``model.probabilities(model(model.prepare(images)))``.

    Raises:
        CheckpointError: there is no model, a file is missing or damaged, or the format is another one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    check_path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; expected the folder of a model, such as runs/NAME/best")
    try:
        description = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no readable model in {folder}: {error}") from error
    _check_description(description, folder / "config.json")
    # The weights are in the folder: timm must not unpickle or fetch others, wherever a config.json comes from.
    backbone_args = {k: v for k, v in description["backbone_args"].items() if k not in _OTHER_WEIGHTS}
    try:
        model = create_model(
            description["backbone"],
            len(description["classes"]),
            head=description["head"],
            head_args=description.get("head_args"),  # older files have none
            cosine=description.get("cosine", True),
            graph=None if description.get("graph", "none") == "none" else description["graph"],
            graph_args=description.get("graph_args"),
            image_size=description["image_size"],
            scale=description["scale"],
            **saved_label_inputs(tensors),
            **backbone_args,
        )
    except TypeError as error:  # arguments that are none
        raise CheckpointError(f"{folder / 'config.json'} describes no model: {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit {description['backbone']!r}: {error}") from error
    for buffer, stored in ((model.mean, description["mean"]), (model.std, description["std"])):
        _adopt(buffer, stored)
    return model.eval(), description


def _adopt(buffer: Tensor, stored: list[float]) -> None:
    """What the model was trained with, should timm now say something else; the file has six digits."""
    values = torch.tensor(stored, dtype=buffer.dtype).view_as(buffer)
    if not torch.allclose(values, buffer, rtol=0, atol=1e-6):
        buffer.copy_(values)


_OTHER_WEIGHTS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_KINDS: dict[str, tuple[type, ...]] = {
    "backbone": (str,),
    "backbone_args": (dict,),
    "classes": (list,),
    "head": (str,),
    "image_size": (int,),
    "mean": (list,),
    "scale": (float, int),
    "std": (list,),
}
_OPTIONAL_KINDS: dict[str, tuple[type, ...]] = {
    "head_args": (dict, type(None)),
    "cosine": (bool,),
    "graph": (str, type(None)),
    "graph_args": (dict, type(None)),
}


def _check_description(description: Any, path: Path) -> None:
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} holds {type(description).__name__}, expected a mapping")
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {description.get('format')}, expected {FORMAT}")
    given = {key: kinds for key, kinds in _OPTIONAL_KINDS.items() if key in description}
    for key, kinds in (_KINDS | given).items():
        value = description.get(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")
    for key in ("mean", "std"):
        if len(description[key]) != 3 or not all(isinstance(x, (float, int)) for x in description[key]):
            raise CheckpointError(f"{path}: {key} is {description[key]!r}, expected three numbers")
    if not 0 < description["scale"] < math.inf:
        raise CheckpointError(f"{path}: scale is {description['scale']!r}, expected a finite number above 0")
    if not description["classes"] or not all(isinstance(name, str) for name in description["classes"]):
        raise CheckpointError(f"{path}: classes must be names, at least one")
