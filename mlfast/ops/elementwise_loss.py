"""The frame of the elementwise losses: launches, autograd.Function, and the op that torch.compile sees.

A loss supplies its reference and its kernels; see ``mlfast/ops/aam_loss.py``. Every loss takes scores [..., K] and
targets of that shape, and reduces in one of four ways.

Sparse targets travel as two tensors: ``target`` holds the classes of the positives [nnz], and ``indptr`` [B + 1], which
is None for dense targets, where they begin for each row.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlfast.backends import _native, choose, choose_kernels, is_exporting
from mlfast.ops._dispatch import is_recorded, needs_dispatcher, refuse_batches
from mlfast.ops._dtypes import CODES, computing_dtype
from mlfast.ops._memory import address, evaluated, in_memory
from mlfast.ops._second_derivative import without_second_derivative
from mlfast.ops._workspace import new_workspace, workspace_for
from mlfast.sparse_targets import SparseTargets

Workspace = Callable[[torch.device, int], Tensor]


@dataclass(frozen=True, eq=False)
class ElementwiseLoss:
    """What tells one loss from another.

    Attributes:
        name: of the op, and so of its kernels in every backend.
        options: the NamedTuple of its numbers, the last of which is the reduction.
        schema: the types of these numbers, as torch.library writes them.
        reference: (scores, target, class_weight, options) -> loss, in plain PyTorch.
        kernel_numbers: (options, factor of the reduction) -> the numbers that its kernels are called with.
    """

    name: str
    options: type
    schema: str
    reference: Callable[[Tensor, Tensor, Tensor | None, Any], Tensor]
    kernel_numbers: Callable[[Any, float], Any]

    def __call__(
        self, scores: Tensor, target: Tensor | SparseTargets, class_weight: Tensor | None, options: Any
    ) -> Tensor:
        """The loss on the backend of this device; the arguments have been checked."""
        backend = "reference" if is_exporting() else choose(scores.device)
        if backend == "reference":
            dense = target.to_dense() if isinstance(target, SparseTargets) else target
            return self.reference(scores, dense, class_weight, options)
        indptr = None
        if isinstance(target, SparseTargets):
            indptr, target = target.indptr, target.indices
        needs_grad = is_recorded(scores)
        if needs_grad and scores.dtype == torch.float16:
            scores = scores.float()  # the incoming gradient is a loss scale: applied before the gradient is rounded
        if needs_dispatcher(scores, target, class_weight):
            return getattr(torch.ops.mlfast, self.name)(scores, target, indptr, class_weight, *options, needs_grad)[0]
        if not needs_grad:
            return launch(self, backend, scores, target, indptr, class_weight, options, False)[0]
        return ElementwiseLossFunction.apply(scores, target, indptr, class_weight, self, options, backend)


# ---------------------------------------------------------------------------------------- what the references share


def labels(target: Tensor, dtype: torch.dtype, smoothing: float) -> tuple[Tensor, Tensor]:
    """Targets as numbers in [0, 1], and where they are known. Integers say present (> 0), absent (0), unknown (< 0)."""
    if target.dtype == torch.uint8:
        target = target.view(torch.int8)  # 255, which is what -1 becomes in uint8, is unknown
    if target.is_floating_point():
        known = ~(target < 0)
        y = torch.where(known, target, 0).to(dtype)
    else:
        known = target >= 0
        y = (target > 0).to(dtype)
    return torch.where(y == 0, smoothing, y * (1 - smoothing)) if smoothing else y, known


def weigh_and_reduce(loss: Tensor, known: Tensor, class_weight: Tensor | None, reduction: str) -> Tensor:
    """The last steps of a reference: unknown labels out, class weights in, and the reduction."""
    loss = torch.where(known, loss, 0)
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "mean":
        return total / known.sum().clamp(min=1)
    return total / max(loss.shape[0], 1) if reduction == "batchmean" else total


# -------------------------------------------------------------------------------------------------- kernel launches


@functools.lru_cache(maxsize=256)
def kernel_numbers(op: ElementwiseLoss, options: Any, batch: int) -> Any:
    """What the kernels are told; a constant of the reduction is part of their weights."""
    return op.kernel_numbers(options, 1 / max(batch, 1) if options.reduction == "batchmean" else 1.0)


def launch(
    op: ElementwiseLoss,
    backend: str,
    scores: Tensor,
    target: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    options: Any,
    needs_grad: bool,
    workspace: Workspace = workspace_for,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass: the loss, its gradient by the scores where needed, and for "mean" the factor 1 / known labels.

    The gradient still lacks that factor and the incoming gradient; :func:`finish_grad` applies both.
    """
    scores, target = in_memory(scores), in_memory(target)
    dtype = computing_dtype(scores.dtype)
    loss = scores.new_empty(scores.shape if options.reduction == "none" else (), dtype=dtype)
    grad = torch.empty_like(scores) if needs_grad else None
    inv_known = scores.new_empty((), dtype=dtype) if options.reduction == "mean" else None
    if class_weight is not None:
        class_weight = in_memory(class_weight.to(dtype))
    if scores.numel() == 0:
        loss.zero_()
        if inv_known is not None:
            inv_known.fill_(1)
    else:
        numbers = kernel_numbers(op, options, scores.shape[0])
        LAUNCH[backend](op.name, workspace, scores, target, indptr, class_weight, loss, grad, inv_known, numbers)
    return loss, grad, inv_known


def _arguments(
    scores: Tensor,
    target: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    loss: Tensor,
    grad: Tensor | None,
    inv_known: Tensor | None,
    numbers: Any,
) -> tuple[Any, ...]:
    """What both compiled backends are called with: addresses, dtype codes, sizes, numbers."""
    classes = scores.shape[-1]
    return (
        scores.data_ptr(),
        CODES[scores.dtype],
        target.data_ptr(),
        CODES[target.dtype],
        *map(address, (indptr, class_weight, loss, grad, inv_known)),
        scores.numel() // classes,
        classes,
        *numbers,
    )


