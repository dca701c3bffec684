"""The lifecycle of a run, shared by all tasks: start or resume, signals, checkpoints, summary.

Each task's subclass defines what is trained and how. No matter how the process ends, nothing in the run folder is lost.
"""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf

import zoo
from zoo.messages import UserError, one_line
from zoo.recipes import (
    atomic_files,
    batchnorm,
    composition,
    distributed,
    logs,
    plots,
    reading,
    records,
    run_checkpoints,
    run_folder,
)
from zoo.recipes.errors import Stopped, causes, of_the_system
from zoo.recipes.files import read_json
from zoo.recipes.hooks import HookFailed, Hooks, TrainingState
from zoo.recipes.lock import Lock
from zoo.recipes.logs import log
from zoo.recipes.timing import StepTimes

# Parts of the messages of gloo and NCCL about a lost process.
_LOST = ("gloo", "NCCL", "Connection", "timed out")
_FEW = 100  # with fewer validation images, a percentage is coarse


class BaseRun:
    """A run in its folder.

    A subclass trains in `train`, calls `save_or_stop` after every update, and writes its final files in `finish`. It
    fills `progress` (`update` counts the steps of the optimizer), `history` (a record per evaluation) and `best`.

    Args:
        cfg: The configuration.
        device: Where to train.
        folder: The run folder; it does not have to exist.
        write_report: Writes the report into the folder when the run ends; None for no report.
        resume_command: The command that continues the run, if it is not the command of this process.
        hooks: Functions of the calling program.
    """

    # The files that a run writes at its end, in this order.
    last_files: tuple[str, ...] = ("model.safetensors", "summary.json", reading.REPORT)

    def __init__(
        self,
        cfg: DictConfig,
        device: torch.device,
        folder: Path,
        write_report: Callable[[Path], Any] | None = None,
        resume_command: str | None = None,
        hooks: Hooks | None = None,
    ):
        self.cfg, self.device, self.folder = cfg, device, folder
        self.write_report, self.resume_command = write_report, resume_command
        self.hooks = hooks
        self.stop_requested = False  # by a hook
        self.primary = distributed.rank() == 0
        self.progress: dict[str, Any] = {"update": 0, "nonfinite": 0, "seconds": 0.0, "finished": False}
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.wandb, self.wandb_id = None, None
        self.tensorboard: records.TensorBoard | None = None
        self.stop_signal = 0
        self.damaged = False  # whether last.pt is damaged, so that previous.pt was loaded
        self.changed = ""  # the settings of a continued run that differ from before
        self.finished: dict[str, Any] | None = None  # the summary of a run that is complete, with all its files
        self.effective_batch = 0  # images in an update
        self.params = 0  # parameters of the model
        self.times = StepTimes(device)
        self.notes: list[str] = []  # logged before the plan

    # Methods that each task defines.

    def identity(self) -> dict[str, Any]:
        """The settings that have to stay the same within a run."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The state to continue from, besides what `save` adds. Called in all processes."""
        raise NotImplementedError

    def log_plan(self) -> None:
        """Log what is going to be trained."""
        raise NotImplementedError

    def describe_data(self) -> list[str]:
        """Describe each split in one line."""
        raise NotImplementedError

    def is_complete(self) -> bool:
        """Whether the training has its full length."""
        raise NotImplementedError

    def train(self) -> None:
        """Train to the end."""
        raise NotImplementedError

    def curves(self) -> tuple[str, dict[str, str]]:
        """The title of the plotted curves, and the titles of the plotted scores by name."""
        raise NotImplementedError

    def trained(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """The model in training, without a wrapper, and its optimizer."""
        raise NotImplementedError

    def total_updates(self) -> int:
        """The updates of the whole run."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """Write the final files and return the summary."""
        raise NotImplementedError

    # Resuming.

    def find_checkpoint(self) -> dict[str, Any] | None:
        """The state to continue from; None for a new run.

        Raises:
            UserError: The folder holds another run, or the setting `resume` does not allow this.
        """
        resume = self.cfg.resume
        if distributed.share(run_checkpoints.has_checkpoint(self.folder)):
            if resume == "never":
                raise UserError(f"{self.folder} already holds a run: choose another run=<folder>, or resume=auto.")
            state, _, damage = run_checkpoints.last_checkpoint(self.folder)
            self._check_same_run(state)
            self.damaged = bool(damage)
            self.notes += [damage] if damage else []
            return state
        if resume == "must":
            raise UserError(f"resume=must, but {self.folder} has no checkpoint last.pt.")
        if distributed.share((self.folder / "config.yaml").exists()):
            # This run ended before its first checkpoint, so starting over loses nothing.
            before = reading.load_config(self.folder)
            for key in ("task", "model"):
                if before.get(key) != self.cfg[key]:
                    raise UserError(f"{self.folder} holds a run of {before.get(key)}: choose another run=<folder>.")
        return None

    def _check_same_run(self, state: dict[str, Any]) -> None:
        identity = self.identity()
        for key in sorted(identity.keys() | state["identity"].keys()):
            then, now = state["identity"].get(key), identity.get(key)
            if then != now:
                raise UserError(
                    f"{self.folder} holds a run with {key} {then!r}, not {now!r}: "
                    "choose another run=<folder>, or give the settings that it was started with."
                )
        before = dict(composition.flat(state["config"]))
        changed = [
            f"{key}={value} (was {before.get(key)})"
            for key, value in composition.flat(OmegaConf.to_container(self.cfg, resolve=True))
            if before.get(key) != value and key not in ("run", "resume") and not key.startswith(("log.", "published."))
        ]
        self.changed = ", ".join(changed)

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state that `save` wrote."""
        self.progress, self.history = state["progress"], state["history"]
        self.best, self.wandb_id = state["best"], state.get("wandb")

    def unfit(self, error: Exception) -> UserError:
        """The error for a checkpoint whose state can't be loaded."""
        return UserError(
            f"the checkpoint in {self.folder} does not fit these settings ({one_line(error, 200)}): "
            "choose another run=<folder>, or give the settings that it was started with."
        )

    def write_history(self) -> None:
        """Write the curves, then metrics.jsonl: if that file is complete, so are the curves."""
        if self.primary:
            title, scores = self.curves()
            if scores:
                plots.plot_curves(self.folder / "curves.png", self.history, title, scores)
            self.write_metrics()

    def write_metrics(self) -> None:
        """Write metrics.jsonl and, with log.csv, metrics.csv."""
        run_folder.write_metrics(self.folder, self.history)
        if self.cfg.log.csv:
            run_folder.write_table(self.folder, self.history)

    def log_record(self, record: dict[str, Any]) -> None:
        """Log the record of an epoch or an evaluation at Weights & Biases and for TensorBoard."""
        if self.wandb:
            self.wandb.log({key: value for key, value in record.items() if value is not None})
        if self.tensorboard:
            self.tensorboard.log(record)

    def save(self) -> None:
        """Write the checkpoint."""
        state = self.state() | {
            "progress": {**self.progress, "seconds": self.seconds()},
            "history": self.history,
            "best": self.best,
            "identity": self.identity(),
            "config": OmegaConf.to_container(self.cfg, resolve=True),
            "wandb": self.wandb_id,
        }
        if self.primary:
            Lock(self.folder).check()
            run_checkpoints.save_checkpoint(self.folder / "last.pt", state)
            if not self.progress["finished"]:
                # These are from the shorter run that this one continues.
                for name in self.last_files:
                    (self.folder / name).unlink(missing_ok=True)
        self.saved_at = time.monotonic()

    def resume_hint(self) -> str:
        """A sentence that says which checkpoint is left if the run fails now."""
        if not run_checkpoints.has_checkpoint(self.folder):
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {self.folder / 'last.pt'}."

    # Lifecycle.

    def log_position(self, epoch: str = "") -> None:
        """Log where the run continues, if it does: after which update and, as a phrase, in which epoch."""
        if self.finished is not None:
            return
        update = self.progress["update"]
        if update and (self.is_over() or self.reached_max_updates()):
            log.info("All %d updates are done: the last files are written.", update)
        elif update:
            log.info("Continues %safter update %d.", epoch, update)
        if self.changed:
            log.info("Continues with another configuration: %s.", self.changed)

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary."""
        logs.start_log(self.folder, self.primary)
        for note in self.notes:
            log.info("%s", note)
        self.finished = distributed.share(self._finished_summary())
        self.log_plan()
        if self.primary:
            if self.damaged:
                run_checkpoints.set_aside(self.folder / "last.pt")
            if self.history and not run_folder.has_metrics(self.folder, self.history):
                self.write_history()  # the run ended between writing its checkpoint and these
        if self.finished is not None:
            if self.changed:
                raise UserError(
                    f"{self.folder} holds a finished run that was not trained with {self.changed}: "
                    "choose another run=<folder>."
                )
            # A run that another run started is the first part of that one.
            advice = "" if self.resume_command else f": {self.way_to_continue()}choose another run=<folder>"
            log.info("This run is finished%s.", advice)
            return self.finished
        self.progress["finished"] = False
        if self.primary:
            run_folder.save_config(self.folder, self.cfg)
            self._note_start()
            self.wandb = records.start_wandb(self.folder, self.cfg, self.wandb_id)
            self.wandb_id = self.wandb.id if self.wandb else None
            if self.cfg.log.tensorboard:
                self.tensorboard = records.TensorBoard(self.folder, self.history)
        self.started = self.saved_at = time.monotonic()
        self.seconds_before = self.progress["seconds"]
        # Only the main thread receives signals.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            self.train()
            self.progress["finished"] |= self.stop_requested
            if early := self.stopped_early():
                log.info("%s", early)
            summary = self.finish()
            if self.stop_signal and (self.resume_command or composition.more_may_follow()):
                # Prevent another run from following in this process.
                rest = f"Continue with: {self.resume_command}" if self.resume_command else "Its files are all written."
                name = signal.Signals(self.stop_signal).name
                raise Stopped(f"Stopped by {name} after the end of {self.folder}. {rest}", self.stop_signal)
            return summary
        except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            explained = self._explained(error)
            if explained is None:
                raise
            raise explained from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.wandb:
                self.wandb.finish(exit_code=0 if self.progress["finished"] else 1)
            if self.tensorboard:
                self.tensorboard.close()

    def _finished_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run with all its files; None if it still has to train or to write some of them."""
        if not self.progress["finished"] or not self.is_over():
            return None
        last = [name for name in self.last_files if self.write_report or name != reading.REPORT]
        if not all((self.folder / name).is_file() for name in ("config.yaml", "start.json", *last)):
            return None
        try:
            reading.load_config(self.folder)
            summary = read_json(self.folder / "summary.json")
        except UserError:
            return None
        whole = isinstance(summary, dict) and isinstance(summary.get("metrics"), dict)
        # A run that was continued and then killed may still have the files of the shorter run.
        return summary if whole and summary.get("updates") == self.progress["update"] else None

    def _note_start(self) -> None:
        """Write `start.json`: what the report needs and can't find out later."""
        chosen, recipe = composition.recipe(self.cfg.task)
        start = {
            "command": composition.command_line(),
            "recipe": {"chosen": chosen, "settings": recipe},
            "data": self.describe_data(),
            "params": self.params,
            "device": str(self.device),
            "processes": distributed.world_size(),
        }
        atomic_files.write_json(self.folder / "start.json", start)

    def batch(self, accumulate: int, processes: str = "processes") -> str:
        """A phrase for the images in an update, as a product if there are several processes or passes."""
        parts = [f"{self.cfg.trainer.batch_size} images"]
        if distributed.world_size() > 1:
            parts.append(f"{distributed.world_size()} {processes}")
        if accumulate > 1:
            parts.append(f"{accumulate} passes, accumulated")
        return f"{self.effective_batch} images per update" + (f" = {' x '.join(parts)}" if len(parts) > 1 else "")

    def seconds(self) -> float:
        """The seconds that the run has taken, including the time before it was resumed."""
        return self.seconds_before + time.monotonic() - self.started

    def out_of_patience(self) -> bool:
        """Whether the last trainer.patience evaluations, of which the last one is of this update, were not the best."""
        limit, best = self.cfg.trainer.patience, self.best.get("epoch")
        evaluated = [record for record in self.history if any(key.startswith("val_") for key in record)]
        if limit is None or not evaluated or evaluated[-1]["update"] != self.progress["update"]:
            return False
        return sum(best is None or record["epoch"] > best for record in evaluated) >= limit

    def is_over(self) -> bool:
        """Whether nothing is left to train: the training has its full length, or was stopped early."""
        return self.is_complete() or self.out_of_patience()

    def stopped_early(self) -> str | None:
        """Why the training ended before its full length, as a sentence; None if it did not."""
        if self.stop_requested:
            return f"Stopped by a hook, after update {self.progress['update']}."
        if self.is_complete() or not self.out_of_patience():
            return None
        limit, best = self.cfg.trainer.patience, self.best.get("epoch")
        since = "" if best is None else f" since epoch {best:g}"
        update = self.progress["update"]
        return f"Stopped early, after update {update}: no better evaluation{since} (trainer.patience={limit})."

    def way_to_continue(self) -> str:
        """How a finished run can be made longer, as the beginning of a sentence; empty if it can't."""
        key = "trainer.patience" if self.stopped_early() else "trainer.epochs"
        return f"raise {key} to continue it, or "

    def reached_max_updates(self) -> bool:
        """Whether trainer.max_updates is reached, or a hook has stopped the training."""
        limit = self.cfg.trainer.max_updates
        return self.stop_requested or (limit is not None and self.progress["update"] >= limit)

    def call_hook(self, name: str, epoch: float, metrics: dict[str, Any]) -> None:
        """Call a hook of the calling program, if it has one, with the state of the training.

        Args:
            name: `after_update`, `after_evaluation` or `after_epoch`.
            epoch: The epochs that are done.
            metrics: The figures for the hook.

        Raises:
            HookFailed: The hook raised an error; the run is saved.
        """
        hook = getattr(self.hooks, name, None)
        if hook is None:
            return
        model, optimizer = self.trained()
        update, total = self.progress["update"], self.total_updates()
        state = TrainingState(self.cfg.task, self.folder, epoch, update, total, metrics, model, optimizer)
        modes = [(module, module.training) for module in model.modules()]
        try:
            hook(state)
        except Exception as error:
            if distributed.world_size() == 1:  # other processes would wait for this one
                self.save()
            raise HookFailed(error) from error
        finally:
            for module, training in modes:
                module.training = training
        [stops] = distributed.total([float(state.stopped)], self.device)
        self.stop_requested |= stops > 0

    def _on_signal(self, number: int, _: Any) -> None:
        if self.stop_signal == number == signal.SIGINT:
            raise KeyboardInterrupt(f"Stopped at once, by a second interrupt. {self.resume_hint()}")
        self.stop_signal = number

    def save_or_stop(self) -> None:
        """Save if a checkpoint is due; save and stop if a signal arrived. All processes do the same."""
        due = self.primary and time.monotonic() - self.saved_at > 60 * self.cfg.trainer.save_minutes
        stop, save = distributed.total([float(self.stop_signal > 0), float(due)], self.device)
        if stop:
            self.stop()
        if save:
            self.save()

    def stop_between_evaluations(self) -> None:
        """During an evaluation, stop the run if a signal arrived.

        The saved state is the one from before the evaluation, so a resumed run repeats the evaluation. Several
        processes have different numbers of batches, so they stop after the next update instead.
        """
        if self.stop_signal and distributed.world_size() == 1:
            self.stop()

    def stop(self) -> None:
        """Save and stop the run."""
        self.save()
        number = self.stop_signal or signal.SIGTERM  # another process may have received it
        raise Stopped(
            f"Stopped by {signal.Signals(number).name} after update {self.progress['update']}, and saved. "
            f"Continue with: {self.resume_command or command_to_resume(self.cfg, self.folder)}",
            number,
        )

    def note_nonfinite(self) -> None:
        """Count an update that was skipped because its loss was not finite.

        Raises:
            UserError: Too many updates in a row were skipped.
        """
        self.progress["nonfinite"] += 1
        count, limit = self.progress["nonfinite"], self.cfg.trainer.max_nonfinite
        log.warning("Skipped update %d: its loss is not finite (%d in a row).", self.progress["update"], count)
        if count > limit:
            raise UserError(
                f"the loss was not finite in {count} updates in a row (trainer.max_nonfinite={limit}): "
                f"lower optim.lr, set optim.clip_grad=1, or use trainer.amp=bf16 or none. {self.resume_hint()}"
            )

    def write_summary(self, metrics: dict[str, Any], **figures: Any) -> dict[str, Any]:
        """Write `summary.json` with `metrics` and `figures`, and return it."""
        summary = {
            "task": self.cfg.task,
            "model": self.cfg.model,
            "metrics": metrics,
            "best": self.best,
            "updates": self.progress["update"],
            "stopped_early": self.stopped_early(),
            **figures,
            "seconds": self.seconds(),
            "processes": distributed.world_size(),
            "device": str(self.device),
            "seed": self.cfg.seed,
            "command": composition.command_line(),
            "versions": {"zoo": zoo.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
        }
        if self.primary:
            # Each file is newer than those before it: a resumed run relies on this order.
            (self.folder / reading.REPORT).unlink(missing_ok=True)
            atomic_files.write_json(self.folder / "summary.json", summary)
            if self.write_report:
                self.write_report(self.folder)
            if self.wandb:
                self.wandb.summary.update(metrics)
        return summary

    def refuse_nonfinite(self, weights: Iterable[torch.Tensor]) -> None:
        """Raise UserError if one of the final `weights` is not finite: the files exist, but they are useless."""
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise UserError(
                f"the final weights in {self.folder} are not finite: lower optim.lr or set optim.clip_grad=1, "
                "and choose another run=<folder>."
            )

    def log_next_steps(self, best: str) -> None:
        """Log where the weights are and what to do with them; `best` is the score of the best epoch."""
        folder = shlex.quote(str(self.folder))
        where, same = self.best["epoch"] if self.best else None, self.best.get("epoch") == self.history[-1]["epoch"]
        text = f"Weights: {self.folder / 'model.safetensors'}: the last epoch"
        if where is not None:
            text += ", also the best." if same else f"; the best was epoch {where:g} ({best}): checkpoint=best."
        log.info("%s", text)
        log.info("What next:")
        log.info("  zoo-eval %s", folder)
        log.info("  zoo-predict %s photos/ out/", shlex.quote(f"run={self.folder}"))
        if self.cfg.task == "classify":
            log.info("  zoo-export %s", folder)

    def _explained(self, error: Exception) -> UserError | None:
        """An error that says what to do about `error`; None if that is not known."""
        hint = f"{self.resume_hint()} The same command continues from there."
        for cause in causes(error):
            text = one_line(cause, 200)
            if isinstance(cause, torch.OutOfMemoryError):
                return UserError(
                    "the device's memory is too small: lower trainer.batch_size and keep the images per update with "
                    f"trainer.effective_batch_size={self.effective_batch}, or set trainer.grad_checkpointing=true. "
                    f"{hint}"
                )
            if distributed.world_size() > 1 and any(word in text for word in _LOST):
                return UserError(f"process {distributed.rank()} lost another process ({text}). {hint}")
        if batchnorm.TOO_FEW in str(error):
            return UserError(f"{batchnorm.remedy('image')} {self.resume_hint()}")
        system = of_the_system(error)
        return UserError(f"{system} {hint}") if system else None


def of_few(images: int) -> str:
    """The number of images behind a figure, as a suffix; empty unless they are few."""
    return f" of {images} image{'s'[: images != 1]}" if images < _FEW else ""


def command_to_resume(cfg: DictConfig, folder: Path) -> str:
    """The command that continues the run in `folder`."""
    return composition.command_line() if cfg.run else f"{composition.command_line()} run={folder}"
