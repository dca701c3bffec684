"""Detectors and segmentors, panoptic ones too: the configurations of mmdet and mmseg with a backbone from timm.

Models start from the configurations that ship inside the packages. The differences (backbone, channels, classes) are
set here.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config as MMConfig
from mmengine.registry import MODELS, init_default_scope
from omegaconf import DictConfig, OmegaConf

from zoo import families
from zoo.messages import UserError, one_line
from zoo.recipes import batchnorm, distributed
from zoo.recipes.dense import views
from zoo.recipes.dense.backbone import TimmBackbone
from zoo.recipes.dense.mm_keys import override, warn_misspelt
from zoo.recipes.dense.settings import SCOPES, finds_masks

# Paths below the packages' folder of configurations.
_DETECTORS = {
    "mask_rcnn": "_base_/models/mask-rcnn_r50_fpn.py",
    # Heads of four convolutions and a linear layer with BatchNorm and GIoU, as in the paper on Swin.
    "cascade_mask_rcnn": "convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py",
    "retinanet": "_base_/models/retinanet_r50_fpn.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
}
_PANOPTIC = {
    "mask2former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
    "panoptic_fpn": "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py",
}
_SEGMENTORS = {
    "upernet": "_base_/models/upernet_r50.py",
    "semantic_fpn": "_base_/models/fpn_r50.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
}


def model_config(cfg: DictConfig, classes: Sequence[str], device: torch.device, pretrained: bool | str) -> MMConfig:
    """The model of `cfg` for `classes`; its backbone starts from `pretrained`."""
    dense, task = cfg.dense, cfg.task
    file = {"detect": _DETECTORS, "segment": _SEGMENTORS, "panoptic": _PANOPTIC}[task][dense.method]
    path = _package(SCOPES[task]) / ".mim" / "configs" / file
    model = MMConfig.fromfile(path, import_custom_modules=False).model
    model.pop("pretrained", None)
    arguments = backbone_arguments(cfg)
    backbone = TimmBackbone(**arguments)  # its channels determine the rest of the model
    channels = list(backbone.channels)
    model.backbone = dict(arguments, type="mmengine.TimmBackbone", pretrained=pretrained)
    for name in ("mean", "std"):
        model.data_preprocessor[name] = [255 * value for value in cfg.data[name] or getattr(backbone, name)]
    if task == "segment":
        _set_segmentor(model, cfg, channels, len(classes))
    else:
        _set_detector(model, cfg, channels, len(classes))
    _set_views(model, cfg)
    _set_norm(model, "SyncBN" if _synchronised(device) else "BN")
    changes = OmegaConf.to_container(cfg.mm, resolve=True)
    warn_misspelt(model, changes.get("model", {}))
    return override(MMConfig(dict(model=model)), {"model": changes.get("model", {})}).model


def build_model(
    cfg: DictConfig, classes: Sequence[str], device: torch.device, pretrained: bool | str
) -> torch.nn.Module:
    """The model of `cfg` for `classes`; its backbone starts from `pretrained`.

    Raises:
        UserError: It can't be built.
    """
    settings = model_config(cfg, classes, device, pretrained)
    init_default_scope(SCOPES[cfg.task])
    try:
        with warnings.catch_warnings():
            # The setting can't be changed if classes have weights.
            warnings.filterwarnings("ignore", message="Default ``avg_non_ignore``")
            model = MODELS.build(settings)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"dense.method={cfg.dense.method} can't be built on {cfg.model}: {one_line(error, 400)}."
        ) from error
    if views.used(cfg) and not hasattr(model, "takes_views"):
        raise UserError(f"eval.tta and eval.window can't be used with mm.model.type={settings.type}: leave out one.")
    if cfg.task == "segment" and _synchronised(device):
        model.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    return model


def memory_format(cfg: DictConfig, model: torch.nn.Module) -> torch.nn.Module:
    """`model` in the memory format that `trainer.channels_last` sets; its convolutions pass the format on."""
    return model.to(memory_format=torch.channels_last) if cfg.trainer.channels_last else model


def check_batchnorm(cfg: DictConfig, model: torch.nn.Module) -> None:
    """Refuse a batch of one image if it can't train BatchNorm; layers that need labels are not checked.

    Args:
        cfg: The configuration.
        model: The detector or segmentor, on the CPU.

    Raises:
        UserError: Such a batch can't train the BatchNorm of `model`.
    """
    divisor, side = cfg.dense.size_divisor, min(cfg.dense.scales)
    size = cfg.dense.crop or [-(-side // divisor) * divisor] * 2
    image = torch.zeros(1, 3, *size)
    whole = cfg.task == "segment" and cfg.dense.method != "mask2former"
    run = (lambda: model(image, mode="tensor")) if whole else (lambda: model.extract_feat(image))
    batchnorm.check_batchnorm(model, run, "dense.crop" if cfg.dense.crop else "dense.scales")


def _synchronised(device: torch.device) -> bool:
    """Whether BatchNorm is synchronized over all processes, which needs accelerators."""
    return distributed.world_size() > 1 and device.type != "cpu"


def backbone_arguments(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of TimmBackbone without its weights."""
    dense = cfg.dense
    return dict(
        model=cfg.model,
        # The official code has the same backbones for panoptic segmentation as for detection.
        model_kwargs=families.dense_kwargs(cfg.model, "segment" if cfg.task == "segment" else "detect")
        | OmegaConf.to_container(cfg.model_kwargs, resolve=True),
        out_indices=_out_indices(cfg),
        output_norm=dense.output_norm,
        frozen_stages=dense.frozen_stages,
        norm_eval=dense.norm_eval,
        grad_checkpointing=cfg.trainer.grad_checkpointing,
        task="segment" if cfg.task == "segment" else "detect",
    )


