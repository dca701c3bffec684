"""The attention of efficient probing, drawn over images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from zoo.efficient_probing import probing_head
from zoo.recipes import sheet
from zoo.recipes.sheet import Tile
from zoo.recipes.subsets import evenly_spread

_QUERIES = 6  # whose attention is drawn


@torch.no_grad()
def plot_attention(
    path: Path,
    model: nn.Module,
    samples: Sequence,
    indices: Sequence[int],
    normalize: Any,
    classes: Sequence[str],
    size: Sequence[int],
    rows: int = 6,
) -> None:
    """Draw the attention of the queries of a head of efficient probing over some images.

    Each row has an image, the mean attention of all queries, and the attention of the most focused queries: those whose
    attention has the lowest entropy over the drawn images.

    Args:
        path: The PNG to write, atomically.
        model: The model.
        samples: Transformed images, as `data.Samples` has them.
        indices: The images to choose from.
        normalize: Converts uint8 images to the model's input.
        classes: The names of the classes.
        size: Height and width of the maps that the queries attend to.
        rows: Number of images.
    """
    head: Any = probing_head(model)
    items = [item for item in (samples[0, index] for index in evenly_spread(indices, rows)) if item[1] >= 0]
    given: list[Tensor] = []
    with head.pool.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
        answers = model.eval()(normalize(torch.stack([image for image, _, _ in items]))).argmax(1)
    attention = head.pool.attention(given[0]).float().cpu()  # images, queries, tokens
    entropy = torch.special.entr(attention).sum(2).mean(0)
    focused = entropy.argsort()[:_QUERIES].tolist()
    groups = []
    for (pixels, target, _), maps, answer in zip(items, attention, answers.tolist(), strict=True):
        picture = to_pil_image(pixels).convert("RGB")
        wrong = answer != target
        name = classes[answer] + (f", is {classes[target]}" if wrong else "")
        drawn = [("mean", maps.mean(0)), *((f"query {number + 1}", maps[number]) for number in focused)]
        tiles = [Tile(_overlay(picture, heat.view(*size)), title) for title, heat in drawn]
        groups.append([Tile(picture, name, wrong=wrong), *tiles])
    title = (
        f"Attention over the map of {size[0]} x {size[1]}, from dark (0) to bright (the largest of each picture): the "
        f"mean of the {attention.shape[1]} queries, and the {len(focused)} most focused queries."
    )
    sheet.write(path, groups, title=title, columns=len(groups[0]), width=120)


def _overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """`picture` under an attention map (h, w), coloured from 0 to its maximum."""
    from matplotlib import colormaps

    shares = (255 * heat / heat.max()).round().byte().numpy()
    large = np.asarray(Image.fromarray(shares).resize(picture.size, Image.Resampling.BICUBIC))
    colours = Image.fromarray((255 * colormaps["inferno"](large)[..., :3]).astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.6)
