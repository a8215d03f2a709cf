"""The scores of graph_attention from the values of the nodes, on the CPU: one read of them, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlfast.backends import _native, choose, is_exporting
from mlfast.ops._dispatch import needs_dispatcher, refuse_batches
from mlfast.ops._dtypes import CODES
from mlfast.ops._graph_attention_sparse import SERVED
from mlfast.ops._memory import address, in_memory
from mlfast.ops._second_derivative import without_second_derivative


def has_kernel(value: Tensor, attention_src: Tensor, attention_dst: Tensor) -> bool:
    """Whether :func:`value_and_scores` serves these: float32 or float64 on the CPU, outside compilers and exporters."""
    tensors = value, attention_src, attention_dst
    return (
        not (is_exporting() or needs_dispatcher(*tensors))
        and choose(value.device, SERVED) == "cpu"
        and value.dtype in (torch.float32, torch.float64)
        and all(t.dtype == value.dtype and t.device == value.device for t in tensors)
        and attention_src.shape == attention_dst.shape == (1, *value.shape[1:])
    )


def value_and_scores(value: Tensor, attention_src: Tensor, attention_dst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value, for attention, and its two scores [K, H]: inner products of value [K, H, F] and vectors [1, H, F].

    The value goes through, so that backward meets its whole gradient and writes it once.
    """
    out: tuple[Tensor, Tensor, Tensor] = ValueAndScoresFunction.apply(value, attention_src, attention_dst)
    return out


class ValueAndScoresFunction(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, attention_src: Tensor, attention_dst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value [K, H, F] and two vectors [1, H, F] to the value and two scores [K, H]."""
        tensors = [in_memory(t) for t in (value, attention_src, attention_dst)]
        scores = value.new_zeros(2, *value.shape[:2])
        if value.numel() > 0:
            addresses = map(address, (*tensors, *scores))
            _native.graph_attention_scores_cpu(CODES[value.dtype], *value.shape, *addresses)
        ctx.save_for_backward(*tensors)
        return value.view_as(value), scores[0], scores[1]

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the value and the vectors."""
        refuse_batches(*grad_outs)
        saved = ctx.saved_tensors  # read once: checkpoints unpack them once only
        value = saved[0]
        grad_outs = tuple(in_memory(grad) for grad in grad_outs)
        grads = tuple(torch.empty_like(t) for t in saved)
        if value.numel() > 0:
            addresses = map(address, (*saved, *grad_outs, *grads))
            _native.graph_attention_scores_backward_cpu(CODES[value.dtype], *value.shape, *addresses)
        else:
            grads = tuple(grad.zero_() for grad in grads)
        return without_second_derivative(saved, grads, *grad_outs)
