"""Training a detector or segmentor: `zoo-train task=detect`, `task=segment` and `task=panoptic`.

MMEngine's Runner trains; a hook saves its state in the run folder, as in classification.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.runner import Runner
from omegaconf import DictConfig, OmegaConf
from timm.utils import ModelEmaV3

from zoo.opening import check_name
from zoo.recipes import atomic_files, composition, distributed, logs, records, run_checkpoints, run_folder
from zoo.recipes.base_run import BaseRun, command_to_resume, of_few
from zoo.recipes.classify.train import train as classify
from zoo.recipes.corrupt import CorruptImages, worker_errors
from zoo.recipes.dense import mm_keys, pictures
from zoo.recipes.dense.confusion import class_scores, pairs
from zoo.recipes.dense.cost import cost_of_evaluation
from zoo.recipes.dense.data import Data, open_data
from zoo.recipes.dense.data_checks import base_folder
from zoo.recipes.dense.model import check_batchnorm, memory_format
from zoo.recipes.dense.panoptic_data import PanopticData
from zoo.recipes.dense.pretrained import build_pretrained
from zoo.recipes.dense.runner import make_runner, mm_errors, runner_config
from zoo.recipes.dense.scores import SCORES, panoptic_table, score_title, scores
from zoo.recipes.dense.settings import check, learning_rate, run_length
from zoo.recipes.dense.transforms import corrupt_names
from zoo.recipes.hooks import Hooks
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.run_weights import save_weights
from zoo.recipes.seeding import seed_all


def train(
    cfg: DictConfig, write_report: Callable[[Path], Any] | None = None, hooks: Hooks | None = None
) -> dict[str, Any]:
    """Train as `cfg` says and return the content of `summary.json`.

    Args:
        cfg: The configuration.
        write_report: Writes the report into the run folder when the run ends; None for no report.
        hooks: Functions of the calling program.

    Raises:
        UserError: The user can correct the cause; the message says how.
        Stopped: A signal arrived; the state is saved.
    """
    check(cfg)
    mm_keys.check(cfg.mm, cfg.task)
    check_name(cfg.model)
    device = distributed.setup(cfg.trainer.device)
    logs.start_log(None, distributed.rank() == 0)
    data = open_data(cfg)
    if isinstance(data, PanopticData):  # an evaluation of the run builds the model before it opens data
        cfg = OmegaConf.merge(cfg, {"dense": {"num_things": data.num_things}})
    with run_folder.locked_folder(Path(cfg.run) if cfg.run else None, name=cfg.model) as folder:
        if cfg.dense.digits_first and not cfg.pretrained:
            cfg = OmegaConf.merge(cfg, {"pretrained": _digits_first(cfg, folder, write_report)})
        return DenseRun(cfg, data, device, folder, write_report, hooks).run()


def _digits_first(cfg: DictConfig, folder: Path, write_report: Callable[[Path], Any] | None) -> str:
    """Train the backbone to classify digits first, in a run of its own below `folder`, and return that run's folder."""
    backbone = folder / "backbone"
    if distributed.share(run_checkpoints.has_checkpoint(folder)):
        return str(backbone)
    first = composition.compose("config", ["data=digit_crops"])
    for key in ("model", "model_kwargs", "resume", "seed", "data.root", "trainer.device", "trainer.max_updates"):
        OmegaConf.update(first, key, OmegaConf.select(cfg, key), force_add=True)
    if cfg.task == "panoptic":
        first.data.root = str(base_folder(cfg.data, None))
    OmegaConf.update(first, "run", str(backbone))
    OmegaConf.update(first, "log", cfg.log)
    OmegaConf.update(first, "log.wandb", "disabled")
    log.info("First, the backbone learns to classify single digits (dense.digits_first=false skips this).")
    classify(first, write_report, resume_command=command_to_resume(cfg, folder))
    return str(backbone)


class DenseRun(BaseRun):
    """A run of detection or segmentation, from the data to `summary.json`."""

    def __init__(
        self,
        cfg: DictConfig,
        data: Data,
        device: torch.device,
        folder: Path,
        write_report: Callable[[Path], Any] | None = None,
        hooks: Hooks | None = None,
    ):
        cfg, lowered = distributed.fit_batch_size(cfg, data.train.num_images)
        super().__init__(cfg, device, folder, write_report, hooks=hooks)
        self.notes += lowered
        self.data = data
        self.length = run_length(cfg, data.train.num_images)
        self.effective_batch = self.length.batch
        self.last = min(self.length.updates, cfg.trainer.max_updates or self.length.updates)
        self.checkpoint = self.find_checkpoint()
        seed_all(cfg.seed)
        # A resumed run loads its weights from its checkpoint.
        pretrained = False if self.checkpoint else cfg.pretrained
        model, loaded = build_pretrained(cfg, data.classes, device, pretrained)
        self.model = memory_format(cfg, model)
        self.notes += loaded
        if cfg.trainer.batch_size == 1:
            check_batchnorm(cfg, self.model)
        self.params = sum(p.numel() for p in self.model.parameters())
        self.trained_params = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.runner: Runner | None = None
        self.ema: ModelEmaV3 | None = None  # averages the weights from the start of training
        self.corrupt = CorruptImages(folder, cfg.data.max_corrupt, (self.checkpoint or {}).get("corrupt", ()))
        self.val_corrupt: set[str] = set()  # images that the last evaluation could not read
        if self.checkpoint:
            self.load_state(self.checkpoint)

    # State.

    def identity(self) -> dict[str, Any]:
        """The settings that have to stay the same within a run."""
        return {
            "task": self.cfg.task,
            "model": self.cfg.model,
            "method": self.cfg.dense.method,
            "classes": list(self.data.classes),
            "training images": self.data.train.num_images,
            "images per update": self.effective_batch,
            "parameters in optim.lr_factors": sorted(self.cfg.optim.lr_factors) or None,
            "averaged weights": self.cfg.trainer.ema_decay is not None or None,
        }

    def state(self) -> dict[str, Any]:
        """The state to continue from."""
        runner = self.runner
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": runner.optim_wrapper.state_dict(),
            "corrupt": sorted(self.corrupt.names),
        }

    def restore(self, runner: Runner) -> None:
        """Load the checkpoint into `runner`, which is about to train."""
        self.runner = runner
        runner.optim_wrapper.times = self.times
        trainer = self.cfg.trainer
        if trainer.ema_decay is not None:
            self.ema = ModelEmaV3(self.model, decay=trainer.ema_decay, use_warmup=trainer.ema_warmup)
        if trainer.compile:
            self.model.backbone.compile()
        if self.checkpoint:
            self._load(runner, self.checkpoint)
            update = self.progress["update"]
            iterations = runner.train_loop._iter = update * self.length.accumulate
            batches = runner.train_dataloader.batch_sampler
            if isinstance(batches.sampler, InfiniteSampler):
                runner.train_loop.fast_forward_on_resume = True  # MMEngine would load all images before
                batches.skip(iterations)
            evaluated = max((r["update"] for r in self.history if any(key.startswith("val_") for key in r)), default=0)
            if update > evaluated and self.evaluates(update):
                runner.val_loop.run()  # the run ended between this update and its evaluation
        runner.train_loop.stop_training = self.out_of_patience()

    def _load(self, runner: Runner, state: dict[str, Any]) -> None:
        for _ in range(self.progress["update"]):  # the schedule of this configuration, which may have changed
            _advance(runner)
        rates = [group["lr"] for group in runner.optim_wrapper.param_groups]
        try:
            self.model.load_state_dict(state["model"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            runner.optim_wrapper.load_state_dict(state["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self.unfit(error) from error
        for group, rate in zip(runner.optim_wrapper.param_groups, rates, strict=True):
            group["lr"] = rate

    def seed(self, part: int) -> None:
        """Seed a forward pass of the next update by its number, so that it does not depend on earlier ones."""
        seed_all(self.cfg.seed, self.progress["update"], distributed.rank(), part)

    # Lifecycle.

    def describe_data(self) -> list[str]:
        """Describe each split in one line."""
        return self.data.summary()

    def log_plan(self) -> None:
        """Log what is going to be trained."""
        cfg, length, classes = self.cfg, self.length, len(self.data.classes)
        log.info("%s on %s: %.2f M parameters, %d classes", cfg.dense.method, cfg.model, self.params / 1e6, classes)
        if self.trained_params < self.params:
            log.info("%s of %s parameters are trained.", f"{self.trained_params:,}", f"{self.params:,}")
        for line in self.data.summary():
            log.info("%s", line)
        log.info(
            "%d updates, %d for every image once; %s; learning rate %g; %s on %s",
            length.updates,
            length.per_epoch,
            self.batch(length.accumulate),
            learning_rate(cfg),
            cfg.optim.opt,
            self.device,
        )
        if cfg.trainer.compile:
            log.info("The backbone is compiled in training; the neck and the heads are not.")
        self.log_position()
        log.info("Run folder: %s", self.folder)

    def is_complete(self) -> bool:
        """Whether the training has its full length."""
        return self.progress["update"] >= self.last

    def trained(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """The model in training, without a wrapper, and its optimizer."""
        return self.model, self.runner.optim_wrapper.optimizer

    def total_updates(self) -> int:
        """The updates of the whole run."""
        return self.last

    def call_hook(self, name: str, epoch: float, metrics: dict[str, Any]) -> None:
        """Call a hook of the calling program; if it stops the training, this update is the last one."""
        super().call_hook(name, epoch, metrics)
        if self.stop_requested:
            self.last = self.progress["update"]
            # MMEngine evaluates after this iteration, unless it just did.
            self.runner.train_loop._max_iters = self.last * self.length.accumulate

    def train(self) -> None:
        """Train to the end."""
        settings = runner_config(self.cfg, self.data, self.length, self.folder / "mmengine", self.device)
        settings.train_cfg.max_iters = self.last * self.length.accumulate
        if self.primary:
            atomic_files.write_text(self.folder / "mmengine.py", settings.pretty_text)
        self.bar = Progress(self.primary, 1, self.last, self.cfg.log.every, self.progress["update"])
        with mm_errors(self.cfg), self.bar:
            runner = make_runner(settings, self.model)
            runner.restore = self.restore
            runner.register_hook(_ProgressHook(self), "VERY_LOW")
            self.bar.start("training", self.progress["update"])
            with worker_errors():
                runner.train()

    def check_corrupt(self) -> None:
        """After an update, end the run if too many images could not be read."""
        [news] = distributed.total([float(self.corrupt.news)], self.device)
        self.corrupt.check(news, self.resume_hint())

    def val_images(self) -> int:
        """The number of images that count in the last evaluation."""
        return self.data.val.num_images - len(self.val_corrupt)

    def evaluates(self, update: int) -> bool:
        """Whether an evaluation follows update number `update`, from 1."""
        return update % self.length.evaluate_every == 0 or update >= self.last

    def close_epoch(self, losses: dict[str, float], speed: float | None, metrics: dict[str, Any] | None) -> None:
        """Record the end of an epoch or, with `metrics`, of an evaluation."""
        update = self.progress["update"]
        self.corrupt.share()
        self.val_corrupt = {name for part in distributed.gather(self.val_corrupt) for name in part}
        epochs, rest = divmod(update, self.length.per_epoch)
        record = {
            "epoch": round(update / self.length.per_epoch, 3) if rest else epochs,
            "update": update,
            "lr": max(self.runner.optim_wrapper.get_lr()["lr"], default=None),
            **{f"train_{name}": value for name, value in losses.items()},
            **{f"val_{name}": value for name, value in scores(metrics).items()},
            "skipped_updates": self.progress.pop("skipped", 0),
            "images_per_second": speed,
            "step_seconds": self.times.take(),
            "corrupt_images": len(self.corrupt.names),
            "seconds": self.seconds(),
        }
        again = bool(self.history) and self.history[-1]["update"] == update
        if again:
            record = {**self.history.pop(), **record}  # the epoch has a record already, and this adds its evaluation
        self.history.append(record)
        main = self.main_score(record)
        improved = main is not None and record[f"val_{main}"] > self.best.get(main, -1.0)
        if improved:
            self.best = {"epoch": record["epoch"], "update": update, main: record[f"val_{main}"]}
            self._write_weights("best.safetensors")
        if metrics is None:
            if self.primary:
                self.write_metrics()
        else:
            if self.primary:
                self._write_classes(metrics)
            self.progress["finished"] = self.is_over()
            self.save()
            self.write_history()
        self.log_record(record)
        parts = [f"training loss {losses['loss']:.4f}"] if "loss" in losses else []
        if metrics is not None:
            figures = ", ".join(f"{score_title(name)} {value:.1f}" for name, value in scores(metrics).items())
            parts.append(f"{figures}{of_few(self.val_images())}{' (best)' if improved else ''}")
        log.info("update %d/%d | %s", update, self.last, " | ".join(parts))
        if metrics is not None:
            self.call_hook("after_evaluation", record["epoch"], record)
        if not again and (not rest or self.is_complete()):
            self.call_hook("after_epoch", record["epoch"], record)

    def curves(self) -> tuple[str, dict[str, str]]:
        """The title of the plotted curves, and the titles of the plotted scores by name."""
        names = [name for name in SCORES.values() if any(f"val_{name}" in record for record in self.history)]
        heading = f"{self.cfg.dense.method} on {self.cfg.model}, {self.folder.name}"
        return heading, {name: score_title(name) for name in names}

    def _write_classes(self, metrics: dict[str, Any]) -> None:
        classes = self.data.classes
        if "panoptic/counts" in metrics:
            table = panoptic_table(metrics)
            run_folder.write_classes(self.folder, classes, table, self.data.val.segments, "segments")
        elif "confusion" in metrics:
            confused = metrics["confusion"]
            counts = confused.sum(1).tolist()
            run_folder.write_classes(self.folder, classes, class_scores(confused), counts, "pixels", pairs(confused))
        elif "coco/per_class" in metrics:
            name = "mask_AP" if "coco/segm_mAP" in metrics else "bbox_AP"
            values = [None if math.isnan(value) else 100 * value for value in metrics["coco/per_class"]]
            run_folder.write_classes(self.folder, classes, {name: values}, self.data.val.boxes, "objects")

    @staticmethod
    def main_score(record: dict[str, Any]) -> str | None:
        """The name of the score that decides which epoch is the best; None if nothing could be scored."""
        return next((name for name in SCORES.values() if f"val_{name}" in record), None)

    def evaluated(self) -> torch.nn.Module:
        """The model that is evaluated, and whose weights are those of the run: with averaged weights if there are any.

        It has no wrapper for several processes.
        """
        return self.ema.module if self.ema else self.model

    def _write_weights(self, name: str) -> None:
        if self.primary:
            weights = {key: value.detach().cpu().contiguous() for key, value in self.evaluated().state_dict().items()}
            save_weights(self.folder / name, weights, self.cfg.model, self.data.classes)

    def finish(self) -> dict[str, Any]:
        """Write the final files and return the summary."""
        record, cost = self.history[-1], {}
        self._write_weights("model.safetensors")
        if self.primary:
            path = self.folder / "predictions.png"
            pictures.draw_samples(path, self.evaluated(), self.runner.val_dataloader.dataset, self.data.classes)
            if self.wandb:
                records.log_pictures(self.wandb, [path, self.folder / "curves.png"])
            cost = cost_of_evaluation(self.evaluated(), self.runner.val_dataloader.dataset)
        summary = self.write_summary(
            {name: record[f"val_{name}"] for name in SCORES.values() if f"val_{name}" in record},
            method=self.cfg.dense.method,
            params=self.params,
            trained_params=self.trained_params,
            **cost,
            epochs=record["epoch"],
            train_images=self.data.train.num_images,
            val_images=self.val_images(),
            classes=list(self.data.classes),
            skipped_updates=sum(r["skipped_updates"] for r in self.history),
            corrupt_images=sorted(self.corrupt.names),
        )
        figures = ", ".join(f"{score_title(name)} {value:.1f}" for name, value in summary["metrics"].items())
        log.info("%s on %d validation images after %.0f s", figures, self.val_images(), summary["seconds"])
        log.info("Pictures of predictions: %s", self.folder / "predictions.png")
        log.info("Run folder: %s", self.folder)
        main = next((name for name in SCORES.values() if name in self.best), None)
        self.log_next_steps(f"{score_title(main)} {self.best[main]:.1f}" if main else "")
        distributed.share(None)  # no process exits before the files are complete
        self.refuse_nonfinite(self.evaluated().state_dict().values())
        return summary


class _ProgressHook(Hook):
    """Reports the progress of MMEngine's Runner to a `DenseRun`."""

    def __init__(self, run: DenseRun):
        self.run = run
        self.sums: dict[str, float] = defaultdict(float)
        self.before: dict[str, float] = defaultdict(float)  # the sums before this update
        self.count = 0
        self.speed: float | None = None

    def before_train(self, runner: Runner) -> None:
        self.run.times.begin()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.run.times.lap("waiting for images")
        self.run.corrupt.note(corrupt_names(data_batch))
        if not self.count:
            self.started = time.monotonic()
        self.run.seed(runner.iter % self.run.length.accumulate)  # loading images may have drawn random numbers

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        run = self.run
        for name, value in outputs.items():
            self.sums[name] += float(value.detach())
        self.count += 1
        run.times.lap("rest")
        if (runner.iter + 1) % run.length.accumulate:
            return
        run.check_corrupt()
        run.progress["update"] += 1
        lr = max(runner.optim_wrapper.get_lr()["lr"])
        _advance(runner)
        if runner.optim_wrapper.stepped:
            run.progress["nonfinite"] = 0
            if run.ema:
                run.ema.update(run.model, step=run.progress["update"])
        else:
            run.progress["skipped"] = run.progress.get("skipped", 0) + 1
            run.note_nonfinite()
        run.bar.advance(f"loss {self.sums['loss'] / self.count:.3f}", lr, run.effective_batch)
        self._call_hook(lr)
        run.times.lap("rest")
        update = run.progress["update"]
        if update % run.length.per_epoch == 0 and not run.evaluates(update):
            self._close(self._speed(), None)
        run.save_or_stop()
        run.times.begin()

    def before_val_epoch(self, runner: Runner) -> None:
        self.speed = self._speed()
        distributed.average_batchnorm(self.run.model)
        if self.run.ema:
            distributed.average_batchnorm(self.run.ema.module)
            self.trained, runner.model = runner.model, self.run.ema.module
        self.run.val_corrupt = set()
        self.run.bar.start_evaluation(len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        names = corrupt_names(data_batch)
        self.run.corrupt.note(names)
        self.run.val_corrupt.update(names)
        self.run.bar.advance_evaluation()
        self.run.stop_between_evaluations()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        if self.run.ema:
            runner.model = self.trained
        self._close(self.speed, metrics)
        runner.train_loop.stop_training = self.run.out_of_patience() or self.run.stop_requested
        self.run.bar.start("training", self.run.progress["update"])
        self.run.times.restart()  # the evaluation is not part of the next update

    def _call_hook(self, lr: float) -> None:
        run, stepped = self.run, self.run.runner.optim_wrapper.stepped
        means = {name: (value - self.before[name]) / run.length.accumulate for name, value in self.sums.items()}
        self.before = self.sums.copy()
        losses = means if stepped else dict.fromkeys(means)
        run.call_hook("after_update", run.progress["update"] / run.length.per_epoch, {**losses, "lr": lr})

    def _speed(self) -> float | None:
        images = self.count * self.run.effective_batch / self.run.length.accumulate
        return images / (time.monotonic() - self.started) if self.count else None

    def _close(self, speed: float | None, metrics: dict[str, Any] | None) -> None:
        losses = {name: value / self.count for name, value in self.sums.items()} if self.count else {}
        self.sums.clear()
        self.before.clear()
        self.count = 0
        self.run.close_epoch(losses, speed, metrics)


def _advance(runner: Runner) -> None:
    """Step the schedule after an update."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule is ahead of the optimizer after skipped updates
        for scheduler in runner.param_schedulers or []:
            scheduler.step()
