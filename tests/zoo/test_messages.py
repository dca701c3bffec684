"""Wording that messages share. 2 s."""

import subprocess
import sys

import pytest

from zoo import messages


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (ValueError("one\n  two\tthree."), "one two three"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        ("as it is", "as it is"),
    ],
)
def test_error_becomes_one_line(message, line):
    assert messages.one_line(message) == line


@pytest.mark.parametrize(("limit", "line"), [(3, "abc ..."), (4, "abc ..."), (5, "abc d ..."), (7, "abc def")])
def test_long_line_is_cut(limit, line):
    assert messages.one_line(ValueError("abc def."), limit) == line


@pytest.mark.parametrize(
    ("word", "settings", "question"),
    [
        ("opttim", {}, "did you mean optim?"),
        ("OPTIM", {}, "did you mean optim?"),
        ("data", {}, "did you mean Data?"),
        ("data", {"prefix": "./"}, "did you mean ./Data?"),
        ("optim", {"count": 2}, "did you mean optim or options?"),
        ("optim", {"count": 3}, "did you mean optim, options or optional?"),
        ("zzz", {}, ""),
        ("opzzzz", {}, ""),
        ("opzzzz", {"cutoff": 0.3}, "did you mean optim?"),
    ],
)
def test_question_names_what_is_nearest(word, settings, question):
    assert messages.did_you_mean(word, ["Data", "optim", "options", "optional"], **settings) == question


def test_first_few_says_whether_there_are_more():
    assert messages.first_few(iter("abc"), 3) == "a, b, c"
    assert messages.first_few([1, 2, 3], 2) == "1, 2, ..."
    assert messages.first_few([]) == ""


def test_size_is_separated_by_crosses():
    assert messages.size_text((224, 320)) == "224x320"


@pytest.mark.slow
def test_imports_the_standard_library_alone():
    script = "import sys; before = set(sys.modules); import zoo.messages; print(*{*sys.modules} - before)"
    names = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "zoo", "wrapt"}
