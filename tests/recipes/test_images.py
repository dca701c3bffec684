"""The image reader: the input of a model from files of every kind. Well under a second."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from zoo.recipes import images
from zoo.recipes.images import ImageError, image_size, open_image, pixel_limit

DEEP = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
GREY = (DEEP >> 8).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


def _file(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    file.seek(0)
    return file


def _pgm(depth):
    values = (DEEP.astype(np.int64) * depth // 65535).astype(">u2")
    return io.BytesIO(b"P5 30 20 %d\n" % depth + values.tobytes())


def _ppm():
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
    return io.BytesIO(b"P6 30 20 65535\n" + deep.astype(">u2").tobytes())


def _big_endian_tiff():
    """An uncompressed grey image of 16 bits, which no installed library writes."""
    entries = [(256, 30), (257, 20), (258, 16), (259, 1), (262, 1), (273, 130), (277, 1), (278, 20), (279, 1200)]
    tags = b"".join(
        tag.to_bytes(2) + (3).to_bytes(2) + (1).to_bytes(4) + value.to_bytes(2) + b"\0\0" for tag, value in entries
    )
    head = b"MM\0*" + (8).to_bytes(4) + len(entries).to_bytes(2) + tags
    return io.BytesIO(head.ljust(130, b"\0") + DEEP.astype(">u2").tobytes())


def _lab():
    rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return _file(ImageCms.profileToProfile(Image.fromarray(COLOUR), rgb, lab, outputMode="LAB"), "TIFF")


GREYS = {
    "png of 8 bits": lambda: _file(GREY, "PNG"),
    "png of 16 bits": lambda: _file(DEEP, "PNG"),
    "tiff of 16 bits": lambda: _file(DEEP, "TIFF"),
    "big-endian tiff of 16 bits": _big_endian_tiff,
    "pgm of 16 bits": lambda: _pgm(65535),
    "pgm of 12 bits": lambda: _pgm(4095),
    "tiff of 32-bit integers up to 255": lambda: _file(GREY.astype(np.int32), "TIFF"),
    "tiff of floats up to 1": lambda: _file((GREY / 255).astype(np.float32), "TIFF"),
    "tiff of floats up to 255": lambda: _file(GREY.astype(np.float32), "TIFF"),
    "grey with transparency": lambda: _file(np.stack([GREY, GREY], -1), "PNG"),
}
COLOURS = {
    "png": (lambda: _file(COLOUR, "PNG"), 0),
    "ppm of 16 bits": (_ppm, 1),
    "png with transparency": (lambda: _file(np.concatenate([COLOUR, GREY[..., None]], -1), "PNG"), 0),
    "cmyk tiff": (lambda: _file(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), 1),
    "ycbcr tiff": (lambda: _file(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF"), 3),
    "lab tiff": (_lab, 32),  # 8 bits of LAB are coarse where colours are pure
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", GREYS)
def test_grey_of_any_depth_is_scaled(kind, channels):
    image = open_image(GREYS[kind](), channels)
    assert image.mode == images.MODES[channels]
    wanted = GREY if channels == 1 else np.repeat(GREY[..., None], 3, -1)
    np.testing.assert_allclose(np.asarray(image).astype(int), wanted, atol=1 if kind == "pgm of 12 bits" else 0)


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_of_any_kind(kind):
    file, error = COLOURS[kind][0](), COLOURS[kind][1]
    image = open_image(file)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(int), COLOUR, atol=error)


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_become_luma(kind):
    luma = np.asarray(open_image(COLOURS[kind][0](), 1)).astype(float)
    np.testing.assert_allclose(luma, COLOUR @ [0.299, 0.587, 0.114], atol=1 + COLOURS[kind][1])


def test_one_bit_is_black_and_white():
    image = open_image(_file(Image.fromarray(GREY > 99), "PNG"), 1)
    np.testing.assert_array_equal(np.asarray(image), 255 * (GREY > 99))


def test_palette_gives_its_colours_whatever_is_transparent():
    palette = Image.fromarray(COLOUR).quantize(16)
    wanted = np.asarray(palette.convert("RGB"))
    image = open_image(_file(palette, "PNG", transparency=bytes(range(16))))
    np.testing.assert_array_equal(np.asarray(image), wanted)


@pytest.mark.parametrize(
    ("pixels", "alpha"),
    [(GREY, 255), (COLOUR, 255), (np.concatenate([COLOUR, GREY[..., None]], -1), GREY), (DEEP, 255)],
    ids=["grey", "colours", "transparent", "16 bits"],
)
def test_four_channels_have_the_transparency(pixels, alpha):
    image = open_image(_file(pixels, "PNG"), 4)
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(image)[..., 3], np.broadcast_to(alpha, GREY.shape))


@pytest.mark.parametrize(
    "values",
    [DEEP.astype(np.int32), DEEP.astype(np.float32), DEEP.astype(np.float32) / 65535 - 0.5, DEEP * np.float32("nan")],
    ids=["integers up to 65535", "floats up to 65535", "negative", "nan"],
)
def test_refuses_numbers_without_a_known_white(values):
    with pytest.raises(ImageError, match="nothing says which is white: save it with 8 or 16 bits"):
        open_image(_file(values, "TIFF"))


def _turned(kind, orientation):
    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    return _file(image, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_their_exif_data_say(kind, orientation):
    image = open_image(_turned(kind, orientation))
    upright = _file(COLOUR, "PNG")
    exif = Image.Exif()
    exif[0x0112] = orientation
    wanted = ImageOps.exif_transpose(Image.open(_file(Image.open(upright), "PNG", exif=exif)))
    assert image.size == image_size(_turned(kind, orientation)) == wanted.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(wanted))
    assert difference.mean() < (3 if kind == "JPEG" else 1e-9)


def test_deep_images_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(_file(DEEP, "PNG", exif=exif), 1)
    np.testing.assert_array_equal(np.asarray(image), np.rot90(GREY, -1))


def test_damaged_exif_data_leave_the_image_as_it_is():
    file = _file(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x99" * 40)
    assert open_image(file).size == (30, 20)
    assert image_size(file) == (30, 20)


def _cut(kind):
    content = _file(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8), kind).getvalue()
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "content",
    [b"", b"text", _cut("PNG"), _cut("JPEG"), _cut("TIFF"), _cut("WEBP"), _cut("BMP"), _cut("PPM")],
    ids=["empty", "text", "png", "jpeg", "tiff", "webp", "bmp", "ppm"],
)
def test_damaged_files_are_refused(content):
    with pytest.raises(ImageError, match=r"\w"):
        open_image(io.BytesIO(content))


@pytest.mark.parametrize("read", [open_image, image_size])
@pytest.mark.parametrize("most", [599, 299, 10], ids=["one too many", "twice as many", "many times as many"])
def test_images_above_the_limit_are_refused_by_its_key(read, most):
    with pytest.raises(ImageError, match=f"more than data.max_pixels={most} pixels"):
        read(_file(GREY, "PNG"), max_pixels=most)


def test_the_limit_can_be_raised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_image(_file(GREY, "PNG"), max_pixels=600).size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 10  # what else the process opens has the limit that it had


def test_a_limit_holds_until_the_last_thread_that_needs_it_is_done(monkeypatch):
    """Files are checked in threads, whose contexts overlap."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    first, second = pixel_limit(600), pixel_limit(500)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 500
    second.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_missing_file_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        open_image(tmp_path / "none.png")
