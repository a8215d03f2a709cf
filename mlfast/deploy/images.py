"""What a user hands in - a path, a picture, an array - to RGB, and folders to the images in them."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlfast.data.images import MAX_PIXELS, SUFFIXES, ImageError, decode, to_rgb
from mlfast.data.transforms import crop_to

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_BYTES = 1 << 29


def read_image(image: Any, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Read a path, PIL image or array as 8-bit RGB; `mlfast.data.images.decode` says how.

    Args:
        image: path of a file; PIL image; or array: uint8 ``[H, W, 3]`` RGB, ``[H, W, 4]`` RGBA, ``[H, W]`` grey, or
            uint16 ``[H, W]`` grey.
        size: (height, width) to stretch to; None keeps the size.
        max_pixels: refuse a larger image.

    Raises:
        ImageError: it cannot be read; the message says why.
        TypeError: something else than path, PIL image or array.
    """
    if isinstance(image, (str, os.PathLike)):
        return decode(_read_file(image), size, max_pixels)
    from PIL import Image as pillow

    if isinstance(image, np.ndarray):
        image = pillow.fromarray(_checked_array(image))
    if not isinstance(image, pillow.Image):
        raise TypeError(f"expected a path, a PIL image or a numpy array, got {type(image).__name__}")
    return to_rgb(image, size, max_pixels)


def model_input(image: Any, size: int, resize: str = "squash", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as a model takes it, uint8 ``[size, size, 3]``; see `read_image` and `ModelInfo.resize`."""
    if resize == "crop":
        return np.array(crop_to(read_image(image, None, max_pixels), size))
    return np.array(read_image(image, (size, size), max_pixels))


def _read_file(path: str | os.PathLike[str]) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise ImageError("a folder, not a file" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        if found.st_size > _MAX_BYTES:
            raise ImageError(f"the file has {found.st_size:,} bytes, more than {_MAX_BYTES:,}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, ImageError):
            raise
        raise ImageError(getattr(error, "strerror", None) or str(error)) from error


def _checked_array(array: np.ndarray) -> np.ndarray:
    colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if not (array.size and (array.dtype == np.uint8 and (colour or array.ndim == 2))) and not (
        array.size and array.dtype == np.uint16 and array.ndim == 2
    ):
        raise ImageError(
            f"the array is {array.dtype} {list(array.shape)}, expected uint8 [H, W, 3], [H, W, 4] or [H, W], or uint16 "
            "[H, W]; several images are passed as a list"
        )
    return np.ascontiguousarray(array)


def find_images(arguments: Iterable[str]) -> list[str]:
    """The files that paths, folders (with all folders below) and patterns such as ``"data/**/*.jpg"`` mean, in order.

    In folders, files count whose name ends like an image's; folders that are symbolic links are not entered, so no
    loop is endless. A file that is named counts whatever its name, and if it is missing: whoever reads it will say so.

    Raises:
        ValueError: a pattern matches nothing, or a folder has no image.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        named = os.path.lexists(argument) or not glob.has_magic(argument)
        matches = [argument] if named else _matching(argument)
        files = [file for match in matches for file in (_in_folder(match) if os.path.isdir(match) else [match])]
        if not files:
            raise ValueError(f"{argument}: " + ("no images in this folder" if matches else "no file or folder matches"))
        found |= dict.fromkeys(files)
    return list(found)


def _matching(pattern: str) -> list[str]:
    """What a pattern means. Links of files and of folders are followed where the pattern names them, not by ``**``."""
    root = Path(pattern).anchor
    return sorted(map(str, Path(root).glob(pattern[len(root) :])))


def _in_folder(folder: str) -> list[str]:
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in paths if os.path.splitext(path)[1].lower() in SUFFIXES)
