"""From zoo-train's configuration to MMEngine's.

Models start from the configurations that ship inside the mmdet and mmseg packages; what differs (backbone, channels,
classes, data, optimizer, schedule) is set here. The length of the training is counted in iterations: one forward pass
of one process, of which an update takes `accumulate`; the schedule is counted in updates.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config as MMConfig
from mmengine.registry import MODELS, init_default_scope
from omegaconf import DictConfig, OmegaConf

from zoo import families
from zoo.recipes import batchnorm, config, distributed
from zoo.recipes.dense.backbone import TimmBackbone
from zoo.recipes.dense.detection_data import DetectionData
from zoo.recipes.dense.segmentation_data import SegmentationData
from zoo.recipes.errors import RunError

# Below the packages' folder of configurations.
_DETECTORS = {
    "mask_rcnn": "_base_/models/mask-rcnn_r50_fpn.py",
    # Heads of four convolutions and a linear layer with BatchNorm and GIoU, which the papers take over from Swin's.
    "cascade_mask_rcnn": "convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py",
    "retinanet": "_base_/models/retinanet_r50_fpn.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
}
_SEGMENTORS = {
    "upernet": "_base_/models/upernet_r50.py",
    "semantic_fpn": "_base_/models/fpn_r50.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
}
METHODS = {"detect": config.DETECTORS, "segment": config.SEGMENTORS}
_SCOPES = {"detect": "mmdet", "segment": "mmseg"}

# Settings of classification that nothing here follows: a value of one's own would be lost without a word.
_UNUSED = (
    "augment.scale",
    "augment.ratio",
    "augment.vflip",
    "augment.color_jitter",
    "augment.auto_augment",
    "augment.interpolation",
    "augment.mixup",
    "augment.cutmix",
    "augment.smoothing",
    "augment.re_prob",
    "data.crop_pct",
    "data.img_size",
    "data.interpolation",
    "optim.clip_mode",
    "schedule.cooldown_epochs",
    "schedule.warmup_epochs",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.ema_decay",
)


@dataclass
class Steps:
    """How long a run is.

    Attributes:
        updates: of the weights, in all.
        per_epoch: updates that see every training image once.
        accumulate: iterations (forward passes of each process) in an update.
        batch: images in an update, over all processes.
        evaluate_every: updates between two evaluations.
    """

    updates: int
    per_epoch: int
    accumulate: int
    batch: int
    evaluate_every: int


def check(cfg: DictConfig) -> None:
    """Refuse settings that no dense run can use.

    Raises:
        RunError: names the key, its value and what is allowed.
    """
    config.check(cfg)
    dense, defaults = cfg.dense, OmegaConf.structured(config.Config)
    methods = METHODS[cfg.task]
    if dense.method not in methods:
        raise RunError(
            f"dense.method={dense.method!r} can't be used with task={cfg.task}: it has {', '.join(methods)}."
        )
    _DIGIT_DEFAULTS = {"augment.scale": [1.0, 1.0], "augment.ratio": [1.0, 1.0], "augment.interpolation": "bicubic"}
    for key in _UNUSED:
        value = OmegaConf.select(cfg, key)
        if value not in (OmegaConf.select(defaults, key), _DIGIT_DEFAULTS.get(key)):
            raise RunError(f"{key}={value} has no effect with task={cfg.task}: leave it out (see the keys of dense).")
    rules = {
        "dense.max_size": (dense.max_size >= max(dense.scales, default=0), "no less than the largest of dense.scales"),
        "dense.detr_crop": (not dense.detr_crop or cfg.task == "detect", "false for task=segment"),
        "schedule.sched": (
            cfg.schedule.sched in ("cosine", "multistep", "poly", "constant"),
            "cosine, multistep, poly or constant",
        ),
        "trainer.parallel": (cfg.trainer.parallel == "ddp", f"ddp for task={cfg.task}"),
        "model_kwargs.in_chans": (cfg.model_kwargs.get("in_chans", 3) == 3, f"3 for task={cfg.task}"),
    }
    for key, (fine, allowed) in rules.items():
        if not fine:
            raise RunError(f"{key}={OmegaConf.select(cfg, key)} is not allowed: it has to be {allowed}.")


def finds_masks(cfg: DictConfig) -> bool:
    """Whether the method that `cfg` names finds instance masks, as far as the data have them.

    Raises:
        RunError: dense.masks=false with a method that knows masks only.
    """
    if cfg.dense.method == "mask2former" and not cfg.dense.masks:
        raise RunError("dense.masks=false can't be used with dense.method=mask2former: it finds nothing but masks.")
    return cfg.dense.masks and cfg.dense.method not in ("retinanet", "dino")


def steps(cfg: DictConfig, images: int) -> Steps:
    """The length of the run that `cfg` asks for on `images` training images.

    Raises:
        RunError: the images of an update can't be reached.
    """
    accumulate, batch = distributed.batches(cfg.trainer)
    per_epoch = -(-images // batch)
    updates = cfg.dense.updates or cfg.trainer.epochs * per_epoch
    return Steps(updates, per_epoch, accumulate, batch, min(cfg.trainer.eval_every * per_epoch, updates))


def model_config(cfg: DictConfig, classes: Sequence[str], device: torch.device, pretrained: bool | str) -> MMConfig:
    """The model of `cfg` for `classes`; its backbone starts from `pretrained`."""
    dense, task = cfg.dense, cfg.task
    file = (_DETECTORS if task == "detect" else _SEGMENTORS)[dense.method]
    path = _package(_SCOPES[task]) / ".mim" / "configs" / file
    model = MMConfig.fromfile(path, import_custom_modules=False).model
    model.pop("pretrained", None)
    arguments = backbone_arguments(cfg)
    backbone = TimmBackbone(**arguments)  # for what the rest has to fit
    channels = list(backbone.channels)
    model.backbone = dict(arguments, type="mmengine.TimmBackbone", pretrained=pretrained)
    for name in ("mean", "std"):
        model.data_preprocessor[name] = [255 * value for value in cfg.data[name] or getattr(backbone, name)]
    if task == "detect":
        _set_detector(model, cfg, channels, len(classes))
    else:
        _set_segmentor(model, cfg, channels, len(classes))
    _set_norm(model, "SyncBN" if _synchronised(device) else "BN")
    changes = OmegaConf.to_container(cfg.mm, resolve=True)
    return _override(MMConfig(dict(model=model)), {"model": changes.get("model", {})}).model


def build_model(
    cfg: DictConfig, classes: Sequence[str], device: torch.device, pretrained: bool | str
) -> torch.nn.Module:
    """The model of `cfg` for `classes`; its backbone starts from `pretrained`.

    Raises:
        RunError: it can't be built.
    """
    settings = model_config(cfg, classes, device, pretrained)
    init_default_scope(_SCOPES[cfg.task])
    try:
        with warnings.catch_warnings():
            # A setting that can't be changed where classes have weights.
            warnings.filterwarnings("ignore", message="Default ``avg_non_ignore``")
            model = MODELS.build(settings)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise RunError(f"dense.method={cfg.dense.method} can't be built on {cfg.model}: {reason}") from error
    if cfg.task == "segment" and _synchronised(device):
        model.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    return model


def check_batchnorm(cfg: DictConfig, model: torch.nn.Module) -> None:
    """Refuse one image a pass where it can't train BatchNorm, as far as layers are concerned that need no labels.

    Args:
        cfg: The configuration.
        model: The detector or segmentor, on the CPU.

    Raises:
        RunError: it can't.
    """
    divisor, side = cfg.dense.size_divisor, min(cfg.dense.scales)
    size = cfg.dense.crop or [-(-side // divisor) * divisor] * 2
    image = torch.zeros(1, 3, *size)
    whole = cfg.task == "segment" and cfg.dense.method != "mask2former"
    run = (lambda: model(image, mode="tensor")) if whole else (lambda: model.extract_feat(image))
    batchnorm.check_batchnorm(model, run, "dense.crop" if cfg.dense.crop else "dense.scales")


def _synchronised(device: torch.device) -> bool:
    """Whether BatchNorm runs over all processes, which needs accelerators."""
    return distributed.world_size() > 1 and device.type != "cpu"


def backbone_arguments(cfg: DictConfig) -> dict[str, Any]:
    """What TimmBackbone is made from, but for its weights."""
    dense = cfg.dense
    return dict(
        model=cfg.model,
        model_kwargs=families.dense_kwargs(cfg.model, cfg.task)
        | OmegaConf.to_container(cfg.model_kwargs, resolve=True),
        out_indices=_out_indices(cfg),
        output_norm=dense.output_norm,
        frozen_stages=dense.frozen_stages,
        norm_eval=dense.norm_eval,
        grad_checkpointing=cfg.trainer.grad_checkpointing,
    )


def _out_indices(cfg: DictConfig) -> list[int] | None:
    """The stages that the method reads: RetinaNet and DINO leave the first one of four out."""
    if cfg.dense.out_indices is not None:
        return list(cfg.dense.out_indices)
    if cfg.dense.method == "dino" or (cfg.dense.method == "retinanet" and not cfg.dense.small):
        return [-3, -2, -1]
    return None


def _set_detector(model: MMConfig, cfg: DictConfig, channels: list[int], classes: int) -> None:
    dense = cfg.dense
    model.data_preprocessor.pad_size_divisor = dense.size_divisor
    if dense.method == "mask2former":
        head = model.panoptic_head
        head.update(in_channels=channels, strides=[4, 8, 16, 32], num_things_classes=classes, num_stuff_classes=0)
        head.loss_cls.class_weight = [1.0] * classes + [0.1]
        model.panoptic_fusion_head.update(num_things_classes=classes, num_stuff_classes=0)
        # Its images are cropped to one size; padding to it again costs nothing where they are.
        model.data_preprocessor.batch_augments = (
            [
                dict(
                    type="BatchFixedSizePad",
                    size=tuple(dense.crop),
                    img_pad_value=0,
                    pad_mask=True,
                    mask_pad_value=0,
                    pad_seg=False,
                )
            ]
            if dense.crop
            else None
        )
        if dense.small:
            _shrink_mask2former(head)
            model.train_cfg.num_points = 1024
        return
    model.neck.in_channels = channels
    if not finds_masks(cfg) and "roi_head" in model:
        for name in ("mask_head", "mask_roi_extractor"):
            model.roi_head.pop(name)
        model.data_preprocessor.pad_mask = False
    for head in _heads(model):
        head.num_classes = classes
    if dense.method == "dino":
        if dense.small:
            model.num_queries = 100
            model.encoder.num_layers = model.decoder.num_layers = 2
            model.dn_cfg.group_cfg.num_dn_queries = 20
        return
    if dense.small:
        _shrink_detector(model)
    elif dense.method == "retinanet":
        model.neck.start_level = 0  # of the three that the backbone gives


def _heads(model: MMConfig) -> list[Any]:
    """The parts of a detector that tell classes apart."""
    parts = [model.bbox_head] if "bbox_head" in model else []
    for name in ("bbox_head", "mask_head"):
        part = model.get("roi_head", {}).get(name)
        parts += part if isinstance(part, list) else [part] if part else []
    return parts


def _shrink_detector(model: MMConfig) -> None:
    """For images of some 128 pixels on a CPU: 64 channels, strides 4 to 32, anchors of 16 to 128, fewer samples."""
    width = 64
    model.neck.update(out_channels=width, num_outs=4, start_level=0, add_extra_convs=False)
    if "rpn_head" not in model:
        model.bbox_head.update(in_channels=width, feat_channels=width, stacked_convs=2)
        model.bbox_head.anchor_generator.update(strides=[4, 8, 16, 32])
        return
    model.rpn_head.update(in_channels=width, feat_channels=width)
    model.rpn_head.anchor_generator.update(scales=[4], strides=[4, 8, 16, 32])
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        if name in model.roi_head:
            model.roi_head[name].update(out_channels=width, finest_scale=32)
            model.roi_head[name].roi_layer.sampling_ratio = 1
    for head in _heads(model):
        head.in_channels = width
        if "fc_out_channels" in head:
            head.fc_out_channels = 256
        else:
            head.num_convs = 2
        if "conv_out_channels" in head:
            head.conv_out_channels = width
    rcnn = model.train_cfg.rcnn
    model.train_cfg.rpn.sampler.num = 64
    model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=100)
    for part in rcnn if isinstance(rcnn, list) else [rcnn]:
        part.sampler.num = 32
    model.test_cfg.rpn.update(nms_pre=200, max_per_img=100)


def _shrink_mask2former(head: MMConfig) -> None:
    head.num_queries = 40
    head.pixel_decoder.encoder.num_layers = 1
    head.transformer_decoder.num_layers = 3


def _set_segmentor(model: MMConfig, cfg: DictConfig, channels: list[int], classes: int) -> None:
    dense, head = cfg.dense, model.decode_head
    model.data_preprocessor.seg_pad_val = cfg.data.ignore_index
    model.data_preprocessor.test_cfg = dict(size_divisor=dense.size_divisor)
    # Training images of one batch have one size, the crop's, or are padded to a multiple.
    model.data_preprocessor.pop("size", None)
    model.data_preprocessor.update(
        dict(size=tuple(dense.crop)) if dense.crop else dict(size_divisor=dense.size_divisor)
    )
    for part in (head, model.get("auxiliary_head")):
        if part:
            part.update(num_classes=classes, ignore_index=cfg.data.ignore_index)
    if dense.method == "semantic_fpn":
        model.neck.in_channels = channels
    else:
        head.in_channels = channels
    if "auxiliary_head" in model:
        model.auxiliary_head.in_channels = channels[2]
    if dense.method == "mask2former":
        head.loss_cls.class_weight = [1.0] * classes + [0.1]
        if dense.small:
            _shrink_mask2former(head)
            head.train_cfg.num_points = 1024
    elif dense.small:
        if dense.method == "semantic_fpn":
            model.neck.out_channels = 64
            head.update(in_channels=[64] * 4)
        head.update(channels=64, dropout_ratio=0.0)
        if "auxiliary_head" in model:
            model.auxiliary_head.update(channels=64, dropout_ratio=0.0)
        if cfg.data.name == "digit_scenes":
            # Nine pixels of ten are background, and a small model would long see nothing else.
            head.loss_decode.class_weight = [0.1] + [1.0] * (classes - 1)


def _set_norm(part: Any, norm: str) -> None:
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ():
        if isinstance(value, dict) and value.get("type") in ("SyncBN", "BN"):
            value["type"] = norm
        _set_norm(value, norm)


def pipelines(cfg: DictConfig, masks: bool) -> tuple[list[dict], list[dict]]:
    """The transforms of training and of test images; prediction leaves those out that load."""
    return (_detection_pipelines if cfg.task == "detect" else _segmentation_pipelines)(cfg, masks)


def _detection_pipelines(cfg: DictConfig, masks: bool) -> tuple[list[dict], list[dict]]:
    dense = cfg.dense
    load = dict(type="LoadImage", max_pixels=cfg.data.max_pixels)
    annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=masks)
    several = dict(type="RandomChoiceResize", scales=[(dense.max_size, s) for s in dense.scales], keep_ratio=True)
    one = dict(type="Resize", scale=(dense.max_size, dense.scales[-1]), keep_ratio=True)
    train = [load, annotations]
    if cfg.augment.hflip:
        train.append(dict(type="RandomFlip", prob=cfg.augment.hflip))
    if dense.photometric:
        train.append(dict(type="PhotoMetricDistortion"))
    if dense.crop:
        size = (dense.crop[1], dense.crop[0])
        train += [
            dict(
                type="RandomResize",
                scale=size,
                ratio_range=tuple(dense.ratio_range or (1, 1)),
                resize_type="Resize",
                keep_ratio=True,
            ),
            dict(
                type="RandomCrop",
                crop_size=tuple(dense.crop),
                crop_type="absolute",
                recompute_bbox=masks,
                allow_negative_crop=True,
            ),
            dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=masks),
        ]
    elif dense.detr_crop:
        # DETR (arXiv 2005.12872, section 4): short sides of 400 to 600, crops of 384 to 600, then as the others.
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
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    return train, [load, one, annotations, dict(type="PackDetInputs", meta_keys=keys)]


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
        train.append(dict(type="RandomCrop", crop_size=tuple(dense.crop), cat_max_ratio=0.75, ignore_index=ignored))
    if cfg.augment.hflip:
        train.append(dict(type="RandomFlip", prob=cfg.augment.hflip))
    if dense.photometric:
        train.append(dict(type="PhotoMetricDistortion"))
    test = [load, one]
    if dense.test_divisor:
        test.append(dict(type="ResizeToMultiple", size_divisor=dense.test_divisor))
    # The labels stay as they are: predictions are resized to them.
    return [*train, dict(type="PackSegInputs")], [*test, annotations, dict(type="PackSegInputs")]


def runner_config(
    cfg: DictConfig,
    data: DetectionData | SegmentationData,
    length: Steps | None,
    work_dir: Path,
    device: torch.device,
) -> MMConfig:
    """All that MMEngine's Runner is made from besides the model; `mm` in `cfg` has the last word.

    Without a `length` it only evaluates.

    Raises:
        RunError: `mm` does not fit.
    """
    masks = cfg.task == "detect" and finds_masks(cfg)
    train, test = pipelines(cfg, masks)
    batch, workers = cfg.trainer.batch_size, distributed.check_open_files(_workers(cfg))
    loading = dict(batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    evaluated = dict(
        dataset=data.val.dataset(test, training=False),
        sampler=dict(type="DefaultSampler", shuffle=False),
        **loading,
    )
    if cfg.task == "segment" and not cfg.dense.small:
        evaluated["batch_size"] = 1  # mmseg tests batches of one size only
    result = MMConfig(
        dict(
            work_dir=str(work_dir),
            experiment_name=str(work_dir),  # else two runners of one second share a visualizer, and its folder
            default_scope=_SCOPES[cfg.task],
            val_dataloader=evaluated,
            val_cfg=dict(type="ValLoop"),
            val_evaluator=data.val.metrics(masks),
            # The run keeps its own checkpoints, and steps the schedule once an update.
            default_hooks=dict(logger=None, checkpoint=None, param_scheduler=None),
            log_level="ERROR",
            randomness=dict(seed=cfg.seed, deterministic=cfg.trainer.deterministic),
            launcher="pytorch" if distributed.world_size() > 1 else "none",
            model_wrapper_cfg=dict(type="MMDistributedDataParallel", find_unused_parameters=False)
            | ({} if device.type != "cpu" else dict(device_ids=None)),
            env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
        )
    )
    if length is not None:
        result.merge_from_dict(
            dict(
                train_dataloader=dict(
                    dataset=data.train.dataset(train, training=True),
                    sampler=dict(type="InfiniteSampler", shuffle=True, seed=cfg.seed),
                    **loading,
                ),
                train_cfg=dict(
                    type="IterBasedTrainLoop",
                    max_iters=length.updates * length.accumulate,
                    val_interval=length.evaluate_every * length.accumulate,
                ),
                optim_wrapper=_optimizer(cfg, length, device),
                param_scheduler=_schedule(cfg, length),
            )
        )
    changes = OmegaConf.to_container(cfg.mm, resolve=True)
    result = _override(result, {key: value for key, value in changes.items() if key != "model"})
    if cfg.task == "segment":
        confusion = dict(type="Confusion", classes=len(data.classes), ignore_index=data.ignore_index)
        result.val_evaluator = [result.val_evaluator, confusion]
    return result


@contextmanager
def mm_errors(cfg: DictConfig) -> Iterator[None]:
    """Say in a sentence that `mm` has what MMEngine can't use: it builds most parts when it is about to run."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error.args[0] if error.args else error)
        unknown = isinstance(error, KeyError) and " registry" in reason
        if not unknown and not cfg.mm.keys() - {"model"}:
            raise
        reason = " ".join(reason.partition(" Please check")[0].split())[:300].rstrip(".")
        raise RunError(f"mm can't be used ({reason}): correct it, every `type` in it is a registered name.") from error


