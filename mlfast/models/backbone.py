"""timm models without their classifier."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlfast.models.errors import first_line
from mlfast.torchvision_compat import import_torchvision


def create_backbone(name: str, *, pretrained: bool, image_size: int | None, arguments: dict[str, Any]) -> Any:
    """Build a timm model without pooling and classifier; `mlfast.create_model` describes arguments and errors."""
    import_torchvision()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'timm is not installed: pip install ".[train]" in a checkout of mlfast', name="timm"
        ) from error
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):  # a colon: a hub or folder address, which timm resolves
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "timm.list_models('*name*') searches them."
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    if image_size is not None and _has_fixed_size(timm.get_pretrained_cfg(architecture)):
        arguments = {"img_size": image_size} | arguments
    try:
        return _create(timm, name, {"pretrained": pretrained, "num_classes": 0} | arguments)
    except TypeError as error:
        raise ValueError(f"backbone {name!r} does not take these arguments {sorted(arguments)}: {error}") from error
    except OSError as error:
        if not pretrained:
            raise
        raise OSError(
            f"the published weights of backbone {name!r} could not be read: {first_line(error)}\nWithout a "
            "network, copy the cache of Hugging Face (HF_HOME) from a machine that has them; or pass a file, in Python "
            "pretrained_cfg_overlay={'file': 'model.safetensors'}, in mlfast train --backbone_args "
            "'{pretrained_cfg_overlay: {file: model.safetensors}}'; or start from random weights, in Python "
            "pretrained=False, in mlfast train --pretrained false"
        ) from error
    except RuntimeError as error:
        if "No pretrained weights exist" in str(error):
            raise ValueError(
                f"timm has no published weights of backbone {name!r}; pass pretrained=False, in mlfast train "
                "--pretrained false"
            ) from error
        if "Invalid pretrained tag" not in str(error):
            raise
        tags = ", ".join(map(repr, timm.list_pretrained(f"{architecture}.*"))) or repr(architecture)
        raise ValueError(f"unknown pretrained tag in backbone {name!r}; available: {tags}") from error


def _create(timm: Any, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, **{"global_pool": ""} | arguments)
    except AssertionError:  # a few families cannot leave their pooling out; forward_features does not reach it
        return timm.create_model(name, **arguments)


def extract_features(backbone: Any, images: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` to what the heads take: a map ``[B, S, h, w]``, or tokens ``[B, N, S]``."""
    features = backbone.forward_features(_whole_blocks(backbone, images))
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":  # Swin and its kin
        features = features.permute(0, 3, 1, 2)
    return features


def _whole_blocks(backbone: Any, images: Tensor) -> Tensor:
    """TResNets begin with blocks of 4 x 4 pixels: other sizes get rows and columns of 0, which is the mean colour."""
    blocks = getattr(getattr(backbone, "body", None), "s2d", None)
    if blocks is None:
        return images
    down, right = (-size % blocks.bs for size in images.shape[2:])
    return F.pad(images, (0, right, 0, down)) if down or right else images


def probe_features(backbone: Any, name: str, image_size: int | None) -> tuple[int, bool]:
    """The channels of the features, and whether they are a map rather than tokens.

    By a look at some: timm's num_features is the width of the head in some families. What they do not depend on, such
    as the last convolution of MobileNetV3, which stands behind the pooling, is frozen: its gradient would never come,
    for which DistributedDataParallel waits.

    Raises:
        ValueError: they are neither.
    """
    usual = (image_size, image_size) if image_size else backbone.pretrained_cfg["input_size"][1:]
    sizes = [(64, 64), usual]  # some need more than 64 pixels
    if _has_fixed_size(backbone.pretrained_cfg):
        sizes = [getattr(getattr(backbone, "patch_embed", None), "img_size", None) or usual]
    was_training = backbone.training
    features = _features_at_first(backbone.eval(), name, sizes)
    backbone.train(was_training)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"backbone {name!r} gives features {got}, but the heads need a feature map [B, channels, height, width] or "
            "tokens [B, N, channels]; choose a convolutional backbone, such as 'resnet50' or 'tf_efficientnetv2_s'"
        )
    if features.requires_grad:  # not in inference mode
        reached = _leaves(features)
        for weight in backbone.parameters():
            weight.requires_grad_(weight.requires_grad and weight in reached)
    is_map = features.ndim == 4
    return features.shape[1 if is_map else 2], is_map


def _features_at_first(backbone: Any, name: str, sizes: Sequence[tuple[int, int]]) -> Any:
    """Those of an empty image of the first size that the backbone takes."""
    for last, size in enumerate(sizes, 1 - len(sizes)):
        try:
            with torch.enable_grad():
                return extract_features(backbone, torch.zeros(1, 3, *size))
        except (AssertionError, AttributeError, RuntimeError) as error:
            if last == 0:
                raise ValueError(
                    f"backbone {name!r} does not take an image [1, 3, {size[0]}, {size[1]}]: {first_line(error)}; "
                    "choose another image_size, other arguments, or another backbone"
                ) from error
    raise AssertionError("no size to try")


def _leaves(result: Tensor) -> set[Tensor]:
    """What a backward pass from here would reach, without one."""
    nodes: list[Any] = [result.grad_fn]
    seen = set(nodes)
    for node in nodes:  # which grows
        following = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= following
        nodes += following
    return {node.variable for node in nodes if hasattr(node, "variable")}


def _has_fixed_size(config: Any) -> bool:
    if config is None:
        return False
    return bool(config.get("fixed_input_size") if isinstance(config, dict) else config.fixed_input_size)
