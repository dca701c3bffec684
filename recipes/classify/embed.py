"""The features of any images, in files: `zoo-embed`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset

from zoo.messages import UserError, one_line, size_text
from zoo.opening import check_name
from zoo.recipes import composition, config, distributed, logs, run_folder
from zoo.recipes.classify.data import build_transform, start_worker
from zoo.recipes.classify.evaluate import from_run
from zoo.recipes.classify.model import build_model, input_config
from zoo.recipes.embeddings import State, Table, state_of
from zoo.recipes.errors import Stopped, of_the_system
from zoo.recipes.features import Extractor
from zoo.recipes.images import ImageError
from zoo.recipes.inputs import Input, Inputs, open_input, shown
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.run_weights import prediction_config

_EVERY = 60.0  # seconds between log lines, if there is no progress bar


def embed(settings: Any, inputs: Inputs, out: Path) -> None:
    """Write the features of images to a folder, or go on with a folder that has some of them.

    Args:
        settings: An `EmbedConfig`.
        inputs: The images.
        out: The output folder; it does not have to exist.

    Raises:
        UserError: The user can correct the cause; or, at the end, images were left out.
        Stopped: Ctrl-C was pressed; the features so far are in the folder.
    """
    model, cfg, weights = _open_model(settings)
    device = distributed.setup(settings.device)
    if distributed.world_size() > 1:
        raise UserError(f"zoo-embed is one process, but {distributed.world_size()} were started: start it once.")
    data_config = input_config(model, cfg.data)
    extractor = Extractor(model.to(device), data_config, settings.features, cfg.trainer.amp, cfg.trainer.channels_last)
    kwargs = OmegaConf.to_container(OmegaConf.create(dict(cfg.model_kwargs)))
    identity = {"model": cfg.model, "model_kwargs": kwargs, **extractor.identity()}
    about = {"model": cfg.model, "weights": weights, "command": composition.command_line()}
    with run_folder.locked_folder(out, key=None), Table(out, identity, extractor.shape) as table:
        table.describe(about)
        items = _missing(inputs.found, table)
        count, shape = len(inputs.found), size_text(extractor.shape)
        if items:
            has = f"; {shown(out)} has the other {count - len(items)}" if len(items) < count else ""
            log.info(
                "%s (%s): %s features, %s, of %d images%s", cfg.model, weights, extractor.kind, shape, len(items), has
            )
        else:
            log.info("Nothing to compute: %s has the features of all %d images.", shown(out), count)
        try:
            _add(table, cfg, extractor, items, inputs, data_config)
        except KeyboardInterrupt:
            message = f"Stopped: {shown(out)} has the features of {len(table)} images. The same command goes on."
            raise Stopped(message, signal.SIGINT) from None
        finally:
            table.describe({**about, "left_out": [shown(path) for path in (*inputs.unread, *inputs.failed)]})
        for format in sorted({*table.copies(), settings.format} - {"npy"}):
            table.copy(format)
        names = shown(out / "names.csv")
        log.info("%s: %dx%s; the images of the rows are in %s", shown(out / "features.npy"), len(table), shape, names)
    inputs.conclude()


def _open_model(settings: Any) -> tuple[nn.Module, DictConfig, str]:
    """The model, its configuration, and what its weights are."""
    cfg, overridden = prediction_config(settings)
    if settings.run:
        model, cfg, _, weights = from_run(cfg, overridden)
        return model, cfg, weights
    cfg.model, cfg.pretrained = settings.model, settings.pretrained
    config.check(cfg)
    check_name(cfg.model)
    return build_model(cfg, None), cfg, "published weights" if cfg.pretrained is True else str(cfg.pretrained)


def _missing(found: Sequence[Input], table: Table) -> list[Input]:
    """Those of the images that the table does not have, or has from another state of the file; each image once."""
    items = []
    for item in {os.path.abspath(item.path): item for item in found}.values():
        known = table.state(item.path)
        try:
            if known is None or known != state_of(item.path):
                items.append(item)
        except OSError:  # reading the image says so, too
            items.append(item)
    return items


def _add(
    table: Table,
    cfg: DictConfig,
    extractor: Extractor,
    items: Sequence[Input],
    inputs: Inputs,
    data_config: dict[str, Any],
) -> None:
    """Add the features of `items` to the table, batch by batch."""
    size = cfg.trainer.batch_size
    workers = distributed.spare_cores() if cfg.data.num_workers is None else cfg.data.num_workers
    channels = data_config["input_size"][0]
    loader = DataLoader(
        _Images([item.path for item in items], build_transform(None, data_config), channels, cfg.data.max_pixels),
        batch_size=size,
        num_workers=distributed.check_open_files(min(workers, len(items) // size)),
        collate_fn=_collate,
        worker_init_fn=start_worker,
    )
    done, logged = 0, time.monotonic()
    with Progress(True) as bar:
        bar.start_evaluation(len(items))
        for batch in loader:
            for place, error in batch.unread:
                inputs.leave_out(items[place], ImageError(error))
            for place, error in batch.failed:
                inputs.fail(items[place], ValueError(error))
            rows = _compute(extractor, batch.pixels)
            good = [number for number, row in enumerate(rows) if isinstance(row, np.ndarray)]
            for number in sorted({*range(len(rows))} - {*good}):
                inputs.fail(items[batch.places[number]], ValueError(rows[number]))
            if good:
                paths = [items[batch.places[number]].path for number in good]
                table.add(paths, [batch.states[number] for number in good], np.stack([rows[number] for number in good]))
            for _ in range(min(size, len(items) - done)):
                bar.advance_evaluation()
                done += 1
            if not logs.console.is_terminal and time.monotonic() - logged > _EVERY:
                logged = time.monotonic()
                log.info("%d of %d images", done, len(items))


def _compute(extractor: Extractor, pixels: torch.Tensor) -> list[np.ndarray | str]:
    """The features of each image of a batch (B, C, H, W), or the reason why there are none."""
    if not len(pixels):
        return []
    try:
        rows = extractor(pixels)
    except Exception as error:  # models can raise any error
        if len(pixels) == 1:
            return [one_line(error, 200)]
        # One image is the cause, or the batch does not fit in memory.
        return [row for image in pixels for row in _compute(extractor, image[None])]
    return [row if np.isfinite(row).all() else "its features are not finite" for row in rows]


# Reading the images, in processes of their own.


class _Batch(NamedTuple):
    """Images that can be read: their places in the list and their states; and those that can't, with the reasons."""

    places: list[int]
    states: list[State]
    pixels: torch.Tensor  # uint8, (B, C, H, W)
    unread: list[tuple[int, str]]
    failed: list[tuple[int, str]]


