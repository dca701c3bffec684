"""What a detector or segmentor costs: the multiply-adds for one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.models.detectors import DetectionTransformer, MaskFormer, TwoStageDetector
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from zoo.costs import counting, without_values
from zoo.messages import one_line
from zoo.recipes.logs import log


def multiply_adds(model: nn.Module, size: Sequence[int]) -> int:
    """Multiply-adds of a detector or segmentor for one image of `size` (H, W), as PyTorch counts them.

    Matrix products and convolutions count, and nothing else. A detector of two stages is counted with as many proposals
    and masks as it keeps at most, which is how papers count (1000 and 100). Auxiliary heads, which only training uses,
    do not count.

    The model is not changed, and may be on the meta device unless it is a DINO or a Mask2Former. Nothing is computed
    except by their heads, which read the sizes of the feature maps from tensors.
    """
    head = getattr(model, "decode_head", None)  # of a segmentor
    computed = isinstance(model, DetectionTransformer | MaskFormer) or isinstance(head, MaskFormerHead)
    parts = ("backbone.", "neck.")
    model = without_values(model, lambda name: not computed or name.startswith(parts)).eval()
    with counting() as counter:
        features = model.extract_feat(torch.empty(1, 3, *size, device="meta"))
        if computed:
            device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
            _run_transformer(model, [torch.rand(x.shape, device=device) for x in features], tuple(size))
        elif head is not None:
            model.decode_head(features)
        elif isinstance(model, TwoStageDetector):
            model.rpn_head(features)
            _run_roi_heads(model)
            if hasattr(model, "semantic_head"):
                model.semantic_head(features)
        else:
            model.bbox_head(features)
    return counter.get_total_flops() // 2


def cost_of_evaluation(model: nn.Module, dataset: Any) -> dict[str, Any]:
    """The entries of `summary.json` on what the first image of `dataset`, the validation images, costs.

    `multiply_adds` is None if the operations can't be counted, which must not make a run fail; `image_size` is the
    height and width after resizing and padding.
    """
    height, width = dataset[0]["inputs"].shape[1:]
    prepared = model.data_preprocessor
    divisor = getattr(prepared, "pad_size_divisor", None) or (prepared.test_cfg or {}).get("size_divisor") or 1
    size = [-(-side // divisor) * divisor for side in (height, width)]
    try:
        count = multiply_adds(model, size)
    except Exception as error:  # a model of timm may do anything on the meta device
        log.warning("The multiply-adds could not be counted: %s.", one_line(error, 300))
        count = None
    return {"multiply_adds": count, "image_size": size}


def _run_transformer(model: nn.Module, features: list[Tensor], size: tuple[int, ...]) -> None:
    sample = DetDataSample(metainfo=dict(batch_input_shape=size, img_shape=size))
    if isinstance(model, DetectionTransformer):
        model.bbox_head(**model.forward_transformer(features, [sample]))
    else:
        head = model.panoptic_head if isinstance(model, MaskFormer) else model.decode_head
        head(features, [sample])


def _run_roi_heads(model: TwoStageDetector) -> None:
    """Run the heads on regions without values; cutting them out of the maps has no matrix products."""
    heads = model.roi_head

    def run(extractors: nn.Module, parts: nn.Module, count: int) -> None:
        cascade = isinstance(parts, nn.ModuleList)
        for extractor, part in zip(extractors, parts, strict=True) if cascade else [(extractors, parts)]:
            part(torch.empty(count, extractor.out_channels, *extractor.roi_layers[0].output_size, device="meta"))

    run(heads.bbox_roi_extractor, heads.bbox_head, model.rpn_head.test_cfg.max_per_img)
    if heads.with_mask:
        run(heads.mask_roi_extractor, heads.mask_head, heads.test_cfg.max_per_img)
