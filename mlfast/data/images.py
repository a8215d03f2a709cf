"""From the bytes of an image file, whatever is in them, to RGB: by Pillow, within limits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Of files that are taken for images where nothing names them one by one.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".pnm", ".ppm")

# Pillow's own limit; it would only warn.
MAX_PIXELS = 89_478_485

_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)


class ImageError(ValueError):
    """An image cannot be decoded; the message says why."""


def decode(data: bytes, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image to 8-bit RGB, turned as its EXIF orientation says.

    Of an animation the first frame is taken. Transparent pixels are put on white. Grey values of 16 bits keep their
    upper 8.

    Args:
        data: the file's content.
        size: (height, width) to resize to, without regard to the aspect as the paper does (bilinear, antialiased; a
            JPEG of at least twice the size is decoded at a fraction of its size); None keeps the size.
        max_pixels: refuse a larger image before decoding it.

    Raises:
        ImageError: the image is broken, empty, too large, or of a kind that is not decoded.
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Images need Pillow: pip install ".[train]" in a checkout of mlfast', name="PIL"
        ) from error
    if not data:
        raise ImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image, size, max_pixels, draft=True)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("cannot identify image: no format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the header promises more than {2 * MAX_PIXELS} pixels; make the image smaller") from error
    except Exception as error:  # decoders meet hostile bytes with errors of every type
        raise ImageError(str(error) or type(error).__name__) from error


def to_rgb(image: Image, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """The same as `decode` for an image that Pillow has opened or made; the image is left as it is.

    Raises:
        ImageError: as `decode`.
    """
    try:
        return _to_rgb(image, size, max_pixels, draft=False)  # a draft would change the image itself
    except ImageError:
        raise
    except Exception as error:  # a file that Pillow opened is decoded only here
        raise ImageError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image, size: tuple[int, int] | None, max_pixels: int, draft: bool) -> Image:
    from PIL.Image import Resampling

    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        limit = f"are more than max_pixels={max_pixels}" if pixels else "hold nothing"
        raise ImageError(f"{image.width} x {image.height} pixels {limit}")
    orientation = _orientation(image)
    if size is None:
        return _turned(_rgb(image), orientation)
    height, width = reversed(size) if orientation in _SWAPS_SIDES else size
    if draft:
        image.draft(None, (width, height))
    return _turned(_rgb(image).resize((width, height), Resampling.BILINEAR, reducing_gap=2.0), orientation)


def _orientation(image: Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the picture may be whole where its EXIF block is damaged, which Pillow meets with any error
        return 1


def _rgb(image: Image) -> Image:
    from PIL import Image as pillow

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return pillow.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers; convert the image to 8 bits")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image.convert("RGB")


def _turned(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    if orientation in turns:
        return image.transpose(turns[orientation])
    image.load()  # while the file is open
    return image
