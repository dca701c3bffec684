"""The picture that zoo-look reads, as a model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.transforms import str_to_pil_interp
from torch import Tensor

from zoo.tools.cli import ToolError
from zoo.tools.model import Loaded, reason


@dataclass
class Picture:
    """An image as a model gets it: `pixels` (H, W, 3) uint8, `images` (1, C, H, W) float32; and its size as a file."""

    pixels: np.ndarray
    images: Tensor
    original: tuple[int, int]

    def pixel(self, at: Sequence[int] | None) -> tuple[int, int]:
        """Row and column in `pixels` of a pixel of the file; the middle if None.

        Raises:
            ToolError: it is outside.
        """
        if at is None:
            at = [side // 2 for side in self.original]
        if not all(0 <= place < side for place, side in zip(at, self.original, strict=True)):
            raise ToolError(
                f"--pixel {at[0]} {at[1]} is outside of the picture of {_by(self.original)} pixels: give a row from 0 "
                f"to {self.original[0] - 1} and a column from 0 to {self.original[1] - 1}."
            )
        sides = zip(at, self.original, self.pixels.shape, strict=False)
        y, x = (int((place + 0.5) * to / side) for place, side, to in sides)
        return y, x


def read_picture(file: Path, loaded: Loaded, size: Sequence[int] | None = None) -> Picture:
    """The image in `file` for a model.

    Args:
        file: Of any format that Pillow reads.
        loaded: The model.
        size: Height and width to resize it to. If None, its shorter side becomes what the model was made for, and its
            shape stays, unless the model takes one size only.

    Raises:
        ToolError: there is no such file, it is no picture, or the model takes something else than pictures.
    """
    config = loaded.config
    channels, *usual = config["input_size"]
    if channels not in (1, 3):
        raise ToolError(f"{loaded.name} takes images of {channels} channels: zoo-look shows grey and RGB ones.")
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise ToolError(f"there is no file {file}: give a picture.") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ToolError(f"{file} can't be read as a picture: {reason(error)}.") from error
    original = picture.height, picture.width
    if size is None:
        scale = min(usual) / min(original)
        size = usual if loaded.fixed else [round(side * scale) for side in original]
    picture = picture.resize((size[1], size[0]), str_to_pil_interp(config["interpolation"]))
    pixels = np.asarray(picture)
    values = torch.tensor(pixels if channels == 3 else np.asarray(picture.convert("L"))[..., None]).permute(2, 0, 1)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return Picture(pixels, ((values / 255 - mean) / std)[None], original)


def _by(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
