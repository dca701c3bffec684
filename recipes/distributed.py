"""Distributed training: devices, ranks, and small exchanges between processes. All of it also works in one process."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from timm.utils import distribute_bn
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import nn

from zoo.messages import UserError
from zoo.recipes.config import TrainerConfig

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

T = TypeVar("T")


def setup(device: str) -> torch.device:
    """Join the process group that torchrun or SLURM describes, if there is one, and return this process's device.

    The process leaves it when it ends, so that several runs can follow each other.

    Args:
        device: `auto` (the accelerator if there is one), or a device's name.

    Raises:
        UserError: There is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        device = accelerator.type if accelerator else "cpu"
    kind = device.partition(":")[0]
    if kind != "cpu" and (accelerator is None or accelerator.type != kind):
        have = f"cpu or {accelerator.type}" if accelerator else "cpu only"
        raise UserError(f"trainer.device={device}: torch {torch.__version__} finds {have} on this machine.")
    if is_distributed_env() and dist.is_initialized():  # this is a second run in the same process
        return torch.device(device)
    found = torch.device(init_distributed_device_so(device)["device"])
    if dist.is_initialized():
        # Not after each run of a sweep: a process could leave while another one still connects to it.
        atexit.register(leave)
    return found


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """The number of processes on this machine that train together."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def batches(trainer: TrainerConfig) -> tuple[int, int]:
    """The forward passes of each process in an update, and the images in an update over all processes.

    Raises:
        UserError: trainer.effective_batch_size is not a multiple of trainer.batch_size over all processes.
    """
    per_pass = trainer.batch_size * world_size()
    wanted = trainer.effective_batch_size or per_pass
    if wanted % per_pass:
        raise UserError(
            f"trainer.effective_batch_size={wanted} is not a multiple of {per_pass}, the images of one pass "
            f"(trainer.batch_size={trainer.batch_size} in {world_size()} processes): change one of them."
        )
    return wanted // per_pass, wanted


def fit_batch_size(cfg: DictConfig, images: int) -> tuple[DictConfig, list[str]]:
    """Lower the batch size until `images` training images fill an update.

    Returns:
        The configuration, and a sentence that says what was lowered, in a list that is empty if nothing was.

    Raises:
        UserError: There are fewer images than processes (with Mixup, which pairs images, than twice as many).
    """
    trainer, pairs = cfg.trainer, bool(cfg.augment.mixup or cfg.augment.cutmix)
    _, wanted = batches(trainer)
    if images >= wanted:
        return cfg, []
    batch = min(trainer.batch_size, images // world_size())
    batch -= batch % 2 if pairs else 0
    if not batch:
        need = f"{'two' if pairs else 'one'} for each of {world_size()} processes"
        raise UserError(f"there are too few training images ({images}): give at least {need}.")
    lowered = {"batch_size": batch}
    if trainer.effective_batch_size:
        lowered["effective_batch_size"] = images // (batch * world_size()) * batch * world_size()
    changes = [f"trainer.{key} from {trainer[key]} to {new}" for key, new in lowered.items() if new != trainer[key]]
    note = f"There are {images} training images, fewer than the {wanted} of an update: lowered "
    return OmegaConf.merge(cfg, {"trainer": lowered}), [f"{note}{' and '.join(changes)}."]


def cores() -> int:
    """The number of CPU cores that this process may use; on macOS and Windows, the number of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spare_cores() -> int:
    """The number of workers that load images: this process's share of the cores, at most eight."""
    return min(8, max(1, cores() // local_world_size()))


def check_open_files(workers: int) -> int:
    """Return `workers` after raising the limit of open files to what the workers of training and evaluation need.

    Raises:
        UserError: The limit can't be raised that far.
    """
    if resource is None:
        return workers
    needed = 40 + 12 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers and soft < needed:
        if hard < needed:
            raise UserError(
                f"only {hard} files may be open at once, and {workers} processes that load images need {needed}: raise "
                f"the limit (ulimit -n {needed} or more), or set data.num_workers=0."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return workers


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(value: Any) -> Any:
    """Return the first process's `value` in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first(action: Callable[[], T]) -> T:
    """Call `action` in the first process, and return its result in every process.

    Raises:
        UserError: The call fails; the other processes end without a message.
    """
    if rank():
        done, value = share(None)
        if not done:
            raise SystemExit(1)
        return value
    try:
        value = action()
    except UserError:
        share((False, None))
        raise
    share((True, value))
    return value


def gather(value: Any) -> list[Any]:
    """Return every process's `value` in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: list[float], device: torch.device) -> list[float]:
    """The sums of `values` over the processes."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def average_batchnorm(module: nn.Module) -> None:
    """Average the running statistics of BatchNorm over all processes."""
    if world_size() > 1:
        distribute_bn(module, world_size(), reduce=True)
