"""What is installed, for the `--version` of every command."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import zoo


def versions() -> str:
    """The versions of zoo, torch, timm and Python in one line; nothing of them is imported for it."""
    parts = [f"zoo {zoo.__version__}"]
    for package in ("torch", "timm"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join([*parts, f"Python {platform.python_version()}"])
