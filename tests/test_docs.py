"""The documentation: its code runs, its commands and links are right, its tables are the code's. Seconds, slow ones
three minutes. ZOO_SNAPSHOT=1 writes the tables.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO

import pytest

import zoo
from zoo.tools import models

from . import pages
from .pages import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("families/*.md"), *DOCS.glob("guides/*.md")])
FAMILIES = [DOCS / "families" / f"{family}.md" for family in zoo.FAMILIES]
# Commands take seconds to start.
SLOW = [page for page in PAGES if any(b.language == "bash" and not b.needs for b in pages.blocks(page))]


def _name(path):
    return path.relative_to(DOCS).with_suffix("").as_posix()


@pytest.mark.parametrize(
    "path", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW), id=_name(page)) for page in PAGES]
)
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run_page(path, tmp_path)


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_every_block_runs_or_says_what_it_needs(path):
    languages = [None, *(block.language for block in pages.blocks(path) if not block.needs)]
    assert path.read_text().count("```") == 2 * len(pages.blocks(path))
    for before, language in itertools.pairwise(languages):
        assert language in ("bash", "python") or (language == "text" and before in ("bash", "python"))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=f"{_name(page)}: {' '.join(command)}")
        for page in PAGES
        for command in pages.commands([block for block in pages.blocks(page) if block.needs])
    ],
)
def test_command_that_is_not_run_composes(command, tmp_path):
    pages.check_command(command, tmp_path)


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_somewhere(path):
    assert [link for link in pages.links(path) if not (path.parent / link).exists()] == []


def test_every_family_has_a_page_and_every_page_its_parts():
    for path in FAMILIES:
        headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert headings == ["What is special", "Models", "Recipes", "Pitfalls", "Licence"], path


@pytest.mark.parametrize("path", FAMILIES, ids=_name)
def test_every_family_shows_its_own_pattern(path):
    assert f"../images/{path.stem}_patterns.png" in pages.links(path)


def test_install_names_extras_that_there_are():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    named = {extra for names in re.findall(r"pip install .*\[([\w,]+)\]", text) for extra in names.split(",")}
    assert named
    assert named <= set(extras)


@pytest.fixture(scope="module")
def rows():
    """What zoo-models says of each model with known weights."""
    printed = StringIO()
    with redirect_stdout(printed):
        models.main(["--json"])
    return json.loads(printed.getvalue())


def _sizes(family):
    """The variants in the papers' order, from small to large."""
    return list(import_module(f"zoo.{family}").VARIANTS)


def _variants(rows, family):
    yield "| model | parameters | multiply-adds | input | top-1, published | trained on |"
    yield "|---|---|---|---|---|---|"
    sources = []
    order = _sizes(family)
    for row in sorted((row for row in rows if row["family"] == family), key=lambda row: order.index(row["model"])):
        top1 = "" if row["top1"] is None else f"{row['top1']} %"
        if top1 and row["top1_source"] != "README of the origin":
            if row["top1_source"] not in sources:
                sources.append(row["top1_source"])
            top1 += f" ({sources.index(row['top1_source']) + 1})"
        height, width = row["input_size"]
        yield (
            f"| `{row['name']}` | {row['parameters'] / 1e6:.1f} M | {row['multiply_adds'] / 1e9:.2f} G "
            f"| {height}x{width} | {top1} | {row['dataset']} |"
        )
    notes = [f"({number}) {source.rstrip('.')}." for number, source in enumerate(sources, 1)]
    yield "\n" + " ".join(["Accuracies are those of the authors' README.", *notes])


def _recipes(rows, family):
    names = {row["model"] for row in rows if row["family"] == family}
    yield "| recipe | published |"
    yield "|---|---|"
    found = [(recipe["model"].partition(".")[0], recipe) for recipe in models.recipes()]
    order = _sizes(family)

    def place(item):
        """By task and method, then by size; what is not called after its model comes last."""
        model, recipe = item
        return recipe["recipe"].partition(model)[0], order.index(model)

    for _, recipe in sorted((item for item in found if item[0] in names), key=place):
        name = recipe["recipe"]
        yield f"| [{name}](../../recipes/conf/recipe/{name}.yaml) | {recipe['expected']} |"


@pytest.mark.slow
@pytest.mark.parametrize("path", FAMILIES, ids=_name)
@pytest.mark.parametrize("kind", ["variants", "recipes"])
def test_table_is_up_to_date(path, kind, rows):
    make = {"variants": _variants, "recipes": _recipes}[kind]
    table = f"<!-- {kind} -->\n" + "\n".join(make(rows, path.stem)) + "\n<!-- end -->"
    page = path.read_text()
    right = re.sub(rf"<!-- {kind} -->\n.*?<!-- end -->", table.replace("\\", r"\\"), page, count=1, flags=re.DOTALL)
    assert table in right
    if os.environ.get("ZOO_SNAPSHOT") == "1":
        path.write_text(right)
    assert path.read_text() == right, "run ZOO_SNAPSHOT=1 pytest tests/test_docs.py -k table, and read the difference"


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-c", str(DOCS)]
    result = subprocess.run([*command, str(ROOT), str(site)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (site / "docs" / "index.html").exists()
    assert "docs/index.html" in (site / "index.html").read_text()
    assert "key minus query" in (site / "docs" / "operators.html").read_text()