class _Images(Dataset):
    """Image files, transformed for the model."""

    def __init__(self, paths: Sequence[Path], transform: Any, channels: int, max_pixels: int):
        self.paths, self.transform, self.channels, self.max_pixels = paths, transform, channels, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, State | None, torch.Tensor | None, str]:
        """The place, the state of the file before it is read, and the pixels; without pixels, the reason."""
        path = self.paths[place]
        try:
            state = state_of(path)
            image = open_input(path, self.channels, self.max_pixels)
        except (OSError, ImageError) as error:
            if of_the_system(error):  # the image is not the cause
                raise
            return place, None, None, getattr(error, "strerror", None) or one_line(error)
        try:
            return place, state, torch.as_tensor(self.transform(image)), ""
        except Exception as error:  # Pillow's, if memory runs out
            return place, state, None, one_line(error, 200)


def _collate(samples: list[tuple[int, State | None, torch.Tensor | None, str]]) -> _Batch:
    good = [(place, state, pixels) for place, state, pixels, _ in samples if pixels is not None]
    bad = [(place, state, error) for place, state, pixels, error in samples if pixels is None]
    return _Batch(
        places=[place for place, _, _ in good],
        states=[state for _, state, _ in good],
        pixels=torch.stack([pixels for _, _, pixels in good]) if good else torch.empty(0),
        unread=[(place, error) for place, state, error in bad if state is None],
        failed=[(place, error) for place, state, error in bad if state is not None],
    )
