"""ML-Decoder: queries that look at the feature map, each for a group of classes."""

from __future__ import annotations

import copy
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.integers import integer, sizes
from mlfast.nn.attention import attend, attention_weights, input_projection, output_projection
from mlfast.nn.cosine_linear import CosineLinear
from mlfast.nn.group_linear import MOST_GROUPS, GroupLinear


class MLDecoder(nn.Module):
    """The ML-Decoder head (Ridnik et al., 2021), plain or with the cosines of Prokofiev & Sovrasov.

    One transformer decoder layer without self-attention. L queries of width D attend over the positions of the feature
    map; each gives the outputs of ``f = ceil(K / L)`` classes by `GroupLinear`. With queries ``q``, tokens ``m`` and
    dropout between the steps as in a post-norm transformer::

        m = ReLU(embed(features))        t = norm1(q + q)
        t = norm2(t + attention(t, m, m))
        t = norm3(t + linear2(ReLU(linear1(t))))
        out[c] = <t[c // f], weight[c // f, :, c % f]> + bias[c]        or the cosine of the two

    Args:
        in_features: channels S of the features.
        num_classes: number K of classes.
        num_groups: number L of queries; by default ``min(100, K)``.
        queries: ``"random"``, drawn from N(0, 1) and never trained, as published; ``"learned"``; or word vectors
            ``[K, V]``, a tensor or an array, one per class: then a learned linear layer makes the queries of them, all
            classes share one projection, and `set_word_vectors` can name other classes after training (zero-shot).
        embed_dim: width D.
        num_heads: heads of the attention; they divide D.
        feedforward_dim: width between ``linear1`` and ``linear2``.
        dropout: probability at each of the four places, and of attention weights.
        cosine: whether outputs are cosines, for angular losses; else logits.
        bias: whether a learned bias per class is added; by default to logits only. Added to a cosine it leaves [-1, 1].
        negative_slope: of the ReLU after ``embed``; by default 0.2 with cosines, as in the paper's released code, and
            0 without.

    Shape:
        features ``[B, S, h, w]``, or tokens ``[B, N, S]`` of a transformer, which are taken as they are, class token
        included; output ``[B, K]``. Cosines are at least float32.

    Raises:
        TypeError: a size is no integer.
        ValueError: sizes that do not fit; the message names the remedy.
    """

    queries: Tensor
    word_vectors: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_groups: int | None = None,
        queries: Literal["random", "learned"] | Tensor | np.ndarray = "random",
        embed_dim: int = 768,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
        cosine: bool = True,
        bias: bool | None = None,
        negative_slope: float | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, num_classes, num_groups, embed_dim, num_heads, feedforward_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"MLDecoder: dropout must be in [0, 1), got {dropout}")
        if bias is None:
            bias = not cosine
        if negative_slope is None:
            negative_slope = 0.2 if cosine else 0.0
        if not math.isfinite(negative_slope):
            raise ValueError(f"MLDecoder: negative_slope must be a finite number, got {negative_slope}")
        self.embed = TokenEmbedding(in_features, embed_dim, negative_slope)
        self.word_projection: nn.Linear | None = None
        self.projection: nn.Module
        if isinstance(queries, (Tensor, np.ndarray)):
            if num_groups not in (None, num_classes):
                raise ValueError(f"word vectors make one query per class, got {num_groups=}; leave it out")
            self.register_buffer("word_vectors", _checked_words(queries, num_classes))
            self.word_projection = nn.Linear(queries.shape[1], embed_dim)
            self.projection = SharedProjection(embed_dim, cosine, bias)
        else:
            groups = min(MOST_GROUPS, num_classes) if num_groups is None else num_groups
            drawn = torch.randn(groups, embed_dim)
            if queries == "learned":
                self.queries = nn.Parameter(drawn)
            elif queries == "random":
                self.register_buffer("queries", drawn)
            else:
                raise ValueError(f"queries must be 'random', 'learned' or word vectors [K, V], got {queries!r}")
            self.projection = GroupLinear(embed_dim, num_classes, num_groups=groups, cosine=cosine, bias=bias)
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(embed_dim)
        self.query_projection = input_projection(embed_dim)
        self.layer = CrossAttentionLayer(embed_dim, num_heads, feedforward_dim, dropout)

    @classmethod
    def released(cls, in_features: int, num_classes: int, **options: object) -> MLDecoder:
        """The head of the paper's released code: cosines, and yet a learned bias per class is added to them."""
        return cls(in_features, num_classes, **{"cosine": True, "bias": True, **options})  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, S, h, w]`` or ``[B, N, S]`` to cosines or logits ``[B, K]``."""
        memory = self.embed(features)
        return self.projection(self.layer(*self.query_side(memory.shape[0]), memory))

    def attention(self, features: Tensor) -> Tensor:
        """Where the query of each class looks: ``[B, K, N]`` over the N positions or tokens, mean over heads.

        Rows sum to 1. The classes of a group share a query, and so a row.
        """
        memory = self.embed(features)
        return _attention_of_classes(self.layer, self.query_side(memory.shape[0])[1], memory, self.projection)

    def query_side(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """What does not depend on the image: queries after ``norm1``, and projected for the attention.

        Both are ``[1, L, D]``; where dropout is at work, ``[batch_size, L, D]``, since every image drops its own.
        """
        queries = (self.queries if self.word_projection is None else self.word_projection(self.word_vectors))[None]
        if self.training and self.dropout > 0:
            queries = queries + F.dropout(queries.expand(batch_size, -1, -1), self.dropout)
        else:
            queries = queries + queries
        target = self.norm1(queries)
        return target, self.query_projection(target)

    def set_word_vectors(self, word_vectors: Tensor | np.ndarray) -> None:
        """Ask for other classes, by their word vectors ``[K', V]``: from now on the output is ``[B, K']``.

        Raises:
            ValueError: the head was not made with word vectors, or their length V is another.
        """
        if self.word_projection is None:
            raise ValueError("this head has no word vectors: pass them as queries when it is made")
        words = _checked_words(word_vectors, len(word_vectors))
        if words.shape[1] != self.word_vectors.shape[1]:
            raise ValueError(f"word vectors must be [K, {self.word_vectors.shape[1]}], got {list(words.shape)}")
        self.word_vectors = words.to(self.word_vectors)

    def fold(self) -> FoldedMLDecoder:
        """A copy for inference with the query side computed once; weights that are loaded later do not reach it."""
        return FoldedMLDecoder(self)


class FoldedMLDecoder(nn.Module):
    """`MLDecoder` in evaluation mode with its query side as constants; made by `MLDecoder.fold`.

    ``L * D**2`` multiply-accumulates less per batch, and no queries, ``norm1`` and query projection to keep.
    """

    target: Tensor
    query: Tensor

    @torch.no_grad()
    def __init__(self, head: MLDecoder) -> None:
        super().__init__()
        head = copy.deepcopy(head).eval().requires_grad_(False)
        target, query = head.query_side(1)
        self.register_buffer("target", target)
        self.register_buffer("query", query)
        self.embed, self.layer, self.projection = head.embed, head.layer, head.projection
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, S, h, w]`` or ``[B, N, S]`` to cosines or logits ``[B, K]``."""
        return self.projection(self.layer(self.target, self.query, self.embed(features)))

    def attention(self, features: Tensor) -> Tensor:
        """As `MLDecoder.attention`."""
        return _attention_of_classes(self.layer, self.query, self.embed(features), self.projection)


