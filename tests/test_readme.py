"""Code in the README runs, its commands are known, and its figures are true. Some seconds, slow ones 15 s."""

import re
import subprocess
import sys

import pytest

from . import pages
from .pages import ROOT

README = ROOT / "README.md"
TEXT = README.read_text()


@pytest.mark.slow
def test_python_runs(tmp_path):
    code = "\n".join(block.text for block in pages.blocks(README) if block.language == "python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", pages.commands(pages.blocks(README)), ids=" ".join)
def test_command_composes(command, tmp_path):
    """The training of a command is not run here, but its keys, groups and values have to be right."""
    pages.check_command(command, tmp_path)


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", TEXT)) <= targets


@pytest.mark.parametrize("path", pages.links(README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "figure"), re.findall(r"\| `(\w+)` \| ([\d.]+) M \|", TEXT))
def test_parameter_counts(name, figure):
    import timm
    import torch

    import zoo  # noqa: F401

    with torch.device("meta"):
        model = timm.create_model(name)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == figure
