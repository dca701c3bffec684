"""The documentation: its code runs, its commands and links are right, its tables are the code's. Seconds, slow ones
three minutes. `make tables` writes the tables.
"""

import itertools
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import zoo

from . import pages, tables
from .pages import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("families/*.md"), *DOCS.glob("guides/*.md")])
NOTEBOOKS = sorted(DOCS.glob("examples/*.ipynb"))
FAMILIES = [DOCS / "families" / f"{family}.md" for family in zoo.FAMILIES]
# Commands take seconds to start.
SLOW = [page for page in PAGES if any(b.language == "bash" and not b.needs for b in pages.blocks(page))]


def _name(path):
    return path.relative_to(DOCS).with_suffix("").as_posix()


@pytest.mark.parametrize(
    "path", [pytest.param(page, marks=[pytest.mark.long] * (page in SLOW), id=_name(page)) for page in PAGES]
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


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """Its cells run, and end with the lines that it shows; their numbers may differ on another machine."""
    monkeypatch.chdir(tmp_path)
    if os.environ.get("ZOO_SNAPSHOT"):
        (tmp_path / "kernel").mkdir()
        pages.execute_notebook(path, tmp_path / "kernel")
    cells = pages.notebook_cells(path)
    printed = pages.run_cells([source for source, _ in cells], path.name)
    for (source, shown), lines in zip(cells, printed, strict=True):
        assert shown or "plt.show()" in source
        ends = [re.sub(r"\d+", "#", text.split("\n")[-2].split()[0]) for text in (lines, shown) if shown]
        assert len(set(ends)) <= 1, f"{lines}\nbut the notebook shows\n{shown}"


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/adding.md", "docs/families/index.md"]
)
def test_files_that_are_named_exist(name):
    named = re.findall(r"`((?:checkpoints|docs|kernels|recipes|tests|tools|zoo)/[\w./-]+)`", (ROOT / name).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_file_tree_of_the_readme_is_complete():
    """One line for each file and folder at the top, as git has them."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a checkout of git")
    tree = (ROOT / "README.md").read_text().partition("## Files\n\n```\n")[2].partition("```")[0]
    assert sorted(line.split()[0] for line in tree.splitlines()) == sorted(
        {f"{name}/" if inside else name for name, inside, _ in (path.partition("/") for path in tracked)}
    )


def test_every_family_has_a_page_and_every_page_its_parts():
    for path in FAMILIES:
        headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert headings == ["What is special", "Models", "Recipes", "Pitfalls", "Licence"], path


@pytest.mark.parametrize("path", FAMILIES, ids=_name)
def test_every_family_shows_its_own_pattern(path):
    assert f"../images/{path.stem}_patterns.png" in pages.links(path)


def test_papers_of_all_families_are_cited():
    # Of two entries that run together, YAML keeps the last address.
    cited = [entry["url"] for entry in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]]
    papers = [paper for family in zoo.FAMILIES for paper in tables.manifest.about(family)["names"].values()]
    assert [paper for paper in papers if f"https://arxiv.org/abs/{paper}" not in cited] == []


def test_install_names_extras_that_there_are():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    named = {extra for names in re.findall(r"pip install .*\[([\w,]+)\]", text) for extra in names.split(",")}
    assert named
    assert named <= set(extras)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_page_names_the_readme_if_an_accuracy_is_from_there(family):
    sources = {entry.get("top1", {}).get("source") for entry in tables.manifest.manifest(family)}
    text = (DOCS / "families" / f"{family}.md").read_text()
    assert ("those of the authors' README" in text) == ("README of the origin" in sources)


@pytest.mark.slow
def test_tables_are_up_to_date():
    """`make tables` writes them."""
    stale = []
    for (path, name), make in tables.tables().items():
        text = path.read_text()
        assert text.count(f"<!-- {name} -->") == 1, f"{path} has no place for the table {name!r}"
        right = tables.with_table(text, name, make())
        if os.environ.get("ZOO_SNAPSHOT") == "1":
            path.write_text(right)
        elif text != right:
            stale.append(f"{name} in {path.relative_to(ROOT)}")
    assert not stale, "run make tables, and read the difference"


@pytest.mark.long
def test_site_builds_without_warnings(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-c", str(DOCS)]
    result = subprocess.run([*command, str(ROOT), str(site)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (site / "docs" / "index.html").exists()
    assert "docs/index.html" in (site / "index.html").read_text()
    assert "key minus query" in (site / "docs" / "operators.html").read_text()
