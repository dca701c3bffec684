"""Checks that run before torch and timm are imported, which takes seconds, so that errors appear at once."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from zoo import extras
from zoo.messages import UserError, similar_path, unknown_model
from zoo.recipes.dense.formats import look
from zoo.recipes.tasks import TASKS

# Keys that name a file or folder, absolute or below data.root.
_BELOW_ROOT = (
    *("data.class_map", "data.train_ann", "data.val_ann"),
    *("data.train_images", "data.val_images", "data.train_labels", "data.val_labels"),
)
# Keys that name the files of detection and segmentation, whose root is then not looked at.
_FILES = ("train_ann", "val_ann", "train_images", "val_images", "train_labels", "val_labels")


def check(cfg: DictConfig) -> None:
    """Refuse a task, a model, data or weights that do not exist.

    Raises:
        UserError: The message names the key, its value, and what may have been meant.
    """
    if cfg.task not in TASKS:
        raise UserError(f"task={cfg.task} is not allowed: it has to be {', '.join(TASKS)}.")
    check_model(cfg.model)
    if cfg.log.tensorboard:
        extras.require("log.tensorboard=true", "tensorboard")
    check_teacher(cfg)
    root = Path(cfg.data.root) if cfg.data.root else None
    given = {"coco": cfg.data.val_ann, "masks": cfg.data.val_images}.get(cfg.data.name)
    rootless = not cfg.data.root and given and os.path.exists(given)
    # Other data sets are generated or downloaded if there is no folder.
    if cfg.data.name in ("", "coco", "masks") and not rootless:
        check_root(cfg.data.root)
    if cfg.data.name == "csv":
        if cfg.task != "classify":
            raise UserError(f"task={cfg.task} can't read data=csv, which is for task=classify: choose other data.")
        check_csv(cfg.data.csv)
    if cfg.task in ("detect", "segment") and root and root.exists() and not any(cfg.data[key] for key in _FILES):
        look.refuse(cfg.task, root)
    for key in _BELOW_ROOT:
        value = cfg.data[key.partition(".")[2]]
        if value and not os.path.exists(value) and not (root and os.path.exists(root / value)):
            raise UserError(f"{key}={value} does not exist{similar_path(root / value if root else Path(value))}")
    check_pretrained(cfg.pretrained)


def check_pretrained(pretrained: bool | str) -> None:
    """Refuse a checkpoint that does not exist.

    Raises:
        UserError: The message says what may have been meant.
    """
    if isinstance(pretrained, str) and not os.path.exists(pretrained):
        hint = similar_path(Path(pretrained))
        raise UserError(
            f"pretrained={pretrained} does not exist{hint} Give true, false, a checkpoint or the folder of a run."
        )


def check_teacher(cfg: DictConfig) -> None:
    """Refuse a teacher or weights of it that do not exist.

    Raises:
        UserError: The message says what may have been meant.
    """
    teacher, weights = cfg.distill.teacher, cfg.distill.weights
    if teacher and not os.path.isdir(teacher):
        if "/" in teacher and ":" not in teacher:
            raise UserError(f"there is no run folder distill.teacher={teacher}{similar_path(Path(teacher))}")
        check_model(teacher)
    if weights and not os.path.exists(weights):
        raise UserError(f"distill.weights={weights} does not exist{similar_path(Path(weights))}")


def check_root(root: str | None) -> None:
    """Refuse a `data.root` that is not set or does not exist.

    Raises:
        UserError: The message says what may have been meant.
    """
    if not root:
        raise UserError("data.root is not set: give the folder of the images, data.root=<folder>.")
    if not os.path.exists(root):
        raise UserError(f"data.root={root} does not exist{similar_path(Path(root))}")


def check_csv(path: str | None) -> None:
    """Refuse a `data.csv` that is not set or does not exist.

    Raises:
        UserError: The message says what may have been meant.
    """
    if not path:
        raise UserError("data.csv is not set: give the CSV file with the images and their labels, data.csv=<file>.")
    if not os.path.exists(path):
        raise UserError(f"data.csv={path} does not exist{similar_path(Path(path))}")


def check_run(folder: Path) -> None:
    """Refuse a folder that is not a run folder.

    Raises:
        UserError: The message says what may have been meant.
    """
    if not os.path.exists(folder):
        raise UserError(f"there is no run folder {folder}{similar_path(folder)}")
    if not os.path.isfile(folder / "config.yaml"):
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml.")


def check_folder(folder: Path, what: str) -> None:
    """Refuse a folder that can't be created or written to; `what` names it in messages.

    Raises:
        UserError: The message says why.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{there} is a file, and can't be {what}: give a new or an existing folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} can't be written to: choose another folder for {what}.")


def check_model(name: str) -> None:
    """Refuse the name of a model that is not in the source code of timm or the zoo.

    A model is a function with the model's name, so reading the code is enough. timm checks the name again, and the tag.

    Raises:
        UserError: The message has the nearest name.
    """
    model = name.partition(".")[0]
    if ":" in name:  # a folder, or a repository at Hugging Face
        return
    names, sources = _models()
    if not model or (model not in names and f"'{model}'" not in sources):  # former names are quoted in timm's code
        raise UserError(unknown_model(model, names))


@cache
def _models() -> tuple[list[str], str]:
    """The names of the models of timm and the zoo, and the source code that defines them."""
    sources = "\n".join(
        file.read_text(encoding="utf-8")
        for package, folder in (("timm", "models"), ("zoo", ""))
        for location in importlib.util.find_spec(package).submodule_search_locations
        for file in Path(location, folder).glob("*.py")
    )
    return re.findall(r"^@register_model\s+def (\w+)\(", sources, re.MULTILINE), sources
