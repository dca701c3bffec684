"""Who may import whom, and what a bare `import zoo` costs. A second, slow ones 20 s."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "timm",
    "triton",
    "hydra",
    "omegaconf",
    "wandb",
    "matplotlib",
    "sklearn",
    "mmengine",
    "mmdet",
    "mmseg",
)
# folder -> what its files may import beside the standard library
ALLOWED = {
    "kernels": {"torch", "triton", "zoo.kernels", "natten"},  # NATTEN where benchmarks compare with it
    "zoo": {
        *("torch", "timm", "huggingface_hub", "safetensors", "wrapt", "zoo", "zoo.kernels", "zoo.manifest"),
        *(f"zoo.{path.stem}" for path in (ROOT / "zoo").glob("*.py") if path.stem not in zoo.FAMILIES),
    },
    "recipes": None,
    "tools": None,
}
FORBIDDEN = {"recipes": {"zoo.tools"}, "tools": {"zoo.recipes"}}


def imports(path):
    """The modules that a file imports, at the top or inside functions; `from zoo import x` counts as zoo.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"zoo.{a.name}" for a in node.names) if node.module == "zoo" else (node.module,)


def names(path):
    """All names that a file imports, with the modules that they come from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def package(module):
    """`zoo.kernels` of zoo.kernels.window, `torch` of torch.nn."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "zoo" else parts[:1])


FILES = [path for folder in ALLOWED for path in files(folder)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    used = {package(module) for module in imports(path)} - set(sys.stdlib_module_names)
    if ALLOWED[folder] is not None:
        assert used <= ALLOWED[folder]
    assert not used & FORBIDDEN.get(folder, set())
    assert not {"tests", "kernels", "recipes", "tools"} & used


def test_family_imports_no_other_family():
    for family in zoo.FAMILIES:
        others = {f"zoo.{other}" for other in zoo.FAMILIES if other != family}
        assert not others & set(imports(ROOT / "zoo" / f"{family}.py"))


def test_fast_implementations_import_nothing_of_the_reference():
    """The reference defines what is right, so nothing that is compared with it may share its code."""
    fast = [path for path in files("kernels") if path.name in ("torch_impl.py", "triton_impl.py")]
    assert fast
    assert [path for path in fast if any("reference" in name.split(".") for name in names(path))] == []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_zoo_brings_nothing_heavy():
    assert run(f"import zoo, sys; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


ORDERS = {
    "zoo-first": "import zoo, timm; print(timm.is_model('van_b0'))",
    "timm-first": "import timm, zoo; print(timm.is_model('van_b0'))",
    "timm.models": "import zoo; from timm.models import is_model; print(is_model('van_b0'))",
    "family-first": "import zoo; zoo.van; import timm; print(timm.is_model('van_b0'))",
    "backbone-first": "import zoo.backbone, timm; print(timm.is_model('van_b0'))",
    "checkpoints-first": "import zoo.checkpoints, timm; print(timm.is_model('van_b0'))",
    "families-first": "import zoo.families, timm; print(timm.is_model('van_b0'))",
    "layers-first": "import zoo.layers, timm; print(timm.is_model('van_b0'))",
    "facts-first": "import zoo.facts, timm; print(timm.is_model('van_b0'))",
    "pretrained-first": "import zoo.pretrained, timm; print(timm.is_model('van_b0'))",
    "recognition-first": "import zoo.recognition, timm; print(timm.is_model('van_b0'))",
}


@pytest.fixture(scope="module")
def registered():
    """What each order prints, in a process of its own that has torch already, which takes seconds to import."""
    program = f"""
        import os, sys, torch, torchvision
        for name, code in {ORDERS}.items():
            if not os.fork():
                print(name, end=" ")
                exec(code)
                sys.stdout.flush()
                os._exit(0)
            os.wait()
    """
    return dict(line.split() for line in run(textwrap.dedent(program)).splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_models_are_registered(registered, order):
    assert registered.get(order) == "True"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'vam'"):
        zoo.vam  # noqa: B018


def test_command_line_starts_without_torch():
    """Help and misspelt keys answer at once."""
    recipes, tools = ("train", "eval", "predict"), ("benchmark", "convert", "export", "look", "models")
    modules = ", ".join([*(f"zoo.recipes.{name}" for name in recipes), *(f"zoo.tools.{name}" for name in tools)])
    code = f"import {modules}, sys; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert run(code) == "[]"
