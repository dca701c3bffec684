"""Predictions of a detector or segmentor for any images: `zoo-predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from omegaconf import DictConfig
from PIL import Image
from pycocotools import mask as coco_mask

from zoo.messages import UserError
from zoo.recipes import atomic_files, distributed, run_folder
from zoo.recipes.dense import evaluate, pictures, views
from zoo.recipes.dense.panoptic_quality import extent, found_segments
from zoo.recipes.dense.pipelines import pipelines
from zoo.recipes.given_images import GivenImages
from zoo.recipes.inputs import Inputs, as_text, shown
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.results import Prediction
from zoo.recipes.run_weights import prediction_config
from zoo.recipes.segment_ids import to_rgb


def predict(settings: Any, inputs: Inputs, out: Path) -> None:
    """Draw and write the predictions of a run's model for images.

    Args:
        settings: A `PredictConfig`.
        inputs: The images.
        out: The output folder; it does not have to exist.

    Raises:
        UserError: The user can correct the cause; or, at the end, images were left out.
    """
    inputs.protect(target for item in inputs.found for target in (_picture(out, item.name), _labels(out, item.name)))
    predictor = _Predictor(settings)
    cfg, classes = predictor.cfg, predictor.classes
    run_folder.make_folder(out, None)
    for line in views.describe(cfg):
        log.info("%s", line)
    written = _Written(cfg, out, classes, predictor.score)
    try:
        with Progress(True) as bar:
            bar.start_evaluation(len(inputs.found))
            for item, image in inputs.read(3, cfg.data.max_pixels, bar.advance_evaluation):
                try:
                    found = predictor(image, str(item.path), len(written.images))
                    picture = pictures.draw_sample(image, found, classes, written.score)
                except Exception as error:  # mmdet and mmseg can raise any error; the other images follow
                    inputs.fail(item, error)
                else:
                    written.add(item.name, image, found, picture)
    finally:
        written.close()
    log.info("%d images: %s. Written to %s", len(written.images), written.summary(), shown(out))
    inputs.conclude()


def results(settings: Any, given: GivenImages) -> list[Prediction]:
    """The predictions of the model of a run for the images of a program, in their order.

    Args:
        settings: A `PredictConfig`.
        given: The images.

    Raises:
        UserError: The user can correct the cause.
    """
    predictor, found = _Predictor(settings), []
    with Progress(True) as bar:
        bar.start_evaluation(len(given.found))
        for number, (source, image) in enumerate(given.read(3, predictor.cfg.data.max_pixels, bar.advance_evaluation)):
            try:
                sample = predictor(image, str(source), number)
            except Exception as error:  # mmdet and mmseg can raise any error
                given.fail(source, error)
            else:
                found.append(predictor.result(source, image, sample))
    return found


class _Predictor:
    """The model of a run, which maps images to the samples of mmdet or mmseg.

    Args:
        settings: A `PredictConfig`.

    Raises:
        UserError: The user can correct the cause.
    """

    def __init__(self, settings: Any):
        if settings.temperature != 1:
            raise UserError(f"temperature={settings.temperature:g} is for classifiers, which {settings.run} is not.")
        model, self.cfg, self.classes, _ = evaluate.from_run(*prediction_config(settings))
        self.model = model.to(distributed.setup(settings.device)).eval()
        self.pipeline = Compose(views.without_loading(pipelines(self.cfg, False)[1]))
        self.score = pictures.SCORE if settings.score is None else settings.score

    @torch.no_grad()
    def __call__(self, image: Image.Image, path: str, number: int) -> Any:
        """The sample with the predictions for an image."""
        # mmcv's readers return BGR, which the models convert.
        data = {"img": np.asarray(image)[..., ::-1], "img_path": path, "img_id": number,
                "ori_shape": image.size[::-1], "img_shape": image.size[::-1]}  # fmt: skip
        [found] = self.model.test_step(pseudo_collate([self.pipeline(data)]))
        return found

    def result(self, source: Path | int, image: Image.Image, sample: Any) -> Prediction:
        """The predictions in `sample` as a program gets them."""
        size, classes = image.size[::-1], list(self.classes)
        if self.cfg.task == "segment":
            return Prediction(source, size, classes, labels=sample.pred_sem_seg.data[0].cpu().numpy().astype(np.int64))
        if self.cfg.task == "panoptic":
            ids, segments = found_segments(sample.pred_panoptic_seg.sem_seg[0].cpu().numpy(), len(classes))
            labels = np.full(ids.shape, -1)
            for position, key in enumerate(segments):
                labels[ids == key] = position
            boxes = np.array([extent(ids == key) for key in segments], dtype=np.float32).reshape(-1, 4)
            names = [classes[segment.label] for segment in segments.values()]
            return Prediction(source, size, names, boxes=boxes, labels=labels)
        objects = sample.pred_instances
        objects = objects[objects.scores >= self.score].cpu()
        objects = objects[objects.scores.argsort(descending=True, stable=True)]
        masks = None
        if "masks" in objects:
            empty = np.zeros((0, *size), dtype=bool)
            masks = np.stack([pictures.as_mask(mask).numpy() for mask in objects.masks]) if len(objects) else empty
        names = [classes[label] for label in objects.labels.tolist()]
        scores, boxes = objects.scores.float().numpy(), objects.bboxes.float().numpy()
        return Prediction(source, size, names, scores, boxes, masks)


def _picture(out: Path, name: Path) -> Path:
    return out / name.with_suffix(".png")


def _labels(out: Path, name: Path) -> Path:
    return out / "labels" / name.with_suffix(".png")


class _Written:
    """Writes predictions to the output folder, and collects the content of the files on all images."""

    def __init__(self, cfg: DictConfig, out: Path, classes: Sequence[str], score: float):
        self.out, self.classes, self.task, self.score = out, classes, cfg.task, score
        self.num_things = cfg.dense.num_things if cfg.task == "panoptic" else 0
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []

    def add(self, name: Path, image: Image.Image, found: Any, picture: Image.Image) -> None:
        """Write an image's predictions."""
        number = len(self.images)
        self.images.append({"id": number, "file_name": as_text(name), "width": image.width, "height": image.height})
        self._save(_picture(self.out, name), picture)
        if self.task == "panoptic":
            self._add_segments(number, name, found)
            return
        if self.task == "segment":
            labels = found.pred_sem_seg.data[0].cpu().numpy()
            bits = np.uint8 if len(self.classes) <= 256 else np.uint16
            self._save(_labels(self.out, name), Image.fromarray(labels.astype(bits)))
            return
        objects = found.pred_instances
        objects = objects[objects.scores >= self.score].cpu()
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
                code = objects.masks[i]  # of merged objects, an RLE code
                if not isinstance(code, dict):
                    code = coco_mask.encode(np.asfortranarray(code.numpy().astype(np.uint8)))
                item["area"] = float(coco_mask.area(code))
                item["segmentation"] = {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}
            self.objects.append(item)

    def _add_segments(self, number: int, name: Path, found: Any) -> None:
        """Write the PNG of the segments of an image in COCO's panoptic format, and describe them."""
        ids, segments = found_segments(found.pred_panoptic_seg.sem_seg[0].cpu().numpy(), len(self.classes))
        path = _labels(self.out, name)
        self._save(path, Image.fromarray(to_rgb(ids)))
        info = [
            {
                "id": key,
                "category_id": segment.label + 1,
                "iscrowd": 0,
                "bbox": [left, top, right - left, bottom - top],
                "area": int((ids == key).sum()),
            }
            for key, segment in segments.items()
            for left, top, right, bottom in [extent(ids == key)]
        ]
        file = as_text(path.relative_to(self.out / "labels"))
        self.objects.append({"image_id": number, "file_name": file, "segments_info": info})

    def _save(self, path: Path, picture: Image.Image) -> None:
        if not path.parent.is_dir():
            run_folder.make_folder(path.parent, None)
        with atomic_files.atomic(path) as file:
            picture.save(file, format="png")

    def close(self) -> None:
        """Write the files on all images."""
        if self.task != "segment":
            categories: list[dict[str, Any]] = [{"id": i, "name": name} for i, name in enumerate(self.classes, start=1)]
            for category in categories if self.task == "panoptic" else []:
                category["isthing"] = int(category["id"] <= self.num_things)
            content = {"images": self.images, "annotations": self.objects, "categories": categories}
            atomic_files.write_json(self.out / "predictions.json", content)
        else:
            atomic_files.write_text(self.out / "classes.txt", "".join(f"{name}\n" for name in self.classes))

    def summary(self) -> str:
        """A summary of the predictions for the log."""
        if self.task == "panoptic":
            return f"{sum(len(item['segments_info']) for item in self.objects)} segments"
        return f"{len(self.objects)} objects" if self.task == "detect" else "labels of all pixels"
