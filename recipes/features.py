"""Features of a frozen model: pooled vectors or maps, computed in batches, and cached for whole data sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import Dataset

import zoo
from zoo.messages import UserError, one_line, size_text
from zoo.recipes import cache
from zoo.recipes.classify.accuracy import Normalize
from zoo.recipes.classify.data import (
    Data,
    EvalSampler,
    Samples,
    Stream,
    build_loader,
    build_transform,
    is_stream,
    open_data,
)
from zoo.recipes.classify.folders import ClassTar
from zoo.recipes.classify.model import input_config
from zoo.recipes.classify.train_state import autocast
from zoo.recipes.config import AMP
from zoo.recipes.corrupt import worker_errors
from zoo.recipes.logs import log
from zoo.recipes.npy_rows import NpyRows
from zoo.recipes.progress import Progress

KINDS = ("pooled", "map")
_VERSION = 1  # of the cache's files; raise it if features change
_NAMES = {"train": "training", "val": "validation"}
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class Extractor:
    """Computes the features of images with a frozen model.

    Pooled features are what the classifier gets: those of timm's `forward_head(..., pre_logits=True)`. Maps are the
    last features before pooling, without class tokens, and normalized unless the model normalizes what it has pooled.

    Args:
        model: A model of timm, on its device. It is put into evaluation mode; its classifier is not used.
        data_config: timm's data configuration, as `input_config` returns it.
        kind: "pooled" or "map".
        amp: The mixed precision, as in `trainer.amp`.
        channels_last: Whether images are in the channels-last memory format.

    Attributes:
        shape: The shape of the features of an image: (C,), or (C, H, W) for maps.

    Raises:
        UserError: There is no such kind, or the model has no features of this kind.
    """

    def __init__(
        self,
        model: nn.Module,
        data_config: dict[str, Any],
        kind: str = "pooled",
        amp: str = "none",
        channels_last: bool = False,
    ):
        if kind not in KINDS:
            raise UserError(f"features={kind} is not allowed: it has to be {' or '.join(KINDS)}.")
        self.model, self.data_config, self.kind, self.amp = model.eval(), data_config, kind, amp
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.device = next(model.parameters()).device
        self._normalize = Normalize(data_config, self.device, channels_last)
        zeros = torch.zeros(1, *data_config["input_size"], dtype=torch.uint8)
        try:
            self.shape: tuple[int, ...] = self(zeros).shape[1:]
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            size = size_text(data_config["input_size"])
            raise UserError(
                f"the model gives no {kind} features of images of {size}: {one_line(error, 200)}."
            ) from error

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """The features of images.

        Args:
            images: (B, C, H, W), uint8, as `build_transform` makes them.

        Returns:
            float32, (B, *shape).
        """
        with autocast(self.amp, self.device):
            found = self._features(self._normalize(images))
        if found.ndim != (2 if self.kind == "pooled" else 4):
            raise ValueError(f"they have the shape {tuple(found.shape)}")
        return found.float().cpu().numpy()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        model = self.model
        features = model.forward_features(images)
        if self.kind == "pooled":
            return model.forward_head(features, pre_logits=True)
        if isinstance(features, torch.Tensor) and features.ndim == 4:
            return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
        # Tokens: timm knows which of them are a map.
        return model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]

    def identity(self) -> dict[str, Any]:
        """What determines the features of an image, as JSON has it."""
        config = {name: self.data_config[name] for name in _PREPROCESSING}
        return {
            "features": self.kind,
            "weights": weights_hash(self.model),
            "preprocessing": json.loads(json.dumps(config)),
            "amp": AMP[self.amp.lower()],
        }


def weights_hash(model: nn.Module) -> str:
    """The SHA-256 of a model's parameters and buffers, with their names, but without those of its classifier."""
    classifier = model.get_classifier()
    parts = classifier if isinstance(classifier, list | tuple) else [classifier]
    left_out = {
        id(t) for part in parts if isinstance(part, nn.Module) for t in part.state_dict(keep_vars=True).values()
    }
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in left_out:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Features:
    """The features of a split, with a row for each image that could be read.

    Attributes:
        values: (N, C), or (N, C, H, W) for maps; float32, mapped from a file that is read as needed, read-only.
        labels: (N,), int64: positions in `classes`.
        positions: (N,), int64: the places of the images in the data set; for a stream, in the order of reading.
        names: The N file names; "image <position>" for images without a file of their own.
        classes: The names of the classes.
        corrupt: The images that could not be read, with reasons.
    """

    values: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    names: list[str]
    classes: list[str]
    corrupt: list[str]


