"""Data for classification: the digits, folders of images, and everything that timm.data.create_dataset reads."""

from __future__ import annotations

import atexit
import bisect
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_dataset, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import Compose, Grayscale

from zoo.messages import UserError, first_few, nearest
from zoo.recipes import distributed, early, same_images
from zoo.recipes.classify import csv_table
from zoo.recipes.classify.csv_table import CsvImages
from zoo.recipes.classify.folders import ClassFolders, ClassTar, class_name, folders_in
from zoo.recipes.config import AugmentConfig, DataConfig
from zoo.recipes.digits import Digits
from zoo.recipes.errors import of_the_system
from zoo.recipes.files import (
    DECODING_ERRORS,
    SPLIT_FOLDERS,
    is_text,
    read_classes,
    reason,
)
from zoo.recipes.images import ENDINGS, MAX_PIXELS, MODES, ImageError, as_read, open_image
from zoo.recipes.logs import log
from zoo.recipes.scenes import DigitCrops
from zoo.recipes.seeding import seed_cpu
from zoo.recipes.subsets import files_to_check


@dataclass
class Data:
    """The two splits (indexable, or streams) with the names of their classes.

    `train` is None if the data are only for evaluation. The indices select the items of a split; by default all items.
    A stream has no indices. The label of an item is the index of a class or, with `multi_label`, a tuple of them.
    """

    train: Dataset | None
    val: Dataset
    classes: list[str]
    train_indices: Sequence[int] | None = None
    val_indices: Sequence[int] | None = None
    multi_label: bool = False

    def __post_init__(self):
        if self.train_indices is None and self.train is not None and not is_stream(self.train):
            self.train_indices = range(len(self.train))
        if self.val_indices is None and not is_stream(self.val):
            self.val_indices = range(len(self.val))


def open_data(cfg: DataConfig, seed: int, training: bool = True, classes: Sequence[str] | None = None) -> Data:
    """Open the data set that `cfg` names, and check it before training.

    Args:
        cfg: The configuration.
        seed: Determines which images are held out if a folder has no validation split.
        training: Open both splits; otherwise only the validation split, or the root if there are no splits.
        classes: The class names in the order of the labels; None for the classes of the training split.

    Raises:
        UserError: The data can't be used; the message names the path.
    """
    if cfg.name == "csv":
        return _open_csv(cfg, seed, training, classes)
    if cfg.csv:
        raise UserError(f"data.csv={cfg.csv} has no effect with data.name={cfg.name!r}: give data=csv, too.")
    if cfg.multi_label:
        raise UserError(
            f"data.multi_label=true, but data.name={cfg.name!r} has one label per image: for several, give data=csv."
        )
    if cfg.name == "digits":
        return Data(Digits(True) if training else None, Digits(False), list(Digits.classes))
    if cfg.name == "digit_crops":
        return Data(DigitCrops(cfg.root, True) if training else None, DigitCrops(cfg.root, False), list(Digits.classes))
    if "/" not in cfg.name:
        early.check_root(cfg.root)
        return _open_folders(cfg, seed, training, classes)
    if cfg.class_map:
        classes = read_classes(Path(cfg.class_map))
    if training and cfg.train_split == cfg.val_split and not cfg.same_images:
        raise UserError(
            f"data.train_split and data.val_split are both {cfg.val_split!r}: give each split its own images, or allow "
            "this with data.same_images=true."
        )
    class_map = {name: index for index, name in enumerate(classes)} if classes else None
    train = _create(cfg, cfg.train_split, True, class_map) if training else None
    names = _checked_number(list(classes), cfg) if classes else _class_names(train, cfg) if training else None
    if class_map is None and training and _class_index(train):
        class_map = {name: index for index, name in enumerate(names)}
    val = _create(cfg, cfg.val_split, False, class_map)
    data = Data(train, val, names or _class_names(val, cfg))
    _check_not_empty(data, cfg)
    return data