def _out_indices(cfg: DictConfig) -> list[int] | None:
    """The stages that the method uses: RetinaNet and DINO omit the first of the four."""
    if cfg.dense.out_indices is not None:
        return list(cfg.dense.out_indices)
    if cfg.dense.method == "dino" or (cfg.dense.method == "retinanet" and not cfg.dense.small):
        return [-3, -2, -1]
    return None


def _set_detector(model: MMConfig, cfg: DictConfig, channels: list[int], classes: int) -> None:
    dense, panoptic = cfg.dense, cfg.task == "panoptic"
    model.data_preprocessor.pad_size_divisor = dense.size_divisor
    things = dense.num_things if panoptic else classes
    numbers = dict(num_things_classes=things, num_stuff_classes=classes - things)
    if panoptic:
        model.data_preprocessor.seg_pad_value = classes  # the label of pixels without a segment
    if dense.method == "mask2former":
        head = model.panoptic_head
        head.update(in_channels=channels, strides=[4, 8, 16, 32], **numbers)
        head.loss_cls.class_weight = [1.0] * classes + [0.1]
        model.panoptic_fusion_head.update(numbers)
        if panoptic:
            model.panoptic_fusion_head.type = "PanopticFusionHead"
        # Images that are smaller than the crop are padded to its size; for others this changes nothing.
        model.data_preprocessor.batch_augments = (
            [
                dict(
                    type="BatchFixedSizePad",
                    size=tuple(dense.crop),
                    img_pad_value=0,
                    pad_mask=True,
                    mask_pad_value=0,
                    pad_seg=panoptic,
                    seg_pad_value=classes,
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
    if dense.method == "panoptic_fpn":
        model.type = "PanopticFPNWithInstances"
        model.semantic_head.update(numbers)
        model.semantic_head.loss_seg.ignore_index = classes
        model.panoptic_fusion_head.update(numbers, type="FusionByScore")
        model.test_cfg.panoptic.score_thr = model.test_cfg.rcnn.score_thr
        model.test_cfg.rcnn.score_thr = 0.05  # COCO's AP counts objects of low scores, too
    if not finds_masks(cfg) and "roi_head" in model:
        for name in ("mask_head", "mask_roi_extractor"):
            model.roi_head.pop(name)
        model.data_preprocessor.pad_mask = False
    for head in _heads(model):
        head.num_classes = things
    if dense.method == "dino":
        if dense.small:
            model.num_queries = 100
            model.encoder.num_layers = model.decoder.num_layers = 2
            model.dn_cfg.group_cfg.num_dn_queries = 20
        return
    if dense.small:
        _shrink_detector(model)
    elif dense.method == "retinanet":
        model.neck.start_level = 0  # of the three stages that the backbone returns


def _heads(model: MMConfig) -> list[Any]:
    """The heads of a detector that predict classes."""
    parts = [model.bbox_head] if "bbox_head" in model else []
    for name in ("bbox_head", "mask_head"):
        part = model.get("roi_head", {}).get(name)
        parts += part if isinstance(part, list) else [part] if part else []
    return parts


def _shrink_detector(model: MMConfig) -> None:
    """Shrink a detector for images of some 128 pixels: 64 channels, strides of 4 to 32, anchors of 16 to 128 pixels."""
    width = 64
    model.neck.update(out_channels=width, num_outs=4, start_level=0, add_extra_convs=False)
    if "semantic_head" in model:
        model.semantic_head.update(in_channels=width, inner_channels=width)
        model.test_cfg.panoptic.stuff_area_limit = 64
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
    # The training images of a batch are crops of one size, or are padded to a multiple.
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
            # Nine of ten pixels are background: without weights, a small model would predict nothing else for long.
            head.loss_decode.class_weight = [0.1] + [1.0] * (classes - 1)


def _set_views(model: MMConfig, cfg: DictConfig) -> None:
    """Take the classes that can predict an image in several parts and ways, and the window that they use."""
    part = views.window(cfg)
    if cfg.task == "detect":
        model.type = f"{model.type}OfViews"
        model.test_cfg.update(part)
    elif cfg.task == "segment":
        model.type = "Segmentor"
        if part:
            model.test_cfg = dict(mode="slide", crop_size=part["window"], stride=part["stride"])


def _set_norm(part: Any, norm: str) -> None:
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ():
        if isinstance(value, dict) and value.get("type") in ("SyncBN", "BN"):
            value["type"] = norm
        _set_norm(value, norm)


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent
