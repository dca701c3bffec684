"""The picture that zoo-look reads, and the model input made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.transforms import str_to_pil_interp
from torch import Tensor

from zoo.messages import UserError, one_line, size_text
from zoo.opening import OpenModel

SHOWN = 1200  # pixels along the longer side of a drawn picture


@dataclass
class Picture:
    """A picture to draw on, and the input of the model.

    Attributes:
        pixels: The picture, (h, w, 3) uint8. A large one is reduced to SHOWN pixels along its longer side.
        images: The input of the model, (1, C, H, W) float32.
        original: Height and width of the file.
    """

    pixels: np.ndarray
    images: Tensor
    original: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """H and W, the sides of the input of the model."""
        return tuple(self.images.shape[2:])

    def pixel(self, at: Sequence[int] | None) -> tuple[int, int]:
        """Row and column in `images` of a pixel of the file, or the centre if None.

        Raises:
            UserError: The pixel is outside the picture.
        """
        if at is None:
            at = [side // 2 for side in self.original]
        if not all(0 <= place < side for place, side in zip(at, self.original, strict=True)):
            raise UserError(
                f"--pixel {at[0]} {at[1]} is outside the picture of {size_text(self.original)} pixels: give a row "
                f"from 0 to {self.original[0] - 1} and a column from 0 to {self.original[1] - 1}."
            )
        sides = zip(at, self.original, self.size, strict=True)
        y, x = (int((place + 0.5) * to / side) for place, side, to in sides)
        return y, x


def read_picture(file: Path, loaded: OpenModel, size: Sequence[int] | None = None) -> Picture:
    """Read a picture for a model.

    Args:
        file: A file in any format that Pillow reads.
        loaded: The model.
        size: Height and width of the input. If None, the shorter side is resized to the model's own size and the aspect
            ratio is kept, unless the model takes one size only.

    Raises:
        UserError: There is no such file, it is not a picture, or the model does not take pictures.
    """
    config = loaded.config
    channels, *usual = config["input_size"]
    if channels not in (1, 3):
        raise UserError(f"{loaded.name} takes images of {channels} channels: zoo-look takes grey and RGB pictures.")
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"there is no file {file}: give a picture.") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} can't be read as a picture: {one_line(error, 600)}.") from error
    original = picture.height, picture.width
    if size is None:
        scale = min(usual) / min(original)
        size = usual if loaded.one_size else [round(side * scale) for side in original]
    resized = picture.resize((size[1], size[0]), str_to_pil_interp(config["interpolation"]))
    values = torch.tensor(np.asarray(resized if channels == 3 else resized.convert("L"))).view(*size, -1)
    values = values.permute(2, 0, 1)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    picture.thumbnail((SHOWN, SHOWN))
    return Picture(np.asarray(picture), ((values / 255 - mean) / std)[None], original)