def _open_folders(cfg: DataConfig, seed: int, training: bool, classes: Sequence[str] | None) -> Data:
    root = Path(cfg.root)
    train_root, val_root = _split(root, cfg.train_split, cfg), _split(root, cfg.val_split, cfg)
    if cfg.class_map:
        classes = read_classes(Path(cfg.class_map))
    if not training:
        # A root without split folders is evaluated itself.
        folders = _class_folders(val_root or root, cfg)
        names = list(classes or folders.images)
        return Data(None, _labelled(folders, names, cfg, training=False), _checked_number(names, cfg))
    if val_root and not train_root:
        raise UserError(
            f"{root} has {val_root.name} but no {cfg.train_split}: name it with data.train_split=<folder or tar file>."
        )
    train_root = train_root or root
    folders = _class_folders(train_root, cfg)
    names = _checked_number(list(classes or folders.images), cfg)
    train = _labelled(folders, names, cfg, training=True)
    if len(names) < 2:
        inside, hint = train_root / names[0], ""
        if inside.is_dir() and folders_in(inside):
            hint = f"; if its classes are the folders in {inside}, that is the root"
        raise UserError(f"{train_root} has a single class, {names[0]!r}: classification needs two or more{hint}.")
    if val_root:
        val_folders = _class_folders(val_root, cfg)
        same_images.check(cfg, folders.files(), val_folders.files())
        return Data(train, _labelled(val_folders, names, cfg, training=False), names)
    train_indices, val_indices = hold_out([target for _, target in folders.samples], cfg.val_fraction, seed)
    if not val_indices:
        raise UserError(
            f"{train_root} has too few images to hold out {cfg.val_fraction:.0%} of a class for validation: "
            "add images, raise data.val_fraction, or add a folder val/."
        )
    log.info(
        "%s has no validation split: %d of %d images are held out (data.val_fraction=%g).",
        root,
        len(val_indices),
        len(train),
        cfg.val_fraction,
    )
    return Data(train, train, names, train_indices, val_indices)


def _open_csv(cfg: DataConfig, seed: int, training: bool, classes: Sequence[str] | None) -> Data:
    table = csv_table.read_table(cfg)
    if cfg.class_map:
        classes = read_classes(Path(cfg.class_map))
    train_rows, val_rows = csv_table.rows_of_splits(table, cfg)
    if not training:
        # A table without splits is evaluated itself.
        rows = val_rows if table.has_splits else table.rows
        if not rows:
            raise csv_table.no_rows(table, cfg.val_split, "val_split")
        names = _checked_number(list(classes or csv_table.class_names(rows)), cfg)
        return Data(None, _listed(table, rows, names, cfg, training=False), names, multi_label=table.multi_label)
    if not train_rows:
        raise csv_table.no_rows(table, cfg.train_split, "train_split")
    names = _checked_number(list(classes or csv_table.class_names(train_rows)), cfg)
    train = _listed(table, train_rows, names, cfg, training=True)
    labels = {label for _, label in train.reader.samples}
    if len(labels) < 2:
        what = f"the same label, {names[0]!r}" if names and labels != {()} else "no label"
        raise UserError(f"{table.path}: all training images have {what}: classification needs two or more classes.")
    if val_rows:
        val = _listed(table, val_rows, names, cfg, training=False)
        same_images.check(cfg, *(split.reader.filenames(absolute=True) for split in (train, val)))
        return Data(train, val, names, multi_label=table.multi_label)
    targets = [label for _, label in train.reader.samples]
    hold = _hold_out_several if table.multi_label else hold_out
    train_indices, val_indices = hold(targets, cfg.val_fraction, seed)
    if not val_indices:
        raise UserError(
            f"{table.path} has too few images to hold out {cfg.val_fraction:.0%} of a class for validation: add "
            f"images, raise data.val_fraction, or write {cfg.val_split} into a column 'split'."
        )
    log.info(
        "%s has no validation split: %d of %d images are held out (data.val_fraction=%g).",
        table.path,
        len(val_indices),
        len(targets),
        cfg.val_fraction,
    )
    return Data(train, train, names, train_indices, val_indices, multi_label=table.multi_label)


def _listed(
    table: csv_table.Table, rows: Sequence[csv_table.Row], names: Sequence[str], cfg: DataConfig, training: bool
) -> ImageDataset:
    """The images of rows, labelled by `names`; other labels are refused, unless a class map leaves them out."""
    found, known = csv_table.class_names(rows), {class_name(name) for name in names}
    unknown = [name for name in found if name not in known]
    if not cfg.class_map:
        csv_table.check_known(table, rows, names)
    elif found and len(unknown) == len(found):
        raise UserError(
            f"{table.path} has none of the {len(names)} classes of data.class_map={cfg.class_map}: it has "
            f"{first_few(map(repr, found))}{_meant(unknown[0], names)}."
        )
    if unknown and training:
        log.warning(
            "data.class_map=%s leaves out %d of the %d labels in %s: %s.",
            cfg.class_map,
            len(unknown),
            len(found),
            table.path,
            first_few(unknown),
        )
    missing = [name for name in names if class_name(name) not in found]
    if missing:
        split = "training" if training else "validation"
        log.warning(
            "%s has no %s images of %d of the %d classes: %s.",
            table.path,
            split,
            len(missing),
            len(names),
            first_few(missing),
        )
    reader = CsvImages(table, rows, names)
    if not training and not any(label != () for _, label in reader.samples):
        raise UserError(f"{table.path}: no validation image has a label: scores need some.")
    _check_files(reader, cfg)
    return ImageDataset(reader.root, reader=reader)


