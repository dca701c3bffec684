"""The three tasks of the commands, and where their code is."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from types import ModuleType

from zoo.extras import require
from zoo.recipes.errors import RunError

TASKS = {"classify": "classify", "detect": "dense", "segment": "dense"}


def task(name: str, part: str) -> ModuleType:
    """The module `part` of the task `name`.

    Raises:
        UserError: there is no such task, or its packages are not installed.
    """
    if name not in TASKS:
        raise RunError(f"task={name} is not allowed: it has to be {', '.join(TASKS)}.")
    if TASKS[name] == "dense":
        require(f"task={name}", "dense")
        from zoo.recipes.dense import mmcv_ops

        mmcv_ops.install()  # before anything imports mmcv.ops
        from zoo.recipes.dense import safe_loading

        safe_loading.refuse_unpickling()
        for package in ("mmdet",) if name == "detect" else ("mmdet", "mmseg"):  # mmseg's Mask2Former is mmdet's
            _import_quietly(package)
        from zoo.recipes.dense import safe_registry

        safe_registry.only_registered_names()
    return importlib.import_module(f"zoo.recipes.{TASKS[name]}.{part}")


def _import_quietly(package: str) -> None:
    """Import `package`, which says at length what it does without."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        importlib.import_module(f"{package}.utils").register_all_modules(init_default_scope=False)
