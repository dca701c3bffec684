"""Training images of a detector or segmentor as the network gets them, with their annotations."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from zoo.opening import check_name
from zoo.recipes import distributed, sheet
from zoo.recipes.dense import mm_keys
from zoo.recipes.dense.data import open_data
from zoo.recipes.dense.model import model_config
from zoo.recipes.dense.panoptic_data import PanopticData
from zoo.recipes.dense.pictures import draw_labels, draw_objects, draw_truth, legend
from zoo.recipes.dense.runner import build_loader, mm_errors, runner_config
from zoo.recipes.dense.settings import SCOPES, check, run_length
from zoo.recipes.dense.transforms import corrupt_names
from zoo.recipes.sheet import Tile

_WIDTH = 320  # pixels, of a picture


def preview(cfg: DictConfig, out: Path, images: int) -> dict[str, Any]:
    """Draw a sheet; see `zoo.recipes.preview`."""
    check(cfg)
    mm_keys.check(cfg.mm, cfg.task)
    check_name(cfg.model)
    data = open_data(cfg)
    if isinstance(data, PanopticData):
        cfg = OmegaConf.merge(cfg, {"dense": {"num_things": data.num_things}})
    cfg, _ = distributed.fit_batch_size(cfg, data.train.num_images)
    length = run_length(cfg, data.train.num_images)
    device = torch.device("cpu")
    tiles: list[Tile] = []
    notes: list[str] = []
    with TemporaryDirectory() as folder, mm_errors(cfg):
        loading = runner_config(cfg, data, length, Path(folder), device).train_dataloader
        loading.update(num_workers=0, persistent_workers=False)
        init_default_scope(SCOPES[cfg.task])
        prepare = MODELS.build(model_config(cfg, data.classes, device, False).data_preprocessor)
        for batch in build_loader(loading, seed=cfg.seed):
            notes += [f"skipped a corrupt image: {name}" for name in corrupt_names(batch)]
            seen = prepare(batch, training=True)
            pixels = (seen["inputs"] * prepare.std + prepare.mean).round().clamp(0, 255).to(torch.uint8)
            for image, sample in zip(pixels, seen["data_samples"], strict=True):
                picture = _drawn(to_pil_image(image), sample, data.classes)
                tiles.append(Tile(picture, Path(sample.img_path).name))
            if len(tiles) >= min(images, data.train.num_images):
                break
    tiles = tiles[:images]
    which = f"{len(tiles)} of {data.train.num_images} training images"
    title = f"{which}, as {cfg.model} gets them: padded to one size."
    names = legend(data.classes) if cfg.task != "detect" else []
    sheet.write(out, [[tile] for tile in tiles], title=title, legend=names, columns=4, width=_WIDTH)
    labels = [tile.caption for tile in tiles]
    return {"model": cfg.model, "size": list(pixels.shape[2:]), "images": len(tiles), "labels": labels, "notes": notes}


def _drawn(image: Image.Image, sample: Any, classes: list[str]) -> Image.Image:
    """Draw the annotations of a training image."""
    if "gt_instances" in sample and "gt_sem_seg" in sample:  # panoptic: stuff and things
        painted = draw_labels(image, sample.gt_sem_seg.sem_seg[0], classes)
        things, factor = sample.gt_instances, painted.width / image.width
        boxes = getattr(things.bboxes, "tensor", things.bboxes) * factor
        return draw_objects(painted, boxes, things.labels, classes, width=_WIDTH)
    return draw_truth(image, sample, classes, width=_WIDTH)
