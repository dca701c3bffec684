"""The backbones in your own configuration of MMDetection or MMSegmentation.

The configuration imports this module with `custom_imports = dict(imports=["zoo.recipes.mm"])`; a program imports it
before anything of mmdet or mmseg. This has two effects:

- `mmcv.ops` can be imported without its compiled extension: torchvision's operators take its place, where needed.
- The registries of MMEngine, MMDetection and MMSegmentation have `TimmBackbone`, and MMEngine's has
  `TimmOptimWrapperConstructor`.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from zoo.extras import require

require(__name__, "dense", ["mmcv", "mmengine"])

from zoo.recipes.dense import mmcv_ops  # noqa: E402

mmcv_ops.install()

from zoo.recipes.dense.backbone import TimmBackbone  # noqa: E402
from zoo.recipes.dense.optim import TimmOptimWrapperConstructor  # noqa: E402

__all__ = ["TimmBackbone", "TimmOptimWrapperConstructor"]


def _register() -> None:
    """Add the backbone to the registries of the installed packages, which search only themselves for `mmdet.<type>`."""
    for package in ("mmdet", "mmseg"):
        if find_spec(package):
            registry = importlib.import_module(f"{package}.registry").MODELS
            registry.register_module(module=TimmBackbone, force=True)


_register()
