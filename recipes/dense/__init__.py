"""Object detection, semantic and panoptic segmentation with MMDetection and MMSegmentation."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings

from zoo.extras import require


def prepare(task: str) -> None:
    """Make MMEngine and its packages ready for `task`; import nothing else from this package before.

    Three side effects, in this order; calling this again changes nothing:

    1. `mmcv.ops` imports without its compiled extension: PyTorch and torchvision replace it where needed.
    2. mmdet, for segmentation mmseg too, and this package register their models, data sets and transforms.
    3. MMEngine loads no checkpoint that runs code, and builds nothing that is not registered.

    Args:
        task: `detect`, `segment` or `panoptic`.

    Raises:
        UserError: The packages are not installed.
    """
    require(f"task={task}", "dense")
    _replace_compiled_operators()
    _register(task)
    _refuse_foreign_code()


def _replace_compiled_operators() -> None:
    from zoo.recipes.dense import mmcv_ops

    mmcv_ops.install()


def _register(task: str) -> None:
    # mmseg's Mask2Former is mmdet's.
    for package in ("mmdet", "mmseg") if task == "segment" else ("mmdet",):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # they print what they lack
            warnings.simplefilter("ignore")
            importlib.import_module(f"{package}.utils").register_all_modules(init_default_scope=False)
    from zoo.recipes.dense import confusion, optim, samplers, transforms  # noqa: F401

    if task == "detect":
        from zoo.recipes.dense import coco, detectors  # noqa: F401
    elif task == "panoptic":
        from zoo.recipes.dense import panoptic  # noqa: F401
    else:
        from zoo.recipes.dense import paired_dataset, segmentor  # noqa: F401


def _refuse_foreign_code() -> None:
    from zoo.recipes.dense import safe_loading, safe_registry

    safe_loading.refuse_unpickling()
    safe_registry.only_registered_names()
