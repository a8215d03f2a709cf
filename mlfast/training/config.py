"""Everything that a training run can be told, in one dataclass which checks itself completely.

The fields carry their help text and their rule, so that the command line, its help page and the checks read one list.
"""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mlfast.training.data_settings import DEFAULT_DIGITS, data_problems
from mlfast.training.errors import ConfigError
from mlfast.value_types import described, has_type

Rule = tuple[str, Callable[[Any], bool]]


def _at_least(low: float) -> Rule:
    return f"at least {low}", lambda value: value >= low


def _above(low: float) -> Rule:
    return f"above {low}", lambda value: value > low


def _between(low: float, high: float) -> Rule:
    return f"from {low} to {high}", lambda value: low <= value <= high


def _inside(low: float, high: float) -> Rule:
    return f"above {low} and below {high}", lambda value: low < value < high


_FOLDER_NAME: Rule = ("a folder name without a slash", lambda value: value not in ("", ".", "..") and "/" not in value)


def _about(group: str, text: str, rule: Rule | None = None) -> dict[str, Any]:
    """The group a setting is shown under, one line of help and the rule its value obeys."""
    return {"group": group, "help": text, "rule": rule}


def _option(default: Any, group: str, text: str, rule: Rule | None = None) -> Any:
    return field(default=default, metadata=_about(group, text, rule))


def _suggesting(settings: Any) -> Any:
    """Python's error for an argument that does not exist, with the nearest one that does."""
    init = settings.__init__

    @functools.wraps(init)
    def checked(self: Any, *values: Any, **named: Any) -> None:
        if wrong := [unknown_key(name) for name in named if name not in _FIELDS]:
            raise TypeError(f"{settings.__name__}: {'; '.join(wrong)}")
        init(self, *values, **named)

    settings.__init__ = checked
    return settings


