"""Class activation maps by the package grad-cam, for classifiers of timm whose features are maps."""

from __future__ import annotations

import numpy as np
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from zoo.messages import UserError
from zoo.opening import OpenModel


def class_names(model: nn.Module) -> list[str] | None:
    """Those of a run, or of ImageNet where the number of classes says that it is; None where they are not known."""
    if model.pretrained_cfg.get("label_names"):
        return list(model.pretrained_cfg["label_names"])
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i).partition(",")[0] for i in range(model.num_classes)]


def find_class(given: str, names: list[str] | None, count: int) -> int:
    """The number of the class of this name or number.

    Raises:
        UserError: there is none.
    """
    if names and given in names:
        return names.index(given)
    if given.isdecimal() and int(given) < count:
        return int(given)
    known = f", or one of {', '.join(names)}" if names and len(names) <= 20 else ", or a class's name" * bool(names)
    raise UserError(f"there is no class {given!r}: give a number from 0 to {count - 1}{known}.")


def layer(loaded: OpenModel, stage: int | None) -> tuple[nn.Module, int]:
    """The module whose output is a stage's features (the last's if None), and their channels.

    Raises:
        UserError: there is no such stage, or the model does not say where its features are.
    """
    infos = getattr(loaded.model, "feature_info", None)
    if not infos:
        raise UserError(f"{loaded.name} has no feature maps that a class activation map could be made of.")
    infos = list(infos)
    if stage is not None and stage > len(infos):
        raise UserError(f"{loaded.name} has no stage {stage}: give a number from 1 to {len(infos)}.")
    info = infos[-1 if stage is None else stage - 1]
    return loaded.model.get_submodule(info["module"]), info["num_chs"]


def heat(model: nn.Module, images: Tensor, layer: nn.Module, channels: int, target: int) -> np.ndarray:
    """Grad-CAM of one image for the class `target`: (H, W) of the image, from 0 to 1.

    Raises:
        UserError: the output of `layer` is no map of `channels`.
    """

    def as_maps(x: Tensor) -> Tensor:
        if x.ndim == 4 and x.shape[1] == channels:
            return x
        if x.ndim == 4 and x.shape[-1] == channels:
            return x.permute(0, 3, 1, 2)
        raise UserError(
            f"the features there have the shape {tuple(x.shape)} and are no maps of {channels} channels: a class "
            "activation map needs a model whose features are maps."
        )

    with GradCAM(model, target_layers=[layer], reshape_transform=as_maps) as cam:
        found = cam(images, targets=[ClassifierOutputTarget(target)])[0]
    return found / (found.max() or 1)  # the package's largest value is a little less than 1
