"""Class activation maps with the package grad-cam, for classifiers of timm whose features are maps."""

from __future__ import annotations

import numpy as np
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from zoo.messages import UserError
from zoo.opening import OpenModel


def class_names(model: nn.Module) -> list[str] | None:
    """The class names of a run, or of ImageNet if the number of classes suggests it; None if they are unknown."""
    if model.pretrained_cfg.get("label_names"):
        return list(model.pretrained_cfg["label_names"])
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i).partition(",")[0] for i in range(model.num_classes)]


def find_class(given: str, names: list[str] | None, count: int) -> int:
    """The index of the class that `given` names or numbers.

    Raises:
        UserError: There is no such class.
    """
    if names and given in names:
        return names.index(given)
    if given.isdecimal() and int(given) < count:
        return int(given)
    known = (
        f", or one of {', '.join(names)}" if names and len(names) <= 20 else ", or the name of a class" * bool(names)
    )
    raise UserError(f"there is no class {given!r}: give a number from 0 to {count - 1}{known}.")


def layer(loaded: OpenModel, stage: int | None) -> tuple[nn.Module, int]:
    """The module that outputs the features of `stage`, the last one if None, and their number of channels.

    Raises:
        UserError: There is no such stage, or the model has no `feature_info`.
    """
    infos = getattr(loaded.model, "feature_info", None)
    if not infos:
        raise UserError(f"{loaded.name} has no feature maps, which a class activation map needs.")
    infos = list(infos)
    if stage is not None and stage > len(infos):
        raise UserError(f"{loaded.name} has no stage {stage}: give a number from 1 to {len(infos)}.")
    info = infos[-1 if stage is None else stage - 1]
    module = loaded.model.get_submodule(info["module"])
    return getattr(module, "maps", module), info["num_chs"]  # a stage that also returns a class token has `maps`


def heat(model: nn.Module, images: Tensor, layer: nn.Module, channels: int, target: int) -> np.ndarray:
    """Grad-CAM of one image for the class `target`: (H, W), from 0 to 1.

    Raises:
        UserError: The output of `layer` is not a map with `channels` channels.
    """

    def as_maps(x: Tensor) -> Tensor:
        if x.ndim == 4 and x.shape[1] == channels:
            return x
        if x.ndim == 4 and x.shape[-1] == channels:
            return x.permute(0, 3, 1, 2)
        raise UserError(
            f"the features have the shape {tuple(x.shape)} and are not maps of {channels} channels: use a model whose "
            "features are maps."
        )

    with GradCAM(model, target_layers=[layer], reshape_transform=as_maps) as cam:
        found = cam(images, targets=[ClassifierOutputTarget(target)])[0]
    return found / (found.max() or 1)  # grad-cam's largest value is slightly below 1
