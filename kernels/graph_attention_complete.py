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

from mlfast.kernels.launch import cdiv, launch_kernel

# Of the tiles that do not spill the fastest on an H200. A row is 32 bytes of float32.
CHUNK = 64
BLOCK = 8
SCANNED = 64  # chunks of a tile of the scan
NUM_WARPS = 2
TILE = {"CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
BLOCK_ITEMS = 256  # of the weights
LARGEST = tl.constexpr(1.7976931348623157e308)  # float64


@triton.jit
def _widened(x):
    """As float64; by float32, since the interpreter converts bfloat16 to and from nothing else."""
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def _narrowed(x, TYPE: tl.constexpr):
    """From float64 to the type of a result."""
    return x if tl.float64 == TYPE else x.to(tl.float32).to(TYPE)


@triton.jit
def _chunk(order, weights, pid, items, chunks, heads, CHUNK: tl.constexpr):
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
def _neighbour_sums(sums, head, number, chunks, heads, width, column, inside):
    """Scanned sums: from the left up to the chunk before, from the right down to the chunk after."""
    row = sums + (head * chunks + number) * width + column
    left = tl.load(row - width, mask=inside & (number > 0), other=0.0)
    right_part = heads.to(tl.int64) * chunks * width
    right = tl.load(row + right_part + width, mask=inside & (number < chunks - 1), other=0.0)
    return left, right


@triton.jit
def _shares(sums, head, number, chunks, heads, columns, is_source, before, after):
    """For every row its weights of all sources to its left, and to its right: sums as of a value that is 1."""
    width = columns.to(tl.int64) + 1
    left, right = _neighbour_sums(sums, head, number, chunks, heads, width, columns, True)
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
    highest = _widened(tl.load(top + head))
    source = _widened(tl.load(score_src + (item - nodes) * heads + head, mask=inside & is_source, other=0.0))
    row = _widened(tl.load(score_dst + item * heads + head, mask=inside & ~is_source, other=0.0))
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
    head, number, _, inside, item, before, after = _chunk(order, weights, tl.program_id(0), items, chunks, heads, CHUNK)
    is_source = item >= nodes
    mine = inside & (is_source == OF_SOURCES)
    node = tl.where(is_source, item - nodes, item).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = mine[:, None] & (column < columns)[None, :]
    row = x + ((node * heads + head) * columns)[:, None]
    tile = _widened(tl.load(row + column[None, :], mask=there, other=1.0))
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
    value, order, weights, sums, out, normalised, nodes: tl.int32, heads: tl.int32, columns: tl.int32,
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
        CHUNK, BLOCK: The tile.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = _chunk(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    share_left, share_right = _shares(sums, head, number, chunks, heads, columns, is_source, before, after)
    total = tl.where(is_source | ~inside, 1.0, share_left + share_right)
    before, after = before / total, after / total
    if tl.program_id(1) == 0:
        tl.store(normalised + at, before, mask=inside)
        tl.store(normalised + heads.to(tl.int64) * items + at, after, mask=inside)

    node = tl.where(is_source, item - nodes, item).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = ((node * heads + head) * columns)[:, None] + column[None, :]
    there = inside[:, None] & (column < columns)[None, :]
    x = _widened(tl.load(value + offset, mask=there & is_source[:, None], other=0.0))
    width = columns.to(tl.int64) + 1
    left, right = _neighbour_sums(sums, head, number, chunks, heads, width, column, column < columns)
    w_before, w_after = before[:, None], after[:, None]
    left = left[None, :] + tl.cumsum(tl.where(is_source[:, None], w_after * x, 0.0), 0)
    right = right[None, :] + tl.cumsum(tl.where(is_source[:, None], w_before * x, 0.0), 0, reverse=True)
    result = w_before * left + w_after * right
    tl.store(out + offset, _narrowed(result, out.dtype.element_ty), mask=there & ~is_source[:, None])


@triton.jit
def _other_sums(x_rows, x_sources, weight, sums_rows, sums_sources, is_source, REVERSE: tl.constexpr):
    """Running sums down the tile, for each item those over the items of the other kind."""
    of_rows = sums_rows[None, :] + tl.cumsum(tl.where(is_source, 0.0, weight * x_rows), 0, reverse=REVERSE)
    of_sources = sums_sources[None, :] + tl.cumsum(tl.where(is_source, weight * x_sources, 0.0), 0, reverse=REVERSE)
    return tl.where(is_source, of_rows, of_sources)


@triton.jit(do_not_specialize=["nodes", "heads", "columns"])
def collect_backward_kernel(
    grad_out, value, order, weights, sums_rows, sums_sources, grad_value, dots, sums_delta,
    nodes: tl.int32, heads: tl.int32, columns: tl.int32,
    NEEDS_VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients by the values of each chunk, and the dot products from which those by the scores follow.

    Args:
        grad_out, value: Pointers to [nodes, heads, columns], any float type.
        order, weights: As in chunk_sums_kernel.
        sums_rows, sums_sources: Pointers to the scanned sums of grad_out and of value.
        grad_value: Pointer to the result, as value; only if NEEDS_VALUE.
        dots: Pointer to [2, heads, 2 nodes], float64: receives each item's products with what it collects from the left
            and from the right.
        sums_delta: Pointer to [2, heads, chunks], float64: receives the sums over rows of after and before times delta.
        nodes, heads, columns: Sizes.
        NEEDS_VALUE: Whether grad_value is written.
        CHUNK, BLOCK: The tile.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = _chunk(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    kind = is_source[:, None]
    row = ((tl.where(is_source, item - nodes, item).to(tl.int64) * heads + head) * columns)[:, None]
    width = columns.to(tl.int64) + 1
    w_before, w_after = before[:, None], after[:, None]
    dot_left = tl.zeros((CHUNK,), tl.float64)
    dot_right = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset, there = row + column[None, :], inside[:, None] & (column < columns)[None, :]
        x_sources = _widened(tl.load(value + offset, mask=there & kind, other=0.0))
        x_rows = _widened(tl.load(grad_out + offset, mask=there & ~kind, other=0.0))
        rows_left, rows_right = _neighbour_sums(sums_rows, head, number, chunks, heads, width, column, column < columns)
        sources_left, sources_right = _neighbour_sums(
            sums_sources, head, number, chunks, heads, width, column, column < columns
        )
        left = _other_sums(x_rows, x_sources, w_after, rows_left, sources_left, kind, False)
        right = _other_sums(x_rows, x_sources, w_before, rows_right, sources_right, kind, True)
        if NEEDS_VALUE:
            result = w_before * left + w_after * right
            tl.store(grad_value + offset, _narrowed(result, grad_value.dtype.element_ty), mask=there & kind)
        x = x_rows + x_sources
        dot_left += tl.sum(x * left, 1)
        dot_right += tl.sum(x * right, 1)
    dot_left, dot_right = before * dot_left, after * dot_right
    tl.store(dots + at, dot_left, mask=inside)
    tl.store(dots + heads.to(tl.int64) * items + at, dot_right, mask=inside)
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
        grad_src, grad_dst: Pointers to the results, [nodes, heads], float64.
        slope: Of the LeakyReLU.
        nodes, heads, columns: Sizes.
        CHUNK: Items of a program.
    """
    items = 2 * nodes
    chunks = tl.cdiv(items, CHUNK)
    head, number, at, inside, item, before, after = _chunk(
        order, weights, tl.program_id(0), items, chunks, heads, CHUNK
    )
    is_source = item >= nodes
    dot_left = tl.load(dots + at, mask=inside, other=0.0)
    dot_right = tl.load(dots + heads.to(tl.int64) * items + at, mask=inside, other=0.0)
    share_left, share_right = _shares(sums_sources, head, number, chunks, heads, columns, is_source, before, after)
    by_dst = (1 - slope) * (share_right * dot_left - share_left * dot_right)
    delta = tl.where(is_source, 0.0, dot_left + dot_right)
    left, right = _neighbour_sums(sums_delta, head, number, chunks, heads, 1, 0, True)
    left += tl.cumsum(after * delta, 0)
    right += tl.cumsum(before * delta, 0, reverse=True)
    by_src = (dot_right - after * right) + slope * (dot_left - before * left)
    node = tl.where(is_source, item - nodes, item).to(tl.int64)
    tl.store(grad_dst + node * heads + head, by_dst, mask=inside & ~is_source)
    tl.store(grad_src + node * heads + head, by_src, mask=inside & is_source)


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


def _sum_and_scan(
    x: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, sums: torch.Tensor, of_sources: bool
) -> None:
    nodes, heads, columns = x.shape
    grid = heads * num_chunks(nodes), cdiv(columns + 1, BLOCK)
    launch_kernel(chunk_sums_kernel, grid, (x, order, weights, sums), x.shape, OF_SOURCES=of_sources, **TILE)
    _scan(sums)


def _scan(sums: torch.Tensor) -> None:
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
    nodes, heads, columns = value.shape
    _sum_and_scan(value, order, weights, sums, True)
    grid, tensors = (heads * num_chunks(nodes), cdiv(columns, BLOCK)), (value, order, weights, sums, out, normalised)
    launch_kernel(collect_kernel, grid, tensors, value.shape, **TILE)


def graph_attention_complete_backward(
    grad_out: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor,
    weights: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dots: torch.Tensor,
    negative_slope: float,
    grad_value: torch.Tensor | None,
    grad_src: torch.Tensor,
    grad_dst: torch.Tensor,
) -> None:
    """Launches the kernels of the backward pass, which document the tensors; ``sums``: of rows, sources, delta."""
    nodes, heads, _ = value.shape
    sums_rows, sums_sources, sums_delta = sums
    grid = (heads * num_chunks(nodes),)
    _sum_and_scan(grad_out, order, weights, sums_rows, False)
    _sum_and_scan(value, order, weights, sums_sources, True)
    tensors = grad_out, value, order, weights, sums_rows, sums_sources, grad_value, dots, sums_delta
    launch_kernel(collect_backward_kernel, grid, tensors, value.shape, NEEDS_VALUE=grad_value is not None, **TILE)
    _scan(sums_delta)
    tensors = order, weights, sums_sources, dots, sums_delta, grad_src, grad_dst
    numbers = negative_slope, *value.shape
    launch_kernel(grad_scores_kernel, grid, tensors, numbers, CHUNK=CHUNK, num_warps=NUM_WARPS)
