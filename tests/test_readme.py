"""Code in the README runs, its commands are known, and its figures are true. Some seconds."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- needs data -->\n)?```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for _, language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if "zoo" in line and "pip install" not in line
]


def test_python_runs(tmp_path):
    code = "\n".join(text for _, language, text in BLOCKS if language == "python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_composes(command, tmp_path):
    """The training of a command is not run here, but its keys, groups and values have to be right."""
    tools = {"zoo-bench": "benchmark", "zoo-models": "models", "zoo-convert": "convert", "zoo-export": "export"}
    if command[0] in tools:
        importlib.import_module(f"zoo.tools.{tools[command[0]]}").parser().parse_args(command[1:])
        return
    if command[0] == "zoo-predict":
        from zoo.recipes.predict import parse

        parse(command[1:])
        return
    words = [word for word in command if word != "-m" or "torchrun" in command]
    module = "zoo.recipes.eval" if words[0] == "zoo-eval" else "zoo.recipes.train"
    arguments = words[words.index("zoo.recipes.train") + 1 :] if words[0] == "torchrun" else words[1:]
    arguments = [word.partition(",")[0] if "-m" in command and words[0] != "torchrun" else word for word in arguments]
    if arguments and arguments[0].startswith("runs/"):
        (tmp_path / arguments[0]).mkdir(parents=True)
    extra = [] if "--help" in arguments else ["--cfg", "job"]
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments, *extra], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "figure"), re.findall(r"^\| `(van_b\d)` \| ([\d,]+) \|", README, re.MULTILINE))
def test_parameter_counts(name, figure):
    import timm
    import torch

    import zoo  # noqa: F401

    with torch.device("meta"):
        model = timm.create_model(name)
    assert f"{sum(p.numel() for p in model.parameters()):,}" == figure
