"""Fixtures of the tests of recipes: image folders, configurations, child processes."""

import copy
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from safetensors.torch import load_file

from zoo.recipes import cli, config

# Small, without BatchNorm, and a few milliseconds per step at 32 pixels.
TINY = ("model=test_vit", "data.img_size=32")
QUIET = ("log.wandb=disabled", "trainer.device=cpu")
THREE = ("apple", "banana", "cherry")
COLOURS = {"apple": (200, 40, 40), "banana": (210, 200, 50), "cherry": (90, 10, 110)}

# Hydra copies the store of the schemas whenever it composes, and only reads the copy.
ConfigStore.__deepcopy__ = lambda self, memo: self


def _make_folder(root: Path, classes=THREE, per_class: int = 8, size: int = 40, seed: int = 0) -> Path:
    """Write `per_class` noisy JPEGs for every class to root/<class>/: the class decides the colour."""
    for number, name in enumerate(classes):
        rng = np.random.default_rng([seed, number])
        colour = np.array(COLOURS.get(name, (37 * number % 256, 91 * number % 256, 153 * number % 256)))
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.normal(0, 30, (size, size + i % 3, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}_{i:02d}.jpg", quality=90)
    return root


@functools.cache
def _with_options(name: str, *options: str):
    """What Hydra composes of options of groups alone, which takes it a tenth of a second; not to be changed."""
    config.register()
    with initialize_config_dir(cli.CONF, version_base="1.3"):
        return hydra_compose(name, list(options))


def _compose(*overrides: str, name: str = "config"):
    """The configuration that `zoo-train` or, with name="eval", `zoo-eval` gets from `overrides`."""
    quiet = QUIET if not any(o.startswith("log.wandb") for o in overrides) else QUIET[1:]
    words = [*quiet, *overrides]
    options = [word for word in words if word.partition("=")[0].lstrip("+~") in config.GROUPS]
    cfg = copy.deepcopy(_with_options(name, *options))
    values = OverridesParser.create().parse_overrides([word for word in words if word not in options])
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)  # as Hydra does after the options
    return cfg


def _environment(**extra: str) -> dict[str, str]:
    # Bit-identical sums need the same number of threads in every run, and one is fastest when tests run in parallel.
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "WANDB_SILENT": "true", **extra}


def _start(*args: str, cwd: Path, module: str = "train", processes: int = 0, program: str = "", **env: str):
    """Start `zoo-train` or `zoo-eval` in a child process; under torchrun if `processes` says how many.

    `program` is Python source that runs first, in the same process.
    """
    command = [sys.executable, "-m", f"zoo.recipes.{module}"]
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, "-m", f"zoo.recipes.{module}"]
    if program:
        source = f"{program}\nimport sys\nfrom zoo.recipes.{module} import main\nsys.exit(main())"
        command = [sys.executable, "-c", source]
    return subprocess.Popen(
        [*command, *args],
        cwd=cwd,
        env=_environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _run(*args: str, cwd: Path, **options) -> tuple[int, str]:
    """Run a command to its end; returns the exit code and the output."""
    process = _start(*args, cwd=cwd, **options)
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope="session")
def make_folder():
    return _make_folder


@pytest.fixture(scope="session")
def compose():
    return _compose


@pytest.fixture(scope="session")
def start_cli():
    return _start


@pytest.fixture(scope="session")
def run_cli():
    return _run


def _main(patch: pytest.MonkeyPatch, cwd: Path, name: str, *words: str) -> int:
    """Run a command in this process, in a folder; returns the exit code. `patch` undoes what this changes."""
    patch.chdir(cwd)
    patch.setenv("HYDRA_FULL_ERROR", "0")  # commands set it in their own process
    module = "tools" if name in ("models", "convert", "export", "look") else "recipes"
    patch.setattr(sys, "argv", [f"zoo-{name}", *map(str, words)])
    try:
        return importlib.import_module(f"zoo.{module}.{name}").main() or 0
    except SystemExit as ended:
        return ended.code or 0


