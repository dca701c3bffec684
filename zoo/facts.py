"""The published weights in `manifest.json`, as the `default_cfgs` of timm.

The fields of the manifest are described in `checkpoints/README.md`. `zoo.manifest` reads it without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from timm.models import DefaultCfg, generate_default_cfgs

from zoo.manifest import manifest

__all__ = ["default_cfgs", "timm_cfg"]


def default_cfgs(
    family: str,
    first_conv: str | Sequence[str],
    tests: Iterable[str] | None = None,
    exceptions: Mapping[str, tuple[str | Sequence[str], int]] | None = None,
    classifier: str | tuple[str, ...] = "head",
    feature_side: Callable[[str, int, int], int] = lambda variant, side, stride: side // stride,
) -> dict[str, DefaultCfg]:
    """The `default_cfgs` of a family: one for each known checkpoint, and one for each test model.

    Args:
        family: The name of the family in the manifest.
        first_conv: Name of the convolution that reads the images, or names if several do.
        tests: The test models; `test_<family>` if None.
        exceptions: For models with another `first_conv` or a last stride other than 32, both values.
        classifier: Name of the classifier, or names if there are several layers.
        feature_side: The side of a feature map for a model, a side of its images and a stride; see `zoo.families`.
    """
    small = {"input_size": (3, 64, 64), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    known = {f"{entry['model']}.{entry['tag']}": timm_cfg(entry) for entry in manifest(family)}
    known |= dict.fromkeys([f"test_{family}"] if tests is None else tests, small)
    cfgs: dict[str, Any] = {}
    for name, cfg in known.items():
        variant = name.split(".")[0]
        conv, stride = (exceptions or {}).get(variant, (first_conv, 32))
        side = feature_side(variant, cfg["input_size"][1], stride)
        cfgs[name] = {"pool_size": (side, side), "first_conv": conv, "classifier": classifier, **cfg}
    return generate_default_cfgs(cfgs)


def timm_cfg(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The `pretrained_cfg` of an entry of the manifest."""
    return {
        "url": entry.get("url", ""),
        "hf_hub_id": entry.get("hf_hub_id"),
        "input_size": tuple(entry["input_size"]),
        "mean": tuple(entry["mean"]),
        "std": tuple(entry["std"]),
        "crop_pct": entry["crop_pct"],
        "interpolation": entry["interpolation"],
        "crop_mode": entry.get("crop_mode", "center"),
        "num_classes": entry["num_classes"],
        "license": entry["licence"],
        "origin_url": entry["origin_url"],
        "paper_ids": entry["paper_ids"],
        "paper_name": entry["paper_name"],
        "description": f"Trained on {entry['dataset']}.",
        "notes": tuple(entry[field] for field in ("note", "licence_note") if field in entry) or None,
    }
