"""The views of an image that a detector or segmentor predicts and merges: sizes, mirror images, windows.

mmcv's TestTimeAug makes the sizes and mirror images; a batch then has a list of inputs and of data samples for each
view. The models cut the windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from zoo.messages import UserError
from zoo.recipes.errors import NoEffect


def check(cfg: DictConfig) -> None:
    """Refuse settings of `eval` that do not fit together or that the task can't use.

    Raises:
        UserError: The message names the key, its value and what is allowed.
    """
    chosen = cfg.eval
    if cfg.task not in ("detect", "segment") and (used(cfg) or not chosen.resize):
        raise UserError(f"eval={dict(chosen)} can't be used with task={cfg.task}: it is for detect and segment.")
    if chosen.stride and not chosen.window:
        message = f"eval.stride={chosen.stride} has no effect without eval.window: set both, or eval.stride=null."
        raise NoEffect(message, "eval.stride", "eval.window")
    if chosen.stride and any(step > side for step, side in zip(chosen.stride, chosen.window, strict=True)):
        raise UserError(
            f"eval.stride={chosen.stride} is not allowed: it has to be at most eval.window={chosen.window}, because "
            "pixels between two windows would not be predicted."
        )
    if chosen.resize and min(factors(cfg)) * min(cfg.dense.scales[-1], cfg.dense.max_size) < 32:
        raise UserError(
            f"eval.scales={chosen.scales} is not allowed: its smallest factor has to leave 32 pixels or more of "
            f"dense.scales={cfg.dense.scales[-1]}."
        )


def check_effect(cfg: DictConfig, overridden: Sequence[str]) -> None:
    """Refuse keys in `overridden` that have no effect without another one.

    Raises:
        UserError: The message names the key that is missing.
    """
    for key in ("eval.scales", "eval.flip"):
        if key in overridden and cfg.eval.tta != "multi_scale":
            message = f"{key} has no effect with eval.tta={cfg.eval.tta}: add eval.tta=multi_scale."
            raise NoEffect(message, key, "eval.tta", "multi_scale")


def used(cfg: DictConfig) -> bool:
    """Whether an image is predicted in more than one part or way."""
    return cfg.eval.tta != "none" or cfg.eval.window is not None


def factors(cfg: DictConfig) -> list[float]:
    """The sizes at which each image is predicted, as factors of its usual size."""
    return list(cfg.eval.scales) if cfg.eval.tta == "multi_scale" else [1.0]


def flips(cfg: DictConfig) -> bool:
    """Whether the mirror image is predicted too."""
    return cfg.eval.tta == "flip" or (cfg.eval.tta == "multi_scale" and cfg.eval.flip)


def window(cfg: DictConfig) -> dict[str, tuple[int, int]]:
    """`window` and `stride` in pixels (rows, columns); empty without a window."""
    if not cfg.eval.window:
        return {}
    stride = cfg.eval.stride or [max(1, 2 * side // 3) for side in cfg.eval.window]
    return {"window": tuple(cfg.eval.window), "stride": tuple(stride)}


def describe(cfg: DictConfig) -> list[str]:
    """What differs from one prediction of each image, in a line for each difference."""
    lines, merged = [], "averages" if cfg.task == "segment" else "merges"
    if cfg.eval.tta != "none":
        sizes = factors(cfg)
        mirrored = " and mirrored" if flips(cfg) else ""
        named = f"at {', '.join(f'{factor:g}' for factor in sizes)} times its size" if sizes != [1.0] else "as it is"
        count = len(sizes) * (2 if flips(cfg) else 1)
        lines.append(f"eval.tta={cfg.eval.tta} {merged} {count} predictions of each image: {named}{mirrored}.")
    if not cfg.eval.resize:
        lines.append("eval.resize=false: images keep their sizes.")
    if part := window(cfg):
        (height, width), (down, right) = part["window"], part["stride"]
        lines.append(f"eval.window: windows of {height}x{width} pixels, every {down} rows and {right} columns.")
    return lines


def boxes(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """The windows (top, left, bottom, right) that cover an image, row by row, as mmseg places them.

    Args:
        size: The height and width of the image.
        window: Those of the window. A side that is longer than the image's becomes the image's.
        stride: The rows and columns from one window to the next; the last ones end at the border of the image.
    """
    (height, width), (high, wide), (down, right) = size, window, stride
    for i in range(max(height - high + down - 1, 0) // down + 1):
        for j in range(max(width - wide + right - 1, 0) // right + 1):
            bottom, end = min(i * down + high, height), min(j * right + wide, width)
            yield max(bottom - high, 0), max(end - wide, 0), bottom, end


def batches(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A collated batch as one batch for each view."""
    if not isinstance(data["data_samples"][0], list | tuple):
        return [data]
    return [{"inputs": i, "data_samples": s} for i, s in zip(data["inputs"], data["data_samples"], strict=True)]


def resizes(cfg: DictConfig) -> list[dict[str, Any]]:
    """The transforms that resize a test image, one for each factor."""
    longest, shortest = cfg.dense.max_size, cfg.dense.scales[-1]
    return [
        dict(type="Resize", scale=(int(longest * factor), int(shortest * factor)), keep_ratio=True)
        if cfg.eval.resize
        else dict(type="Resize", scale_factor=factor, keep_ratio=True)
        for factor in factors(cfg)
    ]


def pipeline(cfg: DictConfig, load: dict[str, Any], further: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The transforms of test images: `load`, resize, and `further` ones, of which the last packs the sample."""
    sizes = resizes(cfg)
    if cfg.eval.tta == "none":
        return [load, *sizes, *further]
    steps = [[step] for step in further]
    if flips(cfg):
        # Annotations, which are loaded later, are not mirrored.
        first = next(i for i, step in enumerate(further) if step["type"].startswith("Load"))
        steps.insert(first, [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)])
    return [load, dict(type="TestTimeAug", transforms=[sizes, *steps])]


def without_loading(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The transforms `steps` for an image that is loaded and has no annotations."""
    kept = []
    for step in steps:
        if step["type"] == "TestTimeAug":
            inner = [[one for one in choice if not one["type"].startswith("Load")] for choice in step["transforms"]]
            kept.append(step | {"transforms": [choice for choice in inner if choice]})
        elif not step["type"].startswith("Load"):
            kept.append(step)
    return kept
