"""The heads by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mlfast.nn.cosine_linear import CosineLinear
from mlfast.nn.csra import CSRA
from mlfast.nn.gatn import GATN
from mlfast.nn.ml_decoder import MLDecoder
from mlfast.nn.ml_gcn import MLGCN
from mlfast.nn.query2label import Query2Label


def _pooled_linear(channels: int, num_classes: int, *, cosine: bool) -> nn.Module:
    return CosineLinear(channels, num_classes) if cosine else nn.Linear(channels, num_classes)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "gap": _pooled_linear,  # the pooling before it is the model's
    "ml_decoder": MLDecoder,
    "q2l": Query2Label,
    "csra": CSRA,
    "ml_gcn": MLGCN,
    "gatn": GATN,
}
_TAKE_TOKENS = ("ml_decoder",)


def create_head(
    name: str,
    features: tuple[int, bool],
    num_classes: int,
    *,
    cosine: bool,
    arguments: Mapping[str, Any],
    backbone: str,
) -> nn.Module:
    """Build a head for a backbone's features, which are told by their channels and whether they are a map.

    Raises:
        ValueError: tokens for a head that needs a map, or arguments that the head does not take.
    """
    channels, is_map = features
    if not is_map and name not in _TAKE_TOKENS:
        raise ValueError(
            f"backbone {backbone!r} gives tokens [B, N, {channels}], but the head {name!r} needs a feature map [B, "
            f"channels, height, width]; choose a convolutional backbone, such as 'resnet50', or head='ml_decoder'"
        )
    try:
        return HEADS[name](channels, num_classes, cosine=cosine, **arguments)
    except TypeError as error:
        raise ValueError(f"head {name!r} does not take these arguments {sorted(arguments)}: {error}") from error
