"""What a run leaves on disk: models to use, and the state to continue from.

A model is a folder of ``model.safetensors`` and ``config.json``: no pickle, and readable by other programs. The state
to continue a run is one file, ``state.pt``, which ``torch.load(weights_only=True)`` reads. Every file is written beside
the old one and renamed over it, so a killed process leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mlfast.models import MultilabelClassifier, create_model
from mlfast.models.label_inputs import saved_label_inputs
from mlfast.training.config import TrainConfig
from mlfast.training.errors import CheckpointError

_FORMAT = 1


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under ``path`` only when all of it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is on the disk only after this
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def describe_model(config: TrainConfig, model: MultilabelClassifier, classes: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` holds: all that is needed to build the model again and to feed it."""
    return {
        "format": _FORMAT,
        "backbone": config.backbone,
        "backbone_args": config.backbone_args,
        "head": config.head,
        "head_args": config.head_args,
        "graph": config.graph,
        "classes": list(classes),
        "cosine": config.loss == "aam",
        "scale": model.scale,
        "image_size": config.image_size,
        "resize": config.resize,
        "mean": [round(value, 6) for value in model.mean.flatten().tolist()],
        "std": [round(value, 6) for value in model.std.flatten().tolist()],
    }


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


def load_model(folder: str | Path) -> tuple[MultilabelClassifier, dict[str, Any]]:
    """Read a model folder, such as ``runs/NAME/best``.

    Returns:
        The model on the CPU in evaluation mode, and its description (keys ``classes``, ``image_size``, ``scale``,
        ``mean``, ``std``, ``backbone``, ...). Probabilities of uint8 images ``[B, 3, image_size, image_size]`` are
        ``model.probabilities(model(model.prepare(images)))``.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is another one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        description = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no readable model in {folder}: {error}") from error
    if description.get("format") != _FORMAT:
        raise CheckpointError(f"{folder}/config.json has format {description.get('format')}, expected {_FORMAT}")
    model = create_model(
        description["backbone"],
        len(description["classes"]),
        head=description["head"],
        head_args=description.get("head_args"),  # older files have none
        cosine=description.get("cosine", True),
        graph=None if description.get("graph", "none") == "none" else description["graph"],
        image_size=description["image_size"],
        scale=description["scale"],
        **saved_label_inputs(tensors),
        **description["backbone_args"],
    )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit {description['backbone']!r}: {error}") from error
    return model.eval(), description


def check_classes(trained: Sequence[str], given: Sequence[str]) -> None:
    """Refuse data whose classes are not those that a model was trained on, in their order.

    Raises:
        CheckpointError: they are not; the message names the first that differs.
    """
    pairs = itertools.zip_longest(trained, given)
    for number, (old, new) in enumerate(pairs):
        if old != new:
            raise CheckpointError(
                f"the data set has other classes than the model: class {number} is {new!r} ({len(given)} classes), "
                f"expected {old!r} ({len(trained)}); read it with classes: [...] as in the model's config.json"
            )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state to continue from: tensors, numbers, strings, lists and dicts only."""
    with atomic_write(path) as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the run stopped before its first checkpoint") from error
    except Exception as error:  # a damaged archive surfaces as one of many types
        raise CheckpointError(f"{path} is damaged: {error}") from error
