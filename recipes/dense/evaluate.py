"""Evaluation of a detector or segmentor: `zoo-eval`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.hooks import Hook
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from zoo.messages import UserError
from zoo.recipes import atomic_files, composition, distributed, logs, plots, run_folder
from zoo.recipes.classify.accuracy import percentage, plot_confusion
from zoo.recipes.corrupt import worker_errors
from zoo.recipes.dense import mm_keys, pictures, views
from zoo.recipes.dense.coco import NamedCoco
from zoo.recipes.dense.confusion import class_scores, pairs
from zoo.recipes.dense.data import open_data
from zoo.recipes.dense.detection_data import DetectionSplit
from zoo.recipes.dense.model import build_model, memory_format
from zoo.recipes.dense.pretrained import load_whole, open_whole
from zoo.recipes.dense.runner import make_runner, mm_errors, runner_config
from zoo.recipes.dense.scores import panoptic_table, score_title, scores
from zoo.recipes.dense.settings import check
from zoo.recipes.dense.transforms import corrupt_names
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.run_weights import load_model


def evaluate(
    cfg: DictConfig, overridden: Sequence[str], write_report: Callable[[Path], Any] | None = None
) -> dict[str, Any]:
    """Evaluate what `cfg` names, print the figures, write `eval.json` and pictures, and return the figures.

    Args:
        cfg: The composed configuration.
        overridden: The keys and groups that the user set; others come from the run.
        write_report: Writes the report into the output folder; None for no report.

    Raises:
        UserError: The user can correct the cause; the message says how.
    """
    logs.start_log(None, distributed.rank() == 0)
    typed = cfg.mm
    if cfg.run:
        model, cfg, classes, weights = from_run(cfg, overridden)
    else:
        check(cfg)
        views.check_effect(cfg, overridden)
        whole = open_whole(cfg, cfg.pretrained)
        if whole is None:
            raise UserError(
                f"nothing to evaluate: give run=<folder> of a run with task={cfg.task}, or pretrained=<checkpoint> of "
                "a whole detector or segmentor."
            )
        classes, weights = whole.classes, str(whole.path)
    mm_keys.check(typed, cfg.task)
    device = distributed.setup(cfg.trainer.device)
    logs.start_log(None, distributed.rank() == 0)
    data = open_data(cfg, training=False, classes=classes)
    if not cfg.run:
        if cfg.task == "panoptic":
            cfg.dense.num_things = data.num_things
        model = build_model(cfg, data.classes, torch.device("cpu"), pretrained=False)
        log.info("%s", load_whole(whole, model, cfg, data.classes, complete=True))
        classes = data.classes
    for line in [*data.summary(), *views.describe(cfg)]:
        log.info("%s", line)
    default = Path(cfg.run) / "eval" if cfg.run else None
    folder = Path(cfg.out) if cfg.out else default or run_folder.default_folder("eval-", cfg.model)
    if distributed.rank() == 0:
        run_folder.warn_unwritable(folder)
    with tempfile.TemporaryDirectory() as scratch:
        metrics, runner, corrupt = _evaluate(cfg, model, data, Path(scratch), device)
        found = {path.name: path.read_bytes() for path in Path(scratch).glob("results.*.json")}
    images = data.val.num_images - len(corrupt)
    summary = {
        "task": cfg.task,
        "model": cfg.model,
        "method": cfg.dense.method,
        "weights": weights,
        "data": {"name": cfg.data.name, "root": cfg.data.root, "format": data.source, "images": images},
        "eval": OmegaConf.to_container(cfg.eval),
        "metrics": scores(metrics),
        "corrupt_images": corrupt,
        "command": composition.command_line(),
    }
    if distributed.rank() == 0:
        title = f"{cfg.dense.method} on {cfg.model}, {images} images"
        if cfg.task == "panoptic":
            table = panoptic_table(metrics)
        elif cfg.task == "detect":
            table, figure = _detection_details(found, data.val, title, runner.val_evaluator.metrics[0].img_ids)
        else:
            table = class_scores(metrics["confusion"])
        summary["per_class"] = {
            name: {score: values[label] for score, values in table.items()} for label, name in enumerate(classes)
        }
        if cfg.per_class:
            _print_classes(summary["per_class"])
        figures = ", ".join(f"{score_title(name)} {value:.1f}" for name, value in summary["metrics"].items())
        log.info("%s (%s): %s on %d images", cfg.model, weights, figures, images)
        # The figures are logged first, so that they are not lost if the folder can't be written to.
        run_folder.make_folder(folder, "out")
        atomic_files.write_json(folder / "eval.json", summary)
        if cfg.task == "detect":
            for name, content in found.items():
                atomic_files.write_text(folder / name, content.decode())
            with atomic_files.atomic(folder / "precision_recall.png") as file:
                figure.savefig(file, format="png")
            run_folder.write_classes(folder, classes, table, data.val.boxes, "objects")
        elif cfg.task == "panoptic":
            plot_confusion(folder / "confusion.png", metrics["panoptic/confusion"], classes, title, unit="pixels")
            run_folder.write_classes(folder, classes, table, data.val.segments, "segments")
        else:
            confusion = metrics["confusion"]
            plot_confusion(folder / "confusion.png", confusion, classes, title, unit="pixels")
            run_folder.write_classes(folder, classes, table, confusion.sum(1).tolist(), "pixels", pairs(confusion))
        pictures.draw_samples(folder / "predictions.png", model, runner.val_dataloader.dataset, classes)
        if write_report:
            write_report(folder)
        log.info("Written to %s", folder)
    distributed.share(None)
    return summary


def from_run(cfg: DictConfig, overridden: Sequence[str] = ()) -> tuple[torch.nn.Module, DictConfig, list[str], str]:
    """`load_model` for a detector or segmentor."""

    def build(cfg: DictConfig, classes: list[str]) -> torch.nn.Module:
        return build_model(cfg, classes, torch.device("cpu"), pretrained=False)

    def check_all(cfg: DictConfig) -> None:
        check(cfg)
        views.check_effect(cfg, overridden)

    return load_model(cfg, overridden, check_all, build)


def _evaluate(
    cfg: DictConfig, model: torch.nn.Module, data: Any, folder: Path, device: torch.device
) -> tuple[dict[str, Any], Any, list[str]]:
    """The metrics, the runner, and the names of images that could not be read."""
    settings = runner_config(cfg, data, None, folder / "mmengine", device)
    if cfg.task == "detect":
        settings.val_evaluator.outfile_prefix = str(folder / "results")
    with mm_errors(cfg), worker_errors(), Progress(distributed.rank() == 0) as bar:
        runner = make_runner(settings, memory_format(cfg, model.to(device)))
        hook = _Bar(bar)
        runner.register_hook(hook, "VERY_LOW")
        metrics = runner.val()
    corrupt = sorted({name for part in distributed.gather(hook.corrupt) for name in part})
    for name in corrupt:
        log.warning("A corrupt image does not count: %s", name)
    return metrics, runner, corrupt


class _Bar(Hook):
    """Advances a progress bar, and collects the images that can't be read."""

    def __init__(self, bar: Progress):
        self.bar, self.corrupt = bar, set()

    def before_val_epoch(self, runner: Any) -> None:
        self.bar.start_evaluation(len(runner.val_dataloader))

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.corrupt.update(corrupt_names(data_batch))
        self.bar.advance_evaluation()


