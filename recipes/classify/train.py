"""Training a classifier: `zoo-train task=classify`.

A run uses timm's task, optimizers, schedules, transforms and Mixup. Random numbers depend only on the seed and the
position in the run, so a run that was killed continues as if nothing had happened.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.utils import unwrap_model
from torch.utils.data import Dataset

from zoo import costs, freezing
from zoo.messages import UserError, one_line
from zoo.opening import check_name
from zoo.recipes import config, distributed, logs, records, run_folder
from zoo.recipes.base_run import BaseRun, of_few
from zoo.recipes.batchnorm import check_batchnorm
from zoo.recipes.classify import batch_size, distillation, losses, multi_label, probe
from zoo.recipes.classify.accuracy import Evaluation, Normalize, measure, percentage, plot_predictions
from zoo.recipes.classify.data import (
    Data,
    EpochSampler,
    Samples,
    Stream,
    build_loader,
    build_transform,
    build_val_loader,
    next_batch,
    open_data,
    train_labels,
)
from zoo.recipes.classify.model import build_model, input_config, write_description
from zoo.recipes.classify.train_state import TrainState, autocast
from zoo.recipes.corrupt import CorruptImages
from zoo.recipes.hooks import Hooks
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.run_weights import save_weights
from zoo.recipes.seeding import seed_all


def train(
    cfg: DictConfig,
    write_report: Callable[[Path], Any] | None = None,
    resume_command: str | None = None,
    hooks: Hooks | None = None,
) -> dict[str, Any]:
    """Train as `cfg` says and return the content of `summary.json`.

    Args:
        cfg: The configuration.
        write_report: Writes the report into the run folder when the run ends; None for no report.
        resume_command: The command that continues the run, if it is not the command of this process.
        hooks: Functions of the calling program.

    Raises:
        UserError: The user can correct the cause; the message says how.
        Stopped: A signal arrived; the state is saved.
    """
    if cfg.probe.kind != "none":
        if hooks is not None:
            raise UserError(f"probe={cfg.probe.kind} calls no hooks: leave them out.")
        return probe.train(cfg, write_report, resume_command)
    config.check(cfg)
    check_name(cfg.model)
    device = distributed.setup(cfg.trainer.device)
    logs.start_log(None, distributed.rank() == 0)
    data = open_data(cfg.data, cfg.seed)
    if cfg.data.name == "csv":
        cfg.data.multi_label = data.multi_label  # for other commands, which may read other files
    with run_folder.locked_folder(Path(cfg.run) if cfg.run else None, name=cfg.model) as folder:
        images = _count(data.train, data.train_indices)
        trial = partial(_run_for_a_trial, data=data, device=device)
        cfg, found = batch_size.resolve(cfg, device, folder, images, trial)
        run = ClassifyRun(cfg, data, device, folder, write_report, resume_command, hooks)
        run.notes += found
        return run.run()


def _run_for_a_trial(cfg: DictConfig, folder: Path, data: Data, device: torch.device) -> ClassifyRun:
    """A run with random weights, which are as large as others, and without compiling, which takes minutes."""
    plain = {"pretrained": False, "resume": "auto", "trainer": {"compile": False}}
    return ClassifyRun(OmegaConf.merge(cfg, plain), data, device, folder)


class ClassifyRun(BaseRun):
    """A run of classification, from the data to `summary.json`."""

    def __init__(
        self,
        cfg: DictConfig,
        data: Data,
        device: torch.device,
        folder: Path,
        write_report: Callable[[Path], Any] | None = None,
        resume_command: str | None = None,
        hooks: Hooks | None = None,
    ):
        cfg, lowered = distributed.fit_batch_size(cfg, _count(data.train, data.train_indices))
        super().__init__(cfg, device, folder, write_report, resume_command, hooks)
        self.notes += lowered
        self.data = data
        if data.multi_label:
            self.main, self.main_title, self.limits = "mAP", "mAP", multi_label.thresholds(cfg, data.classes)
        else:
            self.main, self.main_title = "top1", "top-1"
            multi_label.refuse_threshold(cfg)
        self._weigh_classes()
        self.accumulate, self.effective_batch = distributed.batches(cfg.trainer)
        if cfg.trainer.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        seed_all(cfg.seed)
        model = build_model(cfg, len(data.classes))
        self.description = copy.copy(model)  # has timm's configuration of the model, even if the model is wrapped
        self.params = sum(p.numel() for p in model.parameters())
        self.frozen = freezing.freeze(model, cfg.model, cfg.trainer.freeze) if cfg.trainer.freeze else ""
        self.trained_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.data_config = input_config(model, cfg.data)
        if cfg.trainer.batch_size == 1:
            image = torch.zeros(1, *self.data_config["input_size"])
            check_batchnorm(model, lambda: freezing.keep_frozen(model)(image), "data.img_size")
        self.layers = self._count_layers(model) if self.primary else []
        self.normalize = Normalize(self.data_config, device, cfg.trainer.channels_last)
        self.teacher = None
        if cfg.distill.teacher:
            self.teacher = distillation.open_teacher(cfg, model, self.data_config, data.classes, data.multi_label)
        self._build_loaders()
        # The position in the run; `samples` counts the images of this epoch over all processes.
        self.progress |= {"epoch": 0, "samples": 0}
        self.tallies = _new_tallies()
        self.best = {"epoch": None, self.main: -1.0}
        self.corrupt = CorruptImages(folder, cfg.data.max_corrupt)
        state = self.find_checkpoint()
        number, loss = len(data.classes), losses.make_loss(cfg, self.weights, data.multi_label)
        self.train_state = TrainState(
            cfg, model, number, self.updates_per_epoch, device, data.multi_label, loss, self.teacher
        )
        self.epochs = self.train_state.epochs
        if state:
            self.load_state(state)

    # Data.

    def _count_layers(self, model: torch.nn.Module) -> list[costs.Layer]:
        """The costs of the model by layer; empty if they can't be counted, which must not make a run fail."""
        try:
            return costs.layers(model, self.data_config["input_size"])
        except Exception as error:  # a model of timm may do anything on the meta device
            self.notes.append(f"The multiply-adds could not be counted: {one_line(error, 300)}.")
            return []

    def _weigh_classes(self) -> None:
        """Count the images of each class, and determine the weights of the classes and how images are drawn."""
        cfg, data = self.cfg, self.data
        self.labels = train_labels(data)
        number, several = len(data.classes), data.multi_label
        self.counts = None if self.labels is None else losses.count_classes(self.labels, number)
        images = _count(data.train, data.train_indices)
        self.weights = losses.class_weights(cfg, data.classes, self.counts, images, several)
        if cfg.data.sampling == "balanced":
            if several:
                raise UserError(
                    "data.sampling=balanced needs one label per image, but the data has several: use "
                    "loss.weights=balanced."
                )
            if self.labels is None:
                raise losses.unknown_labels("data.sampling=balanced", cfg)

    def _build_loaders(self) -> None:
        cfg, data, seed = self.cfg, self.data, self.cfg.seed
        rank, world = distributed.rank(), distributed.world_size()
        size = self.data_config["input_size"]
        transform = build_transform(cfg.augment, self.data_config)
        settings = {"max_pixels": cfg.data.max_pixels, "classes": len(data.classes) if data.multi_label else 0}
        samples = Samples(data.train, transform, seed, True, size, data.train_indices, **settings)
        evaluation = build_transform(None, self.data_config)
        self.val_samples = Samples(data.val, evaluation, seed, False, size, **settings)
        self.train_images = _count(data.train, data.train_indices)
        self.val_images = _count(data.val, data.val_indices)
        if data.train_indices is None:
            if cfg.augment.repeats > 1:
                raise UserError(
                    f"augment.repeats={cfg.augment.repeats} can't be used with data.name={cfg.data.name}, which is "
                    "read in its own order: set it to 1."
                )
            samples, self.sampler = Stream(data.train, samples), None
        else:
            repeats = cfg.augment.repeats
            labels = self.labels if cfg.data.sampling == "balanced" else None
            self.sampler = EpochSampler(data.train_indices, self.effective_batch, seed, rank, world, repeats, labels)
        self.updates_per_epoch = self.train_images // self.effective_batch
        batch = cfg.trainer.batch_size
        self.loader = build_loader(
            samples, self.sampler, batch, cfg.data, self.device, training=True, keep_workers=True
        )
        self.val_loader = build_val_loader(data, self.val_samples, batch, cfg.data, self.device, keep_workers=True)

    # State.

    def identity(self) -> dict[str, Any]:
        """The settings that have to stay the same within a run."""
        return {
            "model": self.cfg.model,
            "classes": list(self.data.classes),
            "several labels per image": self.data.multi_label or None,
            "parameters": self.params,
            "training images": self.train_images,
            "images per update": self.effective_batch,
            "averaged weights": self.cfg.trainer.ema_decay is not None,
            "trainer.freeze": self.cfg.trainer.freeze,
            "parameters in optim.lr_factors": sorted(self.cfg.optim.lr_factors) or None,
            "match with a teacher": self.cfg.distill.match if self.teacher else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state that `save` wrote."""
        super().load_state(state)
        try:
            self.train_state.load_state_dict(state["training"])
            if (
                len(state["tallies"]) == distributed.world_size()
            ):  # otherwise the training figures of this epoch start again
                self.tallies = state["tallies"][distributed.rank()]
            self.corrupt = CorruptImages(self.folder, self.cfg.data.max_corrupt, state["corrupt"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self.unfit(error) from error
        self.train_state.set_schedule(self.progress["update"])

    def state(self) -> dict[str, Any]:
        """The state to continue from."""
        return {
            "training": self.train_state.state_dict(),
            "tallies": distributed.gather(self.tallies),
            "corrupt": sorted(self.corrupt.names),
        }

    # Lifecycle.

    def is_complete(self) -> bool:
        """Whether the training has its full length."""
        return self.progress["epoch"] >= self.epochs

    def trained(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """The model in training, without a wrapper, and its optimizer."""
        return unwrap_model(self.train_state.task.trainable_module), self.train_state.optimizer

    def total_updates(self) -> int:
        """The updates of the whole run."""
        return min(self.epochs * self.updates_per_epoch, self.cfg.trainer.max_updates or sys.maxsize)

    def train(self) -> None:
        """Train to the end."""
        every, done = self.cfg.log.every, self.progress["update"]
        self.bar = Progress(self.primary, self.epochs, self.updates_per_epoch, every, done, self.total_updates())
        with self.bar:
            # An epoch that trainer.max_updates cut short is closed again, to evaluate it.
            while not self.is_over() and (self.progress["samples"] or not self.reached_max_updates()):
                self._epoch()

    def log_plan(self) -> None:
        """Log what is going to be trained."""
        cfg = self.cfg
        size = "x".join(map(str, self.data_config["input_size"]))
        log.info(
            "%s: %.2f M parameters, input %s, %d classes", cfg.model, self.params / 1e6, size, len(self.data.classes)
        )
        if self.frozen:
            log.info(
                "Frozen: %s; %s of %s parameters are trained (trainer.freeze=%s).",
                self.frozen,
                f"{self.trained_params:,}",
                f"{self.params:,}",
                cfg.trainer.freeze,
            )
            if not cfg.pretrained:
                log.warning("The frozen part has random weights: pretrained=true loads the published ones.")
        if self.teacher:
            log.info("%s", distillation.describe(cfg, self.teacher))
        log.info("%d training and %d validation images", self.train_images, self.val_images)
        if self.layers:
            log.info("%s", costs.describe(self.layers))
        log.info(
            "%d epochs of %d updates; %s; learning rate %g; %s on %s, %d workers load images",
            self.epochs,
            self.updates_per_epoch,
            self.batch(self.accumulate, f"processes ({cfg.trainer.parallel})"),
            self.train_state.lr,
            cfg.optim.opt,
            self.device,
            self.loader.num_workers,
        )
        loss = losses.describe(cfg, self.data.classes, self.weights, self.data.multi_label)
        if cfg.loss.name or self.weights is not None:
            log.info("Loss: %s.", loss)
        if self.counts and max(self.counts) >= 2 * min(self.counts):
            log.info("Training images by class: %s", losses.shares(self.data.classes, self.counts, self.train_images))
        if cfg.data.sampling == "balanced":
            log.info("An epoch has as many images of each class, some of them several times (data.sampling=balanced).")
            if cfg.loss.weights == "balanced":
                log.warning("loss.weights=balanced makes up for rare classes once more: one of the two is enough.")
        if (repeats := cfg.augment.repeats) > 1:
            used = -(-self.updates_per_epoch * self.effective_batch // repeats)
            log.info("An epoch uses %d of the training images, each %d times (augment.repeats).", used, repeats)
        elif (left := self.train_images % self.effective_batch) and cfg.data.sampling != "balanced":
            others = "" if self.sampler is None else ", different ones each time"
            log.info("%d training images are left out in every epoch%s: they do not fill an update.", left, others)
        self.log_position(f"in epoch {self.progress['epoch'] + 1} ")
        log.info("Run folder: %s", self.folder)

    def describe_data(self) -> list[str]:
        """Describe each split in one line."""
        lines = [f"training: {self.train_images} images", f"validation: {self.val_images} images"]
        if self.counts:
            what = "with each label" if self.data.multi_label else "of each class"
            lines.append(f"training images {what}: {losses.shares(self.data.classes, self.counts, self.train_images)}")
            lines.append(f"sampling: {self.cfg.data.sampling}")
        lines.append(f"loss: {losses.describe(self.cfg, self.data.classes, self.weights, self.data.multi_label)}")
        return [*lines, distillation.describe(self.cfg, self.teacher)] if self.teacher else lines

    def _epoch(self) -> None:
        progress = self.progress
        if progress["samples"] == 0:
            self.tallies = _new_tallies()
        first = progress["samples"] // self.effective_batch
        begun, images_before = time.monotonic(), self.tallies["images"]
        batches = self._batches_from(progress["epoch"], progress["samples"])
        self.bar.start_epoch(progress["epoch"], first)
        self.train_state.train_mode()
        for _ in range(first, self.updates_per_epoch):
            if self.reached_max_updates():
                break
            self._update(batches)
            self.save_or_stop()
        speed = (self.tallies["images"] - images_before) / (time.monotonic() - begun)
        self._close_epoch(speed * distributed.world_size())

    def _batches_from(self, epoch: int, samples: int) -> Iterator[Any]:
        """The batches of this process for the rest of an epoch."""
        if self.sampler is not None:  # an empty sampler is falsy, hence `is not None`
            self.sampler.epoch, self.sampler.start = epoch, samples
            return iter(self.loader)
        self.loader.dataset.epoch = epoch
        if hasattr(self.data.train, "set_epoch"):
            self.data.train.set_epoch(epoch)
        seed_all(self.cfg.seed, epoch, distributed.rank())  # determines the seeds of the workers
        batches = _endless(self.loader)
        for _ in range(samples // self.effective_batch * self.accumulate):
            next_batch(batches)
        return batches

    def preview(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        """The batches of the first epoch as the network gets them.

        Yields:
            Normalized images (B, C, H, W), their labels (B,) or the shares of their classes (B, classes), and the names
            of images that could not be read.
        """
        batches = self._batches_from(0, 0)
        for number in range(self.updates_per_epoch * self.accumulate):
            images, labels, corrupt = next_batch(batches)
            update, part = divmod(number, self.accumulate)
            seed_all(self.cfg.seed, update, part, distributed.rank(), 1)  # as an update does
            yield *self.train_state.mix(self.normalize(images), labels.to(self.device)), corrupt

    def _update(self, batches: Iterator[Any]) -> None:
        """One step of the optimizer, on `accumulate` batches."""
        progress, tallies, training = self.progress, self.tallies, self.train_state
        before = dict(tallies)
        self.times.begin()
        # A forward pass with non-finite values spoils not only the gradients but BatchNorm's running statistics too.
        buffers = list(training.task.trainable_module.buffers())
        kept = [buffer.clone() for buffer in buffers]
        finite = True
        for number in range(self.accumulate):
            self.times.lap("rest")
            images, labels, corrupt = next_batch(batches)
            self.times.lap("waiting for images")
            self.corrupt.note(corrupt)
            if not finite:
                continue  # the batch is consumed, so that the next update has its usual images
            # Drop path, Mixup and erasing draw random numbers: seeded here, they do not depend on earlier updates.
            seed_all(self.cfg.seed, progress["update"], number, distributed.rank(), 1)
            with training.accumulating(last=number == self.accumulate - 1):
                inputs, labels = self.normalize(images), labels.to(self.device, non_blocking=True)
                result = training.forward(inputs, labels)
                loss = float(result["loss"].detach())
                flags = [float(not math.isfinite(loss)), float(self.corrupt.news)]
                bad, news = distributed.total(flags, self.device)
                self.corrupt.check(news, self.resume_hint())
                finite = not bad
                self.times.lap("forward")
                if finite:
                    training.backward(result["loss"] / self.accumulate)
                    self.times.lap("backward")
                    tallies["loss"] += loss * len(labels)
                    if not self.data.multi_label:
                        tallies["right"] += int((result["output"].detach().argmax(1) == labels).sum())
                    tallies["images"] += len(labels)
        progress["update"] += 1
        progress["samples"] += self.effective_batch
        self.times.lap("rest")
        if finite:
            training.step()
            progress["nonfinite"] = 0
        else:
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
            tallies["skipped"] += 1
            self.note_nonfinite()
        training.end_update(progress["update"], stepped=finite)
        self.times.lap("optimizer")
        images = max(tallies["images"], 1)
        note = f"loss {tallies['loss'] / images:.3f}"
        if not self.data.multi_label:
            note += f"  top-1 {100 * tallies['right'] / images:.1f} %"
        lr = max(group["lr"] for group in training.optimizer.param_groups)
        self.bar.advance(note, lr, self.effective_batch)
        self.times.lap("rest")
        seen = tallies["images"] - before["images"]
        mean = (tallies["loss"] - before["loss"]) / seen if finite and seen else None
        epoch = progress["epoch"] + progress["samples"] / (self.updates_per_epoch * self.effective_batch)
        self.call_hook("after_update", epoch, {"loss": mean, "lr": lr})

    def _close_epoch(self, speed: float) -> None:
        cfg, progress = self.cfg, self.progress
        cut = progress["samples"] < self.updates_per_epoch * self.effective_batch  # by trainer.max_updates
        if cut:
            self.save()  # a run with more updates continues this epoch from here
        epoch = progress["epoch"] + 1
        last = epoch >= self.epochs or self.reached_max_updates()
        names = ("loss", "right", "images", "skipped")
        loss, right, images, skipped = distributed.total([self.tallies[name] for name in names], self.device)
        record = {
            "epoch": epoch,
            "update": progress["update"],
            "lr": max(group["lr"] for group in self.train_state.optimizer.param_groups),
            "train_loss": loss / max(images, 1),
            # Mixed images have no single correct class.
            "train_top1": None if self.train_state.mixup or self.data.multi_label else 100 * right / max(images, 1),
            "skipped_updates": int(skipped) // distributed.world_size(),
            "images_per_second": speed,
            "step_seconds": self.times.take(),
        }
        if last or epoch % cfg.trainer.eval_every == 0:
            self._evaluate(record)
        self.corrupt.share()
        record |= {"corrupt_images": len(self.corrupt.names), "seconds": self.seconds()}
        self.history.append(record)
        improved = self._note_best(record)
        progress |= {"epoch": epoch, "samples": 0}
        progress["finished"] = last or self.is_over()
        if not cut:
            self.save()
        self.write_history()
        self.log_record(record)
        log.info("%s | %s | %.0f images/s", self.bar.title, self._line(record, improved), speed)
        self._call_hooks(record)

    def _evaluate(self, record: dict[str, Any]) -> None:
        """Evaluate the model, and add the figures to the record of the epoch."""
        self.bar.start_evaluation(None if self.data.val_indices is None else len(self.val_loader))
        precision = autocast(self.cfg.trainer.amp, self.device)
        model = self.train_state.eval_model()
        given = (model, self.val_loader, self.normalize, precision)
        result: Evaluation | multi_label.Evaluation
        if self.data.multi_label:
            result = multi_label.measure(*given, self.limits, self._after_evaluating_batch)
        else:
            result = measure(*given, self._after_evaluating_batch)
        record |= {f"val_{name}": value for name, value in result.metrics.items() if name != "images"}
        self.corrupt.note(result.corrupt)
        if self.primary:
            result.write_classes(self.folder, self.data.classes)

    def _note_best(self, record: dict[str, Any]) -> bool:
        """Keep the weights if the epoch is the best so far, and return whether it is."""
        improved = record.get(f"val_{self.main}", -1.0) > self.best[self.main]
        if improved:
            self.best = {"epoch": record["epoch"], self.main: record[f"val_{self.main}"]}
            self._write_weights("best.safetensors")
        return improved

    def _call_hooks(self, record: dict[str, Any]) -> None:
        """Call the hooks at the end of an epoch. If they stop the training, the epoch gets the evaluation it lacks."""
        if "val_loss" in record:
            self.call_hook("after_evaluation", record["epoch"], record)
        self.call_hook("after_epoch", record["epoch"], record)
        if self.stop_requested and "val_loss" not in record:
            self._evaluate(record)
            self._note_best(record)
            self.save()
            self.write_history()
            self.call_hook("after_evaluation", record["epoch"], record)

    def _line(self, record: dict[str, Any], improved: bool) -> str:
        """The log line for an epoch."""
        text = f"training loss {record['train_loss']:.4f}"
        if record["train_top1"] is not None:
            text += f" top-1 {record['train_top1']:.2f} %"
        if f"val_{self.main}" in record:
            text += f" | validation loss {record['val_loss']:.4f} {self.main_title} {record[f'val_{self.main}']:.2f} %"
            text += of_few(self.val_images)
        return text + (" (best)" if improved else "")

    def curves(self) -> tuple[str, dict[str, str]]:
        """The title of the plotted curves, and the titles of the plotted scores by name."""
        return f"{self.cfg.model}, {self.folder.name}", {self.main: self.main_title}

    def _after_evaluating_batch(self) -> None:
        self.bar.advance_evaluation()
        self.stop_between_evaluations()

    def _write_weights(self, name: str) -> dict[str, torch.Tensor]:
        weights = self.train_state.weights()
        if self.primary:
            save_weights(self.folder / name, weights, self.cfg.model, self.data.classes)
        return weights

    def finish(self) -> dict[str, Any]:
        """Write the final files and return the summary."""
        record = self.history[-1]
        weights = self._write_weights("model.safetensors")
        if self.primary:
            self._describe(weights)
        summary = self.write_summary(
            {key.removeprefix("val_"): value for key, value in record.items() if key.startswith("val_")},
            params=self.params,
            trained_params=self.trained_params,
            multiply_adds=sum(layer.multiply_adds for layer in self.layers) or None,
            image_size=list(self.data_config["input_size"][1:]),
            epochs=record["epoch"],
            train_images=self.train_images,
            val_images=self.val_images,
            classes=len(self.data.classes),
            skipped_updates=sum(r["skipped_updates"] for r in self.history),
            corrupt_images=sorted(self.corrupt.names),
        )
        log.info(
            "%s %s on %d validation images (best: %s in epoch %d) after %.0f s",
            "Top-1" if self.main == "top1" else self.main_title,
            percentage(summary["metrics"][self.main]),
            self.val_images,
            percentage(self.best[self.main]),
            self.best["epoch"],
            summary["seconds"],
        )
        log.info("Run folder: %s", self.folder)
        self.log_next_steps(f"{self.main_title} {percentage(self.best[self.main])}")
        distributed.share(None)  # no process exits before the files are complete
        self.refuse_nonfinite(weights.values())
        return summary

    def _describe(self, weights: dict[str, torch.Tensor]) -> None:
        """Write what `timm.create_model("local-dir:<folder>")` needs besides the weights, and draw predictions."""
        write_description(self.folder, self.description, self.cfg, self.data.classes, self.data_config)
        if self.data.val_indices is None:
            return
        model = build_model(OmegaConf.merge(self.cfg, {"pretrained": False}), len(self.data.classes))
        model.load_state_dict(weights)
        model, path = model.to(self.device), self.folder / "predictions.png"
        shown = (path, model, self.val_samples, self.data.val_indices, self.normalize, self.data.classes)
        if self.data.multi_label:
            multi_label.plot_predictions(*shown, self.limits)
        else:
            plot_predictions(*shown)
        if self.wandb:
            records.log_pictures(self.wandb, [path, self.folder / "curves.png"])


def _count(dataset: Dataset, indices: Sequence[int] | None) -> int:
    """The number of images in a split; a stream has no indices."""
    return len(dataset if indices is None else indices)


def _new_tallies() -> dict[str, float]:
    """The sums of this process over the epoch so far."""
    return {"loss": 0.0, "right": 0, "images": 0, "skipped": 0}


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
