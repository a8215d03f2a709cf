"""Element types as they cross the boundary to the compiled kernels: the same list as csrc/dtype.h."""

import torch

CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 4,  # read as int8, so that 255, which is what -1 becomes in uint8, means unknown there too
    torch.bool: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
}


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel computes in, and returns losses in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
