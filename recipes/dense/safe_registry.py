"""Restrictions of MMEngine's registries and readers, so that a configuration or a file can't run code.

By default, a `type` can be any importable name (`os.system`), a scope can be any package, and some parts evaluate
strings, run configurations in Python or unpickle files that a configuration names.
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

from zoo.messages import UserError

_PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg")
# Registered classes that evaluate a string or unpickle a file of the configuration; nothing here needs them.
_LEFT_OUT = (
    "CameraMotionCompensation",
    "Detectron2Wrapper",
    "OpenImagesChallengeDataset",
    "OpenImagesDataset",
    "RFSearchHook",
)
_fromfile = Config.fromfile


def only_registered_names() -> None:
    """Patch MMEngine so that configurations build only registered classes, and files are read as plain values.

    Call this after the packages have registered their classes. Calling it again changes nothing.
    """
    registry.import_module = _import_module
    registry.get_object_from_string = lambda name: None  # the registry then says that the name is not registered
    Config.fromfile = staticmethod(_package_file)
    PickleHandler.load_from_fileobj = _refuse_pickle
    yaml_handler.Loader = yaml.SafeLoader
    importlib.import_module("mmcv.ops.nms").eval = _nms  # replaces Python's eval of the operator's name
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
    """`Config.fromfile`, restricted to the configurations in the packages: a configuration is a program."""
    path = Path(filename).resolve()
    folders = [Path(importlib.util.find_spec(name).origin).resolve().parent for name in ("mmdet", "mmseg")]
    if not any(path.is_relative_to(folder) for folder in folders):
        raise UserError(
            f"{filename} is a configuration of MMEngine, which is a program and is not run: give its values in mm."
        )
    return _fromfile(filename, *args, **options)


def _nms(name: str) -> Callable[..., Any]:
    if name not in ("nms", "soft_nms"):
        raise UserError(f"nms.type={name} is not allowed: it has to be nms or soft_nms.")
    return getattr(sys.modules["mmcv.ops.nms"], name)


def _refuse_pickle(self: PickleHandler, file: Any, **options: Any) -> Any:
    raise UserError(f"{getattr(file, 'name', 'a pickle')} can't be read without running its code: give JSON or YAML.")