@pytest.fixture(scope="session")
def train_here():
    """Run zoo-train to its end in this process, in a folder, with one thread, as child processes have."""

    def call(cwd: Path, *words: str) -> None:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            torch.set_num_threads(1)
            try:
                code = _main(patch, cwd, "train", *words)
            finally:
                torch.set_num_threads(threads)
        assert code == 0

    return call


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run a command in this process, in an empty folder: `command("eval", "run=...")`; returns exit code and output."""

    def call(name: str, *words: str) -> tuple[int, str]:
        code = _main(monkeypatch, tmp_path, name, *words)
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return call


@pytest.fixture
def call_predict(monkeypatch, capsys):
    """Run zoo-predict in this process and folder; returns the exit code and the output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["zoo-predict", *map(str, words)])
        code = 0
        try:
            importlib.import_module("zoo.recipes.predict").main()
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with train/ (24 images) and val/ (15) of three classes; read only."""
    root = tmp_path_factory.mktemp("images")
    _make_folder(root / "train")
    _make_folder(root / "val", per_class=5, seed=1)
    return root


@pytest.fixture(scope="session")
def fit():
    """Train in this process; by default test_vit at 32 pixels on a folder, one epoch of batches of 8.

    Pictures take longer than these trainings, so they are drawn on request only. The multiply-adds of a model, which
    take a fifth of a training, are counted once for all runs.
    """
    from zoo.recipes import plots, report
    from zoo.recipes.classify import train

    counted, count = {}, train.costs.layers

    def count_once(model, size):
        parameters = ((name, p.shape, p.requires_grad) for name, p in model.named_parameters())
        key = (str(model), *size, *parameters)
        if key not in counted:
            counted[key] = count(model, size)
        return list(counted[key])

    def run(folder: Path, root: Path | None, *overrides: str, pictures: bool = False):
        data = ("data=imagefolder", f"data.root={root}", "data.num_workers=0") if root else ()
        small = ("trainer.epochs=1", "trainer.batch_size=8", "schedule.warmup_epochs=0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.costs, "layers", count_once)
            if not pictures:
                patch.setattr(plots, "plot_curves", lambda *args, **kwargs: None)
                patch.setattr(train, "plot_predictions", lambda *args, **kwargs: None)
            return train.train(_compose(*TINY, *data, *small, f"run={folder}", *overrides), report.write_or_warn)

    return run


@pytest.fixture(scope="session")
def finished(fit, images, tmp_path_factory):
    """The folder of a finished run of test_vit on `images`; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(folder, images, "trainer.epochs=3", "optim.lr=3e-3", pictures=True)
    return folder


@pytest.fixture(scope="session")
def weights():
    """Read the final weights of a run folder."""
    return lambda folder: load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def summary():
    """Read summary.json of a run folder."""
    return lambda folder: json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="session")
def same():
    """Whether two nested structures are equal, every tensor bit by bit."""

    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return equal


@pytest.fixture(scope="session")
def digit_scenes(tmp_path_factory):
    """A folder with 16 digit scenes for training, 4 for validation and 4 for test; read only."""
    from zoo.recipes import scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", {"train": 16, "val": 4, "test": 4})
        return scenes.ensure(tmp_path_factory.mktemp("scenes") / "digits")


@pytest.fixture(scope="session")
def panoptic_digit_scenes(tmp_path_factory):
    """A folder with 16 panoptic scenes for training, 4 for validation and 4 for test; read only."""
    from zoo.recipes import panoptic_scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panoptic_scenes, "SCENES", {"train": 16, "val": 4, "test": 4})
        return panoptic_scenes.ensure(tmp_path_factory.mktemp("scenes") / "panoptic")


# A second or two of training on the few scenes.
DENSE = (
    "dense.digits_first=false",
    "dense.warmup_updates=0",
    "data.num_workers=0",
    "trainer.batch_size=2",
    "trainer.max_updates=2",
)


@pytest.fixture(scope="session")
def fit_dense(digit_scenes):
    """Train a detector or segmentor in this process; by default two updates of two digit scenes.

    Pictures take longer than these trainings, so they are drawn on request only. With them, multiply-adds are counted,
    MMEngine's configuration is formatted, and a detector's evaluation finds the masks of all objects, not of ten.
    """
    from zoo.recipes import plots, report, tasks

    def run(folder: Path, *overrides: str, task: str = "detect", pictures: bool = False):
        train = tasks.load(task, "train")
        from mmdet.models.roi_heads import StandardRoIHead
        from mmengine.config import Config as MMConfig

        find_boxes = StandardRoIHead.predict_bbox

        words = [f"task={task}", f"data.root={digit_scenes}", *DENSE, f"run={folder}", *overrides]
        with pytest.MonkeyPatch.context() as patch:
            if not pictures:
                patch.setattr(plots, "plot_curves", lambda *args, **kwargs: None)
                patch.setattr(train.pictures, "draw_samples", lambda *args, **kwargs: None)
                patch.setattr(train, "cost_of_evaluation", lambda *args: {})
                patch.setattr(
                    StandardRoIHead,
                    "predict_bbox",
                    lambda *args, **kwargs: [found[:10] for found in find_boxes(*args, **kwargs)],
                )
                patch.setattr(MMConfig, "pretty_text", property(lambda self: str(self.to_dict())))
            return train.train(_compose(*words), report.write_or_warn)

    return run


@pytest.fixture(scope="session")
def finished_dense(fit_dense, tmp_path_factory):
    """The folders of finished runs of three updates, by task; read only.

    They have learnt so little that the detector still finds a hundred things in every image.
    """
    folders = {}
    for task in ("detect", "segment"):
        folders[task] = tmp_path_factory.mktemp("finished") / task
        fit_dense(folders[task], "trainer.max_updates=3", "optim.lr=1e-5", task=task, pictures=True)
    return folders


@pytest.fixture(autouse=True)
def _restore_torch():
    """Restore the state that a run in this process may change."""
    yield
    torch.use_deterministic_algorithms(False)
