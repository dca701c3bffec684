"""The record of a run at Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

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
