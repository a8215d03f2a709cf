"""Triton kernels of graph_attention over the edges of a sparse graph.

docs/graph_attention.md derives the formulas. No allocation, autograd or autotuning. Arithmetic is float32, or float64
for float64 values; sums that cancel are float64. Results are bit-equal from run to run: the order of every addition
depends on the graph alone. These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80,
sm_90 and sm_100; they were tested on an H200.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mlfast.kernels.launch import cdiv, launch_kernel, next_power_of_2

NUM_WARPS = 1  # where a program has no vectors
BLOCK_SCORES = 32  # edges whose scores are looked at together: a warp's
FEW_PROGRAMS = 1024  # fewer than this leave an H200 idle, unless each has several warps


@triton.jit
def logit_below_largest(own, src, largest, negative_slope):
    """leaky(own + src) - leaky(own + largest) for src <= largest: never positive; own cancels where it can.

    NaN where own is infinite.
    """
    logit = own + src
    top = own + largest
    difference = src - largest
    below = tl.where(logit > 0, difference, negative_slope * logit - top)
    return tl.where(top > 0, below, negative_slope * difference) + (own - own)


@triton.jit
def keep_factor(seed, head, row, column, threshold, scale):
    """What dropout multiplies weights by: 0, or 1 / (1 - p), by Philox 4x32-10 of the place."""
    zero = (row + column) * 0
    c0 = (zero + column).to(tl.uint32)
    c1 = (zero + row).to(tl.uint32)
    c2 = (zero + head).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c1, c2, zero.to(tl.uint32))
    return tl.where(word.to(tl.int64) < threshold, 0.0, tl.full((), scale, tl.float64))


@triton.jit
def _row_weights(
    score_src, score_dst, indices, row, begin, start, count, heads, largest, negative_slope, BLOCK_EDGES: tl.constexpr
):
    """exp(logit - largest logit) for a block of a row's edges; the neighbours; and which lanes are edges."""
    edge = start + tl.arange(0, BLOCK_EDGES)
    inside = edge < count
    j = tl.load(indices + begin + edge, mask=inside, other=0).to(tl.int64)
    src = tl.load(score_src + j * heads + row % heads, mask=inside, other=float("-inf"))
    weights = tl.exp(logit_below_largest(tl.load(score_dst + row), src, largest, negative_slope))
    return tl.where(inside, weights, 0.0), j, inside


