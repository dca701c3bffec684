"""The wheel: its files and requirements; commands without their extra. A minute and a half, quick tests a second."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from zoo import extras

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "zoo": "zoo",
    "checkpoints": "zoo/manifest",
    "kernels": "zoo/kernels",
    "recipes": "zoo/recipes",
    "tools": "zoo/tools",
}
KINDS = (".py", ".json", ".xz", ".yaml", ".j2", ".typed")
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NOT_CORE = sorted({module for modules in extras.MODULES.values() for module in modules})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a clean copy: an old build folder or egg-info would hide missing files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("kernels/new_operator", "recipes/new_task"):  # packages that nothing lists
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


@pytest.mark.long
def test_wheel_holds_every_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"zoo/kernels/new_operator/__init__.py", "zoo/recipes/new_task/__init__.py"}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in KINDS and path.parent.name != "tables":  # `make recipes` reads these
                expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    assert held == expected


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import timm, zoo; print(timm.get_pretrained_cfg('van_b0').license)", "apache-2.0"),
        ("from zoo.recipes.train import main; main()", "model: van_b1"),
    ],
    ids=["manifest", "configs"],
)
def test_wheel_works_anywhere(wheel, tmp_path, code, expected):
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    where = f"import zoo; assert zoo.__file__.startswith({str(target)!r}), zoo.__file__\n"
    result = subprocess.run(
        [sys.executable, "-c", where + code, "recipe=imagenet/van_b1", "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


@pytest.fixture(scope="module")
def requirements(wheel):
    """The distributions that the wheel requires, by extra; "" stands for no extra."""
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "backbone-zoo"
    found = {"": set(), **{extra: set() for extra in metadata.get_all("Provides-Extra")}}
    for line in metadata.get_all("Requires-Dist"):
        extra = re.search(r'extra == "(.+?)"', line)
        found[extra[1] if extra else ""].add(re.match(r"[\w.-]+(\[.+?\])?", line)[0])
    return found


@pytest.mark.long
def test_core_requires_little(requirements):
    assert requirements[""] == {"torch", "torchvision", "timm", "safetensors", "huggingface_hub", "wrapt"}


@pytest.mark.long
@pytest.mark.parametrize("extra", extras.MODULES)
def test_extra_installs_its_modules(requirements, extra):
    distributions = packages_distributions()
    named = {distribution for module in extras.MODULES[extra] for distribution in distributions[module]}
    required = {name for name in requirements[extra] if "[" not in name}
    assert {name.lower().replace("_", "-") for name in named} == required


@pytest.mark.long
@pytest.mark.parametrize("extra", ["dense", "onnx", "examples", "slurm"])
def test_extra_includes_the_commands(requirements, extra):
    assert "backbone-zoo[train]" in requirements[extra]


@pytest.mark.parametrize(
    ("folder", "modules"), [("recipes", set(extras.MODULES["train"])), ("tools", {"matplotlib", "rich"})]
)
def test_commands_check_what_they_import(folder, modules):
    statements = "".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", statements, re.MULTILINE))
    assert imported & set(extras.MODULES["train"]) == modules


def without(modules, folder):
    """An environment whose processes cannot import `modules`."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def core_only(tmp_path_factory):
    return without(NOT_CORE, tmp_path_factory.mktemp("core"))


@pytest.mark.slow
def test_core_works_without_extras(core_only):
    code = "import timm, torch, zoo; print(timm.create_model('test_dinat').eval()(torch.zeros(1, 3, 64, 64)).shape[1])"
    result = subprocess.run([sys.executable, "-c", code], env=core_only, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("1000\n", "", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", [[], ["--help"]], ids=["alone", "help"])
def test_command_names_its_extra(core_only, name, words):
    command = [str(Path(sys.executable).with_name(name)), *words]
    result = subprocess.run(command, env=core_only, capture_output=True, text=True)
    modules = ", ".join(extras.MODULES["train"]) if "recipes" in COMMANDS[name] else "matplotlib, rich"
    expected = f"{name}: error: {name} needs {modules}: run pip install 'backbone-zoo[train]'.\n"
    assert (result.stdout, result.stderr, result.returncode) == ("", expected, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "user", "extra"),
    [("zoo-train task=detect", "task=detect", "dense"), ("zoo-export test_van --format onnx", "--format onnx", "onnx")],
)
def test_option_names_its_extra(tmp_path, command, user, extra):
    name, *words = command.split()
    modules = extras.MODULES[extra]
    program = str(Path(sys.executable).with_name(name))
    result = subprocess.run(
        [program, *words], env=without(modules, tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    expected = f"{name}: error: {user} needs {', '.join(modules)}: run pip install 'backbone-zoo[{extra}]'.\n"
    assert (result.stdout, result.stderr, result.returncode) == ("", expected, 1)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["zoo.recipes.train", "zoo.tools.benchmark"])
def test_module_names_its_extra(core_only, module):
    result = subprocess.run([sys.executable, "-m", module], env=core_only, capture_output=True, text=True)
    package = module.rpartition(".")[0]
    assert result.stderr.startswith(f"python -m {package}: error: {package} needs ")
    assert (result.stdout, result.stderr.count("\n"), result.returncode) == ("", 1, 1)


@pytest.mark.slow
def test_import_without_extra_raises(core_only):
    code = "import zoo.recipes.config"
    result = subprocess.run([sys.executable, "-c", code], env=core_only, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("zoo.extras.MissingExtra: zoo.recipes needs hydra, ")


def test_missing_extra_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(extras.MissingExtra, match=r"^task=detect needs mmdet: run pip install 'backbone-zoo\[dense\]'"):
        extras.require("task=detect", "dense")


@pytest.mark.parametrize("target", COMMANDS.values())
def test_command_exists(target):
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
