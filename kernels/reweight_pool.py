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

# In channels_last a tile is 64 channels wide: 128 bytes or more of neighbours in memory.
CHANNELS_IN_CHANNELS_LAST, POSITIONS_IN_CHANNELS_LAST = 64, 32
BLOCK_BATCH, BLOCK_CHANNELS = 32, 32  # of the sums over the batch
NUM_WARPS = 4


@triton.jit
def _is_above(product, peak):
    """Whether a product is above the peak so far; a NaN is above every number."""
    return (product > peak) | ((product != product) & (peak == peak))


@triton.jit
def _pool_tile(
    row, weight, inside_channels, positions, stride,
    T: tl.constexpr, WHOLE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Sum of the features, maximum of the products and where it is first, for each of BLOCK_CHANNELS channels."""
    lane = tl.arange(0, BLOCK_POSITIONS)
    if WHOLE:  # one tile: nothing to compare with
        inside = inside_channels[:, None] & (lane < positions)[None, :]
        total = tl.load(row[:, None] + lane[None, :] * stride, mask=inside, other=0.0).to(T)
        peak = tl.where(inside, weight[:, None] * total, float("-inf"))
        argmax = tl.zeros((BLOCK_CHANNELS, BLOCK_POSITIONS), tl.int32) + lane[None, :]
    else:
        total = tl.zeros((BLOCK_CHANNELS, BLOCK_POSITIONS), T)
        peak = tl.full((BLOCK_CHANNELS, BLOCK_POSITIONS), float("-inf"), T)
        argmax = tl.zeros((BLOCK_CHANNELS, BLOCK_POSITIONS), tl.int32)
        for start in range(0, positions, BLOCK_POSITIONS):
            position = start + lane
            inside = inside_channels[:, None] & (position < positions)[None, :]
            f = tl.load(row[:, None] + position.to(tl.int64)[None, :] * stride, mask=inside, other=0.0).to(T)
            product = weight[:, None] * f
            above = _is_above(product, peak) & inside
            total += f
            peak = tl.where(above, product, peak)
            argmax = tl.where(above, position[None, :], argmax)
    # A lane that saw -inf alone, or nothing, still says its first position; it counts only where all did.
    is_nan = peak != peak
    some_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0
    highest = tl.max(tl.where(is_nan, float("-inf"), peak), axis=1)
    at_peak = tl.where(some_nan[:, None], is_nan, peak == highest[:, None])
    first = tl.min(tl.where(at_peak, argmax, 0x7FFFFFFF), axis=1)
    return tl.sum(total, axis=1), tl.where(some_nan, float("nan"), highest), first


@triton.jit
def _pool_tile_without_grad(
    row, weight, inside_channels, positions, stride,
    T: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Sum of the features and maximum of the products, where no one asks for its position: a NaN is in the sum."""
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_POSITIONS), T)
    peak = tl.full((BLOCK_CHANNELS, BLOCK_POSITIONS), float("-inf"), T)
    for start in range(0, positions, BLOCK_POSITIONS):
        position = start + tl.arange(0, BLOCK_POSITIONS)
        inside = inside_channels[:, None] & (position < positions)[None, :]
        f = tl.load(row[:, None] + position.to(tl.int64)[None, :] * stride, mask=inside, other=0.0).to(T)
        total += f
        above = tl.maximum(peak, weight[:, None] * f, propagate_nan=tl.PropagateNan.ALL)
        peak = tl.where(inside, above, peak)
    return tl.sum(tl.where(peak != peak, peak, total), axis=1), tl.max(peak, axis=1)


