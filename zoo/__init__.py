"""Hierarchical vision backbones. After `import zoo`, timm knows their names.

Importing timm takes seconds, because it imports torch. `import zoo` is fast, since it does not import timm: the models
are registered when timm is imported, or immediately if it already is.
"""

import sys
from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook

from zoo.manifest import families as _families

__version__ = "0.1.0"

# The names of the modules that define models, as in the manifest.
FAMILIES = _families()

# Modules that the families' modules import.
_SHARED = tuple(
    f"zoo.{name}"
    for name in (
        *("backbone", "checkpoints", "efficient_probing", "facts", "families", "layers", "mbconv", "pretrained"),
        *("recognition", "rmt", "stripes"),
    )
)


def _register(_: ModuleType) -> None:
    # This hook runs after the import of timm and of each module in _SHARED. If a shared module is imported before timm,
    # it imports timm itself, and the hook runs before that module has defined anything. A family imported at that point
    # would fail, since it needs these definitions. A module without `__all__` is still at its imports: do nothing now.
    # The hook runs again when that module is complete.
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
