"""What `mlfast.accelerate` knows: modules of other libraries, and the fused module for each.

Modules are known by the name of their class and their attributes, since much of this code is copied from project to
project. Where the original runs, outputs and gradients of the two are compared on a small input before it is swapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.nn.edge_index_attention import EdgeIndexAttention
from mlfast.nn.losses import AsymmetricLoss
from mlfast.nn.ml_decoder import MLDecoder
from mlfast.nn.ml_decoder_names import translate
from mlfast.ops.group_linear import group_linear
from mlfast.sparse_targets import SparseTargets

_LARGEST_EPS = 1e-7  # a clamp of probabilities here changes the loss of logits beyond 16 only


class NotSwappedError(Exception):
    """Why a module stays as it is."""


def require(condition: Any, reason: str) -> None:
    """Leave the module unless the condition holds."""
    if not condition:
        raise NotSwappedError(reason)


# -------------------------------------------------------------------------------------------------------------- losses


def asymmetric_loss(loss: Any) -> tuple[nn.Module, str]:
    """timm's and Alibaba's asymmetric loss."""
    numbers = {"gamma_neg", "gamma_pos", "clip", "eps", "disable_torch_grad_focal_loss"}
    scratch = {"targets", "anti_targets", "xs_pos", "xs_neg", "asymmetric_w", "loss"}
    _require_attributes(loss, numbers, {"smoothing", "reduction", "weight", "pos_weight"} | scratch)
    require(getattr(loss, "pos_weight", None) is None, "pos_weight is not among the options of mlfast.AsymmetricLoss")
    require(not getattr(loss, "smoothing", 0), "it smooths labels towards 0.5, mlfast.AsymmetricLoss otherwise")
    require(loss.eps <= _LARGEST_EPS, f"it clamps probabilities at eps={loss.eps}, which changes the loss")
    new = AsymmetricLoss(
        gamma_neg=loss.gamma_neg,
        gamma_pos=loss.gamma_pos,
        clip=loss.clip or 0.0,
        detach_focus=loss.disable_torch_grad_focal_loss,
        reduction=getattr(loss, "reduction", "sum"),
        class_weight=_class_weight(loss),
    )
    taken = list(inspect.signature(type(loss).forward).parameters.values())[1:]
    require(len(taken) == 2 and all(one.default is one.empty for one in taken), "its call takes other arguments")
    _require_same_losses(loss, new)
    return (
        new,
        f"equal where probabilities are above eps={loss.eps}; a target below 0 now means unknown; call it by position",
    )


def bce_with_logits(loss: Any) -> tuple[nn.Module, str]:
    """PyTorch's binary cross-entropy."""
    plain = type(loss).forward is nn.BCEWithLogitsLoss.forward
    require(plain, "its class computes it in a way of its own")
    _require_attributes(loss, {"weight", "pos_weight", "reduction"}, set())
    require(loss.pos_weight is None, "pos_weight is not among the options of mlfast.AsymmetricLoss")
    new = BinaryCrossEntropy(0.0, 0.0, 0.0, reduction=loss.reduction, class_weight=_class_weight(loss))
    _require_same_losses(loss, new)
    renamed = "" if new.class_weight is None else "; in a state dict its weight is class_weight"
    return new, (
        "equal for targets in [0, 1]; a target below 0 now means unknown, and none can require grad; float32 for half "
        f"precision{renamed}"
    )


class BinaryCrossEntropy(AsymmetricLoss):
    """`mlfast.AsymmetricLoss` with the call of ``nn.BCEWithLogitsLoss``, whose arguments have names of their own."""

    def forward(self, input: Tensor, target: Tensor | SparseTargets) -> Tensor:
        """The loss of logits; of one logit without a dimension too, what ``squeeze`` makes of a batch of one."""
        if input.dim() == 0 and isinstance(target, Tensor):
            return super().forward(input[None], target[None]).reshape(())
        return super().forward(input, target)


def _class_weight(loss: Any) -> Tensor | None:
    weight = getattr(loss, "weight", None)
    require(weight is None or weight.dim() == 1, "weight is not one number per class")
    require(weight is None or len(weight) != 1, "weight is one number for all classes; multiply the loss by it")
    return weight


def _require_same_losses(old: nn.Module, new: AsymmetricLoss) -> None:
    """Compare in both modes, and for two sizes of a batch: a copy of a loss may smooth in training, or divide by B."""
    classes, device = (3, None) if new.class_weight is None else (len(new.class_weight), new.class_weight.device)
    for training, batch in ((False, 4), (True, 6)):
        logits = torch.linspace(-4, 4, batch * classes, device=device).view(batch, classes)
        target = (torch.arange(batch * classes, device=device).view(batch, classes) % 3 == 0).float()
        _require_same_outputs(old, new, logits, target, training=training)


# --------------------------------------------------------------------------------------------------------------- heads