def _override(settings: MMConfig, changes: dict[str, Any]) -> MMConfig:
    """`settings` with what `mm` in the configuration says."""
    try:
        settings.merge_from_dict(changes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"mm={changes} does not fit the configuration of mmengine: {error}") from error
    return settings


def _optimizer(cfg: DictConfig, length: Steps, device: torch.device) -> dict[str, Any]:
    optim = cfg.optim
    optimizer = dict(type=optim.opt, lr=learning_rate(cfg), weight_decay=optim.weight_decay, momentum=optim.momentum)
    optimizer |= {
        name: list(optim[name]) if name == "betas" else optim[name] for name in ("betas", "eps") if optim[name]
    }
    wrapper = dict(
        type="SkipBadLossOptimWrapper",
        constructor="TimmOptimWrapperConstructor",
        optimizer=optimizer,
        paramwise_cfg=dict(
            layer_decay=optim.layer_decay,
            no_decay=None if cfg.dense.no_decay is None else list(cfg.dense.no_decay),
            backbone_lr=cfg.dense.backbone_lr,
        ),
        accumulative_counts=length.accumulate,
    )
    if optim.clip_grad is not None:
        wrapper["clip_grad"] = dict(max_norm=optim.clip_grad)
    dtype = config.AMP[cfg.trainer.amp.lower()]
    if dtype:
        if device.type == "cpu":
            raise RunError(
                f"trainer.amp={cfg.trainer.amp} can't be used with task={cfg.task} on a CPU: leave it out there."
            )
        wrapper |= dict(type="SkipBadLossAmpOptimWrapper", dtype=dtype)
    return wrapper


