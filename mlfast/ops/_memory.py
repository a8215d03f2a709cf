"""Tensors as the compiled kernels see them: where their memory begins, and what is written there."""

from __future__ import annotations

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """As the compiled kernels take it; 0 for what is not there, as PyTorch has it for a tensor without elements."""
    return 0 if tensor is None else tensor.data_ptr()


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, with its values in memory, where PyTorch may have put off a negation or zeros."""
    return evaluated(tensor.contiguous())


def evaluated(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory; strided as it is."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor
