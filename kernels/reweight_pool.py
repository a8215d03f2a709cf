"""Triton kernels of reweight_pool: one read of the features forward, one write of their gradient backward.

docs/reweight_pool.md derives the formulas. No allocation, autograd or autotuning. Arithmetic is float32, or float64 for
float64 features. Results are bit-equal from run to run: the order of every addition depends on the shape alone.

Both kernels see the features as [batch, channels, positions], in either order of the last two. These kernels run under
Triton's interpreter (TRITON_INTERPRET=1) and compile for sm_80, sm_90 and sm_100; they were tested on an H200.
"""

import torch
import triton
import triton.language as tl

from mlfast.kernels.launch import cdiv, launch_kernel, next_power_of_2

NUM_WARPS = 4
MOST_POSITIONS = tl.constexpr(2**30)
SUMS_TILE = {"BLOCK_BATCH": 128, "BLOCK_CHANNELS": 8, "num_warps": NUM_WARPS}  # of the sums over the batch


@triton.jit
def _is_above(product, peak):
    """Whether a product is above the peak so far; a NaN is above every number."""
    return (product > peak) | ((product != product) & (peak == peak))


@triton.jit
def _tile(row, inside_channels, positions, stride, start, T: tl.constexpr, BLOCK_POSITIONS: tl.constexpr):
    """The features of a tile, their positions, and which of them there are."""
    position = start + tl.arange(0, BLOCK_POSITIONS)
    inside = inside_channels[:, None] & (position < positions)[None, :]
    f = tl.load(row[:, None] + position.to(tl.int64)[None, :] * stride, mask=inside, other=0.0).to(T)
    return f, position[None, :], inside


