"""Triton kernels of graph attention over a complete graph, backward; see kernels/graph_attention_complete.py."""

import torch
import triton
import triton.language as tl

from mlfast.kernels.elementary import narrowed, widened
from mlfast.kernels.graph_attention_complete import (
    CHUNK,
    NUM_WARPS,
    TILE,
    chunk_of,
    neighbour_sums,
    num_chunks,
    scan,
    shares_of,
    spans,
    sum_and_scan,
)
from mlfast.kernels.launch import launch_kernel


@triton.jit
def _other_sums(x_rows, x_sources, weight, sums_rows, sums_sources, is_source, REVERSE: tl.constexpr):
    """Running sums down the tile, for each item those over the items of the other kind."""
    of_rows = sums_rows[None, :] + tl.cumsum(tl.where(is_source, 0.0, weight * x_rows), 0, reverse=REVERSE)
    of_sources = sums_sources[None, :] + tl.cumsum(tl.where(is_source, weight * x_sources, 0.0), 0, reverse=REVERSE)
    return tl.where(is_source, of_rows, of_sources)


@triton.jit(do_not_specialize=["nodes", "heads", "columns"])
def collect_backward_kernel(
    grad_out, value, order, weights, sums_rows, sums_sources, grad_value, parts,
    nodes: tl.int32, heads: tl.int32, columns: tl.int32, span: tl.int32,
    NEEDS_VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients by the values of each chunk, and the dot products from which those by the scores follow.

    Args:
        grad_out, value: Pointers to [nodes, heads, columns], any float type.
        order, weights: As in chunk_sums_kernel.
        sums_rows, sums_sources: Pointers to the scanned sums of grad_out and of value.
        grad_value: Pointer to the result, as value; only if NEEDS_VALUE.
        parts: Pointer to [programs of a chunk, 2, heads, 2 nodes], float64: receives each item's products with what it
            collects from the left and from the right, summed over the columns of a program.
        nodes, heads, columns: Sizes.
        span: Columns of a program.
        NEEDS_VALUE: Whether grad_value is written.
        CHUNK, BLOCK: The tile.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = chunk_of(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    kind = is_source[:, None]
    row = ((tl.where(is_source, item - nodes, item).to(tl.int64) * heads + head) * columns)[:, None]
    width = columns.to(tl.int64) + 1
    w_before, w_after = before[:, None], after[:, None]
    dot_left = tl.zeros((CHUNK,), tl.float64)
    dot_right = tl.zeros((CHUNK,), tl.float64)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset, there = row + column[None, :], inside[:, None] & (column < columns)[None, :]
        x_sources = widened(tl.load(value + offset, mask=there & kind, other=0.0))
        x_rows = widened(tl.load(grad_out + offset, mask=there & ~kind, other=0.0))
        rows_left, rows_right = neighbour_sums(sums_rows, head, number, chunks, heads, width, column, column < columns)
        sources_left, sources_right = neighbour_sums(
            sums_sources, head, number, chunks, heads, width, column, column < columns
        )
        left = _other_sums(x_rows, x_sources, w_after, rows_left, sources_left, kind, False)
        right = _other_sums(x_rows, x_sources, w_before, rows_right, sources_right, kind, True)
        if NEEDS_VALUE:
            result = w_before * left + w_after * right
            tl.store(grad_value + offset, narrowed(result, grad_value.dtype.element_ty), mask=there & kind)
        x = x_rows + x_sources
        dot_left += tl.sum(x * left, 1)
        dot_right += tl.sum(x * right, 1)
    part_size = heads.to(tl.int64) * items
    to = parts + tl.program_id(1) * 2 * part_size + at
    tl.store(to, before * dot_left, mask=inside)
    tl.store(to + part_size, after * dot_right, mask=inside)


@triton.jit(do_not_specialize=["nodes", "heads", "programs"])
def dots_kernel(
    order, weights, parts, dots, sums_delta, nodes: tl.int32, heads: tl.int32, programs: tl.int32, CHUNK: tl.constexpr
):  # fmt: skip
    """The dot products over all columns, and what of them is summed over the rows of a chunk.

    Args:
        order, weights, parts: As in collect_backward_kernel.
        dots: Pointer to [2, heads, 2 nodes], float64: receives the sums of the parts.
        sums_delta: Pointer to [2, heads, chunks], float64: receives the sums over rows of after and before times delta.
        nodes, heads: Sizes.
        programs: Parts.
        CHUNK: Items of a program.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = chunk_of(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    part_size = heads.to(tl.int64) * items
    dot_left = tl.zeros((CHUNK,), tl.float64)
    dot_right = tl.zeros((CHUNK,), tl.float64)
    for part in range(programs):
        of_part = parts + part * 2 * part_size + at
        dot_left += tl.load(of_part, mask=inside, other=0.0)
        dot_right += tl.load(of_part + part_size, mask=inside, other=0.0)
    tl.store(dots + at, dot_left, mask=inside)
    tl.store(dots + part_size + at, dot_right, mask=inside)
    delta = tl.where(is_source, 0.0, dot_left + dot_right)
    to = sums_delta + head * chunks + number
    tl.store(to, tl.sum(after * delta, 0))
    tl.store(to + heads.to(tl.int64) * chunks, tl.sum(before * delta, 0))


@triton.jit(do_not_specialize=["nodes", "heads", "columns", "slope"])
def grad_scores_kernel(
    order, weights, sums_sources, dots, sums_delta, grad_src, grad_dst, slope: tl.float64,
    nodes: tl.int32, heads: tl.int32, columns: tl.int32, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients by the scores.

    Args:
        order, weights, sums_sources, dots: As in collect_backward_kernel.
        sums_delta: Scanned.
        grad_src, grad_dst: Pointers to the results, [nodes, heads], any float type; each may be None.
        slope: Of the LeakyReLU.
        nodes, heads, columns: Sizes.
        CHUNK: Items of a program.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = chunk_of(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    dot_left = tl.load(dots + at, mask=inside, other=0.0)
    dot_right = tl.load(dots + heads.to(tl.int64) * items + at, mask=inside, other=0.0)
    share_left, share_right = shares_of(sums_sources, head, number, chunks, heads, columns, is_source, before, after)
    by_dst = (1 - slope) * (share_right * dot_left - share_left * dot_right)
    delta = tl.where(is_source, 0.0, dot_left + dot_right)
    left, right = neighbour_sums(sums_delta, head, number, chunks, heads, 1, 0, True)
    left += tl.cumsum(after * delta, 0)
    right += tl.cumsum(before * delta, 0, reverse=True)
    by_src = (dot_right - after * right) + slope * (dot_left - before * left)
    node = tl.where(is_source, item - nodes, item).to(tl.int64)
    to = node * heads + head
    if grad_dst is not None:
        tl.store(grad_dst + to, narrowed(by_dst, grad_dst.dtype.element_ty), mask=inside & ~is_source)
    if grad_src is not None:
        tl.store(grad_src + to, narrowed(by_src, grad_src.dtype.element_ty), mask=inside & is_source)


def graph_attention_complete_backward(
    grad_out: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor,
    weights: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    parts: torch.Tensor,
    dots: torch.Tensor,
    negative_slope: float,
    grad_value: torch.Tensor | None,
    grad_src: torch.Tensor | None,
    grad_dst: torch.Tensor | None,
) -> None:
    """Launches the kernels of the backward pass, which document the tensors; ``sums``: of rows, sources, delta.

    Those of the sources are as the forward pass left them; `spans` says how many parts there are.
    """
    nodes, heads, _ = value.shape
    sums_rows, sums_sources, sums_delta = sums
    chunks = heads * num_chunks(nodes)
    programs, span = spans(value)
    sum_and_scan(grad_out, order, weights, sums_rows, False)
    tensors = grad_out, value, order, weights, sums_rows, sums_sources, grad_value, parts
    constants = {"NEEDS_VALUE": grad_value is not None} | TILE
    launch_kernel(collect_backward_kernel, (chunks, programs), tensors, (*value.shape, span), **constants)
    of_chunks = {"CHUNK": CHUNK, "num_warps": NUM_WARPS}
    tensors, numbers = (order, weights, parts, dots, sums_delta), (nodes, heads, programs)
    launch_kernel(dots_kernel, (chunks,), tensors, numbers, **of_chunks)
    scan(sums_delta)
    tensors = order, weights, sums_sources, dots, sums_delta, grad_src, grad_dst
    numbers = negative_slope, *value.shape
    launch_kernel(grad_scores_kernel, (chunks,), tensors, numbers, **of_chunks)