@_suggesting
@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run; the defaults train on the built-in digit scenes in about two minutes.

    Every value is checked on construction. Loss settings have the names and meanings of `mlfast.AAMLoss`. The help
    texts below are what ``mlfast train --help`` shows.

    Raises:
        ConfigError: lists every wrong value with its key, what was given and what is expected.
        TypeError: a setting does not exist; names the nearest that does.
    """

    data: Literal[
        "digits", "coco", "csv", "folder", "json", "nus_wide", "openimages", "parquet", "vg500", "voc2007", "webdataset"
    ] = _option("digits", "Data", "kind of data set; the digits are built in, for others see docs/data.md")
    data_root: str | None = _option(None, "Data", "folder of the data set; not for the digits")
    train_split: str | None = _option(None, "Data", "to train on, e.g. train+test; by default the kind's")
    val_split: str | None = _option(None, "Data", "to evaluate on; by default the kind's")
    data_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Data", "options of the kind's reader, as YAML or JSON")
    )
    train_images: int | None = _option(None, "Data", "digits: images to train on; by default 8000", _at_least(1))
    val_images: int | None = _option(None, "Data", "digits: images to evaluate on; by default 1000", _at_least(1))
    image_size: int = _option(64, "Data", "height and width of an image, in pixels", _between(32, 1024))
    resize: Literal["squash", "crop"] = _option("squash", "Data", "squash to a square, or keep the aspect and crop")
    augment: Literal["none", "flip", "randaugment"] = _option("none", "Data", "none, flip, or randaugment and flip")
    cutout: float = _option(0.0, "Data", "side of Cutout's rectangle, a share of the image's; 0: none", _between(0, 1))
    augment_on: Literal["workers", "device"] = _option(
        "workers", "Data", "where: workers, on Pillow's images; device, on batches"
    )
    mixup: float = _option(0.0, "Data", "alpha of mixup; 0: none", _at_least(0))
    cutmix: float = _option(0.0, "Data", "alpha of CutMix; 0: none", _at_least(0))
    workers: int | None = _option(
        None, "Data", "processes that read images; by default one a core, at most 4", _at_least(0)
    )
    max_broken: int | None = _option(
        None, "Data", "images of a split that may be missing or broken; by default 10 and a thousandth", _at_least(0)
    )

    backbone: str = _option("test_resnet", "Model", "timm model with a spatial feature map")
    backbone_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Model", "arguments for timm.create_model, as YAML or JSON")
    )
    head: Literal["gap", "ml_decoder", "q2l", "csra", "ml_gcn", "gatn"] = _option(
        "gap", "Model", "gap (global average pooling), ml_decoder, q2l, csra, ml_gcn or gatn"
    )
    head_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Model", "arguments for the head, as YAML or JSON; see docs/models.md")
    )
    graph: Literal["none", "gat_reweight", "gcn_reweight", "ml_gcn", "gatn"] = _option(
        "none", "Model", "over the labels: none, gat_reweight or gcn_reweight; ml_gcn or gatn, as head"
    )
    graph_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Model", "arguments for the graph, as YAML or JSON; see docs/models.md")
    )
    label_vectors: str = _option(
        "cooccurrence", "Model", "of a graph or its head: cooccurrence, a .npy array, or text as GloVe's"
    )
    pretrained: bool = _option(False, "Model", "start from timm's published weights (downloads them)")
    weights: str | None = _option(None, "Model", "start from these: a model folder such as runs/x/best, or a file")
    min_match: float = _option(0.9, "Model", "least share of the model that weights must give", _between(0, 1))

    loss: Literal["aam", "asl", "bce"] = _option(
        "aam", "Loss", "aam (of cosines), asl or bce (of logits); aam with both gammas 0 is the AM loss"
    )
    scale: float = _option(20.0, "Loss", "aam: s, which multiplies the cosine", _above(0))
    margin: float = _option(0.0, "Loss", "aam: m, the angular margin", _between(0, 1))
    k: float = _option(0.7, "Loss", "aam: weight of the positives; negatives weigh 1-k", _between(0, 1))
    gamma_neg: float = _option(1.0, "Loss", "aam, asl: focusing of the negatives", _at_least(0))
    gamma_pos: float = _option(0.0, "Loss", "aam, asl: focusing of the positives", _at_least(0))
    prob_shift: float = _option(0.0, "Loss", "probability shift that drops easy negatives (ASL's clip)", _between(0, 1))
    label_smoothing: float = _option(0.0, "Loss", "how far targets move towards each other", _between(0, 0.5))

    epochs: int = _option(8, "Optimisation", "passes over the training images", _at_least(1))
    steps: int | None = _option(None, "Optimisation", "updates of the weights; in place of epochs", _at_least(2))
    batch_size: int = _option(64, "Optimisation", "images a step, over all processes", _at_least(2))
    micro_batch: int | None = _option(None, "Optimisation", "images a forward pass, to save memory", _at_least(1))
    grad_checkpointing: bool = _option(
        False, "Optimisation", "compute activations twice instead of keeping them: less memory, slower"
    )
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "Optimisation", "sgd (Nesterov momentum) or adamw")
    lr: float = _option(0.5, "Optimisation", "peak learning rate, for a loss per image", _above(0))
    momentum: float = _option(0.9, "Optimisation", "momentum of sgd, beta1 of adamw", _inside(0, 1))
    nesterov: bool = _option(True, "Optimisation", "Nesterov's form of momentum")
    cycle_momentum: bool = _option(False, "Optimisation", "lower the momentum while the rate is high: 0.95, 0.85, 0.95")
    weight_decay: float = _option(5e-4, "Optimisation", "decay of weights, not of biases and norms", _at_least(0))
    bias_lr: float = _option(1.0, "Optimisation", "factor of the rate of biases; the released code has 2", _above(0))
    warmup: float = _option(0.2, "Optimisation", "share of the steps in which the rate rises", _inside(0, 1))
    sam_rho: float = _option(0.0, "Optimisation", "sharpness-aware minimisation; the paper: 0.05", _between(0, 10))
    sam_adaptive: bool = _option(False, "Optimisation", "measure SAM's climb relative to each weight")
    sam_average: bool = _option(True, "Optimisation", "climb by the gradient of all processes, not by each one's own")
    clip_grad: float = _option(0.0, "Optimisation", "longest gradient; 0 for any", _at_least(0))
    ema_decay: float = _option(
        0.999, "Optimisation", "moving average of the weights; 0 turns it off", _between(0, 0.99999)
    )
    patience: int = _option(0, "Optimisation", "bad epochs that stop the training; 0: never", _at_least(0))
    held_out: float | None = _option(
        None,
        "Optimisation",
        "share of train to stop and choose by; 0: val; by default 0.1 with patience",
        _between(0, 0.5),
    )
    skip_bad_steps: int = _option(0, "Optimisation", "steps without a finite gradient to leave out", _at_least(0))

    name: str | None = _option(None, "Run", "folder below runs_dir; by default data-backbone-number", _FOLDER_NAME)
    runs_dir: str = _option("runs", "Run", "folder that holds the runs")
    device: str = _option("auto", "Run", "auto, cpu, cuda, cuda:1, ...")
    precision: Literal["fp32", "bf16", "fp16"] = _option("fp32", "Run", "of the forward pass, by autocast")
    sync_batch_norm: bool = _option(False, "Run", "batch norm over all processes; on GPUs")
    compile: bool = _option(False, "Run", "torch.compile the model")
    report: bool = _option(True, "Run", "write report.html at the end: one more pass over the validation images")
    tensorboard: bool = _option(False, "Run", "write TensorBoard's files beside metrics.jsonl")
    channels_last: bool = _option(True, "Run", "NHWC memory format, faster for convolutions")
    seed: int = _option(0, "Run", "of initial weights and image order", _between(0, 2**63 - 1))
    deterministic: bool = _option(False, "Run", "only algorithms that repeat bit for bit, on GPUs too")

    def __post_init__(self) -> None:
        problems = _problems(self.to_dict())
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from a mapping such as a loaded YAML file; keys that do not exist are problems like wrong values."""
        known = {name: value for name, value in values.items() if name in _FIELDS}
        problems = [unknown_key(name) for name in values if name not in _FIELDS]
        try:
            config = cls(**known)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)
        return config

    @property
    def held_out_share(self) -> float:
        """The share of the training images that are not trained on."""
        return self.held_out if self.held_out is not None else 0.1 if self.patience else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, ready for YAML."""
        return asdict(self)

    def binding(self) -> dict[str, Any]:
        """The settings that a run must go on with; where it lies and runs, and what it writes beside, may change."""
        free = _FREE - {"workers"} if self.data in ("parquet", "webdataset") else _FREE  # their order depends on it
        return {name: value for name, value in self.to_dict().items() if name not in free}


_FREE = {"device", "name", "pretrained", "report", "runs_dir", "tensorboard", "workers"}
_FIELDS: dict[str, Field[Any]] = {item.name: item for item in fields(TrainConfig)}
_TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)


# What other trainers call it -> what it is called here.
_OTHER_NAMES = {
    "checkpoint": "weights",
    "init_weights": "weights",
    "initial_checkpoint": "weights",
    "learning_rate": "lr",
    "model": "backbone",
    "num_epochs": "epochs",
    "num_workers": "workers",
    "out": "runs_dir",
    "out_dir": "runs_dir",
    "output": "runs_dir",
    "output_dir": "runs_dir",
    "save_dir": "runs_dir",
}


def field_types() -> dict[str, Any]:
    """The type of every setting, for whoever parses settings from text."""
    return dict(_TYPES)


def field_default(item: Field[Any]) -> Any:
    """The default of a setting, whether it is a value or made anew each time."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def unknown_key(name: str) -> str:
    """Words for a setting that does not exist, with the nearest one that does."""
    plain = str(name).replace("-", "_")
    listed = "mlfast train --help lists them"
    if plain in _OTHER_NAMES:
        return f"{name}: there is no such setting; did you mean {_OTHER_NAMES[plain]}? ({listed})"
    near = difflib.get_close_matches(plain, _FIELDS, n=1)
    return f"{name}: there is no such setting; " + (f"did you mean {near[0]}?" if near else listed)


