"""Triton kernels of graph_attention with a mask: weights of a block of rows, and the gradient by their logits.

The matrix products between them are PyTorch's. docs/graph_attention.md has the formulas; the notes of
kernels/graph_attention.py hold here too.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.graph_attention import dropping, keep_factor, logit_below_largest
from mlfast.kernels.launch import cdiv, launch_kernel, next_power_of_2

MOST_COLUMNS = 512  # of a tile: with 1024 and dropout the gradient spills
ADDED = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 8, "num_warps": 4}


@triton.jit
def _load(score_src, mask, i, start, nodes, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a tile, their scores, and which of them row i attends to; -inf for the others."""
    column = start + tl.arange(0, BLOCK)
    allowed = column < nodes
    if HAS_MASK:
        allowed &= tl.load(mask + i * nodes + column, mask=allowed, other=0) > 0
    return column, tl.load(score_src + column, mask=allowed, other=float("-inf")), allowed


@triton.jit(do_not_specialize=["nodes", "rows", "first", "threshold"])
def dense_weights_kernel(
    score_src, score_dst, mask, seed, weights, nodes: tl.int32, rows: tl.int32, first: tl.int32,
    negative_slope: tl.float64, threshold: tl.int64, scale: tl.float64,
    HAS_MASK: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The attention weights of one row and head; zeros without neighbours.

    Args:
        score_src, score_dst: Pointers to [heads, nodes] in the computing type.
        mask: Pointer to [nodes, nodes], uint8, read if HAS_MASK.
        seed: Pointer to one int64, read if DROPS.
        weights: Pointer to the result, [heads, rows, nodes] in the computing type.
        nodes, rows, first: Sizes, and the first row of the block.
        negative_slope, threshold, scale, DROPS: As in graph_attention_kernel.
        BLOCK: Columns of a tile.
    """
    T: tl.constexpr = score_src.dtype.element_ty
    i = (first + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    to = weights + (head * rows + tl.program_id(0)) * nodes
    own = tl.load(score_dst + head * nodes + i)
    src_of_head = score_src + head * nodes
    slope = tl.full((), negative_slope, T)
    highest = tl.full((BLOCK,), float("-inf"), T)
    some = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, nodes, BLOCK):
        _, src, allowed = _load(src_of_head, mask, i, start, nodes, HAS_MASK, BLOCK)
        highest = tl.maximum(highest, src)
        some |= allowed.to(tl.int32)
    largest = tl.where(tl.max(some, axis=0) > 0, tl.max(highest, axis=0), 0.0)
    total = tl.zeros((BLOCK,), T)
    for start in range(0, nodes, BLOCK):
        _, src, allowed = _load(src_of_head, mask, i, start, nodes, HAS_MASK, BLOCK)
        total += tl.where(allowed, tl.exp(logit_below_largest(own, src, largest, slope)), 0.0)
    sum_of_weights = tl.sum(total, axis=0)
    inverse = 1.0 / tl.where(tl.max(some, axis=0) > 0, sum_of_weights, 1.0)
    for start in range(0, nodes, BLOCK):
        column, src, allowed = _load(src_of_head, mask, i, start, nodes, HAS_MASK, BLOCK)
        weight = tl.where(allowed, tl.exp(logit_below_largest(own, src, largest, slope)) * inverse, 0.0)
        if DROPS:
            weight *= keep_factor(tl.load(seed), head, i, column, threshold, scale).to(T)
        tl.store(to + column, weight, mask=column < nodes)


@triton.jit(do_not_specialize=["nodes", "rows", "first", "threshold"])
def dense_grad_kernel(
    score_src, score_dst, seed, weights, grad, grad_score_dst, nodes: tl.int32, rows: tl.int32, first: tl.int32,
    negative_slope: tl.float64, threshold: tl.int64, scale: tl.float64,
    DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns grad_out . value of one row and head into the gradient by its logits' arguments, in place.

    Args:
        weights: As in dense_weights_kernel, without dropout; receives them with it.
        grad: Pointer to [heads, rows, nodes], as weights.
        grad_score_dst: Pointer to [heads, nodes]: receives the sum of the row.
        The others: As in dense_weights_kernel.
    """
    T: tl.constexpr = score_src.dtype.element_ty
    i = (first + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    offset = (head * rows + tl.program_id(0)) * nodes
    own = tl.load(score_dst + head * nodes + i)
    total = tl.zeros((BLOCK,), tl.float64)
    weighted = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, nodes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + offset + column, mask=column < nodes, other=0.0).to(tl.float64)
        g = tl.load(grad + offset + column, mask=column < nodes, other=0.0).to(tl.float64)
        if DROPS:
            g *= keep_factor(tl.load(seed), head, i, column, threshold, scale).to(tl.float64)
        total += weight
        weighted += weight * g
    sum_of_weights = tl.sum(total, axis=0)
    normalise = 1.0 / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
    mean = tl.sum(weighted, axis=0) * normalise
    by_dst = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, nodes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < nodes
        weight = tl.load(weights + offset + column, mask=inside, other=0.0)
        g = tl.load(grad + offset + column, mask=inside, other=0.0).to(tl.float64)
        if DROPS:
            keep = keep_factor(tl.load(seed), head, i, column, threshold, scale)
            g *= keep.to(tl.float64)
            tl.store(weights + offset + column, weight * keep.to(T), mask=inside)
        g = tl.where(weight == 0.0, 0.0, weight.to(tl.float64) * normalise * (g - mean))  # even where mean is NaN
        src = tl.load(score_src + head * nodes + column, mask=inside, other=0.0)
        g = tl.where(own + src > 0, g, negative_slope * g)
        by_dst += tl.where(inside, g, 0.0)
        tl.store(grad + offset + column, g.to(T), mask=inside)
    tl.store(grad_score_dst + head * nodes + i, tl.sum(by_dst, axis=0).to(T))


@triton.jit(do_not_specialize=["nodes", "rows", "first"])
def add_columns_kernel(
    grad, grad_score_src, nodes: tl.int32, rows: tl.int32, first: tl.int32,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the columns of grad [heads, rows, nodes], added to what grad_score_src [heads, nodes] has of others.

    Args:
        grad, grad_score_src: Pointers, in the computing type.
        nodes, rows, first: Sizes, and the first row of the block: where it is 0, there is nothing to add to.
        BLOCK_ROWS, BLOCK_COLUMNS: The tile; a program has BLOCK_COLUMNS of one head.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    head = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float64)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = grad + (head * rows + row)[:, None] * nodes + column[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & (column < nodes)[None, :], other=0.0).to(tl.float64)
    to = grad_score_src + head * nodes + column
    before = tl.load(to, mask=(column < nodes) & (first > 0), other=0.0)
    tl.store(to, before + tl.sum(total, axis=0).to(before.dtype), mask=column < nodes)


def tile(nodes: int) -> dict[str, int]:
    """Columns that a program reads at a time, and its warps: the fewer warps, the less do sums cross them."""
    block = min(max(next_power_of_2(nodes), 128), MOST_COLUMNS)
    return {"BLOCK": block, "num_warps": block // 128}


def dense_weights(
    score_src: torch.Tensor,
    score_dst: torch.Tensor,
    numbers: tuple[float, float],
    seed: torch.Tensor | None,
    first: int,
    mask: torch.Tensor | None,
    weights: torch.Tensor,
) -> None:
    """Launches dense_weights_kernel, which documents the tensors; ``numbers`` are the negative slope and dropout."""
    heads, rows, nodes = weights.shape
    seed, threshold, scale, drops = dropping(numbers[1], seed, score_src)
    launch_kernel(
        dense_weights_kernel,
        (rows, heads),
        (score_src, score_dst, score_src if mask is None else mask.view(torch.uint8), seed, weights),
        (nodes, rows, first, numbers[0], threshold, scale),
        HAS_MASK=mask is not None,
        DROPS=drops,
        **tile(nodes),
    )


def dense_backward(
    score_src: torch.Tensor,
    score_dst: torch.Tensor,
    numbers: tuple[float, float],
    seed: torch.Tensor | None,
    first: int,
    weights: torch.Tensor,
    grad: torch.Tensor,
    grad_score_src: torch.Tensor,
    grad_score_dst: torch.Tensor,
) -> None:
    """Launches dense_grad_kernel and add_columns_kernel."""
    heads, rows, nodes = weights.shape
    seed, threshold, scale, drops = dropping(numbers[1], seed, score_src)
    launch_kernel(
        dense_grad_kernel,
        (rows, heads),
        (score_src, score_dst, seed, weights, grad, grad_score_dst),
        (nodes, rows, first, numbers[0], threshold, scale),
        DROPS=drops,
        **tile(nodes),
    )
    grid, numbers = (cdiv(nodes, ADDED["BLOCK_COLUMNS"]), heads), (nodes, rows, first)
    launch_kernel(add_columns_kernel, grid, (grad, grad_score_src), numbers, **ADDED)
