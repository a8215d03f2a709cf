"""What the attention heads share: in nn.MultiheadAttention, projected queries could not be kept as constants."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, dropout: float) -> Tensor:
    """Multi-head attention of projected queries ``[1 or B, L, D]`` over ``[B, N, D]``, before the output projection."""
    query, key, value = (_heads(x, num_heads) for x in (query, key, value))
    query = query.expand(key.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)


def attention_weights(query: Tensor, key: Tensor, *, num_heads: int) -> Tensor:
    """How much each query of `attend` takes from each position: ``[B, L, N]``, the mean over heads; rows sum to 1."""
    query, key = _heads(query, num_heads), _heads(key, num_heads)
    return (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(3).mean(1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


def input_projection(width: int, count: int = 1) -> nn.Linear:
    """``count`` of the three input projections of an attention, with the initial values of nn.MultiheadAttention.

    There the three are one matrix [3 D, D], which is Xavier uniform as a whole.
    """
    linear = nn.Linear(width, count * width)
    bound = math.sqrt(6 / (4 * width))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
    return linear


def output_projection(width: int) -> nn.Linear:
    """The projection after an attention, initialised as in nn.MultiheadAttention."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.bias)
    return linear
