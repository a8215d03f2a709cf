"""What a run leaves on disk besides its models: the description of a model, and the state to continue from.

The state is one file, ``state.pt``, which ``torch.load(weights_only=True)`` reads. `mlfast.models.checkpoint` writes
the models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlfast.files import atomic_write
from mlfast.models import MultilabelClassifier
from mlfast.models.checkpoint import FORMAT, CheckpointError
from mlfast.models.errors import first_line
from mlfast.training.config import TrainConfig


def describe_model(config: TrainConfig, model: MultilabelClassifier, classes: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` holds: all that is needed to build the model again and to feed it."""
    return {
        "format": FORMAT,
        "backbone": config.backbone,
        "backbone_args": config.backbone_args,
        "head": config.head,
        "head_args": config.head_args,
        "graph": config.graph,
        "graph_args": config.graph_args,
        "classes": list(classes),
        "cosine": config.loss == "aam",
        "scale": model.scale,
        "image_size": config.image_size,
        "resize": config.resize,
        "mean": [round(value, 6) for value in model.mean.flatten().tolist()],
        "std": [round(value, 6) for value in model.std.flatten().tolist()],
    }


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
    """Write the state to continue from: tensors, numbers, strings, lists and dicts only.

    Raises:
        OSError: it cannot be written; the state before it stays.
    """
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch puts a failure of its archive over what the disk said
                raise error.__context__ from None
            raise


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: the run stopped before its first checkpoint; start it again, it may have the same name"
        ) from error
    except Exception as error:  # a damaged archive surfaces as one of many types
        last = path.parent / "last"
        begin = f", with --weights {last} to begin from its weights" if last.exists() else ""
        raise CheckpointError(
            f"{path} is damaged, so this run cannot go on ({first_line(error)}); start another --name{begin}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not the state of a run: it holds a {type(state).__name__}; start a new run")
    return state