def _problems(values: dict[str, Any]) -> list[str]:
    wrong = {name: text for name, value in values.items() if (text := _problem(name, value))}
    return [*wrong.values(), *data_problems(values, wrong), *_conflicts(values, wrong)]


def _conflicts(values: dict[str, Any], wrong: Mapping[str, str]) -> list[str]:
    """What does not go together, of values that are each right."""
    return [
        f"{names[0]}: got {values[names[0]]!r}{text}"
        for names, check in _CONFLICTS.items()
        if not wrong.keys() & set(names) and (text := check(*(values[name] for name in names)))
    ]


def _too_large_a_batch(batch_size: int, data: str, train_images: int | None) -> str:
    images = train_images or DEFAULT_DIGITS["train_images"]
    return f", expected at most train_images ({images})" if data == "digits" and batch_size > images else ""


def _missing_vectors(label_vectors: str, graph: str, head: str) -> str:
    used = label_vectors != "cooccurrence" and (graph != "none" or head == "ml_gcn")
    return ", expected a file that exists" if used and not Path(label_vectors).expanduser().is_file() else ""


# Settings -> what is wrong with their values together, or "". The first of them is the one that is named.
_CONFLICTS: dict[tuple[str, ...], Callable[..., str]] = {
    ("batch_size", "data", "train_images"): _too_large_a_batch,
    ("sam_adaptive", "sam_rho"): lambda adaptive, rho: (
        " with sam_rho 0, expected sam_rho above 0 (0.05 to 2)" if adaptive and not rho else ""
    ),
    ("margin", "loss"): lambda margin, loss: (
        f" with loss {loss}, expected 0 (only aam has a margin)" if margin and loss != "aam" else ""
    ),
    ("augment_on", "resize"): lambda place, resize: (
        " with resize crop, expected workers (they are who crops)" if (place, resize) == ("device", "crop") else ""
    ),
    ("sync_batch_norm", "device"): lambda sync, device: (
        " with device cpu, expected false (torch has it for GPUs only)" if sync and device == "cpu" else ""
    ),
    ("label_vectors", "graph", "head"): _missing_vectors,
    ("weights", "pretrained"): lambda weights, pretrained: (
        " with pretrained true, expected one of the two" if weights and pretrained else ""
    ),
}


def _problem(name: str, value: Any) -> str | None:
    if not has_type(value, _TYPES[name]):
        return f"{name}: got {value!r}, expected {described(_TYPES[name])}"
    rule = _FIELDS[name].metadata["rule"]
    if rule and value is not None and not rule[1](value):
        return f"{name}: got {value!r}, expected {rule[0]}"
    return None
