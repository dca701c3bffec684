"""The transforms of training and of test images, as configurations of mmdet and mmseg."""

from __future__ import annotations

from omegaconf import DictConfig

from zoo.recipes.dense import views


def pipelines(cfg: DictConfig, masks: bool) -> tuple[list[dict], list[dict]]:
    """The transforms of training and of test images; prediction omits those that load images and annotations."""
    return (_segmentation_pipelines if cfg.task == "segment" else _detection_pipelines)(cfg, masks)


def _detection_pipelines(cfg: DictConfig, masks: bool) -> tuple[list[dict], list[dict]]:
    dense = cfg.dense
    load = dict(type="LoadImage", max_pixels=cfg.data.max_pixels)
    panoptic = cfg.task == "panoptic"
    annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=masks)
    if panoptic:
        annotations = dict(type="LoadSegments")
    several = dict(type="RandomChoiceResize", scales=[(dense.max_size, s) for s in dense.scales], keep_ratio=True)
    one = dict(type="Resize", scale=(dense.max_size, dense.scales[-1]), keep_ratio=True)
    train = [load, annotations]
    if cfg.augment.hflip:
        train.append(dict(type="RandomFlip", prob=cfg.augment.hflip))
    if dense.photometric:
        train.append(dict(type="PhotoMetricDistortion"))
    if dense.crop:
        size = (dense.crop[1], dense.crop[0])
        resize = dict(
            type="RandomResize",
            scale=size,
            ratio_range=tuple(dense.ratio_range or (1, 1)),
            resize_type="Resize",
            keep_ratio=True,
        )
        train += [
            several if len(dense.scales) > 1 else resize,
            dict(
                type="RandomCrop",
                crop_size=tuple(dense.crop),
                crop_type="absolute",
                recompute_bbox=masks,
                allow_negative_crop=True,
            ),
            # An image of stuff alone is no reason to draw another one.
            dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=masks, keep_empty=not panoptic),
        ]
    elif dense.detr_crop:
        # DETR (arXiv 2005.12872, section 4): short sides of 400 to 600, crops of 384 to 600, then resized as usual.
        longest = 4200 if dense.method == "dino" else dense.max_size
        before = dict(type="RandomChoiceResize", scales=[(longest, s) for s in (400, 500, 600)], keep_ratio=True)
        crop = dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True)
        train.append(dict(type="RandomChoice", transforms=[[several], [before, crop, several]]))
    elif dense.ratio_range:
        scale, ratios = (dense.max_size, dense.scales[-1]), tuple(dense.ratio_range)
        train.append(dict(type="RandomResize", scale=scale, ratio_range=ratios, keep_ratio=True))
    else:
        train.append(several if len(dense.scales) > 1 else one)
    train.append(dict(type="PackDetInputs"))
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
    pack = dict(type="PackDetInputs", meta_keys=keys)
    if panoptic:
        pack = dict(type="PackSegments", meta_keys=(*keys, "segments"))
    return train, views.pipeline(cfg, load, [annotations, pack])


def _segmentation_pipelines(cfg: DictConfig, masks: bool) -> tuple[list[dict], list[dict]]:
    dense = cfg.dense
    load, annotations = dict(type="LoadImage", max_pixels=cfg.data.max_pixels), dict(type="LoadLabels")
    one = dict(type="Resize", scale=(dense.max_size, dense.scales[-1]), keep_ratio=True)
    train = [load, annotations]
    if len(dense.scales) > 1:
        train.append(
            dict(
                type="RandomChoiceResize",
                scales=list(dense.scales),
                resize_type="ResizeShortestEdge",
                max_size=dense.max_size,
            )
        )
    elif dense.ratio_range:
        scale, ratios = (dense.max_size, dense.scales[-1]), tuple(dense.ratio_range)
        train.append(dict(type="RandomResize", scale=scale, ratio_range=ratios, keep_ratio=True))
    else:
        train.append(one)
    if dense.crop:
        ignored = cfg.data.ignore_index
        ratio = dense.cat_max_ratio
        train.append(dict(type="RandomCrop", crop_size=tuple(dense.crop), cat_max_ratio=ratio, ignore_index=ignored))
    if cfg.augment.hflip:
        train.append(dict(type="RandomFlip", prob=cfg.augment.hflip))
    if dense.photometric:
        train.append(dict(type="PhotoMetricDistortion"))
    test = [annotations, dict(type="PackSegInputs")]  # labels keep their size: predictions are resized to them
    if dense.test_divisor:
        test.insert(0, dict(type="ResizeToMultiple", size_divisor=dense.test_divisor))
    return [*train, dict(type="PackSegInputs")], views.pipeline(cfg, load, test)
