"""Training images of a classifier as the network gets them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchvision.transforms.functional import to_pil_image

from zoo.messages import first_few, size_text
from zoo.opening import check_name
from zoo.recipes import sheet
from zoo.recipes.classify.data import open_data
from zoo.recipes.classify.train import ClassifyRun
from zoo.recipes.sheet import Tile

_SHOWN = 3  # classes in a caption
# What would take time, memory or a network, and does not affect the images.
_PLAIN = {
    "pretrained": False,
    "resume": "auto",
    "data": {"num_workers": 0},
    "distill": {"teacher": None},
    "trainer": {"device": "cpu", "compile": False, "ema_decay": None, "freeze": None},
}


def preview(cfg: DictConfig, out: Path, images: int) -> dict[str, Any]:
    """Draw a sheet; see `zoo.recipes.preview`."""
    check_name(cfg.model)
    cfg = OmegaConf.merge(cfg, _PLAIN)
    if cfg.trainer.batch_size == "auto":
        cfg.trainer.batch_size = images + images % 2
    data = open_data(cfg.data, cfg.seed)
    tiles: list[Tile] = []
    notes: list[str] = []
    with TemporaryDirectory() as folder:
        run = ClassifyRun(cfg, data, torch.device("cpu"), Path(folder))
        smoothing = cfg.augment.smoothing if run.train_state.mixup else 0.0  # the loss smooths other labels
        for batch, labels, corrupt in run.preview():
            notes += [f"skipped a corrupt image: {name}" for name in corrupt]
            pixels = (batch * run.normalize.std + run.normalize.mean).round().clamp(0, 255).to(torch.uint8)
            for image, label in zip(pixels, labels, strict=True):
                text = caption(label, data.classes, smoothing, data.multi_label)
                tiles.append(Tile(to_pil_image(image).convert("RGB"), text))
            if len(tiles) >= images:
                break
    size = run.data_config["input_size"][1:]
    tiles = tiles[:images]
    which = f"{len(tiles)} of {run.train_images} training images"
    title = f"{which}, as {cfg.model} gets them: {size_text(size)} pixels."
    sheet.write(out, [[tile] for tile in tiles], title=title)
    captions = [tile.caption for tile in tiles]
    return {"model": cfg.model, "size": list(size), "images": len(tiles), "labels": captions, "notes": notes}


def caption(label: torch.Tensor, classes: Sequence[str], smoothing: float, multi_label: bool = False) -> str:
    """The class of an image; of a mixed one, the largest shares of its classes, without label smoothing.

    Args:
        label: The label, a scalar; or the shares of the classes, (classes,).
        classes: Their names.
        smoothing: The label smoothing in the shares.
        multi_label: Whether an image has several labels, each of which is smoothed towards 0.5.
    """
    if not label.ndim:
        return classes[int(label)]
    shares = (label - smoothing * (0.5 if multi_label else 1 / len(classes))) / (1 - smoothing)
    order = [i for i in shares.argsort(descending=True).tolist() if shares[i] > 0.005]
    if not order:
        return "no label"
    if all(shares[i] > 0.995 for i in order):
        return first_few([classes[i] for i in order], _SHOWN)
    return ", ".join(f"{classes[i]}: {100 * shares[i]:.0f} %" for i in order[:_SHOWN])
