"""The records of a run at Weights & Biases and for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zoo import extras
from zoo.messages import UserError
from zoo.recipes.logs import log


def start_wandb(folder: Path, cfg: DictConfig, run_id: str | None) -> Any:
    """Start the run's record at Weights & Biases, or resume it by its id; None if it is disabled.

    Raises:
        UserError: It can't start, and `log.wandb=online` requires it.
    """
    if cfg.log.wandb == "disabled":
        return None
    import wandb

    try:
        return wandb.init(
            project=cfg.log.project,
            name=folder.name,
            dir=str(folder),
            mode=cfg.log.wandb,
            id=run_id,
            resume="allow" if run_id else None,
            config=OmegaConf.to_container(cfg, resolve=True),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError) as error:
        if cfg.log.wandb == "online":
            raise UserError(f"wandb can't start ({error}): run `wandb login`, or use log.wandb=offline.") from error
        log.warning("wandb can't start (%s); the run goes on without it.", error)
        return None


def log_pictures(record: Any, paths: list[Path]) -> None:
    """Add pictures to a record that `start_wandb` returned."""
    import wandb

    record.log({path.stem: wandb.Image(str(path)) for path in paths})


class TensorBoard:
    """The metrics of a run as event files for TensorBoard, in `tensorboard/` of its folder.

    A run that is resumed repeats its history in a new file, and TensorBoard drops what earlier files have. So an epoch
    that was logged but not saved is not shown twice, and one that was saved but not logged is not missing.

    Args:
        folder: The folder of the run.
        history: The records of the run so far.

    Raises:
        MissingExtra: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]]):
        extras.require("log.tensorboard=true", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        self._writer = SummaryWriter(str(path), purge_step=0 if path.exists() else None)
        self._step, self._logged = -1, set[str]()
        for record in history:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record of an epoch; the step is the number of the update.

        The record of an epoch and that of its evaluation may have the same step; a number is logged once.
        """
        if record["update"] != self._step:
            self._step, self._logged = record["update"], set()
        for name, value in record.items():
            if isinstance(value, int | float) and name not in {"update", *self._logged}:
                kind, _, rest = name.partition("_")
                tag = f"{kind}/{rest}" if kind in ("train", "val") else f"run/{name}"
                self._writer.add_scalar(tag, value, self._step)
                self._logged.add(name)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
