import io
import os
import random

import numpy as np
import pytest
from PIL import Image

from mlfast.data.images import ImageError
from mlfast.deploy.images import find_images, read_image

FUZZ = int(os.environ.get("MLFAST_FUZZ", "300"))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_a_path_a_picture_and_an_array_are_the_same(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", PICTURE, np.asarray(PICTURE)):
        result = read_image(image, (16, 20))
        assert (result.mode, result.size) == ("RGB", (20, 16))
        np.testing.assert_array_equal(np.asarray(result), np.asarray(read_image(PICTURE, (16, 20))))


def test_an_open_picture_is_left_as_it_is(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        read_image(image, (16, 16))
        assert image.size == (640, 480)


def test_kinds_of_pictures_and_arrays():
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "RGBX"):
        assert read_image(Image.new(mode, (8, 6)), (4, 4)).mode == "RGB"
    assert read_image(np.full((4, 4), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)
    assert read_image(np.full((4, 4), 0x8000, np.uint16)).getpixel((0, 0)) == (128, 128, 128)
    assert read_image(np.zeros((4, 4, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)  # transparent, on white
    assert read_image(np.asarray(PICTURE)[::-1, ::2]).size == (16, 24)  # strided
    turned = Image.new("RGB", (8, 4))
    turned.getexif()[0x0112] = 6
    assert read_image(turned).size == (4, 8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\], expected uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \[3, 4, 5\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "passed as a list"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint16), "expected uint8"),
    ],
)
def test_arrays_that_are_not_images(array, message):
    with pytest.raises(ImageError, match=message):
        read_image(array)


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match="0 x 5 pixels hold nothing"):
        read_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageError, match="24 pixels are more than max_pixels=767"):
        read_image(PICTURE, max_pixels=767)
    with pytest.raises(ImageError, match="floating-point"):
        read_image(Image.new("F", (4, 4)))
    (tmp_path / "half.png").write_bytes(encoded(PICTURE, "PNG")[:700])
    with Image.open(tmp_path / "half.png") as half, pytest.raises(ImageError):
        read_image(half)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "half.jpg").write_bytes(encoded(PICTURE, "JPEG")[:-300])
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to("absent.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "huge.png").write_bytes(encoded(Image.new("1", (20_000, 20_000)), "PNG"))
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(1 << 40)
    for name, message in {
        "text.jpg": "cannot identify image",
        "empty.jpg": "the file is empty",
        "half.jpg": "truncated",
        "loop.jpg": "symbolic links",
        "dangling.jpg": "No such file",
        "pipe.jpg": "not a regular file",
        "huge.png": "pixels",
        "sparse.png": "more than 536,870,912",
        "zero\0byte": "null",
        "": "a folder, not a file",
        "n" * 300: "name too long",
    }.items():
        with pytest.raises(ImageError, match=message):
            read_image(f"{tmp_path}/{name}", (8, 8))


def test_what_is_no_image_at_all():
    with pytest.raises(TypeError, match="got int"):
        read_image(3)


def mutated(data, rng):
    """Bytes changed, cut out, repeated, cut off, or exchanged for those that decoders stumble over."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 32))):
        place = rng.randrange(max(1, len(data)))
        match rng.randrange(5):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place : place + rng.randrange(16)]
            case 2:
                data[place:place] = data[place : place + rng.randrange(64)]
            case 3:
                data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
            case 4 if rng.random() < 0.2:
                del data[place:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it reads all the same
def test_fuzz_gives_an_image_or_a_clean_error(tmp_path):
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(PICTURE, kind) for kind in ("PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "TGA", "PCX", "ICO")]
    seeds += [encoded(PICTURE, "JPEG", exif=exif, progressive=True), encoded(PICTURE.convert("CMYK"), "JPEG")]
    seeds += [encoded(PICTURE.convert("RGBA"), "PNG"), encoded(PICTURE.quantize(16), "PNG", transparency=3)]
    seeds += [encoded(PICTURE, "TIFF", compression="tiff_lzw"), encoded(PICTURE.convert("I;16"), "PNG")]
    path, outcomes = tmp_path / "fuzz", {"image": 0, "error": 0}
    for _ in range(FUZZ):
        path.write_bytes(mutated(rng.choice(seeds), rng))
        try:
            image = read_image(path, (16, 16), max_pixels=1_000_000)
        except ImageError:
            outcomes["error"] += 1
        else:
            assert (image.mode, image.size) == ("RGB", (16, 16))
            outcomes["image"] += 1
    assert min(outcomes.values()) > FUZZ / 20, outcomes


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "note.txt", "below/c.webp", "below/deep/d.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "below" / "up").symlink_to("..")  # a loop
    root = str(tmp_path)
    everything = [f"{root}/{name}" for name in ("a.png", "b.JPG", "below/c.webp", "below/deep/d.tif")]
    assert find_images([root]) == everything
    assert find_images([f"{root}/*.png", root]) == everything  # each once
    assert find_images([f"{root}/note.txt"]) == [f"{root}/note.txt"]  # named, so meant
    assert find_images([f"{root}/below/**/*.tif"]) == [everything[-1]]
    (tmp_path / "odd[1].png").touch()  # a name before it is a pattern
    assert find_images([f"{root}/odd[1].png"]) == [f"{root}/odd[1].png"]
    (tmp_path / "bare").mkdir()
    assert find_images([f"{root}/absent.png"]) == [f"{root}/absent.png"]  # reading it will say so
    with pytest.raises(ValueError, match="bare: no images in this folder"):
        find_images([f"{root}/bare"])
    with pytest.raises(ValueError, match="no file or folder matches"):
        find_images([f"{root}/*.bmp"])


def test_patterns_end_where_links_loop(tmp_path):
    (tmp_path / "a.jpg").touch()
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    assert find_images([f"{tmp_path}/**/*.jpg"]) == [f"{tmp_path}/a.jpg"]
    assert find_images([f"{tmp_path}/one/*.jpg"]) == [f"{tmp_path}/one/a.jpg"]