def _class_folders(root: Path, cfg: DataConfig) -> ClassFolders | ClassTar:
    endings = ENDINGS
    if cfg.input_key:
        endings = {"." + ending.strip().lower().removeprefix(".") for ending in cfg.input_key.split(";")}
    if root.is_dir():
        return ClassFolders(root, endings)
    if root.suffix.lower() == ".tar":
        return ClassTar(root, endings)
    raise UserError(f"{root} is neither a folder of class folders nor a .tar file: give one of these.")


def _labelled(folders: ClassFolders | ClassTar, names: Sequence[str], cfg: DataConfig, training: bool) -> ImageDataset:
    """The images labelled by `names`, in that order; other classes are refused, unless a class map leaves them out."""
    known, found = {class_name(name) for name in names}, list(folders.images)
    unknown = [name for name in found if name not in known]
    if unknown and not cfg.class_map:
        raise UserError(
            f"{folders.root} has {len(unknown)} {'class' if len(unknown) == 1 else 'classes'} that training does not "
            f"have, {first_few(map(repr, unknown))}{_meant(unknown[0], names)}: it has to use the names of the "
            f"{len(names)} training classes."
        )
    if len(unknown) == len(found):
        raise UserError(
            f"{folders.root} has none of the {len(names)} classes of data.class_map={cfg.class_map}: it has "
            f"{first_few(map(repr, found))}{_meant(unknown[0], names)}."
        )
    if unknown and training:
        log.warning(
            "data.class_map=%s leaves out %d of the %d classes in %s: %s.",
            cfg.class_map,
            len(unknown),
            len(found),
            folders.root,
            first_few(unknown),
        )
    missing = [name for name in names if class_name(name) not in folders.images]
    if missing:
        log.warning(
            "%s has no images of %d of the %d classes: %s.", folders.root, len(missing), len(names), first_few(missing)
        )
    folders.label(names)
    if isinstance(folders, ClassFolders):
        _check_files(folders, cfg)
    return ImageDataset(folders.root, reader=folders)


def _meant(name: str, known: Sequence[str]) -> str:
    """A hint at the known name that was probably meant by `name`."""
    close = nearest(name, known)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _create(cfg: DataConfig, split: str, training: bool, class_map: dict[str, int] | None) -> Dataset:
    if cfg.name.lower().startswith("wds/"):
        _refuse_commands(cfg, split)
    try:
        return create_dataset(
            cfg.name,
            root=cfg.root,
            split=split,
            is_training=training,
            class_map=class_map,
            download=cfg.download,
            num_samples=cfg.num_samples if training else cfg.val_num_samples,
            input_img_mode="RGB" if cfg.name.lower().startswith("tfds/") else None,  # their images are converted here
            input_key=cfg.input_key,
            target_key=cfg.target_key,
        )
    except Exception as error:  # any of five libraries may read the data, and raise any error
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f"data.name={cfg.name!r}, data.root={cfg.root}, split {split!r}"
        raise UserError(f"the data set can't be opened ({where}): {what}") from error


def _refuse_commands(cfg: DataConfig, split: str) -> None:
    """Keep webdataset from running shell commands, `pipe:...`, which it accepts in place of shards."""
    if "pipe:" in f"{cfg.root} {split}":
        raise UserError(f"data.root={cfg.root}, split {split!r} is a command, which is not run: give files.")
    with suppress(ImportError):
        from webdataset.gopen import gopen_schemes

        gopen_schemes.pop("pipe", None)  # a list of shards may contain commands too


def _class_index(dataset: Dataset) -> dict[str, int] | None:
    reader = getattr(dataset, "reader", None)
    return getattr(reader, "class_to_idx", None) or getattr(
        reader, "class_name_to_idx", None
    )  # of folders and tar files


