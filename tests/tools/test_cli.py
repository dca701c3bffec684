"""What all commands of the tools do alike. 10 s."""

import importlib
import re
import subprocess
import sys

import pytest

import zoo

TOOLS = ("benchmark", "convert", "export", "look", "models")


@pytest.fixture
def printed(capsys):
    """What a command prints in this process, and its exit code."""

    def call(tool, *words):
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"zoo.tools.{tool}").main(list(words))
        return ended.value.code, capsys.readouterr()

    return call


@pytest.mark.parametrize("tool", TOOLS)
def test_version(printed, tool):
    code, (output, _) = printed(tool, "--version")
    assert code == 0
    assert re.fullmatch(rf"zoo {zoo.__version__}, torch 2\.\S+, timm 1\.\S+,\s+Python 3\.\S+\n", output)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "models"])
def test_without_words_a_command_that_needs_some_explains_itself(printed, tool):
    code, (output, errors) = printed(tool)
    assert (code, output) == (2, "")
    assert "usage: zoo-" in errors
    assert "the following arguments are required" in errors.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["models --help", "benchmark simulate --size 56x56 --kernel 7"])
def test_reader_that_has_seen_enough(words, tmp_path):
    command = f"{sys.executable} -m zoo.tools.{words} | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr == ""
