"""Weights of another run, or of a file, to start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mlfast.models import MultilabelClassifier
from mlfast.nn.group_linear import GroupLinear
from mlfast.training.errors import ConfigError

if TYPE_CHECKING:
    from mlfast.models.weights import LoadReport


def load_initial_weights(model: MultilabelClassifier, path: str, classes: Sequence[str], min_match: float) -> str:
    """Load what fits by `mlfast.load_checkpoint`; returns what was loaded and what was not, for people.

    What belongs to single classes stays as it is where the weights are of other classes: by its shape, and where a
    model folder tells its classes, by their names too.

    Args:
        model: to load into.
        path: a model folder of mlfast, or a file of safetensors or ``torch.save`` without code.
        classes: of the model.
        min_match: least share of the model's numbers that must be given.

    Raises:
        ConfigError: there is no such file, it cannot be read or needs pickle, or gives too little.
    """
    from mlfast.models.weights import WeightsMismatchError, load_checkpoint

    file = Path(path).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    trained = _classes_beside(file)
    others = trained is not None and trained != list(classes)
    kept = _of_classes(model, len(classes)) if others else {}
    try:
        report = load_checkpoint(model, file, min_match=min_match)
    except WeightsMismatchError as error:
        problem = f"got {path!r}, which gives {error.report.share:.1%} of the model, expected at least min_match, "
        raise ConfigError([f"weights: {problem}{min_match:g}\n{error.report}"]) from error
    except FileNotFoundError as error:
        raise ConfigError([f"weights: got {path!r}, expected a model folder or a file that exists ({file})"]) from error
    except (OSError, ValueError) as error:
        reason = str(error).replace("allow_pickle=True runs", "mlfast.load_checkpoint(..., allow_pickle=True) runs")
        raise ConfigError([f"weights: {reason}"]) from error
    model.load_state_dict(kept, strict=False)
    return _told(report, others, [name for name in kept if name in report.matched])


def _classes_beside(file: Path) -> list[str] | None:
    """The classes of the weights where they lie in a model folder."""
    try:
        return list(json.loads((file.parent / "config.json").read_text())["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_classes(model: MultilabelClassifier, num_classes: int) -> dict[str, torch.Tensor]:
    """Copies of the tensors outside of the backbone that have something for each class."""
    grouped = {f"{name}." for name, part in model.named_modules() if isinstance(part, GroupLinear)}
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("backbone.") and (num_classes in tensor.shape or name.startswith(tuple(grouped)))
    }


def _told(report: LoadReport, others: bool, left_out: Sequence[str]) -> str:
    if not others:
        return str(report)
    also = f": {', '.join(left_out)}" if left_out else ""
    return f"{report}\n  they are of other classes, so what belongs to single classes begins anew{also}"
