"""The names that published ML-Decoders give to the tensors of `mlfast.MLDecoder`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Alibaba's and the paper's code keep all of it in a module `decoder`; timm's only the layer itself.
_LAYER = "decoder.layers.0."
_RENAMED = {
    "embed_standart.": "embed.",
    "query_embed.weight": "queries",
    "duplicate_pooling": "projection.weight",
    "duplicate_pooling_bias": "projection.bias",
    _LAYER + "norm1.": "norm1.",
    _LAYER + "norm2.": "layer.norm2.",
    _LAYER + "norm3.": "layer.norm3.",
    _LAYER + "linear1.": "layer.linear1.",
    _LAYER + "linear2.": "layer.linear2.",
    _LAYER + "multihead_attn.out_proj.": "layer.out_projection.",
}
_INPUT_PROJECTION = _LAYER + "multihead_attn.in_proj_"  # queries, keys, values in one


def _names() -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for theirs, ours in _RENAMED.items():
        for leaf in ("weight", "bias") if theirs.endswith(".") else ("",):
            names[theirs + leaf] = (ours + leaf,)
    for leaf in ("weight", "bias"):
        names[_INPUT_PROJECTION + leaf] = (f"query_projection.{leaf}", f"layer.memory_projection.{leaf}")
    moved = {f"decoder.{theirs}": ours for theirs, ours in names.items() if not theirs.startswith(_LAYER)}
    return names | moved


PUBLISHED = _names()  # their name within the head: ours


def translate(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The tensors of published ML-Decoders under our names.

    Args:
        tensors: a state dict, which may hold more than the head, under any prefix.

    Returns:
        For each of our names, behind the prefix of the head, the published name and the tensor. What belongs to no
        published head keeps its name. The input projection of the attention, [3 D, D], becomes two tensors.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, ours = _split(name)
        if len(ours) == 2:
            width = tensor.shape[0] // 3
            parts = [tensor[:width], tensor[width:]]
        else:
            parts = [tensor]
        for part, own in zip(parts, ours, strict=True):
            found[prefix + own] = name, part
    return found


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    """The prefix of the head, and our names for the rest."""
    cuts = [0] + [i + 1 for i, letter in enumerate(name) if letter == "."]
    for cut in cuts:  # from the longest rest, so that "decoder." belongs to the head
        if name[cut:] in PUBLISHED:
            return name[:cut], PUBLISHED[name[cut:]]
    return "", (name,)
