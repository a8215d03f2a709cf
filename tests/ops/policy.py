"""docs/correctness.md in code: what every op's tests ask of a result, of the memory around it, and of threads."""

import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

BAND = 32  # elements on either side of a guarded tensor
GUARD = -984.0  # exact in every dtype, and no result


def assert_error(what, mine, theirs, exact, dtype, floor=None):
    """The error is at most twice that of plain PyTorch in the same dtype, plus four units in the last place.

    These are units of the largest value, unless a floor is given. Where plain PyTorch is not finite they are all that
    is allowed.
    """
    if floor is None:
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item() + 1e-12
    error, error_of_pytorch = ((found - exact).abs().max().item() for found in (mine, theirs))
    bound = floor + (2 * error_of_pytorch if math.isfinite(error_of_pytorch) else 0)
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def guarded(shape, dtype=torch.float32, device="cpu"):
    """A tensor between guard bands, filled as they are: the whole buffer, and the tensor."""
    buffer = torch.full((torch.Size(shape).numel() + 2 * BAND,), GUARD, dtype=dtype, device=device)
    return buffer, buffer[BAND:-BAND].view(shape)


def assert_bands(buffers):
    """Nothing was written into the guard bands."""
    for buffer in buffers:
        assert (buffer[:BAND] == GUARD).all() and (buffer[-BAND:] == GUARD).all()


def assert_written(buffers):
    """Nothing was written into the guard bands, and every element between them was."""
    assert_bands(buffers)
    for buffer in buffers:
        assert (buffer[BAND:-BAND] != GUARD).all()


def over_threads(call):
    """The results of a call for several numbers of threads, some of them twice."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def assert_bit_equal(results):
    """All results, each a sequence of tensors, are the same bits."""
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
