"""exp, log and sigmoid for Triton kernels, accurate near 0 and 1: the polynomials of csrc/math/elementary.h. And casts.

No libdevice and no inline assembly, so they also run under Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """As float64; by float32, since the interpreter converts bfloat16 to and from nothing else."""
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def narrowed(x, TYPE: tl.constexpr):
    """To the type of a result, likewise by float32."""
    return x if x.dtype == TYPE else x.to(tl.float32).to(TYPE)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1 with full relative accuracy near 0, which log(1.0 + x) has not."""
    if x.dtype == tl.float64:
        w = 1.0 + x
        rounded = w - 1.0  # log(w) belongs to this argument, not to x; near 0 the logarithm is proportional to it
        result = tl.where(rounded == 0.0, x, tl.log(w) * (x / tl.where(rounded == 0.0, 1.0, rounded)))
    else:
        # Minimax for log1p(x) / x, relative error 3e-8: as cheap as the hardware's logarithm, whose unit is scarcer.
        x2 = x * x
        x4 = x2 * x2
        low = (0.99999994 - 0.49999493 * x) + x2 * (0.33319098 - 0.24842982 * x)
        high = (0.19106007 - 0.13663246 * x) + x2 * (0.07822595 - 0.029505238 * x)
        result = x * ((0.005232694 * x4 + high) * x4 + low)
    return result


@triton.jit
def log_positive(x):
    """log(x) for positive normal x. NaN stays NaN."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        # The hardware's logarithm has an absolute error near 1, where prob_shift puts most of its arguments.
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) & -0x800000  # measured from 2/3
        f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0  # in [-1/3, 1/3]
        # Minimax for log1p(f) / f, relative error 3e-8.
        f2 = f * f
        f4 = f2 * f2
        low = (1.0 - 0.49999931 * f) + f2 * (0.33333167 - 0.25008029 * f)
        high = (0.20011945 - 0.16412792 * f) + f2 * (0.13987651 - 0.15403198 * f)
        polynomial = (0.14056113 * f4 + high) * f4 + low
        result = polynomial * f + exponent.to(tl.float32) * 8.26295829e-8  # ln(2) / 2^23
        result = tl.where(x != x, x, result)
    return result


@triton.jit
def sigmoid(z):
    """sigmoid(z), sigmoid(-z), log sigmoid(z) and log sigmoid(-z) from one exponential and no hardware logarithm."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    log1p_e = log1p_unit(e)
    negative = z < 0.0
    p = tl.where(negative, smaller, larger)
    complement = tl.where(negative, larger, smaller)
    return p, complement, tl.minimum(z, 0.0) - log1p_e, tl.minimum(-z, 0.0) - log1p_e


@triton.jit
def integer_power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT for EXPONENT in 0..7, by squaring."""
    result = tl.full(x.shape, 1.0, x.dtype)
    for bit in tl.static_range(3):
        if (EXPONENT >> bit) & 1:
            result *= x
        x *= x
    return result
