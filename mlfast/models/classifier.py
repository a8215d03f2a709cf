"""A timm backbone, a multi-label head and perhaps a graph branch as one model whose scores are probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlfast.integers import integer
from mlfast.models.backbone import create_backbone, extract_features, probe_features
from mlfast.models.heads import HEADS, create_head
from mlfast.models.label_graph import LabelCounts, LabelGraph
from mlfast.models.label_inputs import LABEL_HEADS, LabelInputs, create_branch
from mlfast.nn.gatn import GATN
from mlfast.nn.ml_decoder import FoldedMLDecoder, MLDecoder
from mlfast.nn.ml_gcn import MLGCN
from mlfast.ops.reweight_pool import reweight_pool


class ChannelWeights(Protocol):
    """What `create_model` takes as ``graph``: a module that knows one weight per channel, whatever the image.

    It may have an attribute ``pooling``, as `mlfast.GraphBranch` has.
    """

    def weight(self) -> Tensor:
        """The channel weights ``[S]``; constant in evaluation mode."""


class MultilabelClassifier(nn.Module):
    """Backbone, perhaps channel weights of a graph branch, head: one cosine (or logit) per class.

    Made by `create_model`. Calling the model gives what the loss takes: cosines, or logits when ``cosine=False``.
    `probabilities` turns them into scores with the loss's scale already applied, so that whoever reads the scores
    need not know ``s``.

    Args:
        backbone: a module with ``forward_features``: images ``[B, 3, H, W]`` to a feature map ``[B, S, h, w]``, or to
            tokens ``[B, N, S]`` where the head takes them.
        classifier: maps features, or with ``pooled`` their pooling ``[B, S]``, to ``[B, K]``.
        pooled: whether positions are pooled before the classifier: their mean, or with a graph branch the mean plus
            the maximum of the weighted features (`mlfast.functional.reweight_pool`), unless its attribute ``pooling``
            is "mean".
        graph: None, or a module whose method ``weight()`` gives the channel weights ``[S]``.
        scale: the loss's ``s``; 1 for logits.
        mean, std: per-channel statistics of images in [0, 1] which the backbone expects.

    Shape:
        input ``[B, 3, H, W]`` float, as `prepare` gives it (integers raise a TypeError); output ``[B, K]``, float32
        (logits: as autocast has it).
    """

    backbone: Any
    graph_branch: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        *,
        pooled: bool = True,
        graph: nn.Module | None = None,
        scale: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.graph_branch = graph  # an exported module has a graph of its own
        self.classifier = classifier
        self.pooled = pooled
        self.scale = float(scale)
        # Not persistent: they are written to config.json, where other programs can read them.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise uint8 images ``[B, 3, H, W]`` on the device where they are: ``(x / 255 - mean) / std``, float32.

        Raises:
            TypeError, ValueError: images of another dtype or shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"prepare takes uint8 images in 0..255, got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.mean.shape[1]:
            raise ValueError(_wrong_shape(images, self.mean.shape[1]))
        return images.float().mul_(1 / 255).sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``[B, 3, H, W]`` to cosines (or logits) ``[B, K]``."""
        return self.classifier(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the classifier takes of normalised images ``[B, 3, H, W]``: weighted by the graph branch, and pooled."""
        if not images.is_floating_point():
            raise TypeError(f"the model takes normalised images, got {images.dtype}; pass model.prepare(images)")
        features = extract_features(self.backbone, images)
        if self.graph_branch is not None:
            weight = self.graph_branch.weight()
            if self.pooled and _pooling(self.graph_branch) == "mean+max":
                return reweight_pool(features, weight)
            features = _reweight(features, weight)
        return features.mean(dim=(2, 3)) if self.pooled else features

    def attention(self, images: Tensor) -> Tensor:
        """Where an ML-Decoder looks for each label: ``[B, K, h, w]`` over the positions of the feature map.

        The mean over the heads of its attention; ``h * w`` values sum to 1, or to less for a transformer, whose class
        token and registers are left out. Labels of one query have the same map: `mlfast.MLDecoder` says which.

        Raises:
            ValueError: the head is no ML-Decoder, or its tokens are no grid.
        """
        if not isinstance(self.classifier, (MLDecoder, FoldedMLDecoder)):
            raise ValueError(f"attention is that of an ML-Decoder, but the head is {type(self.classifier).__name__}")
        features = self.features(images)
        found = self.classifier.attention(features)
        if features.dim() == 4:
            return found.unflatten(2, features.shape[2:])
        found = found[:, :, getattr(self.backbone, "num_prefix_tokens", 0) :]
        grid = getattr(getattr(self.backbone, "patch_embed", None), "grid_size", None)
        if grid is None or grid[0] * grid[1] != found.shape[2]:
            raise ValueError(f"the {found.shape[2]} tokens of this backbone are no grid of known height and width")
        return found.unflatten(2, tuple(grid))

    def probabilities(self, output: Tensor) -> Tensor:
        """Map what the model returned to probabilities: ``sigmoid(scale * output)``, same shape, at least float32."""
        return torch.sigmoid(self.scale * output.to(torch.promote_types(output.dtype, torch.float32)))

    @torch.no_grad()
    def fold(self) -> MultilabelClassifier:
        """A copy for inference, in evaluation mode, in which all that is the same for every image is a constant.

        That is the query side of an ML-Decoder, the classifiers of ML-GCN and GATN, and the weights of a graph branch.
        Call it when the weights are final: the copy shares no memory with this model, and its ``state_dict`` has other
        names.
        """
        folded = copy.deepcopy(self).eval().requires_grad_(False)
        if folded.graph_branch is not None:
            branch = folded.graph_branch
            folded.graph_branch = ConstantWeight(branch.weight(), _pooling(branch))
        if isinstance(folded.classifier, (MLDecoder, MLGCN, GATN)):
            folded.classifier = folded.classifier.fold()
        return folded


class ConstantWeight(nn.Module):
    """What a graph branch is at inference: channel weights ``[S]``."""

    value: Tensor

    def __init__(self, value: Tensor, pooling: str = "mean+max") -> None:
        super().__init__()
        self.pooling = pooling
        self.register_buffer("value", value.detach().clone())

    def weight(self) -> Tensor:
        """The channel weights ``[S]``."""
        return self.value


def create_model(
    backbone: str,
    num_classes: int,
    *,
    head: str = "gap",
    head_args: Mapping[str, Any] | None = None,
    graph: nn.Module | str | None = None,
    graph_args: Mapping[str, Any] | None = None,
    label_vectors: Any = None,
    cooccurrence: LabelCounts | LabelGraph | Tensor | None = None,
    cosine: bool = True,
    image_size: int | None = None,
    scale: float | None = None,
    pretrained: bool = False,
    **backbone_args: Any,
) -> MultilabelClassifier:
    """Build a multi-label classifier on a timm backbone. ``docs/models.md`` compares the heads.

    Args:
        backbone: name of a timm model, such as ``"resnet50"``. The heads need a spatial feature map; ``"ml_decoder"``
            also takes the tokens of a vision transformer.
        num_classes: number K of labels.
        head: ``"gap"``, global average pooling and one weight vector per class; ``"ml_decoder"``, `mlfast.MLDecoder`;
            ``"q2l"``, `mlfast.Query2Label`; ``"csra"``, `mlfast.CSRA`; ``"ml_gcn"``, `mlfast.MLGCN`; or ``"gatn"``,
            `mlfast.GATN`.
        head_args: arguments for the head, such as ``{"num_groups": 20}``.
        graph: a branch that re-weights the channels: ``"gat_reweight"`` or ``"gcn_reweight"``, an `mlfast.GraphBranch`
            of that kind; or a module whose method ``weight()`` gives ``[S]`` for the S channels of the backbone, the
            same for every image. With the head ``"gap"`` the pooling is then mean plus maximum. ``"ml_gcn"`` and
            ``"gatn"`` make the classifiers of the graph: here they mean the heads of these names.
        graph_args: arguments for the `mlfast.GraphBranch` of a ``graph`` that is named, such as ``{"sigmoid": False}``.
        label_vectors: an array [K, N], one vector per label, for whatever is made of a graph; by default
            `mlfast.models.cooccurrence_vectors` of ``cooccurrence``. Other heads, without a named graph, ignore both.
        cooccurrence: which labels occur together in the training images: what `mlfast.models.count_labels` gives, a
            matrix [K, K] of image counts, or the result of `mlfast.models.create_label_graph`. ``"gatn"`` needs it only
            where there are no ``label_vectors``.
        cosine: normalise features and weights, for angular losses; otherwise the head gives logits.
        image_size: height and width of the images, for backbones that are built for one size (ViT, Swin); by default
            the one they were published with. Others take any size.
        scale: the ``s`` of the loss, used by `MultilabelClassifier.probabilities`. By default 23 (the default of
            ``mlfast.AAMLoss``) for cosines and 1 for logits.
        pretrained: load timm's published weights into the backbone.
        **backbone_args: passed on to ``timm.create_model``.

    Returns:
        A model on the CPU, in training mode. Its ``mean`` and ``std`` are those the backbone was published with.
        Weights of the backbone that stand behind the features, as the last convolution of MobileNetV3 does, are frozen.

    Raises:
        TypeError: ``num_classes`` is no integer.
        ValueError: unknown backbone (close matches are named), unknown head, features that the head does not take,
            arguments, a graph branch, label vectors or co-occurrence that do not fit.
        ImportError: timm or torchvision is missing; the message names the remedy.
    """
    head, graph = as_head(head, graph)
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; available: {', '.join(map(repr, HEADS))}")
    num_classes = integer("create_model", "num_classes", num_classes)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    body = create_backbone(backbone, pretrained=pretrained, image_size=image_size, arguments=backbone_args)
    channels, is_map = probe_features(body, backbone, image_size)
    labels = LabelInputs(num_classes, label_vectors, cooccurrence)
    if isinstance(graph, str):
        graph = create_branch(graph, labels, channels, graph_args or {})
    elif graph_args:
        raise ValueError(f"graph_args are for a graph that is named, got {sorted(graph_args)} and graph={graph!r}")
    arguments = {**labels.of_head(head), **(head_args or {})}
    classifier = create_head(
        head, (channels, is_map), num_classes, cosine=cosine, arguments=arguments, backbone=backbone
    )
    if graph is not None:
        _check_graph(graph, channels, backbone)
    if scale is None:
        scale = 23.0 if cosine else 1.0
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}")
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    return MultilabelClassifier(body, classifier, pooled=head == "gap", graph=graph, scale=scale, mean=mean, std=std)


def as_head(head: str, graph: Any) -> tuple[str, Any]:
    """Head and graph, where a graph that makes the classifiers was named as the graph."""
    if not isinstance(graph, str) or graph not in LABEL_HEADS:
        return head, graph
    if head not in ("gap", graph):  # gap is the default
        raise ValueError(
            f"graph {graph!r} makes the classifiers, and leaves nothing to the head {head!r}; leave it out"
        )
    return graph, None


def _wrong_shape(images: Tensor, channels: int) -> str:
    remedy = f"convert them to {channels} channels"
    if images.dim() > 2 and images.shape[-1] == channels:
        remedy = "channels come last there: pass images.movedim(-1, -3)"
    elif images.dim() == 3:
        remedy = "pass images[None] for a batch of one"
    return f"prepare takes images [B, {channels}, H, W], got {list(images.shape)}; {remedy}"


def _pooling(graph: nn.Module) -> str:
    return getattr(graph, "pooling", "mean+max")


def _reweight(features: Tensor, weight: Tensor) -> Tensor:
    """Channel weights ``[S]`` times a map ``[B, S, h, w]`` or tokens ``[B, N, S]``."""
    return features * (weight[:, None, None] if features.dim() == 4 else weight)


@torch.no_grad()
def _check_graph(graph: Any, channels: int, backbone: str) -> None:
    weight = getattr(graph, "weight", None)
    if not isinstance(graph, nn.Module) or not callable(weight):
        raise ValueError(
            f"graph must be a module with a method weight() that gives [{channels}], got {type(graph).__name__}"
        )
    shape = list(weight().shape)
    if shape != [channels]:
        raise ValueError(
            f"graph.weight() gives {shape}, but backbone {backbone!r} has {channels} channels; "
            f"make the branch with {channels} outputs"
        )
