"""The largest batch that fits in a GPU's memory: `trainer.batch_size=auto`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from zoo.messages import UserError
from zoo.recipes import distributed, reading, run_checkpoints
from zoo.recipes.logs import log

_SHARE = 0.9  # of the free memory that a batch may take: images and allocators vary a little
_FEWEST_UPDATES = 8  # in an epoch, if nothing else limits the images of an update
_FULL = ("out of memory", "ALLOC_FAILED")  # parts of messages of CUDA, cuDNN and cuBLAS


def resolve(
    cfg: DictConfig, device: torch.device, folder: Path, images: int, start: Callable[[DictConfig, Path], Any]
) -> tuple[DictConfig, list[str]]:
    """Replace `trainer.batch_size=auto` by a number.

    A run that is resumed keeps its number.

    Args:
        cfg: The configuration.
        device: Where to train.
        folder: The run folder.
        images: The number of training images.
        start: Makes a run for a configuration and a folder.

    Returns:
        The configuration, and what was found, in sentences for the log.

    Raises:
        UserError: There is no GPU, there are several processes, or not even the smallest batch fits.
    """
    if cfg.trainer.batch_size != "auto":
        return cfg, []
    if device.type != "cuda":
        raise UserError(
            f"trainer.batch_size=auto finds the largest batch that fits on a GPU, but this run is on {device}: give a "
            "number, such as trainer.batch_size=64."
        )
    if distributed.world_size() > 1:
        raise UserError(
            "trainer.batch_size=auto is for one process: run the command once without torchrun and with "
            "trainer.max_updates=1, and give the number that it finds."
        )
    if run_checkpoints.has_checkpoint(folder):
        size = reading.load_config(folder).trainer.batch_size
        return _with(cfg, size), [f"trainer.batch_size=auto: {size} images, as before."]
    pairs = bool(cfg.augment.mixup or cfg.augment.cutmix)
    sizes = candidates(cfg.trainer.effective_batch_size, images, pairs)
    with TemporaryDirectory() as scratch, _quiet(), _limited(device):
        size = largest(_step(start(_with(cfg, sizes[0]), Path(scratch))), sizes)
    release()
    if not size:
        raise UserError(
            f"trainer.batch_size=auto: not even {sizes[0]} {'image fits' if sizes[0] == 1 else 'images fit'} in "
            f"{_SHARE:.0%} of the free memory of {device}: use trainer.grad_checkpointing=true, trainer.amp=bf16, a "
            "smaller data.img_size or a smaller model, or end other programs."
        )
    note = f"trainer.batch_size=auto: {size} images fit in {_SHARE:.0%} of the free memory of {device}."
    if cfg.trainer.effective_batch_size is None:
        note += " An update has as many, and optim.lr is not scaled: trainer.effective_batch_size fixes the images."
    return _with(cfg, size), [note]


def candidates(effective: int | None, images: int, pairs: bool) -> list[int]:
    """The batch sizes to try, rising: 1, 2, 3, 4, 6, 8, 12, ..., or divisors of the `effective` batch size.

    Args:
        effective: The images in an update; None if an update is one batch.
        images: The number of training images. Without `effective`, an epoch has at least 8 updates.
        pairs: Whether images are mixed in pairs, so that the sizes have to be even.
    """
    if effective is not None:
        sizes = [size for size in range(1, effective + 1) if effective % size == 0]
    else:
        most = max(images // _FEWEST_UPDATES, 1 + pairs)
        sizes = sorted(size for power in range(31) for size in (2**power, 3 * 2**power) if size <= most)
    return [size for size in sizes if not pairs or size % 2 == 0] or [1 + pairs]


def largest(step: Callable[[int], None], sizes: Sequence[int]) -> int:
    """The last of the rising `sizes` before the first for which `step` runs out of memory; 0 if the first one does."""
    best = 0
    for size in sizes:
        if not fits(step, size):
            break
        best = size
    return best


def fits(step: Callable[[int], None], size: int) -> bool:
    """Whether `step(size)` has enough memory, which is free again afterwards."""
    enough = True
    try:
        step(size)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(part in str(error) for part in _FULL):
            raise
        enough = False
    release()  # the error, whose traceback holds tensors, is gone
    return enough


def release() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _step(run: Any) -> Callable[[int], None]:
    """Two updates of `run`, the second of which has the optimizer's state, on copies of its first image."""
    images, labels, _ = next(iter(run.loader))

    def step(size: int) -> None:
        training = run.train_state
        training.train_mode()
        for number in (1, 2):
            training.optimizer.zero_grad(set_to_none=True)
            repeated = [part[:1].expand(size, *part.shape[1:]).contiguous() for part in (images, labels)]
            result = training.forward(run.normalize(repeated[0]), repeated[1].to(run.device))
            training.backward(result["loss"])
            training.step()
            training.end_update(number, stepped=True)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)

    return step


def _with(cfg: DictConfig, size: int) -> DictConfig:
    return OmegaConf.merge(cfg, {"trainer": {"batch_size": size}})


@contextmanager
def _limited(device: torch.device) -> Iterator[None]:
    """Let this process take a share of the memory that is free."""
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (taken + _SHARE * free) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a trial logs out of the log of the run."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
