"""Training recipes: the commands `zoo-train`, `-eval`, `-predict`, `-embed` and `-report`, and what they share.

`from zoo.recipes import train, evaluate, predict` gives the commands as functions of a program.

api, hooks, results                  the functions, their hooks and their results
settings, given_images,              their settings, their images, and what they leave as it was
  process_state
commands/, report                    the commands
train, eval, predict                 `python -m zoo.recipes.train`, also under torchrun
cli, sweep, early, errors            their command lines, sweeps, first checks and errors
config, conf/, composition           the schema, the settings, and the starting point of a run
tasks, classify/, dense/             the tasks: dense/ is detection and segmentation
base_run, distributed, timing,       shared by the training of all tasks
  seeding, progress, batchnorm
run_folder, run_checkpoints,         the run folder: its lock and its files
  run_weights, reading, records,
  lock, logs, atomic_files
images, inputs, files, corrupt       reading images and text files, and handling corrupt ones
digits, scenes, subsets              the data of the demos, and subsets of any data
features, embeddings, npy_rows,      features of frozen models, their files, and the cache
  cache
plots, sheet, preview                pictures
"""

import sys
from types import ModuleType
from typing import Any

from zoo.extras import require_for_commands

require_for_commands(__name__)

from zoo.messages import UserError  # noqa: E402
from zoo.recipes.api import evaluate, predict, train  # noqa: E402
from zoo.recipes.hooks import Hooks, TrainingState  # noqa: E402
from zoo.recipes.results import EvalResult, Prediction, TrainResult  # noqa: E402

__all__ = [
    "EvalResult",
    "Hooks",
    "Prediction",
    "TrainResult",
    "TrainingState",
    "UserError",
    "evaluate",
    "predict",
    "train",
]


class _Recipes(ModuleType):
    """Keeps the functions `train` and `predict` when the scripts of the same names are imported.

    Python then sets the module `zoo.recipes.train` as an attribute of its package. `from zoo.recipes.train import main`
    works as well, since it does not read that attribute.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Recipes
