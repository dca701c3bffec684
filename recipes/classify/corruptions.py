"""Common corruptions of images: noise, blur, weather, light, geometry and compression, each in five severities.

They are of the kinds of ImageNet-C (Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, ICLR 2019), but they are other functions with other parameters: figures on them can't be
compared with those on ImageNet-C. Lengths are shares of the image's short side, so that they apply to any size.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.signal import fftconvolve

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Corrupt an image. The same image, name, severity and seed give the same result.

    What is random depends on the image and not on the severity, so that a severity is the next lower one, only worse.

    Args:
        image: uint8 (H, W, C) with 1, 3 or 4 channels (grey, RGB or RGBA, whose alpha stays as it is); not changed.
        name: One of `NAMES`.
        severity: 1 to 5.
        seed: Changes what is random.

    Returns:
        uint8 (H, W, C).
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(np.ascontiguousarray(image))])
    colors = min(image.shape[2], 3)
    corrupted = _CORRUPTIONS[name](image[..., :colors].astype(np.float32) / 255, severity - 1, rng)
    result = image.copy()
    result[..., :colors] = np.rint(255 * np.clip(corrupted, 0, 1))
    return result


# Each function takes an image (H, W, C), float32 from 0 to 1, the severity from 0 to 4, and a generator. It returns an
# image of the same shape, whose values may be outside of 0 to 1.


def _gaussian_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return image + (0.06, 0.10, 0.15, 0.22, 0.32)[severity] * rng.standard_normal(image.shape, np.float32)


def _shot_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    photons = (120, 50, 22, 10, 5)[severity]
    return (rng.poisson(image * photons) / photons).astype(np.float32)


def _impulse_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper."""
    drawn = rng.random(image.shape[:2])[..., None]
    color = rng.integers(0, 2, image.shape[:2])[..., None]
    return np.where(drawn < (0.02, 0.05, 0.09, 0.15, 0.25)[severity], color, image)


def _defocus_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A disk, as an open lens draws a point."""
    radius = max((0.01, 0.018, 0.027, 0.038, 0.05)[severity] * _side(image), (0.8, 1.1, 1.4, 1.8, 2.3)[severity])
    reach = int(np.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _convolve(image, np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1))  # with a smooth edge


def _motion_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A line in a random direction."""
    length = max((0.03, 0.05, 0.075, 0.1, 0.14)[severity] * _side(image), (2.0, 3.0, 4.0, 5.0, 6.5)[severity])
    angle = rng.uniform(0, np.pi)
    reach = int(np.ceil(length / 2)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for place in np.linspace(-length / 2, length / 2, 8 * reach):  # each point is shared by the four pixels around it
        row, column = reach + place * np.sin(angle), reach + place * np.cos(angle)
        top, left = int(row), int(column)
        kernel[top : top + 2, left : left + 2] += np.outer(
            [1 - row + top, row - top], [1 - column + left, column - left]
        )
    return _convolve(image, kernel)


def _zoom_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and of enlarged copies, as if the camera moved towards it."""
    height, width, _ = image.shape
    most, steps = (0.06, 0.11, 0.16, 0.22, 0.3)[severity], 10
    total = np.zeros_like(image)
    for zoom in np.linspace(1, 1 + most, steps):
        left, top = (width - width / zoom) / 2, (height - height / zoom) / 2
        total += _resized(image, (width, height), Image.Resampling.BILINEAR, (left, top, width - left, height - top))
    return total / steps


def _fog(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A light grey with clouds, mixed with the image."""
    height, width, _ = image.shape
    clouds = np.zeros((height, width, 1), np.float32)
    for octave in range(5):
        grid = rng.random((2**octave + 1, 2**octave + 1, 1), np.float32)
        clouds += 0.5**octave * _resized(grid, (width, height), Image.Resampling.BICUBIC)
    clouds = 0.7 + 0.3 * (clouds - clouds.min()) / max(np.ptp(clouds), 1e-6)
    share = (0.25, 0.38, 0.5, 0.62, 0.74)[severity]
    return (1 - share) * image + share * clouds


def _brightness(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return image + (0.1, 0.18, 0.27, 0.37, 0.48)[severity]


def _darkness(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Less light, and the grain of a camera that makes up for it."""
    light, grain = ((0.7, 0.01), (0.5, 0.015), (0.35, 0.02), (0.22, 0.025), (0.12, 0.03))[severity]
    return light * image + grain * rng.standard_normal(image.shape, np.float32)


def _contrast(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1))
    return mean + (0.7, 0.5, 0.35, 0.22, 0.12)[severity] * (image - mean)


def _saturation(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Paler colours, down to none; grey images do not change."""
    if image.shape[2] == 1:
        return image
    grey = (image @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return grey + (0.7, 0.5, 0.3, 0.15, 0.0)[severity] * (image - grey)


def _elastic(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels displaced by smooth random fields."""
    side = _side(image)
    fields = [gaussian_filter(rng.uniform(-1, 1, image.shape[:2]), max(0.04 * side, 1.0)) for _ in range(2)]
    strength = (0.006, 0.011, 0.017, 0.024, 0.033)[severity] * side
    places = [
        grid + strength * field / max(field.std(), 1e-6)
        for grid, field in zip(np.mgrid[: image.shape[0], : image.shape[1]], fields, strict=True)
    ]
    channels = [map_coordinates(image[..., c], places, order=1, mode="reflect") for c in range(image.shape[2])]
    return np.stack(channels, axis=2)


def _pixelate(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    height, width, _ = image.shape
    scale = (0.6, 0.45, 0.34, 0.26, 0.19)[severity]
    small = (max(1, round(scale * width)), max(1, round(scale * height)))
    return _resized(_resized(image, small, Image.Resampling.BOX), (width, height), Image.Resampling.NEAREST)


def _jpeg(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    pixels = np.rint(255 * image).astype(np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.save(file, format="jpeg", quality=(30, 20, 13, 8, 4)[severity])
    with Image.open(file) as opened:
        return np.asarray(opened, np.float32).reshape(image.shape) / 255


_CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "brightness": _brightness,
    "darkness": _darkness,
    "contrast": _contrast,
    "saturation": _saturation,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
NAMES = tuple(_CORRUPTIONS)


def _side(image: np.ndarray) -> int:
    return min(image.shape[:2])


def _convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve each channel of an image, continued as a mirror image, with a square kernel, which is normalized."""
    reach = len(kernel) // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    weights = (kernel / kernel.sum())[..., None].astype(np.float32)
    return fftconvolve(padded, weights, mode="valid", axes=(0, 1))


def _resized(
    image: np.ndarray,
    size: tuple[int, int],
    how: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize each channel of an image, or of a box of it (left, top, right, bottom), to a width and height."""
    channels = [Image.fromarray(image[..., c]).resize(size, how, box) for c in range(image.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
