"""Triton kernels of graph attention over a complete graph: chunk sums, a scan over chunks, and sweeps within chunks.

docs/graph_attention_complete.md derives the algorithm; csrc/cpu/graph_attention_complete.h defines the merged order of
rows and sources and their weights, before and after. Here a chunk of the order is a tile, and its sweeps are cumulative
sums down the tile. No allocation, autograd or autotuning. Arithmetic is float64 for every type: the gradients by the
scores are small differences of sums over all nodes. Results are bit-equal from run to run: the order of every addition
depends on the shape alone.

These kernels run under Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were
tested on an H200.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.elementary import narrowed, widened
from mlfast.kernels.launch import cdiv, launch_kernel

# Of the tiles that do not spill the fastest on an H200. A row is 32 bytes of float32.
CHUNK = 64
BLOCK = 8
SCANNED = 64  # chunks of a tile of the scan
NUM_WARPS = 2
TILE = {"CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
BLOCK_ITEMS = 256  # of the weights
ENOUGH_PROGRAMS = 2048  # more of them share out the columns of a chunk, each with SPAN at the least
SPAN = 32
LARGEST = tl.constexpr(1.7976931348623157e308)  # float64


@triton.jit
def chunk_of(order, weights, pid, items, chunks, heads, CHUNK: tl.constexpr):
    """A program's chunk: its head and number, where its items stand, which exist, what they are, their weights."""
    head, number = (pid // chunks).to(tl.int64), pid % chunks
    position = number * CHUNK + tl.arange(0, CHUNK)
    inside = position < items
    at = head * items + position
    item = tl.load(order + at, mask=inside, other=0)
    before = tl.load(weights + at, mask=inside, other=0.0)
    after = tl.load(weights + heads.to(tl.int64) * items + at, mask=inside, other=0.0)
    return head, number, at, inside, item, before, after


@triton.jit
def neighbour_sums(sums, head, number, chunks, heads, width, column, inside):
    """Scanned sums: from the left up to the chunk before, from the right down to the chunk after."""
    row = sums + (head * chunks + number) * width + column
    left = tl.load(row - width, mask=inside & (number > 0), other=0.0)
    right_part = heads.to(tl.int64) * chunks * width
    right = tl.load(row + right_part + width, mask=inside & (number < chunks - 1), other=0.0)
    return left, right


@triton.jit
def shares_of(sums, head, number, chunks, heads, columns, is_source, before, after):
    """For every row its weights of all sources to its left, and to its right: sums as of a value that is 1."""
    width = columns.to(tl.int64) + 1
    left, right = neighbour_sums(sums, head, number, chunks, heads, width, columns, True)
    left += tl.cumsum(tl.where(is_source, after, 0.0), 0)
    right += tl.cumsum(tl.where(is_source, before, 0.0), 0, reverse=True)
    return before * left, after * right


@triton.jit(do_not_specialize=["nodes", "heads"])
def weights_kernel(
    sorted_order, score_src, score_dst, top, order, weights, negative_slope: tl.float64,
    nodes: tl.int32, heads: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of rows and sources, before and after, in their merged order; those of the rows not normalised yet.

    Args:
        sorted_order: Pointer to [heads, 2 nodes], int64: i < nodes is row i, nodes + j is source j.
        score_src, score_dst: Pointers to [nodes, heads], any float type.
        top: Pointer to [heads]: the largest score_src.
        order: Pointer to [heads, 2 nodes], int32: receives the order.
        weights: Pointer to [2, heads, 2 nodes], float64: receives the weights.
        negative_slope: Of the LeakyReLU.
        nodes, heads: Sizes.
        BLOCK: Items of a program.
    """
    items = 2 * nodes
    head = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < items
    at = head * items + position
    item = tl.load(sorted_order + at, mask=inside, other=0)
    is_source = item >= nodes
    highest = widened(tl.load(top + head))
    source = widened(tl.load(score_src + (item - nodes) * heads + head, mask=inside & is_source, other=0.0))
    row = widened(tl.load(score_dst + item * heads + head, mask=inside & ~is_source, other=0.0))
    # Finite scores far apart must not make 0 * inf; those that are not finite must stay NaN.
    gap = source - highest
    gap = tl.where((source - source == 0) & (gap < -LARGEST), -LARGEST, gap)
    above = row + highest
    above = tl.where(above < 0, 0.0, tl.where(above > LARGEST, LARGEST, above))
    before = tl.where(is_source, tl.exp(negative_slope * gap), 1.0)
    after = tl.where(is_source, tl.exp(gap), tl.exp((negative_slope - 1) * above) + (row - row))
    tl.store(order + at, item.to(tl.int32), mask=inside)
    tl.store(weights + at, before, mask=inside)
    tl.store(weights + heads.to(tl.int64) * items + at, after, mask=inside)


@triton.jit(do_not_specialize=["nodes", "heads", "columns"])
def chunk_sums_kernel(
    x, order, weights, sums, nodes: tl.int32, heads: tl.int32, columns: tl.int32,
    OF_SOURCES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of after * x and of before * x over each chunk, of the rows or of the sources in it.

    Args:
        x: Pointer to [nodes, heads, columns], any float type: values of sources or gradients of rows.
        order: Pointer to [heads, 2 nodes], int32.
        weights: Pointer to [2, heads, 2 nodes], float64: before, after.
        sums: Pointer to [2, heads, chunks, columns + 1], float64: receives the sums; in the last column x counts as 1.
        nodes, heads, columns: Sizes.
        OF_SOURCES: Whether x belongs to the sources.
        CHUNK, BLOCK: Items and columns of a tile.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, _, inside, item, before, after = chunk_of(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    mine = inside & (is_source == OF_SOURCES)
    node = tl.where(is_source, item - nodes, item).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = mine[:, None] & (column < columns)[None, :]
    row = x + ((node * heads + head) * columns)[:, None]
    tile = widened(tl.load(row + column[None, :], mask=there, other=1.0))
    after, before = tl.where(mine, after, 0.0), tl.where(mine, before, 0.0)
    to = sums + (head * chunks + number) * (columns + 1) + column
    tl.store(to, tl.sum(after[:, None] * tile, 0), mask=column <= columns)
    to += heads.to(tl.int64) * chunks * (columns + 1)
    tl.store(to, tl.sum(before[:, None] * tile, 0), mask=column <= columns)


@triton.jit(do_not_specialize=["heads", "chunks", "width"])
def scan_kernel(sums, heads: tl.int32, chunks: tl.int32, width: tl.int32, SCANNED: tl.constexpr, BLOCK: tl.constexpr):
    """In place, sums of chunks become sums over all chunks up to them: from the left, and from the right.

    Args:
        sums: Pointer to [2, heads, chunks, width], float64.
        heads, chunks, width: Sizes.
        SCANNED, BLOCK: Chunks and columns of a tile.
    """
    part = tl.program_id(0).to(tl.int64)
    from_right = part >= heads
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    carry = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, SCANNED):
        step = start + tl.arange(0, SCANNED)
        chunk = tl.where(from_right, chunks - 1 - step, step)
        inside = (step < chunks)[:, None] & (column < width)[None, :]
        at = sums + ((part * chunks + chunk) * width)[:, None] + column[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
        tl.store(at, tl.cumsum(tile, 0) + carry[None, :], mask=inside)
        carry += tl.sum(tile, 0)


@triton.jit(do_not_specialize=["nodes", "heads", "columns"])
def collect_kernel(
    value, order, weights, sums, out, normalised, nodes: tl.int32, heads: tl.int32, columns: tl.int32, span: tl.int32,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the rows of each chunk collect from the sources on either side.

    Args:
        value: Pointer to [nodes, heads, columns], any float type.
        order, weights: As in chunk_sums_kernel; the weights of rows not normalised yet.
        sums: Pointer to the scanned sums of the sources.
        out: Pointer to the result, as value.
        normalised: Pointer to the weights, those of the rows divided by what they sum to: receives them.
        nodes, heads, columns: Sizes.
        span: Columns of a program.
        CHUNK, BLOCK: The tile.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = chunk_of(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    share_left, share_right = shares_of(sums, head, number, chunks, heads, columns, is_source, before, after)
    total = tl.where(is_source | ~inside, 1.0, share_left + share_right)
    before, after = before / total, after / total
    if tl.program_id(1) == 0:
        tl.store(normalised + at, before, mask=inside)
        tl.store(normalised + heads.to(tl.int64) * items + at, after, mask=inside)

    kind = is_source[:, None]
    row = ((tl.where(is_source, item - nodes, item).to(tl.int64) * heads + head) * columns)[:, None]
    width = columns.to(tl.int64) + 1
    w_before, w_after = before[:, None], after[:, None]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset, there = row + column[None, :], inside[:, None] & (column < columns)[None, :]
        x = widened(tl.load(value + offset, mask=there & kind, other=0.0))
        left, right = neighbour_sums(sums, head, number, chunks, heads, width, column, column < columns)
        left = left[None, :] + tl.cumsum(tl.where(kind, w_after * x, 0.0), 0)
        right = right[None, :] + tl.cumsum(tl.where(kind, w_before * x, 0.0), 0, reverse=True)
        result = w_before * left + w_after * right
        tl.store(out + offset, narrowed(result, out.dtype.element_ty), mask=there & ~kind)


def merged_weights(
    sorted_order: torch.Tensor,
    score_src: torch.Tensor,
    score_dst: torch.Tensor,
    top: torch.Tensor,
    negative_slope: float,
    order: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Launches weights_kernel, which documents the tensors."""
    nodes, heads = score_src.shape
    grid = cdiv(2 * nodes, BLOCK_ITEMS), heads
    tensors = sorted_order, score_src, score_dst, top, order, weights
    numbers = negative_slope, nodes, heads
    launch_kernel(weights_kernel, grid, tensors, numbers, BLOCK=BLOCK_ITEMS, num_warps=NUM_WARPS)


def num_chunks(nodes: int) -> int:
    """Chunks of the merged order of ``nodes`` rows and as many sources."""
    return cdiv(2 * nodes, CHUNK)


def sum_and_scan(
    x: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, sums: torch.Tensor, of_sources: bool
) -> None:
    """Launches chunk_sums_kernel, which documents the tensors, and scans what it found."""
    nodes, heads, columns = x.shape
    grid = heads * num_chunks(nodes), cdiv(columns + 1, BLOCK)
    launch_kernel(chunk_sums_kernel, grid, (x, order, weights, sums), x.shape, OF_SOURCES=of_sources, **TILE)
    scan(sums)


def spans(value: torch.Tensor) -> tuple[int, int]:
    """Programs that share out the columns of a chunk, and the columns of each."""
    nodes, heads, columns = value.shape
    programs = min(cdiv(ENOUGH_PROGRAMS, heads * num_chunks(nodes)), cdiv(columns, SPAN))
    span = cdiv(cdiv(columns, programs), BLOCK) * BLOCK
    return cdiv(columns, span), span


def scan(sums: torch.Tensor) -> None:
    """Launches scan_kernel."""
    _, heads, chunks, width = sums.shape
    grid, block = (2 * heads, cdiv(width, BLOCK)), {"SCANNED": SCANNED, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    launch_kernel(scan_kernel, grid, (sums,), (heads, chunks, width), **block)


def graph_attention_complete(
    value: torch.Tensor,
    order: torch.Tensor,
    weights: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor,
    normalised: torch.Tensor,
) -> None:
    """Launches the kernels of the forward pass; collect_kernel documents the tensors."""
    nodes, heads, _ = value.shape
    chunks = heads * num_chunks(nodes)
    programs, span = spans(value)
    sum_and_scan(value, order, weights, sums, True)
    tensors = value, order, weights, sums, out, normalised
    launch_kernel(collect_kernel, (chunks, programs), tensors, (*value.shape, span), **TILE)
