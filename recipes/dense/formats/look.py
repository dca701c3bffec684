"""What a folder of data is, by looking at it. Imports nothing that takes long, so that errors appear at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from zoo.messages import UserError, one_line
from zoo.recipes.files import SPLIT_FOLDERS, read_text

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_LARGEST = 1_000_000  # bytes of a YAML file
_CONFIGS = ("--config", "-cn", "-cd", "-cp")  # Hydra's options for a configuration of one's own
_SPLITS = tuple(name for names in SPLIT_FOLDERS.values() for name in names)
# The option of the group `data` that reads a kind of data, by task.
_OPTIONS = {
    "detect": {"coco": "coco", "voc": "coco", "yolo": "coco"},
    "segment": {"cityscapes": "cityscapes", "ade20k": "ade20k", "masks": "masks", "voc": "masks"},
}


def kind(root: Path) -> str | None:
    """The kind of the data in `root`: a key of `_OPTIONS` or of `refuse`, "digit_scenes", or None if none is known.

    Raises:
        UserError: `root` contains several data sets.
    """
    has = root.joinpath
    if has("VERSION").is_file() and has("VERSION").read_bytes().startswith(b"digit scenes"):
        return "digit_scenes"
    if has("leftImg8bit").is_dir() and has("gtFine").is_dir():
        return "cityscapes"
    if voc_root(root):
        return "voc"
    if any(has("annotations").glob("instances_*.json")) or any(root.glob("*/_annotations.coco.json")):
        return "coco"
    if any(has("annotations").glob("lvis_v1_*.json")) or any(root.glob("lvis_v1_*.json")):
        return "coco"
    if any(has("annotations").glob("panoptic_*.json")):
        return "coco panoptic"
    if has("images", "ADE").is_dir() or has("index_ade20k.pkl").is_file():
        return "ade20k in full"
    if has("annotations", "training").is_dir() and has("objectInfo150.txt").is_file():
        return "ade20k"
    endings = _endings(has("annotations")) | _endings(has("labels"))
    if has("images").is_dir() and ".png" in endings:
        return "masks"
    if yolo_file(root):
        return "yolo"
    if has("Annotations").is_dir() and any(has("Annotations").glob("*.xml")):
        return "voc without lists"
    if ".txt" in endings or any(".txt" in _endings(has(name), "labels") for name in _SPLITS):
        return "yolo without yaml"
    return None


def _endings(folder: Path, *below: str) -> set[str]:
    """The extensions of the first files of the splits in `folder`, or of those in its folder `below`."""
    folders = [folder.joinpath(*below)] if below else [folder / name for name in _SPLITS]
    firsts = (next(iter(sorted(path.iterdir())), None) for path in folders if path.is_dir())
    return {path.suffix.lower() for path in firsts if path}


def option(task: str, root: Path) -> str | None:
    """The option of the group `data` that reads the data in `root`; None for the default."""
    return _OPTIONS[task].get(kind(root) or "")


def with_option(words: Sequence[str]) -> list[str]:
    """The arguments of `zoo-train`, with data=<option> added if they name data of a known kind but no option.

    Without it, the tasks read digit scenes.
    """
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    task = given.get("task", "")
    if task not in _OPTIONS or {"data", "recipe"} & given.keys() or any(word.startswith(_CONFIGS) for word in given):
        return list(words)
    files = ("data.train_ann", "data.val_ann") if task == "detect" else ("data.train_images", "data.train_labels")
    root = Path(os.path.expanduser(given.get("data.root", "")))
    found = None
    if any(given.get(key) for key in files):
        found = "coco" if task == "detect" else "masks"
    elif given.get("data.root") and root.exists():
        try:
            found = option(task, root)
        except UserError:  # raised again by the checks of the configuration
            found = None
    return [*words, f"data={found}"] if found else list(words)


def refuse(task: str, root: Path) -> None:
    """Refuse data in `root` that `task` can't read.

    Raises:
        UserError: The message says what the data are and what to do.
    """
    found = kind(root)
    if found is None or found == "digit_scenes" or found in _OPTIONS[task]:
        return
    [other] = [name for name in _OPTIONS if name != task]
    reasons = {
        "coco panoptic": "COCO's panoptic annotations without its instances: use task=panoptic",
        "ade20k in full": "ADE20K in full: segmentation reads its benchmark of 150 classes, ADEChallengeData2016 "
        "(images/training, annotations/training), so give that",
        "voc without lists": "a data set with Pascal VOC's XML, but without lists of its splits: write "
        "ImageSets/Main/train.txt and val.txt, with the name of an image per line, and put the images into JPEGImages",
        "yolo without yaml": "a YOLO data set without data.yaml: write one that gives names, train and val",
        "cityscapes": "Cityscapes, whose label maps are for task=segment: for detection, convert its instances to COCO "
        "JSON",
        "coco": "COCO's instances: use task=detect",
        "yolo": "a YOLO data set of boxes or polygons: use task=detect",
    }
    what = reasons.get(found, f"data for task={other}: use that")
    raise UserError(f"data.root={root} is {what}.")


def voc_root(root: Path) -> Path | None:
    """The folder of Pascal VOC that `root` is or, like VOCdevkit, contains; None if it is not VOC.

    Raises:
        UserError: It contains several.
    """
    if (root / "JPEGImages").is_dir() and (root / "ImageSets").is_dir():
        return root
    inside = [path for path in sorted(root.glob("VOC*")) if (path / "JPEGImages").is_dir()]
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise UserError(f"data.root={root} has several data sets ({names}): give one of them, data.root={inside[0]}.")
    return inside[0] if inside else None


def yolo_file(root: Path) -> Path | None:
    """The YAML file of a YOLO data set: `root` itself, or the one in it that names classes; None if there is none.

    Raises:
        UserError: Several files name classes, and none of them is called data.yaml.
    """
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    named = [root / name for name in _YAML if (root / name).is_file()]
    if named:
        return named[0]
    others = [path for path in sorted(root.glob("*.y*ml")) if _names_classes(path)]
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise UserError(f"data.root={root} has several YAML files of data ({names}): give one, data.root={others[0]}.")
    return others[0] if others else None


def _names_classes(path: Path) -> bool:
    try:
        content = load_yaml(path)
    except UserError:
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def load_yaml(path: Path) -> Any:
    """The plain values in a YAML file.

    Raises:
        UserError: It can't be read, or has anything else.
    """
    try:
        if os.path.getsize(path) > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST:,} bytes: it is not the YAML file of a data set.")
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not YAML of plain values ({one_line(error, 200)}): correct it.") from error
