"""Which way a call of an op goes: to its kernels, to its autograd.Function, or through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_NO_JVP = 'mlfast\'s fused ops have no jvp, for forward mode; call the op inside mlfast.use_backend("reference")'
_NO_RULES = (
    "mlfast's fused ops have no rules for torch.func's transforms (vmap, grad, jvp, ...) and for batches of gradients; "
    'call the op inside mlfast.use_backend("reference")'
)
_PLAIN = (Tensor, torch.nn.Parameter)


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a dispatch mode or a subclass of Tensor must see the op. Others are spared what that costs.

    Raises:
        RuntimeError: one of torch.func's transforms asks for the op, which has no rule for it.
        NotImplementedError: the dispatcher would have a derivative in forward mode that is silently 0.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(_NO_RULES)
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # whether a tensor has a tangent, a compiler cannot see
            raise NotImplementedError(_NO_JVP)
        return True
    if torch._C._len_torch_dispatch_stack() == 0 and are_plain(*tensors):
        return False
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(_NO_JVP)
    return True


def refuse_batches(*incoming: Tensor | None) -> None:
    """Raises RuntimeError where a backward pass is given several gradients at once, as by is_grads_batched=True."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in incoming):
        raise RuntimeError(_NO_RULES)


def check_traced(needs: Sequence[bool], asked: Sequence[bool]) -> None:
    """Raises RuntimeError where a gradient is asked for that a traced graph was not made for: it would be None.

    Args:
        needs: Of the first inputs of an op, which required grad when the graph was traced.
        asked: Which of them do now, as ``ctx.needs_input_grad`` says.
    """
    if any(ask and not need for need, ask in zip(needs, asked, strict=False)):
        raise RuntimeError(
            "mlfast: a gradient is asked for by an input that did not require grad when this graph was traced; trace "
            "it with inputs that require grad"
        )


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none is of a subclass of Tensor, but Parameter."""
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the op. In forward mode it says that there is no derivative, not a silent 0."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0


def tensors_of(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an op of gradients returns, since it has to return tensors: an empty one where none was asked for."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What autograd takes of the result of such an op."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
