"""Query2Label: a transformer whose queries are the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfast.integers import integer, sizes
from mlfast.nn.attention import attend, input_projection, output_projection
from mlfast.nn.group_linear import GroupLinear


class Query2Label(nn.Module):
    """The Query2Label head (Liu et al., 2021): one learned query per class, and a standard post-norm transformer.

    An encoder layer lets the positions of the feature map attend to each other, two decoder layers let the queries
    attend to each other and to the positions, and each query gives the output of its class by a weight vector of its
    own. Sine encodings of the position, as in DETR, are added to the keys and queries of the encoder and to the keys of
    the decoder, but not to the values.

    Args:
        in_features: channels S of the feature map.
        num_classes: number K of classes.
        embed_dim: width D, a multiple of 4 and of ``num_heads``; by default S, and then there is no input projection.
            The paper's 2048 is the S of its ResNet-101.
        num_heads: heads of every attention.
        feedforward_dim: inner width of the feed-forward layers; by default 4 D.
        encoder_layers, decoder_layers: how many.
        dropout: probability in every layer.
        self_attention: whether queries attend to each other, as in the paper's equations; its released code leaves
            this out by default.
        cosine: whether outputs are cosines, for angular losses, without a bias; else logits with one.

    Shape:
        features ``[B, S, h, w]`` of any height and width; output ``[B, K]``. Cosines are at least float32.

    Raises:
        TypeError: a size is no integer.
        ValueError: sizes that do not fit; the message names the remedy.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        embed_dim: int | None = None,
        num_heads: int = 4,
        feedforward_dim: int | None = None,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        dropout: float = 0.1,
        self_attention: bool = True,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        width = in_features if embed_dim is None else embed_dim
        inner = 4 * width if feedforward_dim is None else feedforward_dim
        in_features, num_classes, num_heads, decoder_layers, width, inner = sizes(
            "Query2Label",
            in_features=in_features,
            num_classes=num_classes,
            num_heads=num_heads,
            decoder_layers=decoder_layers,
            embed_dim=width,
            feedforward_dim=inner,
        )
        if integer("Query2Label", "encoder_layers", encoder_layers) < 0:
            raise ValueError(f"Query2Label: encoder_layers must be at least 0, got {encoder_layers}")
        if not 0 <= dropout < 1:
            raise ValueError(f"Query2Label: dropout must be in [0, 1), got {dropout}")
        if width % num_heads or width % 4:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of {num_heads=}, got {width}; pass embed_dim or num_heads"
            )
        self.in_features = in_features
        self.embed = nn.Identity() if embed_dim is None else nn.Linear(in_features, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, num_heads, inner, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(width, num_heads, inner, dropout, self_attention) for _ in range(decoder_layers)
        )
        self.queries = nn.Parameter(torch.randn(num_classes, width))
        self.projection = GroupLinear(width, num_classes, num_groups=num_classes, cosine=cosine, bias=not cosine)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, S, h, w]`` to cosines or logits ``[B, K]``."""
        if features.dim() != 4 or features.shape[1] != self.in_features:
            raise ValueError(f"Query2Label expects features [B, {self.in_features}, h, w], got {list(features.shape)}")
        tokens = self.embed(features.flatten(2).transpose(1, 2))
        height, width = features.shape[2:]
        positions = sine_positions(height, width, tokens.shape[2], tokens.device).to(tokens.dtype)
        for layer in self.encoder:
            tokens = layer(tokens, positions)
        target = self.queries.expand(features.shape[0], -1, -1)
        for layer in self.decoder:
            target = layer(target, tokens, positions)
        return self.projection(target)


class FeedForward(nn.Module):
    """The second half of a transformer layer: two linear layers, a residual connection and a norm."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to the same shape."""
        return self.norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Attention(nn.Module):
    """Multi-head attention with a residual connection and a norm."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_projection = input_projection(width)
        self.key_projection = input_projection(width)
        self.value_projection = input_projection(width)
        self.out_projection = output_projection(width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map ``x`` [B, L, D] to ``norm(x + attention(query, key, value))``."""
        query, key, value = self.query_projection(query), self.key_projection(key), self.value_projection(value)
        rate = self.dropout.p if self.training else 0.0
        found = attend(query, key, value, num_heads=self.num_heads, dropout=rate)
        return self.norm(x + self.dropout(self.out_projection(found)))


class EncoderLayer(nn.Module):
    """Positions attend to each other."""

    def __init__(self, width: int, num_heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, num_heads, dropout)
        self.feed_forward = FeedForward(width, inner, dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Map tokens ``[B, N, D]``, with encodings ``[N, D]``, to the same shape."""
        placed = tokens + positions
        return self.feed_forward(self.self_attention(tokens, placed, placed, tokens))


class DecoderLayer(nn.Module):
    """Queries attend to each other, where asked for, and to the positions."""

    def __init__(self, width: int, num_heads: int, inner: int, dropout: float, self_attention: bool) -> None:
        super().__init__()
        self.self_attention = Attention(width, num_heads, dropout) if self_attention else None
        self.cross_attention = Attention(width, num_heads, dropout)
        self.feed_forward = FeedForward(width, inner, dropout)

    def forward(self, target: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Map queries ``[B, K, D]``, tokens ``[B, N, D]`` and encodings ``[N, D]`` to ``[B, K, D]``."""
        if self.self_attention is not None:
            target = self.self_attention(target, target, target, target)
        return self.feed_forward(self.cross_attention(target, target, tokens + positions, tokens))


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sine encodings ``[height * width, channels]`` of a map's positions, as in DETR, float32.

    Half of the channels tell the row, half the column. Rows 1 to ``height`` are scaled to end at 2 pi; channels
    ``2 i`` and ``2 i + 1`` of a half are the sine and the cosine of that over ``10000 ** (4 i / channels)``.
    """
    divisors = 10000 ** (torch.arange(channels // 4, device=device) * (4 / channels))

    def encode(length: int) -> Tensor:
        angles = torch.arange(1, length + 1, device=device)[:, None] * (2 * math.pi / length) / divisors
        return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)

    rows = encode(height)[:, None].expand(-1, width, -1)
    columns = encode(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=2).flatten(0, 1)
