"""Published weights, and one's own of another form, into a model: by name and shape, all or nothing."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlfast.models.classifier import ConstantWeight
from mlfast.models.errors import first_line
from mlfast.nn.cosine_linear import CosineLinear
from mlfast.nn.fixed_classifiers import FixedClassifiers
from mlfast.nn.ml_decoder import FoldedMLDecoder, MLDecoder
from mlfast.nn.ml_decoder_names import translate
from mlfast.torchvision_compat import import_torchvision

# Where training programs keep a state dict inside their file. An average over training comes first, as in timm.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
)
_TRAINING_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
# How torch.load says that a file is no plain data, rather than damaged.
_NEEDS_CODE = re.compile(r"(GLOBAL [\w.]+|unrecognized [^\n]+|allowlisted [^\n]+)")
_CLASSIFIERS = ("fc.", "head.", "classifier.", "last_linear.")
_FEW = 4  # a part of fewer tensors is known by its prefix: every layer has a weight and a bias
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` found; as a string, a table.

    Attributes:
        path: the file.
        source: the key in the file that held the weights, such as "state_dict_ema"; "" for the file itself.
        matched: name in the model -> name in the file.
        missing: names in the model for which the file has nothing.
        unexpected: names in the file for which the model has no place.
        wrong_shape: name in the model -> (name in the file, its shape and dtype, those of the model).
        matched_elements, total_elements: how many numbers of the model the file gives, and how many it has, in
            parameters and saved buffers.
    """

    path: str
    source: str
    matched: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: dict[str, tuple[str, str, str]]
    matched_elements: int
    total_elements: int

    @property
    def share(self) -> float:
        """The share of the model's elements that the file gives; 1 for a model without any."""
        return self.matched_elements / self.total_elements if self.total_elements else 1.0

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        shapes = [f"{name}: {theirs}, model {ours}" for name, (_, theirs, ours) in self.wrong_shape.items()]
        lines = [
            f"weights of {self.path}{source}",
            f"  {'matched':12}{len(self.matched):>6}   {self.matched_elements} of {self.total_elements} elements "
            f"({self.share:.1%})",
        ]
        rows = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes}
        for title, names in rows.items():
            lines.append(f"  {title:12}{len(names):>6}   {names[0] if names else ''}".rstrip())
            lines += [" " * 23 + name for name in names[1:_NAMES_SHOWN]]
            if len(names) > _NAMES_SHOWN:
                lines.append(" " * 23 + f"and {len(names) - _NAMES_SHOWN} more")
        return "\n".join(lines)


class WeightsMismatchError(ValueError):
    """A file that gives too little of a model; ``report`` says what it gives."""

    def __init__(self, report: LoadReport, min_match: float) -> None:
        self.report = report
        super().__init__(
            f"the file gives {report.share:.1%} of the model, less than min_match={min_match}; nothing was loaded. Is "
            "it the same backbone, head and number of classes? If the rest shall stay as it is, lower min_match.\n"
            f"{report}"
        )


# ------------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(
    model: nn.Module, path: str | Path, *, min_match: float = 0.9, allow_pickle: bool = False
) -> LoadReport:
    """Load weights of this or another library into a model, and say which.

    Wrappers (``state_dict``, ``model``, averages such as ``state_dict_ema``, which come first) and prefixes
    (``module.``, ``backbone.model.``, ``body.`` ...) are found by what fits. ML-Decoders of Alibaba, timm and the
    paper's code are translated, also where a part of a model; TResNets with InPlaceABN as timm does it; the weight of
    the paper's cosine classifier is transposed. Tensors match where name and shape agree, and both are floating point
    or neither.

    The model is touched only after the check: it has all that matched, or nothing. Its dtype and device stay.

    Args:
        model: what `mlfast.create_model` makes, or any module. It should be as it will be used, with all its parts.
        path: a file of safetensors or of ``torch.save``.
        min_match: the least share of the model's elements, parameters and saved buffers together, that the file must
            give, in [0, 1]. Where the number of classes differs, the last layer does not match: its share is small,
            so read the report.
        allow_pickle: read a file that holds more than tensors, numbers, strings, containers and the options of
            argparse. Such a file is a program: unpickling calls whatever functions it names, with the rights of this
            process, before anything can be checked. Only for files from people whose code you would also run.

    Returns:
        What matched, and what did not.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: the file is damaged, needs pickle, or holds no state dict; or the model is folded, and the file has
            nothing for its constants, which were computed from other weights; or the file is of a folded model, and
            this one is not; or the model is on the meta device.
        WeightsMismatchError: (a ValueError) the file gives less than ``min_match``; its ``report`` says what.
    """
    if not 0 <= min_match <= 1:
        raise ValueError(f"load_checkpoint: min_match must be in [0, 1], got {min_match}")
    if not Path(path).is_file():
        found = "is a folder; pass the file in it" if Path(path).is_dir() else "does not exist; pass a file that does"
        raise FileNotFoundError(f"load_checkpoint: path {str(path)!r} {found}, of safetensors or of torch.save")
    model = _unwrapped(model)
    if any(tensor.is_meta for tensor in model.state_dict().values() if isinstance(tensor, Tensor)):
        raise ValueError("load_checkpoint: the model has tensors on the meta device; make it on a real one")
    source, tensors = _state_dict(_read(Path(path), allow_pickle), Path(path))
    fitting, report = _match(model, tensors, str(path), source)
    if report.share < min_match:
        raise WeightsMismatchError(report, min_match)
    _require_constants(model, report)
    _require_unfolded(report)
    _require_edges(report)
    model.load_state_dict(fitting, strict=False)
    return report