def learning_rate(cfg: DictConfig) -> float:
    """`optim.lr`, or what suits fine-tuning a transformer."""
    return cfg.optim.lr if cfg.optim.lr is not None else 1e-4


def _schedule(cfg: DictConfig, length: Steps) -> list[dict[str, Any]]:
    """Counted in updates, whatever MMEngine calls it."""
    schedule, end = cfg.schedule, length.updates
    warmup = min(cfg.dense.warmup_updates, end)
    parts: list[dict[str, Any]] = []
    if warmup > 1:  # the last update of the warm-up has the whole learning rate
        parts.append(dict(type="LinearLR", start_factor=cfg.dense.warmup_factor, by_epoch=False, begin=0, end=warmup))
    if schedule.sched == "multistep":
        milestones = [epoch * length.per_epoch for epoch in schedule.decay_milestones]
        parts.append(
            dict(type="MultiStepLR", by_epoch=False, begin=0, end=end, milestones=milestones, gamma=schedule.decay_rate)
        )
    elif warmup == end:
        pass  # nothing comes after the warm-up
    elif schedule.sched == "poly":
        parts.append(
            dict(
                type="PolyLR", by_epoch=False, begin=warmup, end=end, power=schedule.decay_rate, eta_min=schedule.min_lr
            )
        )
    elif schedule.sched == "cosine":
        parts.append(dict(type="CosineAnnealingLR", by_epoch=False, begin=warmup, end=end, eta_min=schedule.min_lr))
    return parts


def _workers(cfg: DictConfig) -> int:
    """Worker processes: few where images are small, since starting one takes seconds."""
    if cfg.data.num_workers is not None:
        return cfg.data.num_workers
    return 0 if cfg.dense.small else distributed.spare_cores()


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent
