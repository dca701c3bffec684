"""What the folder of every operator contains, and its use elsewhere. A second."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from zoo import kernels
from zoo.kernels import OPERATORS

ROOT = Path(__file__).parents[2]


def test_operators_are_the_folders():
    assert set(OPERATORS) == {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}


def test_short_names_differ():
    assert len({name.partition("_")[0] for name in OPERATORS}) == len(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_public_functions_are_exported(name):
    folder = import_module(f"zoo.kernels.{name}")
    for function in folder.__all__:
        assert function in kernels.__all__
        assert getattr(kernels, function) is getattr(folder, function)


def test_documentation_has_a_row_for_each_function():
    table = re.findall(r"^\| \[`(\w+)`\]\(\.\./kernels/(\w+)/op\.py\)", (ROOT / "docs/operators.md").read_text(), re.M)
    assert sorted(table) == sorted(
        (function, name) for name in OPERATORS for function in import_module(f"zoo.kernels.{name}").__all__
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_cases(name):
    cases = import_module(f"zoo.kernels.{name}.cases")
    assert len(set(cases.CASES.values())) == len(cases.CASES)
    assert set(cases.KINDS) <= set(cases.CASES)
    assert set(getattr(cases, "LARGE", ())) <= set(cases.CASES)
    assert not set(cases.TARGETS) & set(cases.CASES)
