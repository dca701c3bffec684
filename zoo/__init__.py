"""Hierarchical vision backbones. After `import zoo`, timm knows their names.

Importing timm takes seconds, since it imports torch. So the models are registered as soon as timm is imported, or at
once if it already is, and `import zoo` itself is fast.
"""

import sys
from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook

from zoo.manifest import families as _families

__version__ = "0.1.0"

# The modules that define models, by the names in the manifest.
FAMILIES = _families()

# Modules that the families import.
_SHARED = tuple(f"zoo.{name}" for name in ("backbone", "checkpoints", "facts", "layers", "pretrained", "recognition"))


def _register(_: ModuleType) -> None:
    # If one of these is imported before timm, it imports timm before its own definitions exist. This function then
    # returns, and runs again when the module is complete.
    if not all(hasattr(sys.modules[name], "__all__") for name in _SHARED if name in sys.modules):
        return
    # The operators follow timm.layers.set_fused_attn and set_exportable, but do not import timm.
    import_module("zoo.kernels.dispatch").follow(import_module("timm.layers").use_fused_attn)
    for family in FAMILIES:
        import_module(f"zoo.{family}")


for _name in ("timm", *_SHARED):
    register_post_import_hook(_register, _name)


def __getattr__(name: str) -> ModuleType:
    if name in FAMILIES:
        return import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
