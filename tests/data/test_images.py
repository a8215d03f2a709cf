import contextlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from mlfast.data.images import ImageError, decode


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def corner(data, **options):
    """The colour of the pixel in the upper left corner."""
    image = decode(data, **options)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_every_mode_becomes_rgb():
    grey16 = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert corner(encoded(grey16)) == (128, 128, 128)
    assert corner(encoded(grey16, "TIFF")) == (128, 128, 128)
    assert corner(encoded(Image.fromarray(np.full((4, 4), 300, np.int32)), "TIFF")) == (1, 1, 1)
    assert corner(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert corner(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert corner(encoded(Image.new("RGB", (4, 4), (1, 2, 3)).quantize(4))) == (1, 2, 3)
    red = corner(encoded(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG", quality=95))
    assert red[0] > 240 and max(red[1:]) < 20


def test_transparency_is_put_on_white():
    assert corner(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == (255, 255, 255)
    assert corner(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 255)))) == (10, 20, 30)
    assert corner(encoded(Image.new("LA", (4, 4), (9, 0)))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert corner(encoded(palette, transparency=1)) == (255, 255, 255)
    assert corner(encoded(Image.new("RGB", (4, 4), (5, 6, 7)), transparency=(5, 6, 7))) == (255, 255, 255)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 255, 0))]
    for file_format in ("GIF", "PNG"):
        assert corner(encoded(frames[0], file_format, save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, (30, 20), (16, 16)])
def test_exif_orientation(orientation, size):
    from PIL import ImageOps

    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:20, :32] = (255, 0, 0)
    pixels[20:, :32] = (0, 255, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif.tobytes(), quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if size is not None:
        expected = expected.resize(size[::-1], Image.Resampling.BILINEAR)
    result = decode(data, size)
    assert result.size == expected.size
    assert np.abs(np.asarray(result, int) - np.asarray(expected, int)).mean() < 4


def test_a_large_jpeg_is_decoded_small_and_close_to_the_full_way(monkeypatch):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)).resize((800, 600))
    data = encoded(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BILINEAR)
    sizes = []
    real = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: sizes.append(image.size) or real(image))
    assert np.abs(np.asarray(decode(data, (64, 64)), int) - np.asarray(full, int)).mean() < 2
    assert set(sizes) == {(100, 75)}  # an eighth


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(Image.new("L", (100, 100)))
    with pytest.raises(ImageError, match="100 x 100 pixels are more than max_pixels=9999"):
        decode(data, max_pixels=9999)
    assert decode(data, max_pixels=10000).size == (100, 100)
    # A header that promises 10 gigapixels: 60 bytes, and nothing is allocated.
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + data[24:29]
    huge = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    with pytest.raises(ImageError, match="the header promises more than 178956970 pixels"):
        decode(huge)
    large = encoded(Image.new("1", (10_000, 10_000)))  # 100 megapixels
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="10000 x 10000"):
        decode(large)


def test_broken_files(jpeg):
    whole = jpeg(size=(64, 64))
    for data in (b"", b"GIF89a", b"text", whole[: len(whole) // 2], whole[:20], encoded(Image.new("L", (9, 9)))[:-30]):
        with pytest.raises(ImageError):
            decode(data)
    with pytest.raises(ImageError, match="the file is empty"):
        decode(b"")
    with pytest.raises(ImageError, match="floating-point"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))


def test_any_damage_is_an_image_error(jpeg):
    random = np.random.default_rng(0)
    for whole in (jpeg(size=(16, 16)), jpeg(size=(16, 16), file_format="PNG"), jpeg(size=(16, 16), file_format="GIF")):
        for _ in range(60):
            data = np.frombuffer(whole, np.uint8).copy()
            data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(ImageError):
                decode(data.tobytes(), (8, 8))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_damage_of_the_exif_block_is_no_damage_of_the_picture(jpeg, file_format):
    whole, damaged = (jpeg(file_format=file_format, exif=exif) for exif in (b"", b"Exif\0\0garbage!"))
    assert np.array_equal(np.asarray(decode(damaged)), np.asarray(decode(whole)))
