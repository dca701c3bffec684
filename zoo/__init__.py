"""Hierarchical vision backbones: after `import zoo`, timm knows their names.

timm brings torch and much else with it, and takes seconds; so the models register as soon as timm is imported, at once
if it already is, and `import zoo` by itself takes no time.
"""

import sys
from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook

from zoo.manifest import families as _families

__version__ = "0.1.0"

# The modules of models, found by the names in the manifest.
FAMILIES = _families()

# What the families are made of.
_SHARED = tuple(f"zoo.{name}" for name in ("backbone", "checkpoints", "facts", "layers", "pretrained", "recognition"))


def _register(_: ModuleType) -> None:
    # One of these that is imported ahead of timm brings timm in before it is made itself; at its end we are back here.
    if not all(hasattr(sys.modules[name], "__all__") for name in _SHARED if name in sys.modules):
        return
    # The operators obey timm.layers.set_fused_attn and set_exportable; they know nothing of timm themselves.
    import_module("zoo.kernels.dispatch").follow(import_module("timm.layers").use_fused_attn)
    for family in FAMILIES:
        import_module(f"zoo.{family}")


for _name in ("timm", *_SHARED):
    register_post_import_hook(_register, _name)


def __getattr__(name: str) -> ModuleType:
    if name in FAMILIES:
        return import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