def _class_names(dataset: Dataset, cfg: DataConfig) -> list[str]:
    reader = getattr(dataset, "reader", None)
    index = _class_index(dataset)
    if index:
        names = sorted(index, key=index.get)
    elif getattr(dataset, "classes", None):
        names = list(dataset.classes)
    elif hasattr(reader, "dataset") and hasattr(reader.dataset, "features"):  # Hugging Face
        feature = reader.dataset.features.get(cfg.target_key or "label")
        names = list(getattr(feature, "names", None) or [])
    else:
        names = []
    if not names and cfg.num_classes:
        names = [str(label) for label in range(cfg.num_classes)]
    if not names:
        raise UserError(f"the data set {cfg.name!r} does not name its classes: give data.num_classes=<number>.")
    return _checked_number([str(name) for name in names], cfg)


def _checked_number(names: list[str], cfg: DataConfig) -> list[str]:
    if cfg.num_classes and cfg.num_classes != len(names):
        raise UserError(f"data.num_classes={cfg.num_classes}, but the data has {len(names)} classes: leave it out.")
    return names


def _check_not_empty(data: Data, cfg: DataConfig) -> None:
    for split, dataset in ((cfg.train_split, data.train), (cfg.val_split, data.val)):
        if dataset is None:
            continue
        if len(dataset) == 0:
            option = "num_samples" if dataset is data.train else "val_num_samples"
            what = f"has no known length: give data.{option}=<number>" if is_stream(dataset) else "has no images"
            raise UserError(f"the split {split!r} of data.name={cfg.name!r} {what}.")


def _split(root: Path, split: str, cfg: DataConfig) -> Path | None:
    """The folder or tar file of a split; None if there is none, or if it is a class of the same name."""
    names = SPLIT_FOLDERS.get(split, (split,))
    name = next((name for name in names if os.path.isdir(root / name)), None)
    if name is None:
        return root / split if os.path.isfile(root / split) else None
    splits = {cfg.train_split, cfg.val_split, "test", *(name for names in SPLIT_FOLDERS.values() for name in names)}
    others = [other for other in folders_in(root) if other != name]
    if folders_in(root / name) or not others or splits & set(others):
        return root / name
    log.info("%s has no class folders, so it counts as a class.", root / name)
    return None


def _check_files(reader: ClassFolders | CsvImages, cfg: DataConfig) -> None:
    """Refuse text files named like images: error pages or lists, saved by mistake, spoil a whole data set.

    Damaged images are not refused: training skips and logs them.
    """
    names = reader.filenames(absolute=True)
    chosen = files_to_check(names, cfg)
    text = [name for name in chosen if is_text(name)]
    if text:
        more = f", and {len(text) - 1} more of the {len(chosen)} files looked at are" if len(text) > 1 else " is"
        raise UserError(f"{text[0]}{more} text, not an image: remove or replace it.")


def hold_out(targets: list[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split positions into two sorted lists; the second has `fraction` of every class, at least one of two or more."""
    rng = np.random.default_rng(seed)
    held = []
    for label in sorted(set(targets)):
        positions = [i for i, target in enumerate(targets) if target == label]
        count = max(round(fraction * len(positions)), 1) if len(positions) > 1 else 0
        held += rng.permutation(positions)[:count].tolist()
    chosen = set(held)
    return [i for i in range(len(targets)) if i not in chosen], sorted(held)


def _hold_out_several(targets: list[tuple[int, ...]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """`hold_out` for images with several labels each: close to `fraction` of every label.

    Labels take turns, the rarest first, because only few images can give them their share: the iterative
    stratification of Sechidis, Tsoumakas and Vlahavas, https://doi.org/10.1007/978-3-642-23808-6_10.
    """
    rng = np.random.default_rng(seed)
    having: dict[int, list[int]] = {}
    for i, labels in enumerate(targets):
        for label in labels:
            having.setdefault(label, []).append(i)
    held: set[int] = set()
    open_ = set(range(len(targets)))
    for label in sorted(having, key=lambda label: (len(having[label]), label)):
        images = having[label]
        wanted = max(round(fraction * len(images)), 1) if len(images) > 1 else 0
        free = [i for i in images if i in open_]
        missing = max(wanted - len(held.intersection(images)), 0)
        held.update(rng.permutation(free)[:missing].tolist())
        open_.difference_update(free)
    rest = sorted(open_)  # images without labels
    held.update(rng.permutation(rest)[: round(fraction * len(rest))].tolist())
    return [i for i in range(len(targets)) if i not in held], sorted(held)


def train_labels(data: Data) -> list[Any] | None:
    """The labels of `data.train` at `data.train_indices`; None if the data set does not list them."""
    reader = getattr(data.train, "reader", None)
    if isinstance(reader, ClassFolders | ClassTar | CsvImages):
        labels = [label for _, label in reader.samples]
    elif hasattr(data.train, "targets"):  # of torchvision, and the digits
        labels = list(data.train.targets)
    else:
        return None
    if labels and np.asarray(labels[0]).ndim and not data.multi_label:  # not the index of a class
        return None
    return [labels[i] if data.multi_label else int(labels[i]) for i in data.train_indices]


def is_stream(dataset: Dataset) -> bool:
    """Whether the data set can only be read in its own order."""
    return isinstance(dataset, IterableDataset)


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's strongest posterizing keeps 0 bits, that is, a black image; Pillow 13 and later refuse that."""
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))


