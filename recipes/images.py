"""The image reader of all tasks: 8 bits per channel, upright, with the number of channels that the model takes.

| in the file                         | for the model                                                       |
|-------------------------------------|---------------------------------------------------------------------|
| 8 bits per channel                  | the same numbers                                                    |
| 16 bits per channel                 | the higher 8 (the number divided by 256)                            |
| 1, 2 or 4 bits of grey              | black is 0 and white 255                                            |
| floating-point grey                 | up to 1, multiplied by 255; up to 255, unchanged                    |
| 32-bit or signed integers           | 0 to 255 do not change                                              |
| floats or such integers beyond that | refused: it is unknown which number is white                        |
| a palette, CMYK, YCbCr, LAB         | converted to RGB                                                    |
| transparency                        | kept for four channels (RGBA), otherwise dropped, colours unchanged |
| grey, for three channels            | the same number three times                                         |
| colours, for one channel            | luma: 0.299 red + 0.587 green + 0.114 blue                          |
| several images (GIF, TIFF)          | the first                                                           |

Images are rotated by their EXIF orientation, in every format that has one (JPEG, PNG, TIFF, WebP).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

from zoo.messages import one_line

# The extensions of the files in a folder that count as images.
ENDINGS = frozenset({".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})
# Pillow's mode for each number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 178_956_970  # Pillow's limit for errors
_lock = Lock()
_needed: list[int] = []  # the limits of the contexts of `pixel_limit` that are open
_usual: int | None = None  # Pillow's limit outside of them

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the only limit

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file has no usable image; the message says why."""


def open_image(file: str | Path | BinaryIO, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image.

    Args:
        file: A path, or a binary file that is open for reading.
        channels: 1, 3 or 4.
        max_pixels: Images with more pixels are refused: a small file can declare an image that exceeds the memory.

    Returns:
        An image in mode L, RGB or RGBA.

    Raises:
        ImageError: The file has no usable image.
        OSError: The file can't be opened.
    """
    with _opened(file, max_pixels) as image:
        return as_read(image, channels)


def image_size(file: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the image that `open_image` returns, usually without decoding it. It raises the same."""
    with _opened(file, max_pixels) as image:
        width, height = image.size
        # Pillow rotates TIFFs itself, and decodes a PNG to find its orientation.
        turned = image.format != "TIFF" and width != height and _orientation(image) >= 5
        return (height, width) if turned else (width, height)


def as_read(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any mode that another reader opened to what `open_image` returns.

    Raises:
        ImageError: It is unknown which of its numbers is white.
    """
    image.load()  # rotates a TIFF
    turn = _TURNS.get(_orientation(image))
    image = _with_channels(image, channels)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # otherwise it would be rotated again if this is called twice
    return image


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    mode = MODES[channels]
    image = _eight_bits(image)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode != mode:
        # Pillow converts every mode to these two, but not every mode to every other.
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 255:  # also false for NaN
        raise ImageError(
            f"its numbers range from {low:g} to {high:g}, and nothing says which is white: save it with 8 or 16 bits, "
            "or as floats from 0 to 1"
        )
    if image.mode == "F" and high <= 1:
        values = 255 * values
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data can raise any error, but the image is still usable
        return 1
    return value if value in range(1, 9) else 1


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Within this context, Pillow refuses images of more than twice as many pixels, also while it decodes.

    Pillow has one limit for all threads: it is the largest of those that are needed at a time.
    """
    global _usual
    with _lock:
        if not _needed:
            _usual = Image.MAX_IMAGE_PIXELS
        _needed.append(pixels)
        Image.MAX_IMAGE_PIXELS = max(_needed)
    try:
        yield
    finally:
        with _lock:
            _needed.remove(pixels)
            Image.MAX_IMAGE_PIXELS = max(_needed, default=_usual)


@contextmanager
def _opened(file: str | Path | BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    """Pillow's image; an error about the content of the file becomes an ImageError."""
    try:
        with pixel_limit(max_pixels), Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"it has more than data.max_pixels={max_pixels} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError("it is not an image that Pillow can read") from None
    except Exception as error:  # decoders can raise any error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(one_line(error)) from None