def ml_decoder(head: Any) -> tuple[nn.Module, str]:
    """ML-Decoder in the form of Alibaba or timm: also where it cannot run, on torch >= 2.1."""
    require("backbone" not in head._modules, "it holds a backbone; use mlfast.create_model and mlfast.load_checkpoint")
    zero_shot = getattr(head, "zsl", False) or "wordvec_proj" in head._modules
    require(not zero_shot, "zero-shot; use mlfast.MLDecoder(queries=word_vectors)")
    own = {"embed_standart", "query_embed", "duplicate_pooling", "duplicate_pooling_bias", "duplicate_factor"}
    own |= {"num_classes", "embed_len_decoder", "zsl", "train_wordvecs", "test_wordvecs"}
    _require_attributes(head, {"decoder"}, own)
    _require_attributes(head.decoder, {"layers", "norm"}, own | {"num_layers", "group_fc"})
    group_fc = getattr(head.decoder, "group_fc", None)
    require(group_fc is None or type(group_fc).__name__ == "GroupFC", f"its {type(group_fc).__name__} is not known")
    attention, dropout = _decoder_layer(head.decoder)
    given = dict(head.named_parameters(remove_duplicate=False))
    tensors = {name: (given[theirs], tensor) for name, (theirs, tensor) in translate(given).items()}
    required = {"embed.weight", "queries", "projection.weight", "projection.bias", "layer.linear1.weight"}
    require(required <= set(tensors), f"it has no {', '.join(sorted(required - set(tensors)))}")
    (width, channels), (groups, _, slots) = tensors["embed.weight"][1].shape, tensors["projection.weight"][1].shape
    classes = len(tensors["projection.bias"][1])
    require(slots == -(-classes // groups), f"it has {slots} slots a group for {classes} classes in {groups} groups")
    with torch.device("meta"):
        new = MLDecoder(
            channels,
            classes,
            num_groups=groups,
            queries="learned" if tensors["queries"][0].requires_grad else "random",
            embed_dim=width,
            num_heads=attention.num_heads,
            feedforward_dim=len(tensors["layer.linear1.weight"][1]),
            dropout=dropout,
            cosine=False,
        )
    expected = {name: tensor.shape for name, tensor in new.state_dict().items()}
    require(expected == {name: t.shape for name, (_, t) in tensors.items()}, "its tensors are not those of ML-Decoder")
    _adopt(new, tensors)
    return new, "new parameters: query_projection, memory_projection (make the optimizer after this)"


def _decoder_layer(decoder: Any) -> tuple[nn.MultiheadAttention, float]:
    """The attention and the dropout of the one layer of an ML-Decoder."""
    require(len(getattr(decoder, "layers", ())) == 1 and decoder.norm is None, "it has not one layer without a norm")
    layer = decoder.layers[0]
    parts = {"norm1", "norm2", "norm3", "linear1", "linear2", "dropout", "dropout1", "dropout2", "dropout3"}
    _require_attributes(layer, parts | {"multihead_attn", "activation"}, set())
    foreign = {type(part).__name__ for part in _leaves(decoder) if not type(part).__module__.startswith("torch.nn.")}
    require(not foreign - {"GroupFC"}, f"it has parts that are not known: {', '.join(sorted(foreign))}")
    attention = layer.multihead_attn
    require(isinstance(attention, nn.MultiheadAttention) and not attention.batch_first, "its attention is not known")
    require(attention.bias_k is None and not attention.add_zero_attn, "its attention has added keys")
    require(layer.activation in (F.relu, torch.relu) or isinstance(layer.activation, nn.ReLU), "it has not a ReLU")
    require({layer.norm1.eps, layer.norm2.eps, layer.norm3.eps} == {1e-5}, "its norms have another eps than 1e-5")
    rates = {attention.dropout} | {getattr(layer, f"dropout{i}").p for i in ("", 1, 2, 3)}
    require(len(rates) == 1, f"it has several dropout rates, {sorted(rates)}")
    return attention, rates.pop()


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if not part._modules]


class GroupFC(nn.Module):
    """The loop of ML-Decoder over its groups as one product, with its call: the result is written into ``out_extrap``.

    Shape: h ``[B, L, D]``, duplicate_pooling ``[L, D, f]``, or ``[D, f]`` for all groups, out_extrap ``[B, L, f]``.
    """

    def forward(self, h: Tensor, duplicate_pooling: Tensor, out_extrap: Tensor) -> None:
        """Write the products."""
        if duplicate_pooling.dim() == 2:
            out_extrap.copy_(h @ duplicate_pooling)
            return
        groups, _, slots = duplicate_pooling.shape
        products = group_linear(h, duplicate_pooling, num_classes=groups * slots)
        out_extrap.copy_(products.view(-1, groups, slots))


def group_fc(module: Any) -> tuple[nn.Module, str]:
    """Alibaba's group fully-connected layer, where it is a module rather than a TorchScript class."""
    _require_attributes(module, set(), {"embed_len_decoder"})
    new = GroupFC()
    groups = getattr(module, "embed_len_decoder", 3)
    h = torch.linspace(-1, 1, 8 * groups).view(2, groups, 4)
    weight = torch.linspace(-1, 2, 8 * groups).view(groups, 4, 2)
    theirs, ours = torch.zeros(2, groups, 2), torch.zeros(2, groups, 2)
    try:
        with torch.no_grad():
            module(h, weight, theirs)
            new(h, weight, ours)
    except Exception as error:
        raise NotSwappedError(f"it could not be tried: {type(error).__name__}: {error}") from error
    require(torch.allclose(theirs, ours, atol=1e-5), "it gives other outputs")
    return new, "one product instead of a loop"


# --------------------------------------------------------------------------------------------------------------- graph


def gat_conv(layer: Any) -> tuple[nn.Module, str]:
    """torch_geometric's graph attention layer over one set of nodes, without edge features."""
    options = {"edge_dim": None, "res": None, "flow": "source_to_target", "aggr": "add", "decomposed_layers": 1}
    for name, plain in options.items():
        value = getattr(layer, name, plain)
        require(value == plain, f"{name} is {value!r}, mlfast.GraphAttention has only {plain!r}")
    require(isinstance(layer.in_channels, int), "it is for two sets of nodes")
    require(layer.in_channels > 0, "its size is not known before its first call")
    require(layer.concat or layer.heads == 1, "concat=False takes the mean of heads")
    require(layer.negative_slope >= 0 and layer.dropout < 1, "negative_slope below 0, or dropout of 1")
    with torch.device("meta"):
        new = EdgeIndexAttention(
            layer.in_channels,
            layer.out_channels,
            layer.heads,
            negative_slope=layer.negative_slope,
            dropout=layer.dropout,
            bias=layer.bias is not None,
            add_self_loops=layer.add_self_loops,
        )
    given = dict(layer.named_parameters())
    require(set(given) == set(new.state_dict()), f"its parameters are {', '.join(given)}")
    _adopt(new, {name: (tensor, tensor) for name, tensor in given.items()})
    weight = layer.lin.weight
    x = torch.linspace(-1, 1, 4 * layer.in_channels, device=weight.device, dtype=weight.dtype).view(4, -1)
    edges = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 0, 1]], device=weight.device)
    _require_same_outputs(layer, new, x, edges)
    new._built = None  # the graph of the trial
    return new, "keeps the graph while the same edge_index comes; an edge that comes twice raises"


