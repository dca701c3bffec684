"""Predictions for images outside of a data set: `zoo-predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pycocotools import mask as coco_mask

from zoo.recipes import config, distributed, runs
from zoo.recipes.dense import configure, pictures, score
from zoo.recipes.dense.data import IMAGES
from zoo.recipes.errors import RunError
from zoo.recipes.progress import Progress
from zoo.recipes.runs import log


def predict(settings: Any, inputs: Sequence[Path], out: Path) -> None:
    """Draw and write what the model of a run finds in images.

    Args:
        settings: A `PredictConfig`.
        inputs: Files and folders.
        out: The output folder; need not exist.

    Raises:
        RunError: something that the user can mend; at the end, if images could not be read.
    """
    images = _images(inputs, out)
    base = OmegaConf.merge(OmegaConf.structured(config.EvalConfig), {"run": settings.run})
    base.checkpoint = settings.checkpoint
    model, cfg, classes, _ = score.from_run(base)
    device = distributed.setup(settings.device)
    model = model.to(device).eval()
    runs.make_folder(out, "the output folder")
    steps = configure.pipelines(cfg, False)[1]
    pipeline = Compose([step for step in steps if not step["type"].startswith("Load")])
    written, corrupt = _Written(cfg, out, classes), []
    with Progress(True) as bar:
        bar.start_evaluation(len(images))
        for path, name in images:
            try:
                image = pictures.open_image(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                corrupt.append(path)
                log.warning("%s can't be read as an image (%s).", path, " ".join(str(error).split()))
                continue
            # mmcv's readers give BGR, and the models turn it.
            data = pipeline({"img": np.asarray(image)[..., ::-1], "img_path": str(path), "img_id": len(written.images),
                             "ori_shape": image.size[::-1], "img_shape": image.size[::-1]})  # fmt: skip
            with torch.no_grad():
                [found] = model.test_step(pseudo_collate([data]))
            written.add(name, image, found, settings.score)
            bar.advance_evaluation()
    written.close()
    log.info("%d images: %s. Written to %s", len(written.images), written.summary(), out)
    if corrupt:
        raise RunError(f"{len(corrupt)} of {len(images)} files can't be read as images, beginning with {corrupt[0]}.")


def _images(inputs: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Every image of `inputs`, and its name below the output folder, in which none of them may lie."""
    images = list(_found(inputs, out))
    sources = {file.resolve() for file, _ in images}
    for _, name in images:
        for target in (_picture(out, name), _labels(out, name)):
            if target.resolve() in sources:
                raise RunError(f"the image {target} would be written over: give another output folder than {out}.")
    return images


def _picture(out: Path, name: Path) -> Path:
    return out / name.with_suffix(".png")


def _labels(out: Path, name: Path) -> Path:
    return out / "labels" / name.with_suffix(".png")


def _found(inputs: Sequence[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    names: set[Path] = set()
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
            if path.resolve() in out.resolve().parents:  # what an earlier call wrote is not predicted on
                found = [p for p in found if not p.resolve().is_relative_to(out.resolve())]
            if not found:
                raise RunError(f"the folder {path} has no images ({', '.join(sorted(IMAGES))}).")
            pairs = [(p, p.relative_to(path)) for p in found]
        elif path.is_file():
            pairs = [(path, Path(path.name))]
        else:
            raise RunError(f"{path} does not exist: give images or folders, and the output folder last.")
        for file, name in pairs:
            while name.with_suffix("") in names:  # the same name in two folders, or with two endings
                name = name.with_name(f"{name.stem}_{name.suffix[1:]}{name.suffix}")
            names.add(name.with_suffix(""))
            yield file, name


class _Written:
    """What has been written to the output folder."""

    def __init__(self, cfg: DictConfig, out: Path, classes: Sequence[str]):
        self.out, self.classes, self.task = out, classes, cfg.task
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []

    def add(self, name: Path, image: Image.Image, found: Any, score: float) -> None:
        """Write an image's predictions."""
        number = len(self.images)
        self.images.append({"id": number, "file_name": str(name), "width": image.width, "height": image.height})
        self._save(_picture(self.out, name), pictures.draw_sample(image, found, self.classes, score))
        if self.task == "segment":
            labels = found.pred_sem_seg.data[0].cpu().numpy()
            self._save(_labels(self.out, name), Image.fromarray(labels.astype(np.uint8)))
            return
        objects = found.pred_instances
        objects = objects[objects.scores >= score].cpu()
        for i in range(len(objects)):
            left, top, right, bottom = objects.bboxes[i].tolist()
            item = {
                "id": len(self.objects) + 1,
                "image_id": number,
                "category_id": int(objects.labels[i]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "score": float(objects.scores[i]),
            }
            if "masks" in objects:
                code = coco_mask.encode(np.asfortranarray(objects.masks[i].numpy().astype(np.uint8)))
                item["area"] = float(coco_mask.area(code))
                item["segmentation"] = {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}
            self.objects.append(item)

    def _save(self, path: Path, picture: Image.Image) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with runs.atomic(path) as file:
            picture.save(file, format="png")

    def close(self) -> None:
        """Write what concerns all images."""
        if self.task == "detect":
            categories = [{"id": i, "name": name} for i, name in enumerate(self.classes, start=1)]
            content = {"images": self.images, "annotations": self.objects, "categories": categories}
            runs.write_json(self.out / "predictions.json", content)
        else:
            runs.write_text(self.out / "classes.txt", "".join(f"{name}\n" for name in self.classes))

    def summary(self) -> str:
        """What was found."""
        return f"{len(self.objects)} objects" if self.task == "detect" else "labels of all pixels"