def _detection_details(
    results: dict[str, bytes], split: DetectionSplit, title: str, images: Sequence[int | str]
) -> tuple[dict[str, list[float | None]], Figure]:
    """Average precisions of each class in percent on the images with these ids, and a plot of precision over recall."""
    kinds = [(name, kind) for name, kind in (("bbox", "bbox"), ("mask", "segm")) if f"results.{kind}.json" in results]
    table: dict[str, list[float | None]] = {}
    figure = plots.new_figure(figsize=(6.2 * len(kinds), 4.6), dpi=110)
    figure.suptitle(title, fontsize=10)
    palette = pictures.colors(len(split.classes))
    for (name, kind), axes in zip(kinds, np.atleast_1d(figure.subplots(1, len(kinds))), strict=True):
        truth = NamedCoco(str(split.annotations), split.classes)
        evaluation = truth.evaluated(json.loads(results[f"results.{kind}.json"]), kind, images)
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
        for suffix, part in (("AP", precision), ("AP50", precision[:1])):
            known = [part[:, :, label][part[:, :, label] > -1] for label in range(len(split.classes))]
            table[f"{name}_{suffix}"] = [100 * float(values.mean()) if values.size else None for values in known]
        seen = [label for label in range(len(split.classes)) if (precision[0, :, label] > -1).all()]
        if len(seen) <= 20:
            for label in seen:
                color = [c / 255 for c in palette[label]]
                axes.plot(evaluation.params.recThrs, precision[0, :, label], color=color, linewidth=1,
                          label=split.classes[label])  # fmt: skip
        axes.plot(evaluation.params.recThrs, precision[0][:, seen].mean(1), color="black", linewidth=2, label="mean")
        axes.set_title(f"{score_title(name + '_AP50')}: mean {100 * precision[0][:, seen].mean():.1f} %", fontsize=9)
        axes.set_xlabel("recall at IoU 0.5")
        axes.set_ylabel("precision")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="lower left", ncols=2)
    return table, figure


def _print_classes(table: dict[str, dict[str, float | None]]) -> None:
    columns = list(next(iter(table.values())))
    shown = Table("class", *(score_title(column) for column in columns))
    for name, values in table.items():
        shown.add_row(Text(name), *(percentage(values[column]) for column in columns))
    logs.console.print(shown)
