"""The images that a program gives: files and folders, Pillow's images, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo.messages import UserError, one_line, similar_path
from zoo.recipes import images
from zoo.recipes.inputs import Inputs, checked_shape, open_input, shown
from zoo.recipes.logs import log

_LAYOUTS = "arrays are (H, W) or (H, W, channels), tensors (H, W) or (channels, H, W), with 1, 3 or 4 channels"
_RANGES = "they hold uint8 from 0 to 255, or floats from 0 to 1"


class GivenImages:
    """Images in the order in which they are given; a folder stands for all images in it and its subfolders.

    Args:
        given: One image or several: paths of files and folders, Pillow's images, arrays or tensors.
        skip_unreadable: Whether to leave out images that can't be read or predicted, with a warning in the log, rather
            than to end with an error.

    Attributes:
        found: The source of each image, its path or its position in `given`, and the image.

    Raises:
        UserError: A path does not exist, a folder has no images, or an object is not an image.
    """

    def __init__(self, given: Any, skip_unreadable: bool):
        self.skip = skip_unreadable
        self.found: list[tuple[Path | int, Any]] = []
        single = isinstance(given, str | os.PathLike | Image.Image | np.ndarray | torch.Tensor)
        for position, item in enumerate([given] if single else _listed(given)):
            if isinstance(item, str | os.PathLike):
                self._add_path(Path(item))
            else:
                self.found.append((position, as_image(item, f"image {position}")))
        if not self.found:
            raise UserError("there are no images: give files, folders, Pillow's images, arrays or tensors.")

    def _add_path(self, path: Path) -> None:
        if os.path.isdir(path):
            inputs = Inputs([path], None)
            for folder in inputs.unread:
                self.leave_out(folder, "it can't be read")
            self.found += [(item.path, item.path) for item in inputs.found]
        elif os.path.lexists(path):
            self.found.append((path, path))
        else:
            raise UserError(f"{path} does not exist{similar_path(path)}")

    def read(
        self, channels: int, max_pixels: int, advance: Callable[[], None]
    ) -> Iterator[tuple[Path | int, Image.Image]]:
        """Yield the source and the content of each image, upright, with `channels` channels; call `advance` after it.

        Raises:
            UserError: A file can't be read as an image.
        """
        for source, image in self.found:
            try:
                content = (
                    open_input(image, channels, max_pixels)
                    if isinstance(image, Path)
                    else checked_shape(images.as_read(image, channels))
                )
            except (OSError, images.ImageError) as error:
                reason = getattr(error, "strerror", None) or one_line(error)
                self.leave_out(source, f"it can't be read as an image ({reason})", error)
            else:
                yield source, content
            advance()

    def fail(self, source: Path | int, error: BaseException) -> None:
        """Leave out an image on which the model or its transform raised `error`, or raise UserError."""
        self.leave_out(source, f"the model can't take it ({one_line(error, 200)})", error)

    def leave_out(self, source: Path | int, reason: str, error: BaseException | None = None) -> None:
        """Leave out an image, or raise UserError, as the caller of `predict` wants it."""
        name = shown(source) if isinstance(source, Path) else f"image {source}"
        if not self.skip:
            raise UserError(f"{name}: {reason}; skip_unreadable=True leaves such images out.") from error
        log.warning("%s is left out: %s.", name, reason)


def _listed(given: Any) -> Iterable[Any]:
    if isinstance(given, Iterable):
        return given
    raise UserError(f"{given!r} is not an image: give files, folders, Pillow's images, arrays or tensors.")


def as_image(item: Any, name: str) -> Image.Image:
    """Convert an image, an array or a tensor to Pillow's image.

    Args:
        item: Pillow's image; an array (H, W) or (H, W, C); or a tensor (H, W) or (C, H, W), on any device. C is 1, 3 or
            4: grey, RGB or RGBA. Numbers are uint8 from 0 to 255, or floats from 0 to 1, which are rounded to 8 bits.
        name: What messages call it.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, np.ndarray | torch.Tensor):
        kinds = "a path, Pillow's image, an array or a tensor"
        raise UserError(f"{name} is of type {type(item).__name__}: it has to be {kinds}.")
    shape = tuple(item.shape)
    tensor = isinstance(item, torch.Tensor)
    channels = 1 if len(shape) == 2 else shape[0 if tensor else -1] if len(shape) == 3 else 0
    if channels not in images.MODES or not all(shape):
        raise UserError(f"{name} has the shape {shape}: {_LAYOUTS}; give a batch as a list of images.")
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = (item.float() if item.is_floating_point() else item).numpy()
        item = item.transpose(1, 2, 0) if item.ndim == 3 else item
    if np.issubdtype(item.dtype, np.floating):
        if not 0 <= item.min() <= item.max() <= 1:  # also false for NaN
            raise UserError(f"{name} has numbers from {item.min():g} to {item.max():g}: {_RANGES}.")
        item = np.rint(255 * item.astype(np.float64)).astype(np.uint8)
    if item.dtype != np.uint8:
        raise UserError(f"{name} is of {item.dtype}: {_RANGES}.")
    return Image.fromarray(item[..., 0] if item.ndim == 3 and channels == 1 else np.ascontiguousarray(item))