def split_features(cfg: DictConfig, model: nn.Module, data: Data, split: str, kind: str = "pooled") -> Features:
    """The features of the training or the validation split, preprocessed as for an evaluation, without augmentation.

    They are computed once: the cache (`cache.cache_folder()`, in its folder features/) knows them by the model and its
    weights, the data, the preprocessing and the kind of the features. Memory does not grow with the number of images.

    Args:
        cfg: The configuration, of which `model`, `model_kwargs`, `seed`, `data` and `trainer` (batch_size, amp and
            channels_last) are used.
        model: The model, on the device that computes. It is put into evaluation mode.
        data: The splits, from `open_data`.
        split: "train" or "val".
        kind: "pooled" or "map". See `Extractor`.

    Raises:
        UserError: There are no such features, too many images can't be read, or the cache can't be written to.
    """
    if data.multi_label:
        raise UserError(
            f"{cfg.data.csv} has several labels per image, but features are kept with one: name a column of single "
            "labels with data.label_column=<name> data.multi_label=false."
        )
    dataset, indices = (data.train, data.train_indices) if split == "train" else (data.val, data.val_indices)
    if split == "train" and is_stream(dataset):
        dataset = _training_stream(cfg)
    data_config = input_config(model, cfg.data)
    extractor = Extractor(model, data_config, kind, cfg.trainer.amp, cfg.trainer.channels_last)
    transform, size = build_transform(None, data_config), data_config["input_size"]
    samples = Samples(dataset, transform, cfg.seed, False, size, max_pixels=cfg.data.max_pixels)
    about = {
        "version": [_VERSION, zoo.__version__, timm.__version__],
        "model": cfg.model,
        "model_kwargs": OmegaConf.to_container(OmegaConf.create(dict(cfg.model_kwargs))),
        **extractor.identity(),
        "max_pixels": cfg.data.max_pixels,
        "classes": data.classes,
        "data": _data_hash(cfg, samples, indices, split),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache.cache_folder() / "features" / key
    if (folder / "about.json").is_file():
        log.info("The features of the %s images are in %s", _NAMES[split], folder)
        return _load(folder)
    number = "" if indices is None else f"{len(indices)} "
    log.info("Computing the features of %s%s images (%s), for %s", number, _NAMES[split], kind, folder)
    try:
        cache.publish(folder, lambda draft: _compute(cfg, extractor, samples, indices, about, draft))
    except OSError as error:
        if not (folder / "about.json").is_file():  # otherwise another process was faster
            raise UserError(
                f"the features can't be written to {folder} ({error.strerror}): free some space, or choose another "
                "folder for the cache with the environment variable XDG_CACHE_HOME."
            ) from error
    return _load(folder)


def _training_stream(cfg: DictConfig) -> Dataset:
    """The training split of a stream, read in order, and once: in training it is shuffled and repeated."""
    whole = {"val_split": cfg.data.train_split, "val_num_samples": cfg.data.num_samples}
    return open_data(OmegaConf.merge(cfg.data, whole), cfg.seed, training=False).val


def _compute(
    cfg: DictConfig,
    extractor: Extractor,
    samples: Samples,
    indices: Sequence[int] | None,
    about: dict[str, Any],
    folder: Path,
) -> None:
    """Write the files of the features of a split to `folder`."""
    batch_size, device = cfg.trainer.batch_size, extractor.device
    if indices is None:
        loader = build_loader(Stream(samples.dataset, samples), None, batch_size, cfg.data, device, training=False)
    else:  # all of them, even if other processes train too
        loader = build_loader(samples, EvalSampler(indices, 0, 1), batch_size, cfg.data, device, training=False)
    labels: list[int] = []
    positions: list[int] = []
    corrupt: list[str] = []
    seen = 0
    with NpyRows(folder / "features.npy", extractor.shape) as rows, Progress(True) as bar, worker_errors():
        bar.start_evaluation(None if indices is None else len(loader))
        for images, targets, unread in loader:
            good = targets >= 0
            found = extractor(images[good]) if good.any() else np.empty((0, *extractor.shape), np.float32)
            places = (seen + good.nonzero().flatten()).tolist()
            places = places if indices is None else [indices[place] for place in places]
            for place, row in zip(places, found, strict=True):
                if not np.isfinite(row).all():
                    raise UserError(
                        f"the features of {samples.name(place)} are not finite: check the weights"
                        f"{', or set trainer.amp=none' if extractor.amp != 'none' else ''}."
                    )
            rows.append(found)
            labels += targets[good].tolist()
            positions += places
            seen += len(targets)
            for name in unread:
                log.warning("A corrupt image is left out: %s", name)
            corrupt += unread
            if len(corrupt) > cfg.data.max_corrupt:
                raise UserError(
                    f"{len(corrupt)} images are corrupt, more than data.max_corrupt={cfg.data.max_corrupt}, beginning "
                    f"with {corrupt[0]}: repair or remove them, or raise data.max_corrupt."
                )
            bar.advance_evaluation()
    if not labels:
        raise UserError(f"no image could be read: the first of {len(corrupt)} corrupt ones is {corrupt[:1]}.")
    np.save(folder / "labels.npy", np.array(labels, np.int64))
    np.save(folder / "positions.npy", np.array(positions, np.int64))
    (folder / "names.json").write_text(json.dumps([samples.name(position) for position in positions]))
    (folder / "about.json").write_text(json.dumps({**about, "corrupt": corrupt}))


def _load(folder: Path) -> Features:
    try:
        about = json.loads((folder / "about.json").read_text())
        return Features(
            values=np.load(folder / "features.npy", mmap_mode="r"),
            labels=np.load(folder / "labels.npy"),
            positions=np.load(folder / "positions.npy"),
            names=json.loads((folder / "names.json").read_text()),
            classes=about["classes"],
            corrupt=about["corrupt"],
        )
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"the cached features in {folder} can't be read ({one_line(error)}): delete it.") from error


