"""A timm backbone and a multi-label head as one model whose scores are probabilities."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlfast.nn.cosine_linear import CosineLinear
from mlfast.torchvision_compat import import_torchvision

HEADS = ("gap",)


class MultilabelClassifier(nn.Module):
    """Backbone, global average pooling, and one cosine (or logit) per class.

    Made by `create_model`. Calling the model gives what the loss takes: cosines, or logits when ``cosine=False``.
    `probabilities` turns them into scores with the loss's scale already applied, so that whoever reads the scores
    need not know ``s``.

    Args:
        backbone: a module with ``forward_features``: images ``[B, 3, H, W]`` to a feature map ``[B, C, h, w]``.
        classifier: maps pooled features ``[B, C]`` to ``[B, K]``.
        scale: the loss's ``s``; 1 for logits.
        mean, std: per-channel statistics of images in [0, 1] which the backbone expects.

    Shape:
        input ``[B, 3, H, W]`` float, as `prepare` gives it; output ``[B, K]``, float32 (logits: as autocast has it).
    """

    backbone: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, *, scale: float, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.scale = float(scale)
        # Not persistent: they are written to config.json, where other programs can read them.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise uint8 images ``[B, 3, H, W]`` on the device where they are: ``(x / 255 - mean) / std``, float32."""
        if images.dtype != torch.uint8:
            raise TypeError(f"prepare takes uint8 images in 0..255, got {images.dtype}")
        return images.float().mul_(1 / 255).sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``[B, 3, H, W]`` to cosines (or logits) ``[B, K]``."""
        return self.classifier(self.backbone.forward_features(images).mean(dim=(2, 3)))

    def probabilities(self, output: Tensor) -> Tensor:
        """Map what the model returned to probabilities: ``sigmoid(scale * output)``, same shape, at least float32."""
        return torch.sigmoid(self.scale * output.to(torch.promote_types(output.dtype, torch.float32)))


def create_model(
    backbone: str,
    num_classes: int,
    *,
    head: str = "gap",
    cosine: bool = True,
    scale: float | None = None,
    pretrained: bool = False,
    **backbone_args: Any,
) -> MultilabelClassifier:
    """Build a multi-label classifier on a timm backbone.

    Args:
        backbone: name of a timm model with a spatial feature map, such as ``"resnet50"``.
        num_classes: number K of labels.
        head: ``"gap"``, global average pooling and one weight vector per class.
        cosine: normalise features and weights, for angular losses; otherwise a linear layer that gives logits.
        scale: the ``s`` of the loss, used by `MultilabelClassifier.probabilities`. By default 23 (the default of
            ``mlfast.AAMLoss``) for cosines and 1 for logits.
        pretrained: load timm's published weights into the backbone.
        **backbone_args: passed on to ``timm.create_model``.

    Returns:
        A model on the CPU, in training mode. Its ``mean`` and ``std`` are those the backbone was published with.

    Raises:
        ValueError: unknown backbone (close matches are named), unknown head, or a backbone without a feature map.
        ImportError: timm or torchvision is missing; the message names the remedy.
    """
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; available: {', '.join(map(repr, HEADS))}")
    body = _create_backbone(backbone, pretrained, backbone_args)
    channels = _feature_channels(body, backbone)
    classifier = CosineLinear(channels, num_classes) if cosine else nn.Linear(channels, num_classes)
    if scale is None:
        scale = 23.0 if cosine else 1.0
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    return MultilabelClassifier(body, classifier, scale=scale, mean=mean, std=std)


def _create_backbone(name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    import_torchvision()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('timm is not installed: pip install "mlfast[train]"', name="timm") from error
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):  # a colon: a hub or folder address, which timm resolves
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "timm.list_models('*name*') searches them."
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **arguments)
    except TypeError as error:
        raise ValueError(f"backbone {name!r} does not take these arguments {sorted(arguments)}: {error}") from error
    except RuntimeError as error:
        if "Invalid pretrained tag" not in str(error):
            raise
        tags = ", ".join(map(repr, timm.list_pretrained(f"{architecture}.*"))) or repr(architecture)
        raise ValueError(f"unknown pretrained tag in backbone {name!r}; available: {tags}") from error


@torch.no_grad()
def _feature_channels(backbone: Any, name: str) -> int:
    """The channels of the feature map, by a look at one: timm's num_features is the head's width in some families."""
    config = backbone.pretrained_cfg
    size = config["input_size"] if config.get("fixed_input_size") else (3, 64, 64)
    was_training = backbone.training
    features = backbone.eval().forward_features(torch.zeros(1, *size))
    backbone.train(was_training)
    if not isinstance(features, Tensor) or features.ndim != 4 or getattr(backbone, "output_fmt", "NCHW") != "NCHW":
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"backbone {name!r} gives features {got}, but the head needs a feature map [B, channels, height, width]; "
            "choose a convolutional backbone, such as 'resnet50' or 'tf_efficientnetv2_s'"
        )
    return features.shape[1]
