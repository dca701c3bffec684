"""ImageNet classifiers on other images than ImageNet's: `zoo-eval robustness=imagenet`.

| key      | data set                                                           | classes                        |
|----------|--------------------------------------------------------------------|--------------------------------|
| `val`    | ImageNet's validation images                                       | 1,000                          |
| `real`   | the same images with ReaL labels (Beyer et al., arXiv:2006.07159)  | 1,000, several for some images |
| `v2`     | ImageNet-V2 (Recht et al., ICML 2019)                              | 1,000                          |
| `a`      | ImageNet-A (Hendrycks et al., CVPR 2021)                           | 200                            |
| `r`      | ImageNet-R (Hendrycks et al., ICCV 2021)                           | 200                            |
| `sketch` | ImageNet-Sketch (Wang et al., NeurIPS 2019)                        | 1,000                          |
| `c`      | ImageNet-C (Hendrycks and Dietterich, ICLR 2019)                   | 1,000                          |

On the sets of 200 classes, a prediction is the most probable of these classes, as their authors do it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from timm.data import ImageDataset, ImageNetInfo, RealLabelsImagenet
from timm.data.readers.reader import Reader
from torch import nn

from zoo.messages import UserError, first_few, similar_path
from zoo.recipes import atomic_files, composition, distributed, logs, run_folder
from zoo.recipes.classify import calibration
from zoo.recipes.classify.accuracy import Normalize, percentage
from zoo.recipes.classify.data import Data, Samples, build_transform, build_val_loader
from zoo.recipes.classify.folders import ClassFolders, folders_in
from zoo.recipes.classify.model import input_config
from zoo.recipes.classify.robustness import Unfinished, predictions, weights_hash
from zoo.recipes.classify.train_state import autocast
from zoo.recipes.images import ENDINGS
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress

# The mean errors of AlexNet in percent, by which mCE divides: table 1 of the paper on ImageNet-C.
ALEXNET = {
    **{"gaussian_noise": 88.6, "shot_noise": 89.4, "impulse_noise": 92.3},
    **{"defocus_blur": 82.0, "glass_blur": 82.6, "motion_blur": 78.6, "zoom_blur": 79.8},
    **{"snow": 86.7, "frost": 82.7, "fog": 81.9, "brightness": 56.5},
    **{"contrast": 85.3, "elastic_transform": 64.6, "pixelate": 71.8, "jpeg_compression": 60.7},
}
_SEVERITIES = ("1", "2", "3", "4", "5")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+", re.IGNORECASE)
# Keys of the data that also matter here.
_OF_INPUT = ("img_size", "mean", "std", "interpolation", "crop_pct", "num_workers", "max_pixels")


@dataclass(frozen=True)
class _Set:
    """A data set: its title, the number of its images, and the name of timm's list of its classes, if not all."""

    title: str
    images: int
    classes: str = ""


SETS = {
    "val": _Set("ImageNet", 50_000),
    "real": _Set("ImageNet ReaL", 50_000),
    "v2": _Set("ImageNet-V2", 10_000),
    "a": _Set("ImageNet-A", 7_500, "imagenet_a"),
    "r": _Set("ImageNet-R", 30_000, "imagenet_r"),
    "sketch": _Set("ImageNet-Sketch", 50_889),
    "c": _Set("ImageNet-C", 50_000),  # in each severity of each corruption
}


class Accuracy(TypedDict):
    """Top-1 on a data set in percent, with its interval."""

    title: str
    images: int
    top1: float
    top1_interval: list[float]


class Errors(TypedDict):
    """Errors on ImageNet-C in percent: those of each severity, `ce` by AlexNet's, and their mean `mce`."""

    images: int
    errors: dict[str, list[float]]
    ce: dict[str, float]
    mce: float


class _Files(Reader):
    """A reader of files with labels, for timm's ImageDataset."""

    def __init__(self, samples: list[tuple[str, int]]):
        super().__init__()
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path


