"""Evaluation of a classifier: `zoo-eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text
from torch import nn

from zoo.exits import exit_costs, has_exits
from zoo.messages import UserError
from zoo.recipes import atomic_files, composition, config, distributed, logs, run_folder
from zoo.recipes.classify import calibration, imagenet, multi_label, robustness
from zoo.recipes.classify.accuracy import Evaluation, Normalize, measure, percentage, plot_confusion
from zoo.recipes.classify.data import Data, Samples, build_transform, build_val_loader, open_data
from zoo.recipes.classify.exits import exit_report, log_exits, measure_exits, plot_exits
from zoo.recipes.classify.model import build_model, input_config
from zoo.recipes.classify.train_state import autocast
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.run_weights import load_model


def evaluate(
    cfg: DictConfig,
    overridden: Sequence[str],
    write_report: Callable[[Path], Any] | None = None,
    on_result: Callable[[Evaluation], Any] | None = None,
) -> dict[str, Any]:
    """Evaluate what `cfg` names, print and write the figures, and return them.

    It writes `eval.json`, `classes.json` and, if each image has one label, `confusion.png`.

    Args:
        cfg: The composed configuration.
        overridden: The keys and groups that the user set; others come from the run, if one is named.
        write_report: Writes the report into the output folder; None for no report.
        on_result: Called with the labels and predictions of the images.

    Raises:
        UserError: The user can correct the cause; the message says how.
    """
    config.check(cfg)
    robustness.chosen(cfg)
    logs.start_log(None, distributed.rank() == 0)
    if cfg.run:
        model, cfg, classes, weights = from_run(cfg, overridden)
    elif cfg.pretrained:
        model, classes, weights = build_model(cfg, None), None, str(cfg.pretrained)
    else:
        raise UserError("nothing to evaluate: give run=<folder>, or model=<name> with pretrained=true or =<file>.")
    if cfg.fit_exits and not has_exits(model):
        raise UserError(f"fit_exits=true: {cfg.model} has one exit; leave it out.")
    if cfg.fit_exits and cfg.robustness == "imagenet":
        raise UserError(
            "fit_exits=true is not for robustness=imagenet, which measures the last exit: leave one of them out."
        )
    device = distributed.setup(cfg.trainer.device)
    logs.start_log(None, distributed.rank() == 0)
    if cfg.robustness == "imagenet":
        folder = Path(cfg.out) if cfg.out else _folder(cfg)
        summary = imagenet.evaluate(cfg, overridden, model, classes, weights, device, folder)
        if distributed.rank() == 0:
            if write_report:
                write_report(folder)
            log.info("Written to %s", folder)
        return summary
    # The data set of the run is opened as in training, to find the images that were held out.
    own_data = cfg.run and not any(key == "data" or key.startswith("data.") for key in overridden)
    data = open_data(cfg.data, cfg.seed, training=bool(own_data), classes=classes)
    if len(data.classes) != model.num_classes:
        raise UserError(
            f"{cfg.model} has {model.num_classes} classes, but the data has {len(data.classes)}: "
            "evaluate on the classes that it was trained on (data.class_map=<file> lists them in order)."
        )
    limits = multi_label.thresholds(cfg, data.classes) if data.multi_label else None
    if limits is None:
        multi_label.refuse_threshold(cfg)
    elif cfg.robustness != "none":
        raise UserError(f"robustness={cfg.robustness} is for images with one label each, not several: leave it out.")
    elif cfg.fit_exits:
        raise UserError("fit_exits=true: early exit is for one label per image; leave it out.")
    folder = Path(cfg.out) if cfg.out else _folder(cfg)
    if distributed.rank() == 0:
        run_folder.warn_unwritable(folder)
    result = _evaluate(cfg, model.to(device), data, device, limits)
    if on_result:
        on_result(result)
    summary = {
        "task": cfg.task,
        "model": cfg.model,
        "weights": weights,
        "data": {name: cfg.data[name] for name in ("name", "csv", "root")},
        "metrics": result.metrics,
        "corrupt_images": result.corrupt,
        "per_class": dict(zip(data.classes, result.per_class(len(data.classes)), strict=True))
        if isinstance(result, Evaluation)
        else result.by_name(data.classes),
        "command": composition.command_line(),
    }
    if isinstance(result, Evaluation):
        right = int((result.targets == result.predictions).sum())
        summary["top1_interval"] = list(calibration.interval(right, len(result.targets)))
        if result.logits is not None:
            summary["calibration"] = calibration.calibrate(result.logits, result.targets, cfg.seed)
    if cfg.fit_exits:
        measured = _pass_over(measure_exits, cfg, model, data, device)
        costs = exit_costs(model, input_config(model, cfg.data)["input_size"])
        summary["early_exit"] = exit_report(*measured, costs, cfg.seed)
    if distributed.rank() == 0:
        if isinstance(result, Evaluation):
            _report(folder, summary, result, data.classes, cfg.per_class)
        else:
            _report_labels(folder, summary, result, data.classes, cfg.per_class)
    if cfg.robustness == "corruptions" and isinstance(result, Evaluation):
        summary["corruptions"] = robustness.evaluate(cfg, model, data, device, result, folder)
    if distributed.rank() == 0:
        if "corruptions" in summary:
            atomic_files.write_json(folder / "eval.json", summary)
        if write_report:
            write_report(folder)
        log.info("Written to %s", folder)
    return summary


def from_run(cfg: DictConfig, overridden: Sequence[str] = ()) -> tuple[nn.Module, DictConfig, list[str], str]:
    """`load_model` for a classifier."""

    def build(cfg: DictConfig, classes: list[str]) -> nn.Module:
        return build_model(OmegaConf.merge(cfg, {"pretrained": False}), len(classes))

    return load_model(cfg, overridden, config.check, build)


def _evaluate(
    cfg: DictConfig, model: nn.Module, data: Data, device: torch.device, limits: np.ndarray | None
) -> Evaluation | multi_label.Evaluation:
    if limits is not None:
        return _pass_over(partial(multi_label.measure, limits=limits), cfg, model, data, device)
    return _pass_over(partial(measure, most_logits=calibration.MOST_LOGITS), cfg, model, data, device)


def _pass_over(
    measured: Callable[..., Any], cfg: DictConfig, model: nn.Module, data: Data, device: torch.device
) -> Any:
    """What `measured` returns for the validation images."""
    data_config = input_config(model, cfg.data)
    transform, size = build_transform(None, data_config), data_config["input_size"]
    number = len(data.classes) if data.multi_label else 0
    samples = Samples(data.val, transform, cfg.seed, False, size, max_pixels=cfg.data.max_pixels, classes=number)
    loader = build_val_loader(data, samples, cfg.trainer.batch_size, cfg.data, device)
    if cfg.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    normalize = Normalize(data_config, device, cfg.trainer.channels_last)
    with Progress(distributed.rank() == 0) as bar:
        bar.start_evaluation(None if data.val_indices is None else len(loader))
        context = autocast(cfg.trainer.amp, device)
        return measured(model, loader, normalize, context, on_batch=bar.advance_evaluation)


def _folder(cfg: DictConfig) -> Path:
    return Path(cfg.run) / "eval" if cfg.run else run_folder.default_folder("eval-", cfg.model)


def _report(folder: Path, summary: dict[str, Any], result: Evaluation, classes: list[str], per_class: bool) -> None:
    metrics = summary["metrics"]
    if per_class:
        table = Table("class", "images", "top-1")
        counts = result.confusion(len(classes)).sum(1)
        for (name, value), count in zip(summary["per_class"].items(), counts.tolist(), strict=True):
            table.add_row(Text(name), str(count), percentage(value))
        logs.console.print(table)
    for name in result.corrupt:
        log.warning("A corrupt image does not count: %s", name)
    names = {"top5": "top-5"} if len(classes) > 5 else {}  # otherwise it is 100 %
    names |= {"balanced_accuracy": "balanced accuracy"}
    low, high = summary["top1_interval"]
    log.info(
        "%s (%s): top-1 %s (95 %% interval: %.2f to %.2f %%), %s, loss %.4f on %d images",
        summary["model"],
        summary["weights"],
        percentage(metrics["top1"]),
        low,
        high,
        ", ".join(f"{text} {percentage(metrics[name])}" for name, text in names.items()),
        metrics["loss"],
        metrics["images"],
    )
    if "calibration" in summary:
        log.info("%s", calibration.describe(summary["calibration"]))
    else:
        log.info("The calibration is not measured: images x classes are more than %s.", f"{calibration.MOST_LOGITS:,}")
    if "early_exit" in summary:
        log_exits(summary["early_exit"])
    # The figures are logged first, so that they are not lost if the folder can't be written to.
    run_folder.make_folder(folder, "out")
    if "early_exit" in summary:
        plot_exits(folder / "exits.png", summary["early_exit"], f"{summary['model']} on {metrics['images']} images")
    atomic_files.write_json(folder / "eval.json", summary)
    title = f"{summary['model']}: top-1 {percentage(metrics['top1'])} on {metrics['images']} images"
    result.write_classes(folder, classes)
    if "calibration" in summary:
        calibration.plot_reliability(folder / "reliability.png", summary["calibration"])
    plot_confusion(folder / "confusion.png", result.confusion(len(classes)), classes, title)


def _report_labels(
    folder: Path, summary: dict[str, Any], result: multi_label.Evaluation, classes: list[str], per_class: bool
) -> None:
    """`_report` for images with several labels, which have no confusion matrix."""
    metrics = summary["metrics"]
    if per_class:
        table = Table("class", "images", "AP", "F1")
        counts = result.targets.sum(0).tolist()
        for i, (name, count) in enumerate(zip(classes, counts, strict=True)):
            table.add_row(Text(name), str(count), *(percentage(values[i]) for values in result.per_class().values()))
        logs.console.print(table)
    for name in result.corrupt:
        log.warning("A corrupt image does not count: %s", name)
    log.info(
        "%s (%s): %s, loss %.4f on %d images",
        summary["model"],
        summary["weights"],
        ", ".join(f"{text} {percentage(metrics[name])}" for name, text in multi_label.TITLES.items()),
        metrics["loss"],
        metrics["images"],
    )
    run_folder.make_folder(folder, "out")
    atomic_files.write_json(folder / "eval.json", summary)
    result.write_classes(folder, classes)