@triton.jit
def _pool(
    row, weight, inside_channels, positions, stride,
    T: tl.constexpr, UNROLL: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_CHANNELS channels the sum of the features, the maximum of the products, its place and its feature."""
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_POSITIONS), T)
    peak = tl.full((BLOCK_CHANNELS, BLOCK_POSITIONS), float("-inf"), T)
    first = tl.full((BLOCK_CHANNELS, BLOCK_POSITIONS), 0x7FFFFFFF, tl.int32)  # of lanes that see nothing
    feature = peak
    for start in range(0, positions, BLOCK_POSITIONS * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step * BLOCK_POSITIONS
            f, position, inside = _tile(row, inside_channels, positions, stride, at, T, BLOCK_POSITIONS)
            product = weight[:, None] * f
            above = (_is_above(product, peak) | (at == 0)) & inside  # a first product of -inf counts too
            total += f
            peak = tl.where(above, product, peak)
            first = tl.where(above, position, first)
            feature = tl.where(above, f, feature)
    is_nan = peak != peak  # above every number: it counts as inf at a place before all others
    height = tl.where(is_nan, float("inf"), peak)
    highest = tl.max(height, axis=1)
    place = tl.where(is_nan, first - MOST_POSITIONS, first)
    place = tl.min(tl.where(height == highest[:, None], place, 0x7FFFFFFF), axis=1)
    position = tl.where(place < 0, place + MOST_POSITIONS, place)
    feature = tl.sum(tl.where(first == position[:, None], feature, 0.0), axis=1)
    return tl.sum(total, axis=1), tl.where(place < 0, float("nan"), highest), position, feature


@triton.jit
def _pool_without_grad(
    row, weight, inside_channels, positions, stride,
    T: tl.constexpr, UNROLL: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Sum of the features and maximum of the products, where no one asks for its position: a NaN is in the sum."""
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_POSITIONS), T)
    peak = tl.full((BLOCK_CHANNELS, BLOCK_POSITIONS), float("-inf"), T)
    for start in range(0, positions, BLOCK_POSITIONS * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step * BLOCK_POSITIONS
            f, _, inside = _tile(row, inside_channels, positions, stride, at, T, BLOCK_POSITIONS)
            total += f
            above = tl.maximum(peak, weight[:, None] * f, propagate_nan=tl.PropagateNan.ALL)
            peak = tl.where(inside, above, peak)
    return tl.sum(tl.where(peak != peak, peak, total), axis=1), tl.max(peak, axis=1)


@triton.jit
def _in_quads(positions, QUADS: tl.constexpr):
    """The number itself; a multiple of 4 in a form that lets the compiler move four neighbours at a time."""
    result = positions
    if QUADS:
        result = positions // 4 * 4
    return result


@triton.jit
def reweight_pool_kernel(
    features, weight, out, argmax, weight_slope, channels: tl.int32, positions: tl.int32,
    CHANNELS_LAST: tl.constexpr, NEEDS_GRAD: tl.constexpr, QUADS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Mean plus maximum of weight * features over positions; a program has BLOCK_CHANNELS channels of one image.

    Args:
        features: Pointer to [batch, channels, positions], or [batch, positions, channels] if CHANNELS_LAST, any float
            type.
        weight: Pointer to [channels] in the computing type.
        out: Pointer to [batch, channels] in the type of features.
        argmax: Pointer to [batch, channels], int32: receives where weight * features is first at its maximum. Only if
            NEEDS_GRAD, as weight_slope.
        weight_slope: Pointer to [batch, channels] in the computing type: receives mean + features[argmax].
        channels, positions: Sizes.
        CHANNELS_LAST: The order of features in memory.
        NEEDS_GRAD: Whether argmax and weight_slope are written.
        QUADS: Whether positions is a multiple of 4.
        UNROLL: Tiles whose loads are under way together.
        BLOCK_CHANNELS, BLOCK_POSITIONS: The tile.
    """
    T: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    positions = _in_quads(positions, QUADS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    w = tl.load(weight + channel, mask=inside, other=0.0)
    to = image * channels + channel
    if CHANNELS_LAST:
        row, stride = features + image * positions * channels + channel, channels.to(tl.int64)
    else:
        row, stride = features + to * positions, tl.full((), 1, tl.int64)
    if NEEDS_GRAD:
        total, peak, first, feature = _pool(
            row, w, inside, positions, stride, T, UNROLL, BLOCK_CHANNELS, BLOCK_POSITIONS
        )
        tl.store(argmax + to, first, mask=inside)
        tl.store(weight_slope + to, total / positions.to(T) + feature, mask=inside)
    else:
        total, peak = _pool_without_grad(row, w, inside, positions, stride, T, UNROLL, BLOCK_CHANNELS, BLOCK_POSITIONS)
    tl.store(out + to, (w * (total / positions.to(T)) + peak).to(out.dtype.element_ty), mask=inside)


@triton.jit
def grad_features_kernel(
    grad_out, weight, argmax, grad_features, channels: tl.int32, positions: tl.int32,
    CHANNELS_LAST: tl.constexpr, QUADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """grad_out * weight * (1 / positions + [position == argmax]); programs as in reweight_pool_kernel.

    Args:
        grad_out: Pointer to [batch, channels], any float type.
        weight, argmax: As in reweight_pool_kernel.
        grad_features: Pointer to the result, in the layout of the features and the type of grad_out.
        channels, positions: Sizes.
        CHANNELS_LAST: The order of grad_features in memory.
        QUADS, BLOCK_CHANNELS, BLOCK_POSITIONS: As in reweight_pool_kernel.
    """
    T: tl.constexpr = weight.dtype.element_ty
    positions = _in_quads(positions, QUADS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside_channels = channel < channels
    of = image * channels + channel
    if CHANNELS_LAST:
        row, stride = grad_features + image * positions * channels + channel, channels.to(tl.int64)
    else:
        row, stride = grad_features + of * positions, tl.full((), 1, tl.int64)
    slope = tl.load(grad_out + of, mask=inside_channels, other=0.0).to(T)
    slope *= tl.load(weight + channel, mask=inside_channels, other=0.0)
    cold = slope / positions.to(T)
    hot = cold + slope
    first = tl.load(argmax + of, mask=inside_channels, other=0)
    for start in range(0, positions, BLOCK_POSITIONS):
        position = start + tl.arange(0, BLOCK_POSITIONS)
        inside = inside_channels[:, None] & (position < positions)[None, :]
        value = tl.where(position[None, :] == first[:, None], hot[:, None], cold[:, None])
        at = row[:, None] + position.to(tl.int64)[None, :] * stride
        tl.store(at, value.to(grad_features.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "channels"])
def grad_weight_kernel(
    grad_out, weight_slope, grad_weight, batch: tl.int32, channels: tl.int32,
    BLOCK_BATCH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum over the batch of grad_out * weight_slope, in float64; a program has BLOCK_CHANNELS channels.

    Args:
        grad_out: Pointer to [batch, channels], any float type.
        weight_slope: Pointer to [batch, channels] in the computing type.
        grad_weight: Pointer to the result, [channels] in the computing type.
        batch, channels: Sizes.
        BLOCK_BATCH, BLOCK_CHANNELS: The tile.
    """
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    total = tl.zeros((BLOCK_BATCH, BLOCK_CHANNELS), tl.float64)
    for start in range(0, batch, BLOCK_BATCH):
        image = start + tl.arange(0, BLOCK_BATCH)
        inside = (image < batch)[:, None] & (channel < channels)[None, :]
        at = image.to(tl.int64)[:, None] * channels + channel[None, :]
        g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float64)
        total += g * tl.load(weight_slope + at, mask=inside, other=0.0).to(tl.float64)
    result = tl.sum(total, axis=0)
    tl.store(grad_weight + channel, result.to(grad_weight.dtype.element_ty), mask=channel < channels)


Sizes = tuple[int, int, int, bool]  # batch, channels, positions, channels_last


def forward_tile(positions: int, channels_last: bool, needs_grad: bool) -> dict[str, int]:
    """A program's tile and its warps, as they were the fastest on an H200."""
    if channels_last:
        return {"UNROLL": 1, "BLOCK_CHANNELS": 64, "BLOCK_POSITIONS": 16, "num_warps": 4}
    # A warp has whole channels, so that sums stay within it. With and without a gradient they are added alike.
    channels = 32 if positions <= 64 else 16 if needs_grad else 8
    unroll = min(cdiv(positions, 64), 2 if needs_grad else 4)
    return {"UNROLL": unroll, "BLOCK_CHANNELS": channels, "BLOCK_POSITIONS": 64, "num_warps": 4}


def backward_tile(positions: int, channels_last: bool) -> dict[str, int]:
    """Likewise."""
    if channels_last:
        return {"BLOCK_CHANNELS": 64, "BLOCK_POSITIONS": 16, "num_warps": 4}
    wide = max(min(next_power_of_2(positions), 256), 32)
    return {"BLOCK_CHANNELS": 1024 // wide, "BLOCK_POSITIONS": wide, "num_warps": 1}


def reweight_pool(
    features: torch.Tensor,
    sizes: Sizes,
    weight: torch.Tensor,
    out: torch.Tensor,
    argmax: torch.Tensor | None,
    weight_slope: torch.Tensor | None,
) -> None:
    """Launches reweight_pool_kernel, which documents the tensors; without ``argmax`` for no gradient."""
    batch, channels, positions, channels_last = sizes
    chosen = forward_tile(positions, channels_last, argmax is not None)
    launch_kernel(
        reweight_pool_kernel,
        (batch * cdiv(channels, chosen["BLOCK_CHANNELS"]),),
        (features, weight, out, argmax, weight_slope),
        (channels, positions),
        CHANNELS_LAST=channels_last,
        NEEDS_GRAD=argmax is not None,
        QUADS=positions % 4 == 0,
        **chosen,
    )


def reweight_pool_backward(
    grad_out: torch.Tensor,
    sizes: Sizes,
    weight: torch.Tensor,
    argmax: torch.Tensor,
    weight_slope: torch.Tensor,
    grad_features: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Launches grad_features_kernel and grad_weight_kernel, each where its result is wanted."""
    batch, channels, positions, channels_last = sizes
    if grad_features is not None:
        chosen = backward_tile(positions, channels_last) | {"CHANNELS_LAST": channels_last, "QUADS": positions % 4 == 0}
        grid = (batch * cdiv(channels, chosen["BLOCK_CHANNELS"]),)
        tensors = grad_out, weight, argmax, grad_features
        launch_kernel(grad_features_kernel, grid, tensors, (channels, positions), **chosen)
    if grad_weight is not None:
        grid = (cdiv(channels, SUMS_TILE["BLOCK_CHANNELS"]),)
        launch_kernel(grad_weight_kernel, grid, (grad_out, weight_slope, grad_weight), (batch, channels), **SUMS_TILE)
