"""Who may import whom, and what a bare `import zoo` costs. A second, slow ones 20 s."""

import ast
import functools
import graphlib
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
# folder -> what its files may import besides the standard library and each other
ALLOWED = {
    "kernels": {"torch", "triton", "natten"},  # NATTEN in benchmarks that compare with it
    "zoo": {"torch", "timm", "huggingface_hub", "safetensors", "wrapt", "zoo.kernels", "zoo.manifest"},
}
FORBIDDEN = {"recipes": {"zoo.tools"}, "tools": {"zoo.recipes"}}
# Only the recipes can open the run folder of a detector or segmentor, and draw the batches of a training.
EXCEPT = {
    "zoo.tools.export": {"zoo.recipes.reading", "zoo.recipes.tasks"},
    "zoo.tools.look": {"zoo.recipes.preview.preview"},
}


def module(path):
    """The name under which a file is imported: the folders beside zoo/ are packages in it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in ("zoo", *parts[parts[0] == "zoo" :]) if part != "__init__")


FILES = {
    module(path): path for folder in ("zoo", "kernels", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")
}


def imported(path):
    """All that a file imports, at the top or inside functions: modules, and names in them as `module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def graph():
    """What each file imports; not to be changed."""
    return {
        name: {found if found in FILES else found.rpartition(".")[0] for found in imported(path)}
        for name, path in FILES.items()
    }


def folder(name):
    """`kernels` of zoo.kernels.window_attention.op, `zoo` of zoo.van."""
    path = FILES[name].relative_to(ROOT)
    return path.parts[0]


def package(name):
    """`zoo.kernels` of zoo.kernels.dispatch.use, `zoo` of zoo.van, `torch` of torch.nn."""
    top, *parts = name.split(".")
    return f"zoo.{parts[0]}" if top == "zoo" and parts and parts[0] in (*BESIDE, "manifest") else top


BESIDE = ("kernels", "recipes", "tools")


@pytest.mark.slow
def test_imports_point_one_way():
    wrong = {}
    for name, path in FILES.items():
        here = folder(name)
        found = set(imported(path)) - EXCEPT.get(name, set())
        used = {package(each) for each in found} - set(sys.stdlib_module_names)
        used -= {"zoo" if here == "zoo" else f"zoo.{here}"}
        bad = used & FORBIDDEN.get(here, set()) | used & {"tests", *BESIDE}
        wrong[name] = bad | (used - ALLOWED[here] if here in ALLOWED else set())
    assert {name: bad for name, bad in wrong.items() if bad} == {}


@pytest.mark.slow
def test_no_circle():
    """No file imports another one that imports it in turn, directly or through others, not even inside functions."""
    others = {name: (used & FILES.keys()) - {name} for name, used in graph().items()}
    assert {"zoo.recipes.base_run", "zoo.recipes.progress"} <= others["zoo.recipes.classify.train"]
    circle = None
    try:
        graphlib.TopologicalSorter(others).prepare()
    except graphlib.CycleError as error:
        circle = " <- ".join(error.args[1])
    assert circle is None


def test_no_file_of_zoo_imports_a_family():
    """What families share knows none of them, and no family knows another."""
    families = {f"zoo.{family}" for family in zoo.FAMILIES}
    assert families <= FILES.keys()
    wrong = {name: used & families for name, used in graph().items() if folder(name) == "zoo"}
    assert {name: used for name, used in wrong.items() if used} == {}


def test_fast_implementations_import_nothing_of_the_reference():
    """The reference defines what is right, so nothing that is compared with it may share its code."""
    fast = [path for path in FILES.values() if path.name in ("torch_impl.py", "triton_impl.py")]
    assert fast
    assert [path for path in fast if any("reference" in name.split(".") for name in imported(path))] == []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ["zoo", "zoo.recipes"])
def test_import_brings_nothing_heavy(name):
    assert run(f"import {name}, sys; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


# The first five are tried by `make test`.
ORDERS = {
    "zoo-first": "import zoo, timm; print(timm.is_model('van_b0'))",
    "timm-first": "import timm, zoo; print(timm.is_model('van_b0'))",
    "timm.models": "import zoo; from timm.models import is_model; print(is_model('van_b0'))",
    "family-first": "import zoo; zoo.van; import timm; print(timm.is_model('van_b0'))",
    "recognition-first": "import zoo.recognition, timm; print(timm.is_model('van_b0'))",
    "backbone-first": "import zoo.backbone, timm; print(timm.is_model('van_b0'))",
    "checkpoints-first": "import zoo.checkpoints, timm; print(timm.is_model('van_b0'))",
    "families-first": "import zoo.families, timm; print(timm.is_model('van_b0'))",
    "layers-first": "import zoo.layers, timm; print(timm.is_model('van_b0'))",
    "rmt-first": "import zoo.rmt, timm; print(timm.is_model('van_b0'))",
    "stripes-first": "import zoo.stripes, timm; print(timm.is_model('van_b0'))",
    "facts-first": "import zoo.facts, timm; print(timm.is_model('van_b0'))",
    "pretrained-first": "import zoo.pretrained, timm; print(timm.is_model('van_b0'))",
}


@pytest.fixture(scope="module")
def registered(request):
    """What each order prints, in a process of its own that has torch already, which takes seconds to import."""
    tests = [item for item in request.session.items if item.originalname == "test_models_are_registered"]
    orders = {name: ORDERS[name] for name in [item.callspec.params["order"] for item in tests]}
    program = f"""
        import os, sys, torch, torchvision
        for name, code in {orders}.items():
            if not os.fork():
                print(name, end=" ")
                exec(code)
                sys.stdout.flush()
                os._exit(0)
            os.wait()
    """
    return dict(line.split() for line in run(textwrap.dedent(program)).splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[pytest.mark.long] * (i >= 5)) for i, order in enumerate(ORDERS)]
)
def test_models_are_registered(registered, order):
    assert registered.get(order) == "True"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'vam'"):
        zoo.vam  # noqa: B018


@pytest.mark.slow
def test_command_line_starts_without_torch():
    """Help and misspelt keys answer at once."""
    recipes = ("train", "eval", "predict")  # each in zoo.recipes and zoo.recipes.commands
    tools = ("benchmark", "convert", "export", "look", "models")
    recipes = (*recipes, "commands.embed")
    modules = ", ".join([*(f"zoo.recipes.{name}" for name in recipes), *(f"zoo.tools.{name}" for name in tools)])
    code = f"import {modules}, sys; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert run(code) == "[]"