def _data_hash(cfg: DictConfig, samples: Samples, indices: Sequence[int] | None, split: str) -> str:
    """A hash of the images of a split and their labels, without decoding files.

    Files are known by name, size and time of the last change; data without files of their own by their content. Streams
    are known by their settings and the files below data.root.
    """
    dataset = samples.dataset
    reader = getattr(dataset, "reader", None)
    digest = hashlib.sha256()

    def add(parts: Iterable[Any]) -> None:
        for part in parts:
            digest.update(f"{part!r}\n".encode("utf-8", "surrogateescape"))

    fingerprint = getattr(getattr(reader, "dataset", None), "_fingerprint", None)  # Hugging Face's, of the content
    if indices is None:
        keys = ("name", f"{split}_split", "input_key", "target_key", "num_samples", "val_num_samples", "class_map")
        add(cfg.data[key] for key in keys)
        add(_below(cfg.data.root))
    elif isinstance(reader, ClassTar):
        add(_state(reader.root))
        add(reader.samples[index] for index in indices)
    elif fingerprint:
        add((fingerprint, *(cfg.data[key] for key in ("input_key", "target_key")), *indices))
    elif any(os.path.isfile(samples.name(index)) for index in indices):
        labels = getattr(reader, "samples", None) or getattr(dataset, "samples", None)
        for index in indices:
            add((_state(samples.name(index)), labels[index][1] if labels else None))
    else:
        for index in indices:
            image, target = dataset[index]
            add((image.mode, image.size, int(target)))
            digest.update(image.tobytes())
    return digest.hexdigest()


def _below(root: str | None) -> Iterator[tuple[str, int, int]]:
    """The states of the files in a folder and its subfolders."""
    for folder, folders, names in os.walk(root or ""):
        folders.sort()
        yield from (_state(os.path.join(folder, name)) for name in sorted(names))


def _state(path: str) -> tuple[str, int, int]:
    """The absolute path of a file, its size, and the time of its last change; -1 if it can't be read."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.abspath(path), -1, -1
    return os.path.abspath(path), status.st_size, status.st_mtime_ns
