"""Multiply-accumulates (MACs) of a model, and the figures that the paper prints for its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mlfast.models.backbone import create_backbone, extract_features
from mlfast.models.classifier import as_head
from mlfast.models.heads import HEADS, create_head
from mlfast.models.label_graph import LabelGraph
from mlfast.models.label_inputs import LABEL_HEADS, LabelInputs, create_branch
from mlfast.nn.fixed_classifiers import FixedClassifiers

TOOL = "torch.utils.flop_counter"
WORD_VECTOR = 300  # numbers of a word vector, as in the paper


class Cost(NamedTuple):
    """What a model costs: trained parameters, and multiply-accumulates for one image."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class PaperRow:
    """A model of the paper's Tables 2 to 5.

    Attributes:
        data: the data set of the table.
        backbone: its name in timm.
        head: the head.
        num_classes, image_size: as in the paper.
        printed: the table's "GFLOPs", which are billions of multiply-accumulates; None where our sources do not tell.
        graph: the graph branch before the head; "GAN" in the tables is "gat_reweight".
    """

    data: str
    backbone: str
    head: str
    num_classes: int
    image_size: int
    printed: float | None = None
    graph: str | None = None


_V2S, _V2L, _TRESNET = "tf_efficientnetv2_s.in21k", "tf_efficientnetv2_l.in21k", "tresnet_v2_l"
_GAT = "gat_reweight"

PAPER_ROWS = (
    PaperRow("COCO", _V2S, "gap", 80, 448, 10.83),
    PaperRow("COCO", _V2S, "gap", 80, 448, 10.83, _GAT),
    PaperRow("COCO", _V2S, "ml_decoder", 80, 448, 12.28),
    PaperRow("COCO", _V2L, "ml_decoder", 80, 448, 49.92),
    PaperRow("COCO", _TRESNET, "gap", 80, 448, 35.20),
    PaperRow("COCO", _TRESNET, "gap", 80, 448, 35.20, _GAT),
    PaperRow("COCO", _TRESNET, "ml_decoder", 80, 448, 36.15),
    PaperRow("COCO", _TRESNET, "ml_decoder", 80, 640, 73.42),
    PaperRow("COCO", "tresnet_l", "gap", 80, 448, 43.50),  # the row of ASL: another TResNet-L than the others
    PaperRow("COCO", "resnet101", "ml_gcn", 80, 448),
    PaperRow("COCO", "resnet101", "csra", 80, 448),
    PaperRow("COCO", "resnet101", "q2l", 80, 448),
    PaperRow("COCO", "resnext101_32x8d", "gatn", 80, 448),
    PaperRow("VOC", _V2S, "gap", 20, 448, None, _GAT),
    PaperRow("VOC", _V2S, "ml_decoder", 20, 448, 12.00),
    PaperRow("VOC", _TRESNET, "ml_decoder", 20, 448, 35.78),
    PaperRow("NUS", _V2S, "gap", 81, 448, None, _GAT),
    PaperRow("NUS", _V2S, "ml_decoder", 81, 448),
    PaperRow("NUS", _TRESNET, "ml_decoder", 81, 448),
    PaperRow("VG500", _V2S, "gap", 500, 576, 17.90),
    PaperRow("VG500", _V2S, "gap", 500, 576, 17.90, _GAT),
    PaperRow("VG500", _V2S, "ml_decoder", 500, 576, 20.16),
    PaperRow("VG500", _TRESNET, "ml_decoder", 500, 576, 59.63),
)


# ------------------------------------------------------------------------------------------------------------ counting


@torch.no_grad()
def count(
    backbone: str,
    head: str,
    num_classes: int,
    image_size: int,
    graph: str | None = None,
    *,
    head_args: Mapping[str, Any] | None = None,
    graph_args: Mapping[str, Any] | None = None,
) -> Cost:
    """Count a model with cosines, at inference, without computing anything: on PyTorch's meta device.

    Convolutions and matrix products count, as in `torch.utils.flop_counter`, at one multiply-accumulate per product;
    norms, activations, softmax and pooling do not. Whatever is made of the labels' graph is trained, and counts as
    parameters, for vectors of 300 numbers; at inference it is a constant, as in the paper's tables.

    Raises:
        ValueError, ImportError: as `mlfast.create_model`.
    """
    head, graph = as_head(head, graph)
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; available: {', '.join(map(repr, HEADS))}")
    body, features = _count_backbone(backbone, image_size)
    is_map = features.dim() == 4
    channels = features.shape[1 if is_map else 2]
    labels = LabelInputs(num_classes, torch.zeros(num_classes, WORD_VECTOR), LabelGraph(torch.eye(num_classes)))
    arguments = {**labels.of_head(head), **(head_args or {})}

    def build(cosine: bool) -> nn.Module:
        return create_head(head, (channels, is_map), num_classes, cosine=cosine, arguments=arguments, backbone=backbone)

    parameters = body.parameters
    if graph is not None:
        parameters += _parameters(create_branch(graph, labels, channels, graph_args or {}))
    if head in LABEL_HEADS:  # not on the meta device, where no graph can be built
        parameters += _parameters(build(cosine=True))
        last: nn.Module = FixedClassifiers(torch.empty(num_classes, channels, device="meta"), cosine=True)
    else:
        with torch.device("meta"):
            last = build(cosine=True)
        parameters += _parameters(last)
    if head == "gap":
        features = features.mean((2, 3)) if is_map else features
    return Cost(parameters, body.macs + _macs(last.eval().requires_grad_(False), features))


@lru_cache(maxsize=32)
def _count_backbone(name: str, image_size: int) -> tuple[Cost, Tensor]:
    """A backbone's cost, and the features of one image, on the meta device."""
    with torch.device("meta"):
        body = create_backbone(name, pretrained=False, image_size=image_size, arguments={}).eval().requires_grad_()
        images = torch.empty(1, 3, image_size, image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            features = extract_features(body, images)
    return Cost(_parameters(body), counter.get_total_flops() // 2), features


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _macs(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2


# ------------------------------------------------------------------------------------------------------------ the table


def paper_line(row: PaperRow | None = None, cost: Cost | None = None) -> str:
    """A line of the table of `PAPER_ROWS` beside what `count` gives for them; without arguments, its header."""
    if row is None or cost is None:
        cells = ("data", "backbone", "head", "graph", "K", "size", "M params", "GMACs", "paper")
    else:
        name = row.backbone.removesuffix(".in21k")
        printed = "-" if row.printed is None else f"{row.printed:.2f}"
        counts = (f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}", printed)
        cells = (row.data, name, row.head, row.graph or "-", str(row.num_classes), str(row.image_size), *counts)
    return "{:5}  {:19}  {:10}  {:12}  {:>3}  {:>4}  {:>8}  {:>6}  {:>6}".format(*cells)