def _launch_cpu(name: str, workspace: Workspace, *arguments: Any) -> None:
    getattr(_native, f"{name}_cpu")(*_arguments(*arguments))


def _launch_cuda(name: str, workspace: Workspace, scores: Tensor, *arguments: Any) -> None:
    scratch = workspace(scores.device, _native.LOSS_WORKSPACE_BYTES)
    with torch.cuda.device(scores.device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(_native, f"{name}_cuda")(*_arguments(scores, *arguments), scratch.data_ptr(), stream)


def _launch_triton(name: str, workspace: Workspace, scores: Tensor, target: Tensor, *arguments: Any) -> None:
    kernel = importlib.import_module(f"mlfast.kernels.{name}")
    target = target.view(torch.int8) if target.dtype in (torch.uint8, torch.bool) else target
    *tensors, numbers = arguments
    scratch = workspace(scores.device, kernel.WORKSPACE_BYTES)
    getattr(kernel, name)(scores, target, *tensors, scratch, numbers)


LAUNCH = {"cpu": _launch_cpu, "triton": _launch_triton, "cuda": _launch_cuda}


def finish_grad(backend: str, grad: Tensor, grad_loss: Tensor, inv_known: Tensor | None) -> Tensor:
    """Applies the incoming gradient, in place: ``grad`` is a private buffer that is given away once."""
    if grad_loss.dim() > 0:
        return grad.mul_(grad_loss)
    factor = evaluated(grad_loss if inv_known is None else grad_loss * inv_known)
    if backend == "triton":
        from mlfast.kernels.elementwise_loss import scale_grad

        scale_grad(grad, factor)
        return grad
    arguments = grad.data_ptr(), CODES[grad.dtype], factor.data_ptr(), CODES[factor.dtype], grad.numel()
    if backend == "cpu":
        _native.scale_grad_cpu(*arguments)
    else:
        with torch.cuda.device(grad.device):
            _native.scale_grad_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    return grad


# ------------------------------------------------------------------------------------------------ autograd.Function


class ElementwiseLossFunction(torch.autograd.Function):
    """One pass forward leaves the gradient; backward only applies the incoming gradient to it."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        target: Tensor,
        indptr: Tensor | None,
        class_weight: Tensor | None,
        op: ElementwiseLoss,
        options: Any,
        backend: str,
    ) -> Tensor:
        """The loss of ``scores`` [..., K] and ``target`` [..., K], or sparse."""
        loss, grad, inv_known = launch(op, backend, scores, target, indptr, class_weight, options, True)
        ctx.save_for_backward(scores, target, indptr, class_weight)
        ctx.unscaled = grad, inv_known
        ctx.call = op, backend, options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by ``scores``."""
        refuse_batches(grad_loss)
        op, backend, options = ctx.call
        unscaled, ctx.unscaled = ctx.unscaled, None
        saved: tuple[Any, ...] = ctx.saved_tensors if unscaled is None or torch.is_grad_enabled() else ()
        if unscaled is None:  # a second backward through a retained graph: the first one gave the buffer away
            scores, target, indptr, class_weight = saved
            unscaled = launch(op, backend, scores, target, indptr, class_weight, options, True)[1:]
        grad = finish_grad(backend, unscaled[0], grad_loss, unscaled[1])
        return *without_second_derivative(saved, (grad,), grad_loss), *[None] * 6


# ---------------------------------------------------------------------------------------------- under torch.compile


def register(op: ElementwiseLoss) -> ElementwiseLoss:
    """Gives a loss a schema: opaque to the compiler, but traced through whole.

    In eager mode it is bypassed: the dispatcher would cost more than the loss of a small batch.
    """
    name = f"mlfast::{op.name}"
    torch.library.define(
        name,
        f"(Tensor scores, Tensor target, Tensor? indptr, Tensor? class_weight, {op.schema}, str reduction, "
        "bool needs_grad) -> (Tensor loss, Tensor grad, Tensor inv_known)",
    )

    def run(
        scores: Tensor, target: Tensor, indptr: Tensor | None, class_weight: Tensor | None, *numbers: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *values, needs_grad = numbers
        options = op.options(*values)
        tensors, backend = (scores, target, indptr, class_weight), choose_kernels(scores.device)
        loss, grad, inv_known = launch(op, backend, *tensors, options, needs_grad, new_workspace)
        return (
            loss,
            scores.new_empty(0) if grad is None else grad,
            loss.new_ones(()) if inv_known is None else inv_known,
        )

    torch.library.impl(name, ["CPU", "CUDA"], run)
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward, setup_context=_save)
    return op


def _fake(scores: Tensor, target: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction, needs_grad = others
    dtype = computing_dtype(scores.dtype)
    loss = scores.new_empty(scores.shape if reduction == "none" else (), dtype=dtype)
    grad = torch.empty_like(scores, memory_format=torch.contiguous_format) if needs_grad else scores.new_empty(0)
    return loss, grad, scores.new_empty((), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:], inputs[0])  # the scores for the sake of second derivatives, which are refused
    ctx.number_of_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, inv_known, _ = saved = ctx.saved_tensors
    # A factor without dimensions does not promote: on a GPU it would be rounded to the 16 bits of the gradient.
    scaled = (grad.to(inv_known.dtype) * (grad_loss * inv_known)).to(grad.dtype)
    return *without_second_derivative(saved, (scaled,), grad_loss), *[None] * (ctx.number_of_inputs - 1)