class _Among(nn.Module):
    """A model that chooses among some of its classes: the logits of the others are -inf."""

    def __init__(self, model: nn.Module, classes: Sequence[int], number: int):
        super().__init__()
        self.model = model
        others = torch.ones(number, dtype=torch.bool)
        others[list(classes)] = False
        self.register_buffer("others", others, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images to logits (B, classes)."""
        return self.model(images).masked_fill(self.others, -torch.inf)


def evaluate(
    cfg: DictConfig,
    overridden: Sequence[str],
    model: nn.Module,
    classes: Sequence[str] | None,
    weights: str,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Evaluate `model` on the data sets whose folders `cfg.imagenet` names, and print and write the figures.

    Args:
        cfg: The configuration.
        overridden: The keys that the user set.
        model: The model.
        classes: The names of its classes, if they are known: ImageNet's synsets. Otherwise they are in timm's order.
        weights: Where its weights are from.
        device: Where to evaluate.
        folder: The output folder. An evaluation that is interrupted goes on with what it left there.

    Raises:
        UserError: The model is not for ImageNet, or a folder does not hold what its key says.
    """
    useless = [key for key in overridden if key.partition(".")[0] == "data" and key.partition(".")[2] not in _OF_INPUT]
    if useless:
        raise UserError(
            f"{useless[0]} has no effect with robustness=imagenet: name the folders, for example imagenet.val=<folder>."
        )
    outputs = _outputs(cfg.model, model, classes)
    sources = {key: Path(cfg.imagenet[key]) for key in SETS if cfg.imagenet[key]}
    found = {key: _find(key, root, outputs) for key, root in sources.items()}
    distributed.first(lambda: run_folder.make_folder(folder, "out"))
    model = model.to(device)
    if cfg.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    settings = [cfg.model, cfg.trainer.amp, *(str(cfg.data[key]) for key in _OF_INPUT if key != "num_workers")]
    identity = {
        "weights": weights_hash(model),
        "settings": settings,
        "folders": {key: str(root.absolute()) for key, root in sources.items()},
    }
    unfinished = Unfinished(folder / "imagenet.part.json", identity)
    parts = [(key, part, root) for key, roots in found.items() for part, root in roots.items()]
    if done := sum(_name(key, part) in unfinished.rows for key, part, _ in parts):
        log.info("Continues: %d of %d parts are done.", done, len(parts))
    corrupt: list[str] = []
    for key, part, root in parts:
        if (name := _name(key, part)) in unfinished.rows:
            continue
        dataset = _open(key, root, outputs)
        _check_number(key, root, len(dataset))
        labels, answers, unread = _answers(cfg, model, key, dataset, outputs, device, name)
        corrupt += unread
        unfinished.add(name, [_right(key, labels, answers, outputs), len(labels)])
    figures = _figures(sources, unfinished.rows)
    whole = figures.get("val")
    summary = {
        "task": cfg.task,
        "model": cfg.model,
        "weights": weights,
        "data": {SETS[key].title: str(root) for key, root in sources.items()},
        "metrics": {"top1": whole["top1"], "images": whole["images"]} if whole else {},
        "imagenet": figures,
        "corrupt_images": corrupt,
        "command": composition.command_line(),
    }
    if distributed.rank() == 0:
        for path in corrupt:
            log.warning("A corrupt image does not count: %s", path)
        _print(cfg.model, weights, figures)
        atomic_files.write_json(folder / "eval.json", summary)
    unfinished.close()
    return summary


def _name(key: str, part: str) -> str:
    return f"{key}/{part}" if part else key


def _outputs(name: str, model: nn.Module, classes: Sequence[str] | None) -> dict[str, int]:
    """The output of the model for each synset, in the order of ImageNet."""
    synsets = ImageNetInfo("imagenet-1k").label_names()
    number = getattr(model, "num_classes", None)
    if number != len(synsets):
        raise UserError(f"{name} has {number} classes, but robustness=imagenet needs the 1,000 classes of ImageNet-1k.")
    if classes is None:
        return {synset: i for i, synset in enumerate(synsets)}
    outputs = {synset: i for i, synset in enumerate(classes)}
    if unknown := [name for name in classes if name not in set(synsets)]:
        raise UserError(
            f"the classes of this run are not ImageNet's synsets, such as n01440764: it has "
            f"{first_few(map(repr, unknown))}. If they are in ImageNet's order, give its weights as model=<name> "
            "pretrained=<run folder>."
        )
    return {synset: outputs[synset] for synset in synsets}


# Folders.


def _classes(key: str, outputs: dict[str, int]) -> list[str]:
    """The synsets of a data set."""
    if not SETS[key].classes:
        return list(outputs)
    return (files("timm.data") / "_info" / f"{SETS[key].classes}_synsets.txt").read_text().split()


def _find(key: str, root: Path, outputs: dict[str, int]) -> dict[str, Path]:
    """The folders of class folders below `root`, by the part of the data set that each one is, after checking them."""
    if not root.is_dir():
        what = "is a file: give a folder." if root.exists() else f"does not exist{similar_path(root)}"
        raise UserError(f"imagenet.{key}={root} {what}")
    if key == "real":
        return {"": root}
    if key != "c":
        _by_class(key, root, outputs)
        return {"": root}
    places = {path.name: path for group in [root, *map(root.joinpath, folders_in(root))] for path in _children(group)}
    missing = [name for name in ALEXNET if name not in places]
    if missing:
        raise UserError(
            f"imagenet.c={root} lacks {len(missing)} of the 15 corruptions of ImageNet-C, {first_few(missing)}: give "
            "the folder that has them, as corruption/severity/class/, directly or in noise/, blur/, weather/, digital/."
        )
    parts = {f"{name}/{severity}": places[name] / severity for name in ALEXNET for severity in _SEVERITIES}
    for path in parts.values():
        if not path.is_dir():
            raise UserError(f"imagenet.c={root} is incomplete: it has no folder {path}.")
        _by_class(key, path, outputs)
    return parts


def _children(folder: Path) -> list[Path]:
    return [folder / name for name in folders_in(folder) if name in ALEXNET]


def _by_class(key: str, root: Path, outputs: dict[str, int]) -> dict[str, str]:
    """The names of the class folders in `root` by synset, after checking them."""
    wanted, names = _classes(key, outputs), folders_in(root)
    title, number = SETS[key].title, f"{len(_classes(key, outputs)):,}"
    # ImageNet-V2's folders are numbers, which do not sort as text.
    numbered = len(wanted) == len(outputs) and bool(names) and all(re.fullmatch("[0-9]{1,4}", name) for name in names)
    synsets = list(outputs)
    by_synset = (
        {synsets[int(name)]: name for name in names if int(name) < len(synsets)}
        if numbered
        else {name: name for name in names}
    )
    forms = f"synsets such as {wanted[0]}" + (" or numbers from 0 to 999" if len(wanted) == len(outputs) else "")
    if unknown := sorted(set(names) - set(by_synset.values())) or [name for name in by_synset if name not in wanted]:
        inner = [name for name in unknown if set(folders_in(root / name)) & {*wanted, "0"}]
        hint = f"; did you mean imagenet.{key}={root / inner[0]}?" if inner and key != "c" else "."
        raise UserError(
            f"imagenet.{key}: {root} has the folder {unknown[0]!r}, which is none of the {number} classes of {title}, "
            f"{forms}{hint}"
        )
    if missing := [synset for synset in wanted if synset not in by_synset]:
        if len(missing) == len(wanted):
            raise UserError(
                f"imagenet.{key}: {root} has no class folders: it has to have the {number} of {title}, {forms}."
            )
        raise UserError(
            f"imagenet.{key}: {root} is incomplete: it lacks {len(missing)} of the {number} classes of {title}, such "
            f"as {synsets.index(missing[0]) if numbered else missing[0]}."
        )
    return by_synset


def _open(key: str, root: Path, outputs: dict[str, int]) -> ImageDataset:
    """The images in `root`, labelled by the outputs of the model, or by their numbers if they have ReaL labels."""
    if key != "real":
        by_synset = _by_class(key, root, outputs)
        names = {output: by_synset.get(synset, synset) for synset, output in outputs.items()}
        reader = ClassFolders(root, ENDINGS)
        reader.label([names[output] for output in range(len(names))])
        return ImageDataset(root, reader=reader)
    numbers = {}
    for place, _, found in os.walk(root, followlinks=True):
        for file in found:
            if match := _NUMBERED.fullmatch(file):
                numbers[int(match[1]) - 1] = os.path.join(place, file)
    if not numbers:
        raise UserError(
            f"imagenet.real={root} has no files named as ILSVRC2012_val_00000001.JPEG, which ReaL labels are for: give "
            "the folder of ImageNet's validation images, with their original names."
        )
    if unknown := [number for number in numbers if not 0 <= number < SETS[key].images]:
        raise UserError(f"imagenet.real={root} has {numbers[unknown[0]]}, but ImageNet has 50,000 validation images.")
    labels = _real_labels()
    labelled = [(path, number) for number, path in sorted(numbers.items()) if labels[number]]
    log.info("%d of %d images have no ReaL label and do not count.", len(numbers) - len(labelled), len(numbers))
    if not labelled:
        raise UserError(f"imagenet.real={root} has no image with a ReaL label.")
    return ImageDataset(root, reader=_Files(labelled))


def _real_labels() -> list[list[int]]:
    """The labels of each validation image in timm's order of the classes; some images have none."""
    labels = RealLabelsImagenet(range(SETS["real"].images)).real_labels  # their number is all that it reads
    return [labels[f"ILSVRC2012_val_{number + 1:08d}.JPEG"] for number in range(len(labels))]


def _check_number(key: str, root: Path, number: int) -> None:
    whole = sum(map(bool, _real_labels())) if key == "real" else SETS[key].images
    if number != whole and distributed.rank() == 0:
        log.warning(
            "%s has %s images, but %s has %s: the figure is not that of the whole set.",
            root, f"{number:,}", SETS[key].title, f"{whole:,}",
        )  # fmt: skip


# Figures.


def _answers(
    cfg: DictConfig,
    model: nn.Module,
    key: str,
    dataset: ImageDataset,
    outputs: dict[str, int],
    device: torch.device,
    name: str,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    data_config = input_config(model, cfg.data)
    if key == "c":  # its images are already cropped
        data_config["crop_pct"] = 1.0
    samples = Samples(
        dataset, build_transform(None, data_config), cfg.seed, False, data_config["input_size"],
        max_pixels=cfg.data.max_pixels,
    )  # fmt: skip
    data = Data(None, dataset, list(outputs))
    loader = build_val_loader(data, samples, cfg.trainer.batch_size, cfg.data, device)
    normalize = Normalize(data_config, device, cfg.trainer.channels_last)
    among = [outputs[synset] for synset in _classes(key, outputs)]
    with Progress(distributed.rank() == 0) as bar:
        bar.title = name
        bar.start_evaluation(len(loader))
        chooser = _Among(model, among, len(outputs)).to(device)
        return predictions(chooser, loader, normalize, autocast(cfg.trainer.amp, device), bar.advance_evaluation)


def _right(key: str, labels: np.ndarray, answers: np.ndarray, outputs: dict[str, int]) -> int:
    """How many answers are right."""
    if key != "real":
        return int((labels == answers).sum())
    standard = {output: i for i, output in enumerate(outputs.values())}
    allowed = _real_labels()
    return sum(
        standard[answer] in allowed[number] for number, answer in zip(labels.tolist(), answers.tolist(), strict=True)
    )


def _figures(sources: dict[str, Path], rows: dict[str, list[float]]) -> dict[str, Any]:
    """An `Accuracy` for each data set, but `Errors` for "c"."""
    figures: dict[str, Any] = {}
    for key in sources:
        if key != "c":
            right, images = map(int, rows[key])
            figures[key] = Accuracy(
                title=SETS[key].title,
                images=images,
                top1=100 * right / images,
                top1_interval=list(calibration.interval(right, images)),
            )
            continue
        errors = {
            name: [100 - 100 * rows[f"c/{name}/{s}"][0] / rows[f"c/{name}/{s}"][1] for s in _SEVERITIES]
            for name in ALEXNET
        }
        ce = {name: 100 * float(np.mean(row)) / ALEXNET[name] for name, row in errors.items()}
        images = sum(int(row[1]) for name, row in rows.items() if name.startswith("c/"))
        figures[key] = Errors(images=images, errors=errors, ce=ce, mce=float(np.mean(list(ce.values()))))
    return figures


def _print(model: str, weights: str, figures: dict[str, Any]) -> None:
    log.info("%s (%s):", model, weights)
    if simple := [row for key, row in figures.items() if key != "c"]:
        table = Table("data set", "images", "top-1", "95 % interval")
        for row in simple:
            low, high = row["top1_interval"]
            table.add_row(row["title"], f"{row['images']:,}", percentage(row["top1"]), f"{low:.2f} to {high:.2f} %")
        logs.console.print(table)
    if found := figures.get("c"):
        table = Table("corruption, severity", *_SEVERITIES, "CE")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, row in found["errors"].items():
            table.add_row(name, *(f"{value:.1f}" for value in (*row, found["ce"][name])))
        logs.console.print(table)
        log.info("ImageNet-C: errors in %%; mCE %.2f %% (relative to AlexNet's errors; lower is better)", found["mce"])
