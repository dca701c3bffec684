"""The schema of `zoo-train` and `zoo-eval`: every key, its type, its default and its meaning.

Hydra checks every configuration file and every override against these dataclasses.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.messages import UserError, similarity
from zoo.recipes.errors import NoEffect

_DENSE = ("detect", "segment", "panoptic")
DETECTORS = ("mask_rcnn", "cascade_mask_rcnn", "retinanet", "dino", "mask2former")
SEGMENTORS = ("upernet", "semantic_fpn", "mask2former")
PANOPTIC_METHODS = ("mask2former", "panoptic_fpn")


@dataclass(frozen=True)
class Between:
    """Finite numbers from `low` to `high`, or lists or mappings of them.

    Attributes:
        low: The smallest number.
        high: The largest number.
        above: Whether `low` itself is excluded.
        below: Whether `high` itself is excluded.
        numbers: The length of a list, in words for messages.
        lengths: The lengths that a list may have; any if empty.
        rising: Whether the numbers of a list must not decrease.
    """

    low: float
    high: float = 1e9
    above: bool = False
    below: bool = False
    numbers: str = ""
    lengths: tuple[int, ...] = ()
    rising: bool = False

    def allows(self, value: Any) -> bool:
        """Whether `value`, a number, a list or a mapping, is allowed."""
        if isinstance(value, str | bool):  # where a key takes values of any type
            return False
        if not isinstance(value, int | float):
            numbers = _numbers(value)
            right = len(numbers) in self.lengths if self.lengths else bool(numbers) or isinstance(value, Mapping)
            return right and all(map(self.allows, numbers)) and (not self.rising or numbers == sorted(numbers))
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)  # both are false for NaN

    def __str__(self) -> str:
        if self.above and self.below:
            words = f"between {self.low:g} and {self.high:g}"
        else:
            words = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
            if self.below:
                words += f" and below {self.high:g}"
            elif self.high <= 100:  # larger limits only exclude absurd values
                words += f", at most {self.high:g}"
        return f"{self.numbers} {words}".strip()


@dataclass(frozen=True)
class OrAuto(Between):
    """A number, as `Between` has it, or the word auto."""

    def allows(self, value: Any) -> bool:
        """Whether `value` is allowed."""
        return value == "auto" if isinstance(value, str) else super().allows(value)

    def __str__(self) -> str:
        return f"{super().__str__()}, or auto"


def _numbers(value: Any) -> list[float]:
    """The numbers of a list or a mapping."""
    return list(value.values() if isinstance(value, Mapping) else value)


@dataclass(frozen=True)
class OneOf:
    """One of `words`."""

    words: tuple[str, ...]

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return value in self.words

    def __str__(self) -> str:
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"


@dataclass(frozen=True)
class Like:
    """Text that matches the regular expression `form`, which `meaning` describes in messages."""

    form: str
    meaning: str

    def allows(self, value: Any) -> bool:
        """Whether `value` matches."""
        return re.fullmatch(self.form, str(value)) is not None

    def __str__(self) -> str:
        return self.meaning


SHARE = Between(0, 1)
COUNT = Between(1)
PERCENT = Between(0, 100)
FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def option(
    default: Any, help: str, allowed: Between | OneOf | Like | None = None, aliases: tuple[str, ...] = ()
) -> Any:
    """A dataclass field with its metadata.

    Args:
        default: The default value, or a function that returns it.
        help: The meaning of the key, for `--help`.
        allowed: The values that the key takes, if its type does not say this.
        aliases: Other names that users may write, from which `nearest_key` finds the key.
    """
    metadata = {"help": help, "allowed": allowed, "aliases": aliases}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """The source of the images, and how they are read."""

    name: str = option(
        "",
        "name of the data set: `digits`, `csv`, or what timm.data.create_dataset reads: empty (image folders), `tar`, "
        "`hfds/...`, `hfids/...`, `tfds/...`, `wds/...`, `torch/...`",
    )
    root: str | None = option(None, "root folder of the data; image folders may be in its subfolders train/ and val/")
    train_split: str = option("train", "training split: its name, or its folder below the root")
    val_split: str = option("val", "validation split: its name, or its folder below the root")
    val_fraction: float = option(
        0.1,
        "validation fraction: share of each class that is held out if nothing is for validation",
        Between(0, 1, above=True, below=True),
    )
    num_classes: int | None = option(None, "number of classes, if the data set does not provide it", Between(1, 1e6))
    class_map: str | None = option(None, "class map: file with one class name per line, in the order of the labels")
    csv: str | None = option(None, "CSV file (data=csv): paths of images, below data.root or beside it, and labels")
    file_column: str = option("file", "file column (csv): header of the paths of images")
    label_column: str | None = option(None, "label column (csv): header of the labels; `label` or `labels` if null")
    split_column: str | None = option("split", "split column (csv): header of the splits, if there is such a column")
    multi_label: bool | None = option(
        None, "multi-label (csv): any number of labels per image; if null, for `labels`", aliases=("multilabel",)
    )
    label_separator: str | None = option(
        None, "label separator (csv): between the labels in a cell; |, ; or a comma if null"
    )
    input_key: str | None = option(None, "input key: field of the image (hfds, wds), or file extensions (folders)")
    target_key: str | None = option(None, "target key: field of the label (hfds, wds)")
    num_samples: int | None = option(
        None, "number of training samples, if a stream (hfids, wds) does not provide it", Between(1, 1e12)
    )
    sampling: str = option(
        "uniform",
        "sampling of training images: uniform, or balanced (as many of each class)",
        OneOf(("uniform", "balanced")),
        aliases=("sampler", "weighted_sampler", "balanced_sampling"),
    )
    val_num_samples: int | None = option(
        None, "number of validation samples, if a stream does not provide it", Between(1, 1e12)
    )
    download: bool = option(False, "download the data set, if the reader can")
    img_size: int | None = option(None, "image size in pixels; that of the model if null", Between(1, 1e5))
    mean: list[float] | None = option(
        None, "mean of each channel, 0-1; that of the model if null", Between(0, 1, numbers="a list of numbers,")
    )
    std: list[float] | None = option(
        None,
        "standard deviation of each channel, 0-1; that of the model if null",
        Between(0, 1, above=True, numbers="a list of numbers,"),
        aliases=("standard_deviation",),
    )
    interpolation: str | None = option(None, "interpolation for resizing; that of the model if null", OneOf(FILTERS))
    crop_pct: float | None = option(
        None, "share of the resized image that evaluation crops; that of the model if null", Between(0.1, 2)
    )
    num_workers: int | None = option(
        None,
        "number of worker processes that load images; if null, it depends on the CPU cores; results do not depend on "
        "it, except with streams (hfids, wds)",
        Between(0, 1024),
    )
    max_corrupt: int = option(
        100, "maximum number of corrupt images: they are skipped and logged; one more ends the run", Between(0)
    )
    max_pixels: int = option(
        178_956_970,
        "maximum number of pixels: larger images count as corrupt; default: Pillow's limit",
        Between(1, 2**40 - 1),
    )
    same_images: bool = option(False, "same images: allow validation on images that are also training images")
    check_files: int = option(
        20000,
        "number of files that are checked before training for text saved as an image; 0 for none, -1 for all",
        Between(-1),
    )
    train_ann: str | None = option(
        None,
        "training annotations (detect, panoptic): COCO JSON, absolute or below data.root",
        aliases=("training_annotations",),
    )
    val_ann: str | None = option(
        None,
        "validation annotations (detect, panoptic): COCO JSON, absolute or below data.root",
        aliases=("validation_annotations",),
    )
    train_images: str | None = option(None, "folder of the training images, absolute or below data.root; found if null")
    val_images: str | None = option(None, "folder of the validation images, absolute or below data.root; found if null")
    train_labels: str | None = option(
        None, "training labels (segment, panoptic): folder of PNGs, absolute or below data.root"
    )
    val_labels: str | None = option(
        None, "validation labels (segment, panoptic): folder of PNGs, absolute or below data.root"
    )
    ignore_index: int = option(255, "ignore index (segment): label of pixels that do not count", Between(-255, 65535))
    reduce_zero_label: bool | None = option(
        None, "reduce zero label (segment): 0 in the PNGs is not a class, and classes start at 1, as in ADE20K"
    )


@dataclass
class AugmentConfig:
    """Augmentation of training images. Names and meanings are those of timm."""

    scale: list[float] = option(
        lambda: [0.35, 1.0],
        "scale of the random resized crop: its share of the area",
        Between(0, 1e3, above=True, numbers="two rising numbers", lengths=(2,), rising=True),
    )
    ratio: list[float] = option(
        lambda: [3 / 4, 4 / 3],
        "ratio of width to height of the random resized crop",
        Between(0, 1e3, above=True, numbers="two rising numbers", lengths=(2,), rising=True),
    )
    hflip: float = option(0.5, "horizontal flip probability", SHARE, aliases=("horizontal_flip",))
    vflip: float = option(0.0, "vertical flip probability", SHARE, aliases=("vertical_flip",))
    color_jitter: float = option(0.0, "colour jitter strength, unless auto_augment is set", Between(0, 10))
    auto_augment: str | None = option(None, "automatic augmentation policy, for example rand-m9-mstd0.5-inc1")
    interpolation: str = option(
        "random", "interpolation in training: bilinear, bicubic or random (of the two)", OneOf((*FILTERS, "random"))
    )
    mixup: float = option(0.0, "mixup alpha; 0 is off", Between(0, 100))
    cutmix: float = option(0.0, "cutmix alpha; 0 is off", Between(0, 100))
    mixup_prob: float = option(1.0, "mixup probability: how likely a batch is mixed", SHARE)
    mixup_switch_prob: float = option(0.5, "mixup switch probability: how likely cutmix is used, if both are on", SHARE)
    mixup_mode: str = option("batch", "mixup mode: one draw per batch, pair or elem", OneOf(("batch", "pair", "elem")))
    smoothing: float = option(0.0, "label smoothing", Between(0, 1, below=True))
    repeats: int = option(
        1,
        "repeated augmentation: an epoch has fewer images, each this often, in other forms",
        Between(1, 100),
        aliases=("aug_repeats", "num_aug_repeats", "repeated_augmentation", "repeated_aug"),
    )
    re_prob: float = option(0.0, "random erasing probability", SHARE, aliases=("random_erasing_probability",))
    re_mode: str = option(
        "pixel",
        "random erasing mode: const, rand or pixel",
        OneOf(("const", "rand", "pixel")),
        aliases=("random_erasing_mode",),
    )
    re_count: int = option(
        1, "random erasing count: largest number of areas per image", Between(1, 100), aliases=("random_erasing_count",)
    )


@dataclass
class LossConfig:
    """The loss of a classifier in training. Evaluations report plain (binary) cross-entropy."""

    name: str | None = option(
        None,
        "name: ce (cross-entropy), bce (binary) or focal; if null, ce, or bce if multi-label",
        OneOf(("ce", "bce", "focal")),
        aliases=("loss", "criterion"),
    )
    gamma: float = option(
        2.0,
        "gamma of focal: how much less right predictions count",
        Between(0, 10),
        aliases=("focal_gamma",),
    )
    weights: Any = option(
        None,
        "weights of classes: balanced, a list, or by class, such as {cat: 2, dog: 0.5}",
        aliases=("class_weights", "class_weight", "pos_weight"),
    )


@dataclass
class OptimConfig:
    """Arguments of timm.optim.create_optimizer_v2."""

    opt: str = option("adamw", "optimizer: any name of timm.optim.list_optimizers()", aliases=("optimizer",))
    lr: float | None = option(
        None,
        "learning rate for the effective batch size; null: 1e-3, 2e-4 for pretrained weights",
        Between(0, 1e4, above=True),
        aliases=("learning_rate",),
    )
    weight_decay: float = option(0.05, "weight decay; biases and vectors are exempt", Between(0, 1e4))
    momentum: float = option(0.9, "momentum of optimizers that have one", Between(0, 1, below=True))
    betas: list[float] | None = option(
        None,
        "betas of Adam and similar optimizers; those of the optimizer if null",
        Between(0, 1, below=True, numbers="two or three numbers,", lengths=(2, 3)),
    )
    eps: float | None = option(
        None, "epsilon of the optimizer; its default if null", Between(0, 1), aliases=("epsilon",)
    )
    layer_decay: float | None = option(
        None, "layer decay: factor of the learning rate from one layer to the one below", Between(0, 1, above=True)
    )
    lr_factors: dict[str, float] = option(
        dict,
        "learning rate factors {part of a parameter's name: factor of lr}, for example {offset.weight: 0.01}; of "
        "several parts that fit, the longest one counts; schedule.warmup_lr and min_lr stay as they are",
        Between(0, 1e4, above=True, numbers="factors"),
        aliases=("lr_mult", "custom_keys", "learning_rate_factors"),
    )
    clip_grad: float | None = option(None, "clip gradients at this norm", Between(0, above=True))
    clip_mode: str = option("norm", "clip mode: norm, value or agc", OneOf(("norm", "value", "agc")))


@dataclass
class ScheduleConfig:
    """Arguments of timm.scheduler.create_scheduler_v2; the schedule steps once per update. Lengths are in epochs."""

    sched: str = option(
        "cosine",
        "schedule: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant or none",
        OneOf(("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")),
    )
    warmup_epochs: float = option(0.0, "warm-up epochs, part of trainer.epochs", Between(0, 1e6), aliases=("warmup",))
    warmup_lr: float = option(
        1e-6, "warm-up learning rate at the start", Between(0, 1e4), aliases=("warmup_learning_rate",)
    )
    min_lr: float = option(1e-6, "minimum learning rate", Between(0, 1e4), aliases=("minimum_learning_rate",))
    cooldown_epochs: int = option(0, "cool-down epochs at min_lr, after trainer.epochs", Between(0, 1e6))
    decay_epochs: float | None = option(
        None, "decay epochs: interval (step) or length (wsd, rsqrt)", Between(0, 1e6, above=True)
    )
    decay_milestones: list[float] = option(
        lambda: [90, 180, 270], "decay milestones in epochs (multistep)", Between(0, 1e6, numbers="a list of numbers,")
    )
    decay_rate: float = option(0.1, "decay rate (step, multistep) or power (poly)", Between(0, 100, above=True))


@dataclass
class TrainerConfig:
    """How the model is trained, and on which device."""

    epochs: int = option(30, "epochs, including warm-up, excluding cool-down", Between(1, 1e6))
    batch_size: int | str = option(
        64,
        "batch size of one forward pass of one process; auto: the largest that fits on one GPU (classify)",
        OrAuto(1, 1e6),
    )
    effective_batch_size: int | None = option(
        None,
        "effective batch size of one update, by accumulating gradients; null: one batch per process",
        COUNT,
    )
    device: str = option(
        "auto",
        "device: auto, cpu, cuda, cuda:N, mps or xpu",
        Like("auto|cpu|mps|xpu|cuda|(cuda|xpu):[0-9]{1,3}", "auto, cpu, cuda, cuda:N, mps or xpu"),
    )
    amp: str = option(
        "none",
        "automatic mixed precision: none (or false), bf16 (or true) or fp16",
        Like("(?i)none|false|bf16|true|fp16", "none, bf16 or fp16"),
        aliases=("mixed_precision",),
    )
    channels_last: bool = option(False, "channels-last memory format")
    compile: bool = option(False, "compile the model with torch.compile")
    parallel: str = option("ddp", "parallel training under torchrun: ddp or fsdp (FSDP2)", OneOf(("ddp", "fsdp")))
    grad_checkpointing: bool = option(False, "gradient checkpointing: less memory, more time")
    freeze: str | None = option(
        None,
        "freeze the stem and this number of stages (classify), or `backbone`: all but the head; null: train everything",
        Like("backbone|[0-9]{1,3}", "a number of stages, or backbone (all but the head)"),
        aliases=("frozen_stages", "freeze_backbone", "linear_probe"),
    )
    ema_decay: float | None = option(
        None,
        "EMA decay of the averaged weights, which are then evaluated",
        Between(0, 1, above=True, below=True),
    )
    ema_warmup: bool = option(False, "EMA warm-up: increase the decay up to ema_decay")
    eval_every: int = option(1, "epochs between evaluations; the last epoch is always evaluated", COUNT)
    save_minutes: float = option(
        10.0, "longest time between two checkpoints within an epoch, in minutes", Between(0, 1e6)
    )
    max_nonfinite: int = option(
        20, "maximum number of non-finite losses in a row: the next one stops the run", Between(0)
    )
    max_updates: int | None = option(None, "maximum number of updates, to try a recipe out", COUNT)
    patience: int | None = option(
        None,
        "patience: stop after so many evaluations without a new best; never if null",
        COUNT,
        aliases=("early_stopping",),
    )
    deterministic: bool = option(False, "deterministic kernels, where torch has them")


@dataclass
class ExitsConfig:
    """Training of models with several exits, each a classifier."""

    weights: list[float] | None = option(
        None,
        "weights of the losses of the exits, from the first to the last; 1 each if null",
        Between(0, 1e4, numbers="a list of numbers,"),
    )
    distill: float = option(
        0.5,
        "distillation: weight of the divergence of each exit from the last one, which teaches the others; 0 is off",
        Between(0, 1e4),
    )


@dataclass
class DenseConfig:
    """Settings of detection and segmentation, which MMDetection and MMSegmentation run."""

    method: str = option(
        "",
        f"method: {', '.join(DETECTORS)} (detect); {', '.join(SEGMENTORS)} (segment); "
        f"{', '.join(PANOPTIC_METHODS)} (panoptic)",
    )
    digits_first: bool = option(
        False, "digits first: without pretrained weights, train the backbone on single digits first"
    )
    small: bool = option(False, "small necks, heads and anchors, for images of about 128 pixels")
    num_things: int | None = option(
        None, "number of things (panoptic), the first of the classes; that of the data if null", COUNT
    )
    masks: bool = option(True, "masks: predict instance masks as well as boxes, if the data and the method have them")
    updates: int | None = option(None, "updates: length of training, in place of trainer.epochs", COUNT)
    warmup_updates: int = option(0, "warm-up updates, linear", Between(0))
    warmup_factor: float = option(1e-3, "warm-up factor of the learning rate at the start", Between(0, 1, above=True))
    no_decay: list[str] | None = option(
        None,
        "no weight decay for parameters whose name contains one of these; if null, for vectors and those that the "
        "model lists",
    )
    backbone_lr: float = option(
        1.0,
        "backbone learning rate as a factor of optim.lr",
        Between(0, 1e4, above=True),
        aliases=("backbone_learning_rate",),
    )
    out_indices: list[int] | None = option(
        None,
        "output indices: the stages whose features are used; the last four if null",
        Between(-100, 100, numbers="a list of numbers,"),
    )
    output_norm: bool | None = option(
        None, "output norm: LayerNorm on each feature; that of the family's dense code if null"
    )
    frozen_stages: int = option(
        -1, "frozen stages: the stem and this number of stages are not trained; -1 for none", Between(-1, 100)
    )
    pretrained_heads: bool = option(
        True,
        "pretrained heads: from a detector or segmentor, load the neck and heads too",
    )
    norm_eval: bool = option(False, "norm evaluation: BatchNorm in the backbone keeps its statistics")
    scales: list[int] = option(
        lambda: [800],
        "scales: short sides of training images in pixels, one drawn at random; evaluation uses the last one",
        Between(32, 1e5, numbers="a list of numbers,"),
    )
    max_size: int = option(1333, "maximum size of an image's long side in pixels, after resizing", Between(32, 1e5))
    ratio_range: list[float] | None = option(
        None,
        "ratio range: a random factor of the scale, drawn for each training image",
        Between(0, 1e3, above=True, numbers="two rising numbers", lengths=(2,), rising=True),
    )
    crop: list[int] | None = option(
        None,
        "crop of a training image: height and width in pixels; none if null",
        Between(32, 1e5, numbers="two numbers,", lengths=(2,)),
    )
    cat_max_ratio: float = option(
        0.75, "category maximum ratio (segment): a crop of which one class has a larger share is drawn again", SHARE
    )
    detr_crop: bool = option(False, "DETR's crop: half of the images are cropped between two resizings (detect)")
    photometric: bool = option(False, "photometric distortion of training images: brightness, contrast, hue")
    size_divisor: int = option(32, "size divisor: images of a batch are padded to a multiple of it", Between(1, 1e4))
    test_divisor: int | None = option(
        None,
        "test divisor (segment): images are resized to a multiple of it in evaluation, if set",
        Between(1, 1e4),
    )


PROBES = {
    "none": "",
    "linear": "linear probe",
    "knn": "k nearest neighbours",
    "ep": "efficient probing",
}


@dataclass
class ProbeConfig:
    """A probe: how well the features of the frozen model tell the classes apart. `probe=<kind>` selects one."""

    kind: str = option(
        "none",
        "kind: none, linear, knn (nearest neighbours) or ep (efficient probing)",
        OneOf(tuple(PROBES)),
    )
    k: int = option(20, "k, the number of neighbours that vote (knn)", Between(1, 1e6))
    temperature: float = option(
        0.07, "temperature: a neighbour votes with exp(cosine similarity / temperature) (knn)", Between(1e-3, 100)
    )
    lrs: list[float] = option(
        lambda: [0.01, 0.1, 1.0],
        "learning rates to try; the best on held-out training images is used (linear, ep)",
        Between(0, 1e4, above=True, numbers="a list of numbers,"),
    )
    epochs: int = option(100, "epochs of the probe, over the computed features (linear, ep)", Between(1, 1e6))
    batch_size: int = option(256, "batch size of the probe (linear, ep)", Between(2, 1e6))
    holdout: float = option(
        0.2,
        "hold-out: share of the training images that chooses the learning rate (linear, ep)",
        Between(0, 1, above=True, below=True),
    )
    queries: int | None = option(
        None, "number of queries (ep); it has to divide the channels; null: the largest up to 32", Between(1, 1e4)
    )


# Keys of `probe` that matter to each kind.
_FITTED = ("kind", "lrs", "epochs", "batch_size", "holdout")
_OF_KIND = {"none": ("kind",), "knn": ("kind", "k", "temperature"), "linear": _FITTED, "ep": (*_FITTED, "queries")}
# Other keys and groups that matter to a probe.
_OF_PROBES = (
    *("model", "pretrained", "run", "resume", "seed", "task", "recipe", "data", "probe", "log", "published", "hydra"),
    *("trainer.batch_size", "trainer.device", "trainer.amp", "trainer.channels_last", "trainer.save_minutes"),
)


@dataclass
class InferenceConfig:
    """How models predict an image, in every evaluation and in `zoo-predict`. Classifiers have `threshold` only."""

    threshold: Any = option(
        0.5,
        "threshold (multi-label): least probability of a label; or by class, {cat: 0.3}",
        Between(0, 1, above=True, below=True, numbers="a number, or numbers by class,"),
    )
    tta: str = option(
        "none",
        "test-time augmentation: none, flip (the image and its mirror image) or multi_scale (several sizes); scores of "
        "segmentors are averaged, objects of detectors merged by NMS",
        OneOf(("none", "flip", "multi_scale")),
        aliases=("test_time_augmentation", "augmentation"),
    )
    scales: list[float] = option(
        lambda: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
        "scales of multi_scale: factors of dense.scales and dense.max_size",
        Between(0, 10, above=True, numbers="a list of numbers,"),
    )
    flip: bool = option(True, "flip: multi_scale also predicts the mirror image at every scale")
    resize: bool = option(True, "resize images to dense.scales and dense.max_size; false keeps the size of each image")
    window: list[int] | None = option(
        None,
        "window that slides over each resized image: height and width in pixels; the whole image at once if null",
        Between(32, 1e5, numbers="two numbers,", lengths=(2,)),
        aliases=("tile", "crop_size"),
    )
    stride: list[int] | None = option(
        None,
        "stride of the window: rows and columns from one to the next; two thirds of the window if null",
        Between(1, 1e5, numbers="two numbers,", lengths=(2,)),
    )


@dataclass
class PublishedConfig:
    """Published figures of a recipe. Training does not read them; reports show them beside those of a run."""

    model: str | None = option(None, "model of the published figures")
    top1: float | None = option(None, "top-1 accuracy on ImageNet-1k in percent, as published", PERCENT)
    box_ap: float | None = option(None, "box AP, as published", PERCENT)
    mask_ap: float | None = option(None, "mask AP, as published", PERCENT)
    pq: float | None = option(None, "panoptic quality at one scale, as published", PERCENT)
    miou: float | None = option(None, "mIoU at one scale, as published", PERCENT)
    miou_multi_scale: float | None = option(None, "mIoU there at several scales with flips, as published", PERCENT)
    source: str | None = option(None, "source of the published figures, such as README or paper")


@dataclass
class DistillConfig:
    """Distillation: a classifier also learns from a teacher, another classifier."""

    teacher: str | None = option(
        None, "teacher: a model by its timm name, or the run folder of a classifier; none if null"
    )
    weights: str | None = option(None, "weights of a teacher by name: a checkpoint; the published ones if null")
    match: str = option(
        "logits",
        "match the teacher's logits (same classes), or its pooled features (any classes)",
        OneOf(("logits", "features")),
    )
    temperature: float = option(
        4.0, "temperature that divides both logits before the softmax", Between(0, 1e3, above=True)
    )
    weight: float = option(1.0, "weight of the teacher's loss", Between(0, 1e6), aliases=("alpha", "kd_weight"))
    label_weight: float = option(1.0, "label weight: weight of the loss on the labels", Between(0, 1e6))


@dataclass
class LogConfig:
    """Logging during training."""

    every: int = option(50, "updates between log lines, if there is no progress bar", COUNT)
    wandb: str = option(
        "offline", "Weights & Biases: offline, online or disabled", OneOf(("offline", "online", "disabled"))
    )
    project: str = option("zoo", "project name at Weights & Biases")
    csv: bool = option(False, "CSV: also write the metrics to metrics.csv, a row per epoch")
    tensorboard: bool = option(False, "TensorBoard: also write event files, to tensorboard/ in the run folder")


@dataclass
class Config:
    """The configuration of `zoo-train`."""

    model: str = option("test_van", "model: any name that timm.create_model takes, with or without a tag")
    model_kwargs: dict[str, Any] = option(dict, "model keyword arguments, for example {drop_path_rate: 0.1}")
    pretrained: Any = option(
        False,
        "pretrained weights: false, true (the published ones), a checkpoint or a run folder",
    )
    run: str | None = option(None, "run folder; runs/<date>-<model> if null")
    resume: str = option(
        "auto", "resume: auto (if the run folder has a checkpoint), never, or must", OneOf(("auto", "never", "must"))
    )
    seed: int = option(0, "seed of all random numbers", Between(0, 2**32 - 1))
    task: str = option("classify", "task: classify, detect, segment or panoptic")
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: InferenceConfig = field(default_factory=InferenceConfig)
    mm: dict[str, Any] = option(dict, "MMEngine configuration: values that override those of the other keys")
    log: LogConfig = field(default_factory=LogConfig)
    published: PublishedConfig = field(default_factory=PublishedConfig)


@dataclass
class ImageNetConfig:
    """Folders of data sets for ImageNet classifiers."""

    val: str | None = option(None, "ImageNet's validation images, in class folders")
    real: str | None = option(None, "the same images with ReaL labels, in any folders, with their original names")
    v2: str | None = option(None, "ImageNet-V2: one of its three sets")
    a: str | None = option(None, "ImageNet-A")
    r: str | None = option(None, "ImageNet-R")
    sketch: str | None = option(None, "ImageNet-Sketch")
    c: str | None = option(None, "ImageNet-C: the folder that has the 15 corruptions, also in subfolders")


@dataclass
class EvalConfig(Config):
    """The configuration of `zoo-eval`: the keys of `zoo-train` that affect an evaluation, and these."""

    run: str | None = option(None, "run folder of the model to evaluate")
    checkpoint: str = option("last", "checkpoint of a run folder: last or best", OneOf(("last", "best")))
    per_class: bool = option(False, "print and write per-class accuracies")
    robustness: str = option(
        "none",
        "robustness of a classifier: none, corruptions (also evaluate on images with noise, blur, fog, ...) or "
        "imagenet (evaluate on the data sets whose folders are given by imagenet.)",
        OneOf(("none", "corruptions", "imagenet")),
    )
    corruptions: list[str] | None = option(None, "names of the corruptions for robustness=corruptions; all if null")
    severities: list[int] = option(
        lambda: [1, 2, 3, 4, 5],
        "severities of the corruptions",
        Between(1, 5, numbers="a list of numbers,"),
        aliases=("severity",),
    )
    imagenet: ImageNetConfig = field(default_factory=ImageNetConfig)
    fit_exits: bool = option(
        False,
        "fit exits (models with several exits): accuracy and cost of each, and thresholds for early exit",
    )
    out: str | None = option(None, "output folder; <run>/eval or runs/eval-<date>-<model> if null")


# Values of trainer.amp -> names of torch's dtypes. true and false in YAML arrive as text.
AMP = {"none": None, "false": None, "bf16": "bfloat16", "true": "bfloat16", "fp16": "float16"}

GROUPS = ("task", "data", "augment", "optim", "schedule", "trainer", "dense", "probe", "log", "recipe")


def keys(schema: type = Config) -> Iterator[tuple[str, str]]:
    """Every key of `schema` in dotted form, with its help text. A group is a key with an empty help text."""
    for name, item in _items(schema):
        yield name, item.metadata.get("help", "")


def _items(schema: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    for item in fields(schema):
        yield prefix + item.name, item
        if item.default_factory is not MISSING and is_dataclass(item.default_factory):
            yield from _items(item.default_factory, f"{prefix}{item.name}.")


def mappings(schema: type = Config) -> list[str]:
    """The keys in dotted form whose value is a mapping with keys of the user's own."""
    return [name for name, item in _items(schema) if str(item.type).startswith("dict")]