# --------------------------------------------------------------------------------------------------------- comparison


def _require_attributes(module: nn.Module, needed: set[str], known: set[str]) -> None:
    """Leave a module that has less or more than what this code was written for: it may compute something else."""
    names: Iterable[str] = (*vars(module), *module._modules, *module._parameters, *module._buffers)
    has = {name for name in names if not name.startswith("_")} - {"training"}
    require(needed <= has, f"it has no {', '.join(sorted(needed - has))}")
    require(has <= needed | known, f"it has attributes that are not known: {', '.join(sorted(has - needed - known))}")


def _adopt(new: nn.Module, tensors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Give a module on the meta device its tensors: (the whole parameter, the part of it) by name.

    Whole parameters stay the same objects, so that optimizers and ties keep them.
    """
    parameters = dict(new.named_parameters())
    for name, (whole, part) in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if name not in parameters:  # a buffer
            part = part.detach()
        elif part is not whole:
            part = nn.Parameter(part.detach().clone(), whole.requires_grad)
        setattr(new.get_submodule(owner), leaf, part)


def _require_same_outputs(old: nn.Module, new: nn.Module, x: Tensor, *rest: Tensor, training: bool = False) -> None:
    """Leave a module whose output, or gradient for x, is another in this mode."""
    require(x.device.type != "meta", "it cannot be tried on the meta device")
    results = []
    was_training = old.training
    try:
        for module in (old.train(training), new.train(training)):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = x.clone().requires_grad_()
                output = module(leaf, *(tensor.clone() for tensor in rest))  # in inference mode they are of its kind
                results.append((output.detach(), torch.autograd.grad(output.sum(), leaf)[0]))
    except Exception as error:
        raise NotSwappedError(f"it could not be tried: {type(error).__name__}: {error}") from error
    finally:
        old.train(was_training)
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
    for theirs, ours in zip(*results, strict=True):
        same = ours.shape == theirs.shape and torch.allclose(ours.double(), theirs.double(), tolerance, tolerance)
        require(same, "it gives other outputs, or gradients")


KNOWN: dict[str, Callable[[Any], tuple[nn.Module, str]]] = {
    "AsymmetricLossMultiLabel": asymmetric_loss,
    "AsymmetricLoss": asymmetric_loss,
    "AsymmetricLossOptimized": asymmetric_loss,
    "BCEWithLogitsLoss": bce_with_logits,
    "MLDecoder": ml_decoder,
    "GroupFC": group_fc,
    "GATConv": gat_conv,
}
