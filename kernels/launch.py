"""Launches of Triton kernels that cost Python little.

`kernel[grid](...)` inspects every argument, builds a text of what it finds, and looks the compiled kernel up by that.
Here it is found by types, alignments and the numbers that code may depend on, which come again in every step, and takes
addresses, which need no look into tensors.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton.runtime import driver

Numbers = tuple[int | float, ...]

MOST_REMEMBERED = 4096  # so that numbers which differ from call to call do not fill the memory
_NOTHING = nullcontext()
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def _compiled_for(kernel: Any, first: int, count: int) -> tuple[int, ...]:
    """Which of a kernel's numbers, ``count`` parameters from this one on, the compiled code may depend on."""
    parameters = getattr(kernel, "params", ())[first : first + count]  # an interpreted kernel has none to compile for
    return tuple(i for i, parameter in enumerate(parameters) if not parameter.do_not_specialize)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which the tensor's GPU is the current one; if it is already, one that costs nothing."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.get_device())
    return _NOTHING


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor | None, ...], numbers: Numbers, **constants: Any
) -> None:
    """Does what ``kernel[grid](*tensors, *numbers, **constants)`` does, on the device of the tensors.

    Args:
        kernel: A `triton.jit` function whose arguments are tensors, then numbers, then constants.
        grid: One to three numbers of programs.
        tensors: Tensors, or None.
        numbers: Integers below 2^31 or of an annotated type, floats, and constants that are bools.
        constants: The other constants by name, and options of the launch such as num_warps.
    """
    one = next(tensor for tensor in tensors if tensor is not None)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    key = (
        kernel.fn,
        one.device,
        *[numbers[i] for i in _compiled_for(kernel, len(tensors), len(numbers))],
        *[None if tensor is None else tensor.dtype for tensor in tensors],
        *[address and address % 16 for address in addresses],
        *constants.items(),
    )
    found = _compiled.get(key)
    with on_device_of(one):
        if found is not None:
            compiled, last = found
            stream = driver.active.get_current_stream(one.get_device())
            compiled[(*grid, 1, 1)](*addresses, *numbers, *last, stream=stream)
            return
        compiled = kernel[grid](*tensors, *numbers, **constants)
    # The interpreter compiles nothing, and on ROCm Triton compiles for the sizes of tensors too.
    if compiled is not None and torch.version.hip is None:
        if len(_compiled) >= MOST_REMEMBERED:
            _compiled.clear()
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