def _unwrapped(model: Any) -> nn.Module:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _require_constants(model: nn.Module, report: LoadReport) -> None:
    """Whatever `fold` computed from the weights must not stay beside other weights."""
    kinds = (ConstantWeight, FixedClassifiers, FoldedMLDecoder)
    folded = [name for name, part in model.named_modules() if isinstance(part, kinds)]
    stale = [name for name in report.missing for prefix in folded if name.startswith(f"{prefix}." if prefix else "")]
    if stale:
        raise ValueError(
            f"the model is folded: {', '.join(stale[:_NAMES_SHOWN])} were computed from the weights that it had, and "
            f"{report.path} has nothing for them; nothing was loaded. Load the weights first, and fold() then"
        )


def _require_unfolded(report: LoadReport) -> None:
    """The constants of a folded model stand for weights that its file has not: they would stay what they are."""
    names = set(report.unexpected)
    constants = [name for name in names if f".{name}".endswith((".classifiers", ".graph_branch.value"))]
    constants += [name for name in names if name.endswith("query") and f"{name.removesuffix('query')}target" in names]
    if constants and report.missing:
        raise ValueError(
            f"{report.path} is of a folded model: {', '.join(sorted(constants)[:_NAMES_SHOWN])} stand for weights that "
            f"it has not, such as {report.missing[0]}; nothing was loaded. Load a file from before fold(), or fold() "
            "the model first"
        )


def _require_edges(report: LoadReport) -> None:
    """The label vectors of a graph must not come from the file, and its edges from elsewhere."""
    for name in report.wrong_shape:
        network, _, buffer = name.rpartition(".")
        if buffer in ("edge_index", "edge_weight") and f"{network}.vectors" in report.matched:
            raise ValueError(
                f"{report.path} holds another label graph than the model's: {name} is {report.wrong_shape[name][1]} "
                f"there and {report.wrong_shape[name][2]} here; nothing was loaded. Make the model with the "
                "co-occurrence that the file's was made with"
            )


def _read(path: Path, allow_pickle: bool) -> Any:
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
        return _read_safetensors(path)
    try:
        # Options of argparse are plain data, and common in the files of training programs.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        code = _NEEDS_CODE.search(str(error))
        if code is None:
            raise ValueError(f"{path} is damaged, or no file of torch.save: {first_line(error)}") from error
        raise ValueError(
            f"{path} holds more than data ({code[1]}); allow_pickle=True runs what it asks for, which is safe only if "
            "you trust whoever made the file"
        ) from error
    except Exception as error:  # a damaged file surfaces as one of many types
        raise ValueError(f"{path} is damaged, or no file of torch.save: {first_line(error)}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file: {error}") from error