class TokenEmbedding(nn.Linear):
    """Features ``[B, S, h, w]`` or ``[B, N, S]`` to tokens ``[B, N, D]``: a linear layer and a (leaky) ReLU."""

    def __init__(self, in_features: int, embed_dim: int, negative_slope: float) -> None:
        super().__init__(in_features, embed_dim)
        self.negative_slope = negative_slope

    def forward(self, features: Tensor) -> Tensor:
        """Map features to tokens."""
        tokens = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        if tokens.dim() != 3 or tokens.shape[2] != self.in_features:
            raise ValueError(
                f"MLDecoder expects features [B, {self.in_features}, h, w] or tokens [B, N, {self.in_features}], "
                f"got {list(features.shape)}"
            )
        tokens = super().forward(tokens)
        return F.leaky_relu(tokens, self.negative_slope) if self.negative_slope else F.relu(tokens)


class CrossAttentionLayer(nn.Module):
    """The rest of the decoder layer, which depends on the image: attention, feed-forward, and their norms."""

    def __init__(self, embed_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.memory_projection = input_projection(embed_dim, 2)  # keys, then values
        self.out_projection = output_projection(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(self, target: Tensor, query: Tensor, memory: Tensor) -> Tensor:
        """Map queries ``[1 or B, L, D]`` and their projection, and tokens ``[B, N, D]``, to ``[B, L, D]``."""
        key, value = self.memory_projection(memory).chunk(2, dim=2)
        rate = self.dropout if self.training else 0.0
        found = attend(query, key, value, num_heads=self.num_heads, dropout=rate)
        target = self.norm2(target + self._drop(self.out_projection(found)))
        inner = self._drop(F.relu(self.linear1(target)))
        return self.norm3(target + self._drop(self.linear2(inner)))

    def attention(self, query: Tensor, memory: Tensor) -> Tensor:
        """How much each query takes from each token, ``[B, L, N]``."""
        key, _ = self.memory_projection(memory).chunk(2, dim=2)
        return attention_weights(query, key, num_heads=self.num_heads)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class SharedProjection(nn.Module):
    """One output per query by one weight vector for all of them: ``[B, K, D]`` to ``[B, K]``."""

    def __init__(self, embed_dim: int, cosine: bool, bias: bool) -> None:
        super().__init__()
        if cosine and bias:
            raise ValueError("with word vectors and cosine=True, all classes would share one bias; leave bias out")
        self.linear = CosineLinear(embed_dim, 1) if cosine else nn.Linear(embed_dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map queries to outputs."""
        return self.linear(x).squeeze(2)


def _attention_of_classes(layer: CrossAttentionLayer, query: Tensor, memory: Tensor, projection: nn.Module) -> Tensor:
    rows = layer.attention(query, memory)
    if not isinstance(projection, GroupLinear):
        return rows  # one query for each class
    classes_of_a_query = projection.weight.shape[2]
    return rows.repeat_interleave(classes_of_a_query, dim=1)[:, : projection.num_classes]


def _check_sizes(
    in_features: int, num_classes: int, num_groups: int | None, embed_dim: int, num_heads: int, feedforward_dim: int
) -> None:
    sizes("MLDecoder", in_features=in_features, num_classes=num_classes)
    sizes("MLDecoder", embed_dim=embed_dim, num_heads=num_heads, feedforward_dim=feedforward_dim)
    if num_groups is not None and not 1 <= integer("MLDecoder", "num_groups", num_groups) <= num_classes:
        raise ValueError(
            f"num_groups must be from 1 to the number of classes, {num_classes}, got {num_groups}; "
            f"leave it out for {min(MOST_GROUPS, num_classes)}"
        )
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim=} and {num_heads=}")


def _checked_words(word_vectors: Tensor | np.ndarray, num_classes: int) -> Tensor:
    if isinstance(word_vectors, np.ndarray):
        word_vectors = torch.from_numpy(word_vectors).to(torch.get_default_dtype())
    if word_vectors.dim() != 2 or not word_vectors.is_floating_point():
        raise ValueError(
            f"word vectors must be [K, V], floating point, got {list(word_vectors.shape)} of {word_vectors.dtype}"
        )
    if len(word_vectors) != num_classes:
        raise ValueError(f"word vectors must be one per class, {num_classes}, got {len(word_vectors)}")
    return word_vectors.detach().clone()
