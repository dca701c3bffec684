"""MMEngine's registries and readers, kept from running what a configuration or a file names.

As they come, any importable name is a `type` (`os.system`), a scope is a package to import, and some parts evaluate
texts, run configurations in Python or unpickle files that a configuration points to.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mmengine.fileio.handlers.yaml_handler as yaml_handler
import yaml
from mmengine.config import Config
from mmengine.fileio.handlers import PickleHandler
from mmengine.registry import registry

from zoo.recipes.errors import RunError

_PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg")
# What is registered and yet evaluates a text or unpickles a file of the configuration: nothing here needs it.
_LEFT_OUT = (
    "CameraMotionCompensation",
    "Detectron2Wrapper",
    "OpenImagesChallengeDataset",
    "OpenImagesDataset",
    "RFSearchHook",
)
_fromfile = Config.fromfile


def only_registered_names() -> None:
    """From now on configurations build what is registered and nothing else, and files are read as plain values.

    To be called when the packages are imported and have registered their parts. Calling it again changes nothing.
    """
    registry.import_module = _import_module
    registry.get_object_from_string = lambda name: None  # not registered: the registry's own message follows
    Config.fromfile = staticmethod(_package_file)
    PickleHandler.load_from_fileobj = _refuse_pickle
    yaml_handler.Loader = yaml.SafeLoader
    importlib.import_module("mmcv.ops.nms").eval = _nms  # in place of Python's, of the operator's name
    for package in _PACKAGES:
        for value in vars(sys.modules.get(f"{package}.registry", registry)).values():
            if isinstance(value, registry.Registry):
                for name in _LEFT_OUT:
                    value._module_dict.pop(name, None)


def _import_module(name: str) -> ModuleType:
    if name.partition(".")[0] not in _PACKAGES:
        raise ImportError(f"{name} is not one of {', '.join(_PACKAGES)}")
    return importlib.import_module(name)


def _package_file(filename: str | Path, *args: Any, **options: Any) -> Config:
    """`Config.fromfile` of the configurations that the packages bring along: others are programs."""
    path = Path(filename).resolve()
    folders = [Path(importlib.util.find_spec(name).origin).resolve().parent for name in ("mmdet", "mmseg")]
    if not any(path.is_relative_to(folder) for folder in folders):
        raise RunError(f"{filename} is a configuration of MMEngine, a program, and is not run: give its values in mm.")
    return _fromfile(filename, *args, **options)


def _nms(name: str) -> Callable[..., Any]:
    if name not in ("nms", "soft_nms"):
        raise RunError(f"nms.type={name} is not allowed: it has to be nms or soft_nms.")
    return getattr(sys.modules["mmcv.ops.nms"], name)


def _refuse_pickle(self: PickleHandler, file: Any, **options: Any) -> Any:
    raise RunError(
        f"{getattr(file, 'name', 'a pickle')} can't be read without running what it says: give JSON or YAML."
    )
