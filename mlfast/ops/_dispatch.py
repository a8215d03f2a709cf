"""Which way a call of an op goes: to its kernels, to its autograd.Function, or through PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a compiler or a subclass of Tensor must see the op. Others are spared what that costs."""
    return torch.compiler.is_compiling() or not are_plain(*tensors)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none is of a subclass of Tensor, but Parameter."""
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the op. In forward mode it says that there is no derivative, not a silent 0."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0


def address(tensor: Tensor | None) -> int:
    """As the compiled kernels take it; 0 for what is not there, as PyTorch has it for a tensor without elements."""
    return 0 if tensor is None else tensor.data_ptr()
