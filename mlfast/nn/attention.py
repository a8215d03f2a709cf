"""What the attention heads share: in nn.MultiheadAttention, projected queries could not be kept as constants."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, dropout: float) -> Tensor:
    """Multi-head attention of projected queries ``[1 or B, L, D]`` over ``[B, N, D]``, before the output projection."""
    query, key, value = (
        x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2) for x in (query, key, value)
    )
    query = query.expand(key.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)


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
