"""Multiply-accumulates (MACs) of a model, and the figures that the paper prints for its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from mlfast.models.classifier import create_model


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
        head: the head; the graph branch ("GAN") adds nothing to "gap", since its weights are constants at inference.
        num_classes, image_size: as in the paper.
        printed: the table's "GFLOPs", which are billions of multiply-accumulates.
    """

    data: str
    backbone: str
    head: str
    num_classes: int
    image_size: int
    printed: float


_V2S, _V2L, _TRESNET = "tf_efficientnetv2_s.in21k", "tf_efficientnetv2_l.in21k", "tresnet_v2_l"

PAPER_ROWS = (
    PaperRow("COCO", _V2S, "gap", 80, 448, 10.83),
    PaperRow("COCO", _V2S, "ml_decoder", 80, 448, 12.28),
    PaperRow("COCO", _V2L, "ml_decoder", 80, 448, 49.92),
    PaperRow("COCO", _TRESNET, "gap", 80, 448, 35.20),
    PaperRow("COCO", _TRESNET, "ml_decoder", 80, 448, 36.15),
    PaperRow("COCO", _TRESNET, "ml_decoder", 80, 640, 73.42),
    PaperRow("COCO", "tresnet_l", "gap", 80, 448, 43.50),  # the row of ASL: another TResNet-L than the others
    PaperRow("VOC", _V2S, "ml_decoder", 20, 448, 12.00),
    PaperRow("VOC", _TRESNET, "ml_decoder", 20, 448, 35.78),
    PaperRow("VG500", _V2S, "gap", 500, 576, 17.90),
    PaperRow("VG500", _V2S, "ml_decoder", 500, 576, 20.16),
    PaperRow("VG500", _TRESNET, "ml_decoder", 500, 576, 59.63),
)


@torch.no_grad()
def count(backbone: str, head: str, num_classes: int, image_size: int) -> Cost:
    """Count a model with cosines, without computing anything: on PyTorch's meta device.

    Convolutions and matrix products count, as in `torch.utils.flop_counter`, at one multiply-accumulate per product;
    norms, activations, softmax and pooling do not.

    Raises:
        ValueError, ImportError: as `mlfast.create_model`.
    """
    with torch.device("meta"):
        parameters = sum(
            p.numel() for p in create_model(backbone, num_classes, head=head, image_size=image_size).parameters()
        )
        # Logits have the same products as cosines. Cosines turn autocast off, which does not know the meta device.
        model = create_model(backbone, num_classes, head=head, image_size=image_size, cosine=False)
        model.eval().requires_grad_(False)
        images = torch.empty(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            model(images)
    return Cost(parameters, counter.get_total_flops() // 2)


def paper_line(row: PaperRow | None = None, cost: Cost | None = None) -> str:
    """A line of the table of `PAPER_ROWS` beside what `count` gives for them; without arguments, its header."""
    if row is None or cost is None:
        cells = ("data", "backbone", "head", "K", "size", "M params", "GMACs", "paper")
    else:
        name = row.backbone.removesuffix(".in21k")
        counts = (f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}", f"{row.printed:.2f}")
        cells = (row.data, name, row.head, str(row.num_classes), str(row.image_size), *counts)
    return "{:5}  {:19}  {:10}  {:>3}  {:>4}  {:>8}  {:>6}  {:>6}".format(*cells)