def build_transform(cfg: AugmentConfig | None, data_config: dict[str, Any]) -> Any:
    """timm's transform to a uint8 array (C, H, W): for training with `cfg`, or for evaluation if that is None.

    Raises:
        UserError: `cfg` can't be applied to images with this number of channels.
    """
    common = {"input_size": data_config["input_size"], "use_prefetcher": True}
    channels = data_config["input_size"][0]
    if cfg is None:
        names = ("interpolation", "crop_pct", "crop_mode")
        transform = create_transform(**common, **{name: data_config[name] for name in names})
        return Compose([_middle, *transform.transforms]) if data_config["crop_mode"] == "center" else transform
    if cfg.auto_augment and channels == 4:
        raise UserError(
            f"augment.auto_augment={cfg.auto_augment} changes images of 1 or 3 channels, but the model takes 4: "
            "set it to null."
        )
    try:
        transform = create_transform(
            **common,
            is_training=True,
            scale=tuple(cfg.scale),
            ratio=tuple(cfg.ratio),
            hflip=cfg.hflip,
            vflip=cfg.vflip,
            color_jitter=cfg.color_jitter or None,
            auto_augment=cfg.auto_augment,
            interpolation=cfg.interpolation,
        )
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"augment.auto_augment={cfg.auto_augment} is not a policy of timm ({type(error).__name__}: {error}): "
            "give one such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original, or null."
        ) from error
    if cfg.auto_augment and channels == 1:  # its policies are for RGB images
        *steps, to_array = transform.transforms
        return Compose([Grayscale(3), *steps, Grayscale(1), to_array])
    return transform


def _middle(image: Image.Image) -> Image.Image:
    """Crop the ends of a very long image, which a center crop ignores: resizing the short side would make it huge."""
    most = 64 * min(image.size)
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


Sample = tuple[torch.Tensor, int | torch.Tensor, list[str]]


