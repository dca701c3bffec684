"""Distillation (arXiv 1503.02531): a classifier also learns from a teacher, by timm's tasks.

The teacher sees the augmented images that the student sees, normalized as it expects, in evaluation mode and without
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.task.distillation import DistillationTeacher, FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn

from zoo.messages import UserError, first_few, one_line
from zoo.opening import OpenModel, open_model
from zoo.recipes.config import Config


class Teacher(DistillationTeacher):
    """timm's teacher for images that are normalized for a student.

    Args:
        opened: The teacher.
        student: timm's data configuration of the student, whose `mean` and `std` normalized the images.
        order: The number of each of the student's classes among the teacher's.
    """

    def __init__(self, opened: OpenModel, student: dict[str, Any], order: Sequence[int]):
        super().__init__(opened.model.requires_grad_(False))
        self.opened = opened
        self.input_size = student["input_size"]
        mean, std = _mean_std(student)
        own_mean, own_std = _mean_std(opened.config)
        self.register_buffer("factor", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def normalize_input(self, input: Tensor, *_: Any) -> Tensor:
        """The images (B, C, H, W) as the teacher expects them."""
        return input * self.factor + self.shift

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        """The logits (B, classes) of the student's classes in their order, or the pooled features (B, channels)."""
        found = super().forward(input, return_features)
        return found if return_features else found[:, self.order]


def _mean_std(data_config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of the channels, each (1, C, 1, 1)."""
    mean, std = (torch.tensor(data_config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return mean, std


def open_teacher(
    cfg: Config, student: nn.Module, data_config: dict[str, Any], classes: Sequence[str], multi_label: bool = False
) -> Teacher:
    """The teacher that `cfg.distill` names, on the CPU.

    Args:
        cfg: The configuration.
        student: The model to train.
        data_config: timm's data configuration of the student.
        classes: The names of the student's classes.
        multi_label: Whether an image has several of them.

    Raises:
        UserError: The teacher does not exist, or it can't teach this student.
    """
    distill, size = cfg.distill, data_config["input_size"]
    if multi_label and distill.match == "logits":
        raise UserError(
            "distill.match=logits can't be used if images have several labels, as it compares the probabilities of "
            "classes that exclude each other: use distill.match=features."
        )
    opened = open_model(distill.teacher, _weights(cfg), size=size[1:])
    teacher = Teacher(opened, data_config, _order(cfg, opened, classes))
    image = torch.zeros(1, *size)
    try:
        with torch.no_grad():
            teacher(teacher.normalize_input(image), distill.match == "features")
            for model in (student, opened.model) if distill.match == "features" else ():
                _features(model, image)
    except Exception as error:  # a model of timm can raise anything
        raise UserError(
            f"distill.teacher={distill.teacher} and {cfg.model} can't be used together with distill.match="
            f"{distill.match} and images {'x'.join(map(str, size))}: {one_line(error, 300)}."
        ) from error
    return teacher


def _weights(cfg: Config) -> bool | str:
    """What `open_model` takes as the teacher's weights."""
    if cfg.distill.weights:
        return cfg.distill.weights
    return not (":" in cfg.distill.teacher or Path(cfg.distill.teacher).is_dir())


def _order(cfg: Config, opened: OpenModel, classes: Sequence[str]) -> list[int]:
    """The number of each of `classes` among those of the teacher, by name if the teacher knows the names."""
    if cfg.distill.match == "features":
        return []
    teacher, count = cfg.distill.teacher, opened.model.num_classes
    names = opened.model.pretrained_cfg.get("label_names")
    if names and not set(classes) - set(names):
        return [list(names).index(name) for name in classes]
    fault = f"has {count} classes, but the data have {len(classes)}"
    if names:
        fault = f"does not know {first_few([name for name in classes if name not in names], 3)}"
    elif count == len(classes):
        return list(range(count))
    raise UserError(
        f"distill.teacher={teacher} {fault}: give a teacher that was trained on these classes, or use its features "
        "alone with distill.match=features."
    )


def make_task(
    cfg: Config, student: nn.Module, teacher: Teacher, loss: nn.Module, device: torch.device
) -> LogitDistillationTask | FeatureDistillationTask:
    """timm's task that trains `student` on `device`; `loss` maps its logits and the labels to their loss."""
    distill = cfg.distill
    teacher = teacher.to(device)
    if cfg.trainer.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    options = {"task_loss_weight": distill.label_weight, "distill_loss_weight": distill.weight, "verbose": False}
    if distill.match == "logits":
        return LogitDistillationTask(student, teacher, loss, temperature=distill.temperature, device=device, **options)
    image = torch.zeros(1, *teacher.input_size, device=device)
    widths = (_features(model, image).shape[1] for model in (student, teacher.model))
    return FeatureDistillationTask(
        student,
        teacher,
        loss,
        **dict(zip(("student_feature_dim", "teacher_feature_dim"), widths, strict=True)),
        device=device,
        **options,
    )


@torch.no_grad()
def _features(model: nn.Module, image: Tensor) -> Tensor:
    """The pooled features (1, channels) of an image."""
    training = model.training
    try:
        found = model.eval().forward_head(model.forward_features(image), pre_logits=True)
    finally:
        model.train(training)
    if found.ndim != 2:
        raise ValueError(f"the features have the shape {tuple(found.shape)}, and not one number for each channel")
    return found


def trained_model(module: nn.Module) -> nn.Module:
    """The classifier in the trainable module of a task, without wrappers and without the projection of its features."""
    module = unwrap_model(module)
    return module.student if isinstance(module, FeatureDistillationTrainableModule) else module


def describe(cfg: DictConfig, teacher: Teacher) -> str:
    """Describe the teacher in one line."""
    distill = cfg.distill
    how = f"logits at temperature {distill.temperature:g}" if distill.match == "logits" else "features"
    size = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    return (
        f"teacher: {distill.teacher}, {size:.2f} M parameters, {teacher.opened.weights}; the loss on its {how} counts "
        f"{distill.weight:g} times, that on the labels {distill.label_weight:g} times"
    )
