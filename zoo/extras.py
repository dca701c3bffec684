"""The optional dependencies: which modules an extra installs, and the message that names a missing extra."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from zoo.messages import UserError

__all__ = ["MODULES", "MissingExtra", "install_command", "require", "require_for_commands"]

MODULES = {
    "train": ("hydra", "jinja2", "matplotlib", "rich", "scipy", "sklearn", "wandb"),
    "dense": ("mmcv", "mmdet", "mmengine", "mmseg", "pycocotools"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "examples": ("pytorch_grad_cam", "segmentation_models_pytorch", "transformers"),
}


class MissingExtra(UserError, ImportError):
    """Modules that an extra installs are missing; the message says which, and how to install them."""


def install_command(extra: str) -> str:
    """The command that adds `extra` to the installed distribution. pip needs no index to find the extra's packages."""
    return f"pip install 'backbone-zoo[{extra}]'"


def require(user: str, extra: str, modules: Iterable[str] | None = None) -> None:
    """Check that the modules of `extra` are installed, without importing them.

    Args:
        user: What needs the modules. The message begins with it.
        extra: One of `MODULES`.
        modules: The modules of the extra that are needed; None means all.

    Raises:
        MissingExtra: Some of the modules are not installed.
    """
    missing = [module for module in modules or MODULES[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{user} needs {', '.join(missing)}: run {install_command(extra)}.")


def require_for_commands(package: str, modules: Iterable[str] | None = None) -> None:
    """Check that the extra "train" is installed for `package`, which holds commands. Call it before other imports.

    A command (`zoo-train`, `python -m zoo.recipes.train`) prints the message on one line and ends with exit code 1.

    Args:
        package: The name of the package.
        modules: The modules of the extra that the package imports; None means all.

    Raises:
        MissingExtra: The extra is not installed, and `package` is imported by another program.
    """
    program = Path(sys.argv[0]).stem
    if program == "-m":  # while Python looks for the module of `python -m`
        program = f"python -m {package}"
    try:
        require(program if program.startswith("zoo-") else package, "train", modules)
    except MissingExtra as error:
        if program.startswith(("zoo-", "python -m")):
            sys.exit(f"{program}: error: {error}")
        raise