class Samples(Dataset):
    """Transformed images: uint8 (C, H, W), label, and the names of images that could not be read.

    The label is the index of a class or, if `classes` is not 0, float32 (classes,): 1 for each label of the image and 0
    for the others.

    The random transform of an item depends only on the seed and on the item's key, which is the epoch and the index,
    and with repeated augmentation the number of the repetition. So it does not matter which process makes it, or when.
    In training, a corrupt image is replaced by the next good one of `indices` (None: of all images); in evaluation, it
    gets the label -1, or -1 for every class.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Any,
        seed: int,
        training: bool,
        input_size: tuple[int, int, int],
        indices: Sequence[int] | None = None,
        max_pixels: int = MAX_PIXELS,
        classes: int = 0,
    ):
        self.channels, self.max_pixels = input_size[0], max_pixels
        if self.channels not in MODES:
            raise UserError(
                f"the model takes images of {self.channels} channels, but images are read with 1 (grey), 3 (RGB) or 4 "
                "(RGBA): set model_kwargs.in_chans to one of these."
            )
        if hasattr(dataset, "loader"):  # torchvision's folders
            dataset.loader = self._open
        self.dataset, self.transform, self.seed, self.training = dataset, transform, seed, training
        self.input_size, self.indices, self.classes = input_size, indices, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, *repetition = key
        corrupt: list[str] = []
        indices = range(len(self)) if self.indices is None else self.indices  # rising
        place = bisect.bisect_left(indices, index)
        for attempt in range(min(len(indices), 1000) if self.training else 1):
            position = indices[(place + attempt) % len(indices)] if attempt else index
            try:
                image, target = self._read(position)
            except DECODING_ERRORS as error:
                if of_the_system(error):  # the image is not the cause
                    raise
                corrupt.append(f"{self.name(position)} ({reason(error)})")
                continue
            if self.training:
                seed_cpu(self.seed, epoch, position, *repetition)
            return self.finish(image), self.label(target), corrupt
        if self.training:
            raise UserError(f"{len(corrupt)} corrupt images in a row; the first is {corrupt[0]}: check the data.")
        bad = torch.full((self.classes,), -1.0) if self.classes else -1
        return torch.zeros(self.input_size, dtype=torch.uint8), bad, corrupt

    def label(self, target: Any) -> int | torch.Tensor:
        """The label of an image whose data set has `target`."""
        if not self.classes:
            return int(target)
        label = torch.zeros(self.classes)
        label[list(target)] = 1
        return label

    def _open(self, file: Any) -> Image.Image:
        return open_image(file, self.channels, self.max_pixels)

    def _read(self, position: int) -> tuple[Image.Image, Any]:
        if not isinstance(self.dataset, ImageDataset):
            image, target = self.dataset[position]
            return as_read(image, self.channels), target
        # timm itself would silently replace an image that can't be read by another one, so that it would go uncounted.
        try:
            file, target = self.dataset.reader[position]
        except (AssertionError, KeyError, TypeError, EOFError, tarfile.TarError) as error:
            raise ImageError(f"it has no image ({type(error).__name__}: {error})") from None
        with file:
            return self._open(file), target

    def finish(self, image: Image.Image) -> torch.Tensor:
        """Transform an image that has the right number of channels."""
        return torch.as_tensor(self.transform(image))

    def name(self, position: int) -> str:
        """The file of an image, or its number if it has none of its own."""
        for name in (getattr(self.dataset, "filename", None), getattr(self.dataset, "samples", None)):
            try:
                return str(name(position, absolute=True) if callable(name) else name[position][0])
            except (AttributeError, IndexError, NotImplementedError, TypeError, AssertionError):
                continue
        return f"image {position}"


class Stream(IterableDataset):
    """`Samples` for data sets that can only be read in order; the position takes the place of the index."""

    def __init__(self, dataset: IterableDataset, samples: Samples):
        self.dataset, self.samples, self.epoch = dataset, samples, 0

    def __iter__(self) -> Iterator[Sample]:
        samples, worker = self.samples, get_worker_info()
        corrupt: list[str] = []
        for number, (image, target) in enumerate(self._stream()):
            try:
                image = as_read(image, samples.channels)
            except DECODING_ERRORS as error:
                corrupt.append(f"image {number} of the stream ({reason(error)})")
                if not samples.training:
                    yield torch.zeros(samples.input_size, dtype=torch.uint8), -1, [corrupt.pop()]
                continue
            if samples.training:
                seed_cpu(samples.seed, self.epoch, number, distributed.rank(), worker.id if worker else 0)
            yield samples.finish(image), int(target), corrupt
            corrupt = []

    def _stream(self) -> Iterator[tuple[Image.Image, Any]]:
        try:
            yield from self.dataset
        except DECODING_ERRORS as error:
            raise UserError(f"the data set can't be read to its end: {reason(error)}") from error


class EpochSampler(Sampler):
    """This process's share of an epoch in shuffled order, as the keys of `Samples`; it can start in the middle.

    All processes together take `effective_batch` images per update, which do not depend on the number of processes.
    Images left over at the end of an epoch are dropped.

    With `repeats` above 1, an epoch is as long as otherwise, but has `repeats` forms of each of its images, one after
    the other, so that several processes share them: the order of timm's RepeatAugSampler, which can't start in the
    middle.

    With `labels`, the class of each index, an epoch is as long as otherwise, but has the same number of images of every
    class. Each time that an image occurs in it, it has another form.
    """

    def __init__(
        self,
        indices: Sequence[int],
        effective_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        repeats: int = 1,
        labels: Sequence[int] | None = None,
    ):
        self.labels = None if labels is None else np.asarray(labels)
        self.indices, self.effective_batch, self.seed = indices, effective_batch, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return (len(self.indices) // self.effective_batch * self.effective_batch - self.start) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        occurrence = None
        if self.labels is None:
            order = rng.permutation(len(self.indices))
        else:
            order, occurrence = _balanced_order(self.labels, rng)
        stop = len(order) // self.effective_batch * self.effective_batch
        for number in range(self.start, stop)[self.rank :: self.world_size]:
            place = number // self.repeats
            repetition = () if occurrence is None else (int(occurrence[place]),)
            repetition += (number % self.repeats,) if self.repeats > 1 else ()
            yield self.epoch, self.indices[order[place]], *repetition


def _balanced_order(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `labels` in random order, as many as there are labels, with the same number of every class.

    A class takes all of its images before it takes one again.

    Returns:
        The positions, and for each of them how often it occurs before.
    """
    by_class = np.argsort(labels, kind="stable")
    groups = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    counts = np.full(len(groups), len(labels) // len(groups))
    counts[rng.permutation(len(groups))[: len(labels) % len(groups)]] += 1
    order, occurrence = [], []
    for group, count in zip(groups, counts.tolist(), strict=True):
        rounds = -(-count // len(group))
        order.append(np.concatenate([rng.permutation(group) for _ in range(rounds)] or [group])[:count])
        occurrence.append(np.arange(count) // len(group))
    mixed = rng.permutation(len(labels))
    return np.concatenate(order)[mixed], np.concatenate(occurrence)[mixed]


class EvalSampler(OrderedDistributedSampler):
    """This process's share of the validation images, as (0, index) pairs.

    Every process gets the same number, so that processes that gather sharded weights stay in step;
    `num_valid_samples` is the number of images that count in this process.
    """

    def __init__(self, indices: Sequence[int], rank: int, world_size: int):
        super().__init__(indices, num_replicas=world_size, rank=rank)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, self.dataset[position]) for position in super().__iter__())


def collate(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Stack samples: uint8 (B, C, H, W), labels as int64 (B,) or float32 (B, classes), and names of corrupt images."""
    images, targets, corrupt = zip(*samples, strict=True)
    labels = torch.stack(targets) if isinstance(targets[0], torch.Tensor) else torch.tensor(targets)
    return torch.stack(images), labels, [name for names in corrupt for name in names]


def next_batch(batches: Iterator[Any]) -> Any:
    """The next batch; the traceback of a worker process is stripped from its UserError."""
    try:
        return next(batches)
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def start_worker(_: int) -> None:
    """Prepare a process that loads images."""
    # The main process handles signals to the whole group; a worker ends when the main process does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers() -> None:
    """Kill the workers at exit: multiprocessing would wait for them, and they ignore the signal that it sends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise torch would report their end as a crash
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


atexit.register(_end_workers)  # registered after multiprocessing's handler, so it runs before it


def num_workers(cfg: DataConfig) -> int:
    """The number of workers that load images: as configured, or this process's share of the cores, at most eight."""
    if cfg.num_workers is not None:
        return cfg.num_workers
    if cfg.name in ("digits", "digit_crops"):  # in memory
        return 0
    return distributed.spare_cores()


def build_loader(
    dataset: Dataset,
    sampler: Sampler | None,
    batch_size: int,
    cfg: DataConfig,
    device: torch.device,
    training: bool,
    keep_workers: bool = False,
) -> DataLoader:
    """A loader of batches made by `collate`; without a sampler, `dataset` is a stream.

    If it is read several times, `keep_workers` keeps its workers. They then end when the loader is deleted, and Python
    ignores Ctrl-C there.
    """
    workers = distributed.check_open_files(num_workers(cfg))
    if sampler is None and training:
        # A stream's reader counts how often it was read; a new worker for every epoch starts at 0, as in a resumed run.
        workers = max(workers, 1)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        persistent_workers=keep_workers and workers > 0 and sampler is not None,
    )


def build_val_loader(
    data: Data, samples: Samples, batch_size: int, cfg: DataConfig, device: torch.device, keep_workers: bool = False
) -> DataLoader:
    """A loader of this process's share of `data.val`, which `samples` transforms; see `build_loader`."""
    if data.val_indices is None:
        return build_loader(Stream(data.val, samples), None, batch_size, cfg, device, training=False)
    sampler = EvalSampler(data.val_indices, distributed.rank(), distributed.world_size())
    return build_loader(samples, sampler, batch_size, cfg, device, training=False, keep_workers=keep_workers)
