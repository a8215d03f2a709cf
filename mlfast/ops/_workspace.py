"""Scratch memory for reductions on a GPU that finish in one launch."""

import torch
from torch import Tensor

_cache: dict[tuple[torch.device, int], Tensor] = {}


def new_workspace(device: torch.device, num_bytes: int) -> Tensor:
    """Zeroed device memory. torch.compile asks for it: nothing of its CUDA graphs' memory may outlive their warm-up."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def workspace_for(device: torch.device, num_bytes: int) -> Tensor:
    """The same, but kept, since each kernel leaves it as it found it.

    One per stream, so that launches which may overlap do not share it. A CUDA graph gets its own, in the graph's
    memory, because it may be replayed on any stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return new_workspace(device, num_bytes)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _cache or _cache[key].numel() < num_bytes:
        _cache[key] = new_workspace(device, num_bytes)
    return _cache[key]