@triton.jit(do_not_specialize=["channels", "positions"])
def reweight_pool_kernel(
    features, weight, out, argmax, weight_slope, channels: tl.int32, positions: tl.int32,
    CHANNELS_LAST: tl.constexpr, NEEDS_GRAD: tl.constexpr, WHOLE: tl.constexpr,
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
        WHOLE: Whether a tile holds all positions.
        BLOCK_CHANNELS, BLOCK_POSITIONS: The tile.
    """
    T: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
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
    first = tl.zeros((BLOCK_CHANNELS,), tl.int32)
    if NEEDS_GRAD:
        total, peak, first = _pool_tile(row, w, inside, positions, stride, T, WHOLE, BLOCK_CHANNELS, BLOCK_POSITIONS)
    else:
        total, peak = _pool_tile_without_grad(row, w, inside, positions, stride, T, BLOCK_CHANNELS, BLOCK_POSITIONS)
    mean = total / positions.to(T)
    tl.store(out + to, (w * mean + peak).to(out.dtype.element_ty), mask=inside)
    if NEEDS_GRAD:
        at_peak = tl.load(row + first.to(tl.int64) * stride, mask=inside, other=0.0).to(T)
        tl.store(argmax + to, first, mask=inside)
        tl.store(weight_slope + to, mean + at_peak, mask=inside)


@triton.jit(do_not_specialize=["channels", "positions"])
def grad_features_kernel(
    grad_out, weight, argmax, grad_features, channels: tl.int32, positions: tl.int32,
    CHANNELS_LAST: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """grad_out * weight * (1 / positions + [position == argmax]), in the programs of reweight_pool_kernel.

    Args:
        grad_out: Pointer to [batch, channels], any float type.
        weight, argmax: As in reweight_pool_kernel.
        grad_features: Pointer to the result, in the layout of the features and the type of grad_out.
        channels, positions: Sizes.
        CHANNELS_LAST: The order of grad_features in memory.
        BLOCK_CHANNELS, BLOCK_POSITIONS: The tile.
    """
    T: tl.constexpr = weight.dtype.element_ty
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


def tile(positions: int, channels_last: bool, forward: bool) -> dict[str, int]:
    """A program's tile and its warps, as they were the fastest on an H200."""
    if channels_last:
        channels = CHANNELS_IN_CHANNELS_LAST if forward else CHANNELS_IN_CHANNELS_LAST // 2
        wide, num_warps = POSITIONS_IN_CHANNELS_LAST, 8 if forward else 4
    else:  # one warp, whose sums stay within it; large maps make programs enough without more channels of each
        elements = 512 if not forward else 256 if positions <= 256 else 128
        wide, num_warps = max(min(next_power_of_2(positions), 128), 32), 1
        channels = elements // wide
    return {"BLOCK_CHANNELS": channels, "BLOCK_POSITIONS": wide, "num_warps": num_warps}


def reweight_pool(
    features: torch.Tensor,
    sizes: Sizes,
    weight: torch.Tensor,
    out: torch.Tensor,
    argmax: torch.Tensor,
    weight_slope: torch.Tensor,
) -> None:
    """Launches reweight_pool_kernel, which documents the tensors; an empty ``argmax`` is not written."""
    batch, channels, positions, channels_last = sizes
    chosen = tile(positions, channels_last, True)
    launch_kernel(
        reweight_pool_kernel,
        (batch * cdiv(channels, chosen["BLOCK_CHANNELS"]),),
        (features, weight, out, argmax, weight_slope),
        (channels, positions),
        CHANNELS_LAST=channels_last,
        NEEDS_GRAD=argmax.numel() > 0,
        WHOLE=positions <= chosen["BLOCK_POSITIONS"],
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
    chosen = tile(positions, channels_last, False)
    if grad_features is not None:
        grid = (batch * cdiv(channels, chosen["BLOCK_CHANNELS"]),)
        tensors = grad_out, weight, argmax, grad_features
        launch_kernel(grad_features_kernel, grid, tensors, (channels, positions), CHANNELS_LAST=channels_last, **chosen)
    if grad_weight is not None:
        grid = (cdiv(channels, BLOCK_CHANNELS),)
        block = {"BLOCK_BATCH": BLOCK_BATCH, "BLOCK_CHANNELS": BLOCK_CHANNELS, "num_warps": NUM_WARPS}
        launch_kernel(grad_weight_kernel, grid, (grad_out, weight_slope, grad_weight), (batch, channels), **block)