@triton.jit(do_not_specialize=["nodes", "heads", "threshold"])
def graph_attention_kernel(
    value, score_src, score_dst, indptr, indices, seed, out, statistics,
    nodes: tl.int32, heads: tl.int32, features: tl.int32,
    negative_slope: tl.float64, threshold: tl.int64, scale: tl.float64,
    DROPS: tl.constexpr, BLOCK_SCORES: tl.constexpr, BLOCK_EDGES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Attention of one row and head over its neighbours, a tile of features.

    Args:
        value: Pointer to [nodes, heads, features], any float type.
        score_src, score_dst: Pointers to [nodes, heads] in the computing type.
        indptr, indices: Pointers to the rows of neighbours, int64 and int32.
        seed: Pointer to one int64, read if DROPS.
        out: Pointer to the result, as value.
        statistics: Pointer to [2, nodes, heads] in the computing type: receives the largest score_src of the row's
            neighbours, and 1 / sum of exp(logit - largest logit); zeros without neighbours.
        nodes, heads, features: Sizes.
        negative_slope: Of the LeakyReLU.
        threshold, scale: Random words below threshold drop a weight; others multiply it by scale.
        DROPS: Whether there is dropout.
        BLOCK_SCORES: Edges whose scores are looked at together.
        BLOCK_EDGES, BLOCK_FEATURES: The tile.
    """
    T: tl.constexpr = score_src.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr + row // heads)
    count = (tl.load(indptr + row // heads + 1) - begin).to(tl.int32)
    slope = tl.full((), negative_slope, T)
    highest = tl.full((BLOCK_SCORES,), float("-inf"), T)
    for start in range(0, count, BLOCK_SCORES):
        edge = start + tl.arange(0, BLOCK_SCORES)
        j = tl.load(indices + begin + edge, mask=edge < count, other=0).to(tl.int64)
        src = tl.load(score_src + j * heads + row % heads, mask=edge < count, other=float("-inf"))
        highest = tl.maximum(highest, src)
    largest = tl.max(highest, axis=0)

    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    total = tl.zeros((BLOCK_EDGES,), T)
    attended = tl.zeros((BLOCK_FEATURES,), T)
    for start in range(0, count, BLOCK_EDGES):
        weights, j, inside = _row_weights(
            score_src, score_dst, indices, row, begin, start, count, heads, largest, slope, BLOCK_EDGES
        )
        total += weights
        if DROPS:
            weights *= keep_factor(tl.load(seed), row % heads, row // heads, j, threshold, scale).to(T)
        at = (j * heads + row % heads)[:, None] * features + feature[None, :]
        v = tl.load(value + at, mask=inside[:, None] & (feature < features)[None, :], other=0.0).to(T)
        attended += tl.sum(weights[:, None] * v, axis=0)
    sum_of_weights = tl.sum(total, axis=0)
    inverse = tl.where(count == 0, 0.0, 1.0 / tl.where(count == 0, 1.0, sum_of_weights)).to(T)
    tl.store(out + row * features + feature, (attended * inverse).to(out.dtype.element_ty), mask=feature < features)
    if tl.program_id(1) == 0:
        tl.store(statistics + row, tl.where(count == 0, 0.0, largest).to(T))
        tl.store(statistics + nodes.to(tl.int64) * heads + row, inverse)


@triton.jit(do_not_specialize=["nodes", "heads", "threshold"])
def grad_value_kernel(
    value, score_src, score_dst, indptr_t, indices_t, edges_t, seed, statistics, grad_out, grad_value, grad_weights,
    nodes: tl.int32, heads: tl.int32, features: tl.int32,
    negative_slope: tl.float64, threshold: tl.int64, scale: tl.float64,
    DROPS: tl.constexpr, BLOCK_EDGES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The gradients by one node's value, and by the weights with which the rows that attend see it; a head each.

    Args:
        indptr_t, indices_t, edges_t: Pointers to the transpose; edges_t, int64, says where its edges are in the rows.
        grad_out: Pointer to the incoming gradient, as value.
        grad_value: Pointer to the result, as value.
        grad_weights: Pointer to [edges, heads] in the computing type, in the order of the rows.
        The others: As in graph_attention_kernel.
    """
    T: tl.constexpr = score_src.dtype.element_ty
    node = tl.program_id(0).to(tl.int64)
    head = node % heads
    begin = tl.load(indptr_t + node // heads)
    count = (tl.load(indptr_t + node // heads + 1) - begin).to(tl.int32)
    src = tl.load(score_src + node)
    for first in range(0, features, BLOCK_FEATURES):
        feature = first + tl.arange(0, BLOCK_FEATURES)
        v = tl.load(value + node * features + feature, mask=feature < features, other=0.0).to(T)
        total = tl.zeros((BLOCK_FEATURES,), T)
        for start in range(0, count, BLOCK_EDGES):
            edge = start + tl.arange(0, BLOCK_EDGES)
            inside = edge < count
            row = tl.load(indices_t + begin + edge, mask=inside, other=0).to(tl.int64) * heads + head
            own = tl.load(score_dst + row, mask=inside, other=0.0)
            largest = tl.load(statistics + row, mask=inside, other=0.0)
            inverse = tl.load(statistics + nodes.to(tl.int64) * heads + row, mask=inside, other=0.0)
            below = logit_below_largest(own, src, largest, tl.full((), negative_slope, T))
            weights = tl.exp(tl.where(inside, below, float("-inf"))) * inverse
            g = tl.load(
                grad_out + row[:, None] * features + feature[None, :],
                mask=inside[:, None] & (feature < features)[None, :],
                other=0.0,
            ).to(T)
            dots = tl.sum(g * v[None, :], axis=1)
            if DROPS:
                keep = keep_factor(tl.load(seed), head, row // heads, node // heads, threshold, scale).to(T)
                weights *= keep
                dots *= keep
            total += tl.sum(weights[:, None] * g, axis=0)
            to = grad_weights + tl.load(edges_t + begin + edge, mask=inside, other=0) * heads + head
            dots += tl.load(to, mask=inside & (first > 0), other=0.0)
            tl.store(to, dots, mask=inside)
        tl.debug_barrier()  # the next tile of features reads what this one wrote
        to = grad_value + node * features + feature
        tl.store(to, total.to(grad_value.dtype.element_ty), mask=feature < features)


@triton.jit(do_not_specialize=["heads"])
def grad_logits_kernel(
    score_src, score_dst, indptr, indices, statistics, grad, grad_score_dst,
    heads: tl.int32, negative_slope: tl.float64, BLOCK_EDGES: tl.constexpr,
):  # fmt: skip
    """Turns the gradients by the weights of one row and head into those by its logits' arguments, in place.

    Args:
        grad: Pointer to [edges, heads], as grad_weights.
        grad_score_dst: Pointer to [nodes, heads] in the computing type: receives their sum.
        The others: As in graph_attention_kernel.
    """
    T: tl.constexpr = score_src.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr + row // heads)
    count = (tl.load(indptr + row // heads + 1) - begin).to(tl.int32)
    largest = tl.load(statistics + row)
    slope = tl.full((), negative_slope, T)
    total = tl.zeros((BLOCK_EDGES,), tl.float64)
    weighted = tl.zeros((BLOCK_EDGES,), tl.float64)
    for start in range(0, count, BLOCK_EDGES):
        weights, _, inside = _row_weights(
            score_src, score_dst, indices, row, begin, start, count, heads, largest, slope, BLOCK_EDGES
        )
        at = grad + (begin + start + tl.arange(0, BLOCK_EDGES)) * heads + row % heads
        total += weights.to(tl.float64)
        weighted += weights.to(tl.float64) * tl.load(at, mask=inside, other=0.0).to(tl.float64)
    sum_of_weights = tl.sum(total, axis=0)
    normalise = 1.0 / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
    mean = tl.sum(weighted, axis=0) * normalise
    by_dst = tl.zeros((BLOCK_EDGES,), tl.float64)
    for start in range(0, count, BLOCK_EDGES):
        weights, j, inside = _row_weights(
            score_src, score_dst, indices, row, begin, start, count, heads, largest, slope, BLOCK_EDGES
        )
        at = grad + (begin + start + tl.arange(0, BLOCK_EDGES)) * heads + row % heads
        g = weights.to(tl.float64) * normalise * (tl.load(at, mask=inside, other=0.0).to(tl.float64) - mean)
        src = tl.load(score_src + j * heads + row % heads, mask=inside, other=0.0)
        g = tl.where(tl.load(score_dst + row) + src > 0, g, negative_slope * g)
        by_dst += tl.where(inside, g, 0.0)
        tl.store(at, g.to(T), mask=inside)
    tl.store(grad_score_dst + row, tl.sum(by_dst, axis=0).to(T))


@triton.jit(do_not_specialize=["heads"])
def grad_score_src_kernel(
    indptr_t, edges_t, grad, grad_score_src, heads: tl.int32, BLOCK_EDGES: tl.constexpr
):  # fmt: skip
    """The sum of one node's and head's gradients by logits, in the order of the transpose.

    Args:
        grad: Pointer to [edges, heads], in the order of the rows.
        grad_score_src: Pointer to [nodes, heads]: receives the sums.
        The others: As in grad_value_kernel.
    """
    node = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_t + node // heads)
    count = (tl.load(indptr_t + node // heads + 1) - begin).to(tl.int32)
    total = tl.zeros((BLOCK_EDGES,), tl.float64)
    for start in range(0, count, BLOCK_EDGES):
        edge = start + tl.arange(0, BLOCK_EDGES)
        at = tl.load(edges_t + begin + edge, mask=edge < count, other=0) * heads + node % heads
        total += tl.load(grad + at, mask=edge < count, other=0.0).to(tl.float64)
    tl.store(grad_score_src + node, tl.sum(total, axis=0).to(grad_score_src.dtype.element_ty))


def dropping(
    dropout: float, seed: torch.Tensor | None, otherwise: torch.Tensor
) -> tuple[torch.Tensor, int, float, bool]:
    """The seed, threshold, scale and DROPS that the kernels take; ``otherwise`` stands in for a seed not read."""
    return otherwise if seed is None else seed, int(dropout * 2**32), 1 / (1 - dropout), seed is not None


def tile(value: torch.Tensor, forward: bool) -> dict[str, int]:
    """Edges and features of a program, and its warps, as they were the fastest on an H200.

    One warp, where that makes enough programs: then no sum crosses warps. Where it does not, programs share out the
    features of a row forward, and backward have more warps.
    """
    nodes, heads, features = value.shape
    padded, few = next_power_of_2(features), nodes * heads < FEW_PROGRAMS
    warps = max(padded // 128, 1)
    if few and forward:
        warps = min(warps, 4)
        return {"BLOCK_EDGES": 8, "BLOCK_FEATURES": min(padded, 128 * warps), "num_warps": warps}
    warps = min(warps, 8) if few else 1
    most = 32 * warps * (4 if value.dtype == torch.float64 else 8)  # features of one edge
    edges = 1 if warps > 1 and value.element_size() == 2 else 2  # with more ptxas spills
    block = min(padded, most)
    return {"BLOCK_EDGES": min(edges * most // block, 16), "BLOCK_FEATURES": block, "num_warps": warps}


def graph_attention(
    value: torch.Tensor,
    score_src: torch.Tensor,
    score_dst: torch.Tensor,
    edges: Any,
    numbers: tuple[float, float],
    seed: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
) -> None:
    """Launches graph_attention_kernel, which documents the tensors; ``numbers`` are the negative slope and dropout."""
    nodes, heads, features = value.shape
    indptr, indices = edges[:2]
    seed, threshold, scale, drops = dropping(numbers[1], seed, indptr)
    chosen = tile(value, True)
    launch_kernel(
        graph_attention_kernel,
        (nodes * heads, cdiv(features, chosen["BLOCK_FEATURES"])),
        (value, score_src, score_dst, indptr, indices, seed, out, statistics),
        (nodes, heads, features, numbers[0], threshold, scale),
        DROPS=drops,
        BLOCK_SCORES=BLOCK_SCORES,
        **chosen,
    )


def graph_attention_backward(
    value: torch.Tensor,
    score_src: torch.Tensor,
    score_dst: torch.Tensor,
    edges: Any,
    numbers: tuple[float, float],
    seed: torch.Tensor | None,
    statistics: torch.Tensor,
    grad_out: torch.Tensor,
    grad_value: torch.Tensor,
    grad_logits: torch.Tensor,
    grad_score_src: torch.Tensor,
    grad_score_dst: torch.Tensor,
) -> None:
    """Launches the three kernels of the gradient, one after the other."""
    nodes, heads, features = value.shape
    indptr, indices, indptr_t, indices_t, edges_t = edges
    seed, threshold, scale, drops = dropping(numbers[1], seed, indptr)
    grid = (nodes * heads,)
    of_edges = value, score_src, score_dst, indptr_t, indices_t, edges_t, seed, statistics
    launch_kernel(
        grad_value_kernel,
        grid,
        (*of_edges, grad_out, grad_value, grad_logits),
        (nodes, heads, features, numbers[0], threshold, scale),
        DROPS=drops,
        **tile(value, False),
    )
    block = {"BLOCK_EDGES": BLOCK_SCORES, "num_warps": NUM_WARPS}
    of_rows = score_src, score_dst, indptr, indices, statistics, grad_logits, grad_score_dst
    launch_kernel(grad_logits_kernel, grid, of_rows, (heads, numbers[0]), **block)
    of_sources = indptr_t, edges_t, grad_logits, grad_score_src
    launch_kernel(grad_score_src_kernel, grid, of_sources, (heads,), **block)
