"""Cityscapes as unpacked: leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_*.png.

The 19 classes, their order and the ids in the label files are those of the data set's scripts
(github.com/mcordts/cityscapesScripts, helpers/labels.py).
"""

from __future__ import annotations

import json
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import atomic_files, distributed
from zoo.recipes.dense.formats.converted import DATA, Converted, convert, split_name
from zoo.recipes.files import DECODING_ERRORS, reason
from zoo.recipes.progress import track

# The classes in the order of their train ids, with the ids in *_labelIds.png. All other ids are ignored (255).
IDS = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
IGNORED = 255
_IMAGE, _TRAIN_IDS, _IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


def read_segmentation(root: Path, splits: dict[str, str]) -> Converted:
    """The images and labels of Cityscapes: 19 classes; labelTrainIds are made from labelIds where they are missing.

    Args:
        root: The folder of the data.
        splits: `data.train_split` and `data.val_split` by key, "train" and "val".

    Raises:
        UserError: A split is missing, or an image has no labels.
    """
    known = [path.name for path in (root / "leftImg8bit").iterdir() if path.is_dir()]
    files = {}
    for key, split in splits.items():
        name = split_name(split, known, str(root / "leftImg8bit"))
        pairs = _pairs(root, name)
        labels = [label for _, label in pairs]
        files[key] = convert(f"cityscapes-{name}", root, labels, partial(_write, root, pairs)) / DATA
    return Converted("Cityscapes", files, root, classes=list(IDS))


def _write(root: Path, pairs: list[tuple[Path, Path]], folder: Path) -> None:
    made = {label: Path("labels") / label.relative_to(root) for _, label in pairs if label.name.endswith(_IDS)}
    for path in made.values():
        (folder / path.parent).mkdir(parents=True, exist_ok=True)
    with ThreadPool(min(8, distributed.cores())) as pool:  # decoding releases the GIL
        written = pool.imap(lambda label: _write_train_ids(label, folder / made[label]), made)
        for _ in track(written, len(made), "labels of Cityscapes"):
            pass
    content = [(str(image), str(made.get(label, label))) for image, label in pairs]
    atomic_files.write_text(folder / DATA, json.dumps(content))


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The images of a split with their labelTrainIds or, where these are missing, labelIds."""
    images = sorted((root / "leftImg8bit" / split).glob(f"*/*{_IMAGE}"))
    if not images:
        raise UserError(f"{root / 'leftImg8bit' / split} has no <city>/*{_IMAGE}: unpack leftImg8bit_trainvaltest.zip.")
    pairs, without = [], []
    for image in images:
        start = root / "gtFine" / split / image.parent.name / image.name.removesuffix(_IMAGE)
        files = (start.with_name(f"{start.name}{ending}") for ending in (_TRAIN_IDS, _IDS))
        label = next((file for file in files if file.is_file()), None)
        if label:
            pairs.append((image.absolute(), label.absolute()))
        else:
            without.append(image)
    if without:
        raise UserError(
            f"{len(without)} of the {len(images)} images in {root / 'leftImg8bit' / split} have no "
            f"*{_TRAIN_IDS} or *{_IDS} in {root / 'gtFine' / split}; the first is "
            f"{without[0].name}: unpack gtFine_trainvaltest.zip."
        )
    return pairs


def _write_train_ids(source: Path, target: Path) -> None:
    """Write the train ids of a file of ids."""
    try:
        with Image.open(source) as opened:
            ids = np.array(opened)
    except DECODING_ERRORS as error:
        raise UserError(f"{source} can't be read ({reason(error)}): unpack it again.") from error
    if ids.dtype != np.uint8 or ids.ndim != 2:
        raise UserError(f"{source} has the mode {opened.mode}, but the ids of Cityscapes have 8 bits: unpack it again.")
    Image.fromarray(train_ids(ids)).save(target)


def train_ids(ids: np.ndarray) -> np.ndarray:
    """The train ids, 0 to 18 and 255, of ids in *_labelIds.png, both uint8 of any shape."""
    table = np.full(256, IGNORED, np.uint8)
    table[list(IDS.values())] = range(len(IDS))
    return table[ids]
