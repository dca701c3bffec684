"""The commands from Python: `train`, `evaluate` and `predict`, which `zoo.recipes` exports.

They do what zoo-train, zoo-eval and zoo-predict do, with the same checks and messages, and print the same log. Errors
are exceptions, the process goes on as it was, and the same settings give the same figures, to the last bit.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.messages import UserError
from zoo.recipes.hooks import HookFailed, Hooks, check_hooks
from zoo.recipes.results import EvalResult, Prediction, TrainResult

if TYPE_CHECKING:
    import numpy as np
    import torch
    from omegaconf import DictConfig
    from PIL import Image

    Given = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor

Settings = Mapping[str, Any]
_working = threading.RLock()  # a hook may evaluate or predict


@contextmanager
def _called() -> Iterator[None]:
    """Let one thread at a time work, and end a run as a program expects it: by errors and by its own signal handlers.

    Imports draw from Python's random numbers (rich's do), and reading settings chooses the version that Hydra is
    compatible with, so both are restored here.

    Raises:
        UserError: Another thread works: training, evaluation and prediction share random numbers and the log.
        KeyboardInterrupt: An interrupt stopped the run, which is saved.
    """
    from hydra.version import VersionBase

    from zoo.recipes.errors import Stopped, of_the_system

    if not _working.acquire(blocking=False):
        raise UserError(
            "another thread of this process is training, evaluating or predicting: wait until it ends, or use another "
            "process."
        )
    error: Exception | None = None
    context, generator, hydra = None, random.getstate(), VersionBase.instance()
    base = hydra.version_base
    try:
        yield
    except HookFailed as failed:
        error, context = failed.error, failed.error.__context__
    except Stopped as stopped:
        error = stopped
    except UserError:
        raise
    except Exception as other:
        explanation = of_the_system(other)
        if explanation is None:
            raise
        raise UserError(explanation) from other
    finally:
        random.setstate(generator)
        hydra.version_base = base
        _working.release()
    if isinstance(error, Stopped):
        if error.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(error)) from None
        signal.raise_signal(error.signum)  # for the handler of the program, which usually ends the process
    if error:
        try:
            raise error
        finally:
            error.__context__ = context  # the hook's, as if nothing of ours were between it and the program


@_called()
def train(settings: Settings | None = None, *, hooks: Hooks | None = None) -> TrainResult:
    """Train a model, as `zoo-train` does with the same settings.

    For example::

        result = train({"model": "van_b0", "data": "imagefolder", "data.root": "pets", "trainer.epochs": 10})

    Ctrl-C and the interrupt of a notebook save the run, and raise KeyboardInterrupt with the command that continues it;
    `train` with the same settings and `"run": <folder>` continues it too. A run that is finished is not trained again.

    Args:
        settings: The keys of the command line, in dotted form, with their values: strings, numbers, truth values, None,
            paths, lists and mappings. `zoo-train --help` lists them. Without any, a small model learns digits.
        hooks: Functions that are called after updates, evaluations and epochs.

    Raises:
        UserError: The settings, the data or the machine do not allow it; the message says what to do.
        Exception: What a hook raised.
    """
    from zoo.recipes import composition, config, process_state
    from zoo.recipes.commands import train as command
    from zoo.recipes.dense.formats import look
    from zoo.recipes.settings import words as as_words

    check_hooks(hooks)
    words = look.with_option(as_words(settings, config.Config))
    with composition.called("zoo-train", words):
        cfg = _composed("config", config.Config, words)
        command.check(cfg)
        with process_state.kept():
            from zoo.recipes import distributed, reading, report, run_folder, sweep, tasks

            task = tasks.load(cfg.task, "train")
            new = not cfg.run
            if new:
                distributed.setup(cfg.trainer.device)
                cfg.run = distributed.first(lambda: str(run_folder.default_folder("", cfg.model)))
            try:
                with composition.called("zoo-train", [*words, f"run={cfg.run}"] if new else words):
                    summary = task.train(cfg, report.write_or_warn, hooks=hooks)
            except BaseException:
                if new:
                    sweep.discard_folder(cfg)
                raise
            folder = Path(cfg.run)
            history = reading.load_history(folder)
    stopped = summary.get("stopped_early")
    return TrainResult(cfg.task, folder, summary["metrics"], summary["best"], history, stopped, summary)


@_called()
def evaluate(run: str | os.PathLike[str] | None = None, settings: Settings | None = None) -> EvalResult:
    """Evaluate the model of a run, or a model by its name, as `zoo-eval` does.

    For example::

        evaluate("runs/pets", {"checkpoint": "best"})
        evaluate(settings={"model": "van_b0", "pretrained": True, "data": "imagefolder", "data.root": "imagenet/val"})

    Args:
        run: The run folder; None to evaluate what `settings` name.
        settings: As those of `train`; `zoo-eval --help` lists the keys. The others are those of the run.

    Raises:
        UserError: The settings, the data or the machine do not allow it; the message says what to do.
    """
    from zoo.recipes import composition, config, process_state
    from zoo.recipes.commands import eval as command
    from zoo.recipes.settings import words as as_words

    named = {} if run is None else _named(run, settings)
    words = [*as_words(named, config.EvalConfig), *as_words(settings, config.EvalConfig)]
    with composition.called("zoo-eval", words):
        cfg = _composed("eval", config.EvalConfig, words)
        name = command.check(cfg)
        results: list[Any] = []
        with process_state.kept():
            from zoo.recipes import distributed, reading, report, run_folder, sweep, tasks

            task = tasks.load(name, "evaluate")
            if cfg.run and not cfg.out:
                cfg.out = str(Path(cfg.run, "eval"))
            if not cfg.out:
                distributed.setup(cfg.trainer.device)
                cfg.out = distributed.first(lambda: str(run_folder.default_folder("eval-", cfg.model)))
            keep = {"on_result": results.append} if name == "classify" else {}
            try:
                summary = task.evaluate(cfg, composition.overridden(), report.write_or_warn, **keep)
            except BaseException:
                sweep.discard_folder(cfg)
                raise
            distributed.share(None)  # the first process has written the files
            table = reading.load_classes(Path(cfg.out))
    return _eval_result(name, Path(cfg.out), summary, table, results)


def _eval_result(task: str, folder: Path, summary: Settings, table: Any, results: Sequence[Any]) -> EvalResult:
    import numpy as np

    classes = table["classes"]
    confusion = None
    if table["confusion"] is not None:
        confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        for label, predicted, count in table["confusion"]:
            confusion[label, predicted] = count
    per_class = {
        name: {score: values[label] for score, values in table["scores"].items()} for label, name in enumerate(classes)
    }
    targets = predictions = None
    for found in results:
        if confusion is not None:
            targets, predictions = found.targets, found.predictions
        else:  # of a classifier of several labels per image
            targets, predictions = found.targets.astype(bool), found.predictions.astype(bool)
    return EvalResult(task, folder, summary["metrics"], per_class, classes, confusion, targets, predictions, summary)


@_called()
def predict(
    run: str | os.PathLike[str],
    images: Given | Iterable[Given],
    settings: Settings | None = None,
    *,
    skip_unreadable: bool = False,
) -> list[Prediction]:
    """Predict the content of images with the model of a run, as `zoo-predict` does, without writing files.

    For example::

        predict("runs/pets", "photos/")
        predict("runs/pets", [image, "cat.jpg"], {"checkpoint": "best"})

    Args:
        run: The run folder.
        images: One image or several: paths of files and folders; Pillow's images; arrays (H, W) or (H, W, C); tensors
            (H, W) or (C, H, W). C is 1, 3 or 4: grey, RGB or RGBA. Arrays and tensors are uint8 from 0 to 255, or
            floats from 0 to 1, neither resized nor normalized. A folder stands for all images in it and its subfolders,
            in the order of their names.
        settings: `checkpoint`, `score`, `device`, and the keys with a dot that `zoo-predict --help` lists.
        skip_unreadable: Whether to leave out images that can't be read or predicted, with a warning in the log, rather
            than to raise an error.

    Returns:
        A prediction for each image, in their order.

    Raises:
        UserError: The settings, the images or the machine do not allow it; the message says what to do.
    """
    from zoo.recipes import early, process_state, reading
    from zoo.recipes.commands import predict as command
    from zoo.recipes.settings import words as as_words

    words = [*as_words(_named(run, settings), command.PredictConfig), *as_words(settings, command.PredictConfig)]
    cfg = command.settings(words)
    early.check_run(Path(cfg.run))
    name = reading.load_config(Path(cfg.run)).get("task", "classify")
    command.check_effect(cfg.overrides, name)
    with process_state.kept():
        from zoo.recipes import logs, tasks
        from zoo.recipes.given_images import GivenImages

        logs.start_log(None, True)
        return tasks.load(name, "predict").results(cfg, GivenImages(images, skip_unreadable))


def _named(run: Any, settings: Any) -> dict[str, Any]:
    """The setting that names the run.

    Raises:
        UserError: It is no folder, or the settings have a run too.
    """
    if not isinstance(run, str | os.PathLike):
        raise UserError(
            f"run is of type {type(run).__name__}: give a run folder, such as the `folder` of a TrainResult."
        )
    if isinstance(settings, Mapping) and "run" in settings:
        raise UserError(f"run={settings['run']} is given twice: leave it out of the settings.")
    return {"run": run}


def _composed(name: str, schema: type, words: Sequence[str]) -> DictConfig:
    """The configuration that results from the arguments `words`, checked as those of a command."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zoo.recipes import cli, composition

    checked = cli.checked_overrides(schema, [cli.literal(word) for word in words], sweep=False)
    try:
        cfg = composition.compose(name, checked)
        OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{cli.line(error)}.") from error
    return cfg