def _state_dict(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The weights inside what a file holds, without the prefixes of training wrappers, and the keys that led there."""
    keys: list[str] = []
    while True:
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds no state dict but {type(content).__name__}")
        key = next((key for key in _WRAPPERS if _holds_tensors(content.get(key))), None)
        if key is None:
            break
        keys.append(key)
        content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys_there = sorted(map(str, content))[:_NAMES_SHOWN]
        raise ValueError(f"{path} holds no state dict; its keys are {keys_there}. Save the part that is one alone")
    return ".".join(keys), {_TRAINING_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}


def _holds_tensors(content: Any) -> bool:
    """Whether there is a weight somewhere inside: an average may be there in name alone."""
    if isinstance(content, Mapping):
        return any(map(_holds_tensors, content.values()))
    return isinstance(content, nn.Module) or (isinstance(content, Tensor) and content.dim() > 0)


# ------------------------------------------------------------------------------------------------------------ matching


def _match(
    model: nn.Module, tensors: dict[str, Tensor], path: str, source: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """What fits the model, by its names, and the report."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    fitting: dict[str, Tensor] = {}
    matched: dict[str, str] = {}
    wrong_shape: dict[str, tuple[str, str, str]] = {}
    unused = dict(tensors)
    open_names = set(state)
    for prefix, part in _parts(model):
        names = [name for name in state if name in open_names and name.startswith(prefix)]
        if not names:  # an ML-Decoder that is the classifier was looked at already
            continue
        open_names.difference_update(names)
        wanted = {name.removeprefix(prefix): state[name] for name in names}
        for name, (theirs, tensor) in _offers(prefix, part, wanted, unused).items():
            if _fits(tensor, wanted[name]):
                fitting[prefix + name], matched[prefix + name] = tensor, theirs
            else:
                wrong_shape[prefix + name] = theirs, _kind(tensor), _kind(wanted[name])
        used = {*matched.values(), *(theirs for theirs, _, _ in wrong_shape.values())}
        unused = {name: tensor for name, tensor in unused.items() if name not in used}
    report = LoadReport(
        path=path,
        source=source,
        matched=matched,
        missing=tuple(name for name in state if name not in matched and name not in wrong_shape),
        unexpected=tuple(unused),
        wrong_shape=wrong_shape,
        matched_elements=sum(state[name].numel() for name in matched),
        total_elements=sum(tensor.numel() for tensor in state.values()),
    )
    return fitting, report


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts that may have a prefix of their own in the file; the last is the model, for all that remains."""
    heads = [(f"{name}." if name else "", part) for name, part in model.named_modules() if isinstance(part, MLDecoder)]
    names = ("backbone", "classifier", "graph_branch") if hasattr(model, "backbone") else ()
    others = [(f"{name}.", getattr(model, name)) for name in names if isinstance(getattr(model, name, None), nn.Module)]
    return [*heads, *others, ("", model)]


def _offers(
    own_prefix: str, part: nn.Module, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """For names of a part, what the file has under the prefix that gives most: name -> (name in the file, tensor)."""
    forms = {name: (name, tensor) for name, tensor in tensors.items()}
    if isinstance(part, MLDecoder):
        forms = translate(tensors)
    elif type(part).__name__ == "TResNet":
        forms = _tresnet(tensors)
    by_prefix: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for form, (theirs, tensor) in forms.items():
        for cut in [0] + [i + 1 for i, letter in enumerate(form) if letter == "."]:
            if form[cut:] in wanted:
                by_prefix[form[:cut]][form[cut:]] = theirs, _turned(part, form[cut:], tensor, wanted[form[cut:]])

    def plausible(prefix: str) -> bool:
        """Not some layer of another part that has a norm or a weight too."""
        if prefix == own_prefix:
            return True
        if len(wanted) < _FEW:
            return prefix.endswith(_CLASSIFIERS)
        return 2 * len(by_prefix[prefix]) >= len(wanted)

    def given(prefix: str) -> tuple[int, int, int]:
        fits = sum(wanted[name].numel() for name, (_, t) in by_prefix[prefix].items() if _fits(t, wanted[name]))
        return fits, len(by_prefix[prefix]), -len(prefix)

    return by_prefix[max(candidates, key=given)] if (candidates := list(filter(plausible, by_prefix))) else {}


def _tresnet(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """TResNets of Alibaba's code in timm's names; InPlaceABN multiplies by the absolute value of its weight."""
    if any(name.endswith("body.conv1.conv.weight") for name in tensors):
        return {name: (name, tensor) for name, tensor in tensors.items()}
    import_torchvision()
    from timm.models.tresnet import checkpoint_filter_fn

    found = {}
    for name, tensor in tensors.items():
        for form, value in checkpoint_filter_fn({name: tensor}, None).items():
            found[form] = name, value
    return found


def _turned(part: nn.Module, name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """The paper's code keeps the weight of its cosine classifier as [S, K]."""
    if isinstance(part, CosineLinear) and name == "weight" and tensor.shape == wanted.shape[::-1] != wanted.shape:
        return tensor.t()
    return tensor


def _fits(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