def default_of(item: Field) -> Any:
    """The default of a field of a schema."""
    return item.default if item.default_factory is MISSING else item.default_factory()


@cache
def _made(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def defaults(schema: type = Config) -> DictConfig:
    """The configuration of `schema` with its defaults: a copy of one that is made once, which takes far longer."""
    return copy.deepcopy(_made(schema))


def nearest_key(key: str, schema: type = Config) -> str | None:
    """The key of `schema` that the user probably meant by `key`, judged by the keys' names and aliases."""
    best, score = None, 0.6
    group, _, leaf = key.rpartition(".")
    for name, item in _items(schema):
        own_group, _, own_leaf = name.rpartition(".")
        names = (own_leaf, *item.metadata.get("aliases", ()))
        ratio = max(similarity(leaf, other) for other in names)
        ratio += 0.1 * (own_group == group)  # of two similar keys, prefer the one in the same group
        if ratio > score:
            best, score = name, ratio
    return best


def check(cfg: Config) -> None:
    """Raise an error for values that no run can use.

    Raises:
        UserError: A value is not allowed. The message names the key, the value and what is allowed.
    """
    for key, item in _items(EvalConfig if "checkpoint" in cfg else Config):
        allowed, value = item.metadata.get("allowed"), OmegaConf.select(cfg, key)
        if allowed and value is not None and not allowed.allows(value):
            null = ", or null" if str(item.type).endswith("| None") else ""
            high = getattr(allowed, "high", math.inf)
            numbers = [value] if isinstance(value, int | float) else [] if isinstance(value, str) else _numbers(value)
            absurd = f", and {high:,.0f} at most" if 100 < high < math.inf and any(n > high for n in numbers) else ""
            raise UserError(f"{key}={value} is not allowed: it has to be {allowed}{null}{absurd}.")
    if cfg.task == "classify":
        for key, item in _items(InferenceConfig, "eval."):
            value = OmegaConf.select(cfg, key)
            if value != default_of(item) and key != "eval.threshold":  # which needs the data
                raise NoEffect(
                    f"{key}={value} has no effect with task=classify: it is for detectors and segmentors; leave it "
                    "out.",
                    *(key, "task", *_DENSE),
                )
        if (stages := cfg.dense.frozen_stages) >= 0:
            raise NoEffect(
                f"dense.frozen_stages={stages} has no effect with task=classify: use trainer.freeze={stages}.",
                *("dense.frozen_stages", "task", *_DENSE),
            )
    else:
        of_classifiers = ("eval.threshold", "data.sampling", "loss.", "distill.")
        for key, item in _items(Config):
            if key.startswith(of_classifiers) and (value := OmegaConf.select(cfg, key)) != default_of(item):
                raise NoEffect(
                    f"{key}={value} has no effect with task={cfg.task}: it is for classifiers; leave it out.",
                    *(key, "task", "classify"),
                )
    if "robustness" in cfg:
        _check_robustness(cfg)
    _check_probe(cfg)
    _check_distill(cfg)
    if cfg.data.name == "unset":
        raise UserError("data.name=unset is not allowed: it has to be a name that timm.data.create_dataset reads, "
                       "for example hfds/cifar10.")  # fmt: skip
    if cfg.trainer.batch_size == "auto":
        if cfg.task != "classify" or "checkpoint" in cfg or cfg.probe.kind != "none":
            raise UserError("trainer.batch_size=auto is for the training of a classifier: give a number.")
    elif (cfg.augment.mixup or cfg.augment.cutmix) and cfg.trainer.batch_size % 2:
        raise UserError(f"trainer.batch_size={cfg.trainer.batch_size} is odd, but mixup pairs images: make it even.")


def _check_robustness(cfg: Config) -> None:
    if cfg.robustness != "none" and cfg.task != "classify":
        raise UserError(f"robustness={cfg.robustness} is for task=classify, not for task={cfg.task}: leave it out.")
    for item in fields(EvalConfig):
        of_corruptions = item.name in ("corruptions", "severities")
        if of_corruptions and cfg.robustness != "corruptions" and cfg[item.name] != default_of(item):
            message = f"{item.name}={cfg[item.name]} needs robustness=corruptions: add it."
            raise NoEffect(message, item.name, "robustness", "corruptions")
    given = [item.name for item in fields(ImageNetConfig) if cfg.imagenet[item.name]]
    if given and cfg.robustness != "imagenet":
        message = f"imagenet.{given[0]}={cfg.imagenet[given[0]]} needs robustness=imagenet: add it."
        raise NoEffect(message, f"imagenet.{given[0]}", "robustness", "imagenet")
    if cfg.robustness == "imagenet" and not given:
        keys_of_folders = ", ".join(f"imagenet.{item.name}" for item in fields(ImageNetConfig))
        raise UserError(f"robustness=imagenet needs a folder or several: set any of {keys_of_folders}.")


def _check_probe(cfg: Config) -> None:
    kind = cfg.probe.kind
    if kind != "none" and cfg.task != "classify":
        raise UserError(f"probe={kind} is for task=classify, not for task={cfg.task}: leave out one of them.")
    for key, item in _items(ProbeConfig, "probe."):
        value = OmegaConf.select(cfg, key)
        if item.name not in _OF_KIND[kind] and value != default_of(item):
            kinds = [name for name, keys in _OF_KIND.items() if item.name in keys]
            which = " and ".join(f"probe={name}" for name in kinds)
            message = f"{key}={value} has no effect with probe={kind}: it is for {which}; leave it out."
            raise NoEffect(message, key, "probe.kind", *kinds)
    if kind != "none" and cfg.data.sampling != "uniform":
        message = f"data.sampling={cfg.data.sampling} has no effect with probe={kind}: leave it out."
        raise NoEffect(message, "data.sampling", "probe.kind", "none")
    if len(set(cfg.probe.lrs)) < len(cfg.probe.lrs):
        raise UserError(f"probe.lrs={cfg.probe.lrs} has a learning rate twice: give each of them once.")
    if kind == "ep" and cfg.model_kwargs.get("global_pool") is not None and "checkpoint" not in cfg:
        raise UserError(
            f"model_kwargs.global_pool={cfg.model_kwargs.global_pool} can't be used with probe=ep, which sets it: "
            "leave it out."
        )


def check_effect_on_classifier(cfg: Config, overridden: Sequence[str]) -> None:
    """Raise an error if the user set a key or group of detectors and segmentors for a classifier.

    Raises:
        UserError: The message names the key.
    """
    for key in overridden if cfg.task == "classify" else ():
        if key.partition(".")[0] in ("dense", "mm"):
            raise NoEffect(
                f"{key} has no effect with task=classify: it is for detectors and segmentors; leave it out, or set "
                "task.",
                *(key, "task", *_DENSE),
            )


def check_effect_on_probe(cfg: Config, overridden: Sequence[str]) -> None:
    """Raise an error if a key or group that the user set has no effect on a probe.

    Raises:
        UserError: The message names the key.
    """
    if cfg.probe.kind == "none":
        return
    for key in overridden:
        if not any(key == known or key.startswith(f"{known}.") for known in (*_OF_PROBES, "model_kwargs")):
            raise NoEffect(
                f"{key} has no effect with probe={cfg.probe.kind}: the model is frozen, its images are not augmented, "
                "and what is trained has settings of its own, probe.<key>; leave it out.",
                *(key, "probe.kind", "none"),
            )


def _check_distill(cfg: Config) -> None:
    distill = cfg.distill
    given = [item.name for item in fields(DistillConfig) if distill[item.name] != default_of(item)]
    if not given:
        return
    if not distill.teacher:
        key = f"distill.{given[0]}"
        message = (
            f"{key}={distill[given[0]]} has no effect without a teacher: add distill.teacher=<model or run folder>."
        )
        raise NoEffect(message, key, "distill.teacher")
    if distill.match == "features" and "temperature" in given:
        message = f"distill.temperature={distill.temperature} has no effect with distill.match=features: leave it out."
        raise NoEffect(message, "distill.temperature", "distill.match", "logits")
    if not distill.weight:
        raise UserError("distill.weight=0 is not allowed with a teacher, which then teaches nothing: leave both out.")
    if cfg.trainer.parallel == "fsdp":
        raise UserError("distill.teacher can't be used with trainer.parallel=fsdp: use ddp.")


def of_run(cfg: DictConfig, trained: DictConfig, overridden: Sequence[str]) -> DictConfig:
    """The configuration `trained` of a run, with the keys and groups `overridden` from `cfg`.

    Raises:
        UserError: The run has keys that this version does not have.
    """
    try:
        # A configuration that Hydra composed accepts no new keys, but that of a run can have any below its mappings.
        merged = OmegaConf.merge(defaults(EvalConfig), trained)
    except OmegaConfBaseException as error:
        raise UserError(f"{cfg.run} was written by another version: {str(error).splitlines()[0]}.") from error
    data = OmegaConf.to_container(merged.data)
    own = {item.name for item in fields(EvalConfig)}
    for key in ("run", "checkpoint", "per_class", "fit_exits", "out", *overridden):
        if key.partition(".")[0] in own:
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False)
    # data=<option> sets the whole section, but the model keeps its input.
    if any(key.partition(".")[0] == "data" for key in overridden):  # a column named `labels` may be in the new data
        data["multi_label"] = bool(data["multi_label"])
    for name in ("img_size", "mean", "std", "interpolation", "crop_pct", "multi_label"):
        if f"data.{name}" not in overridden:
            OmegaConf.update(merged, f"data.{name}", data[name])
    return merged


@cache
def register() -> None:
    """Register the schemas with Hydra, under names that a program is unlikely to have for its own."""
    store = ConfigStore.instance()
    store.store(name="zoo_schema", node=Config)
    store.store(name="zoo_eval_schema", node=EvalConfig)
