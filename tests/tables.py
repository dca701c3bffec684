"""The tables of the documents that are written from the manifest, the recipes and the code: `make tables` writes them.

A table stands between `<!-- name -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import zoo
from zoo import families, manifest
from zoo.tools import models

from .pages import ROOT

INDEX = ROOT / "docs" / "families" / "index.md"
README = ROOT / "README.md"


@cache
def rows() -> list[dict]:
    """What zoo-models says of each model with known weights."""
    printed = StringIO()
    with redirect_stdout(printed):
        models.main(["--json"])
    return json.loads(printed.getvalue())


def variants(family: str) -> Iterator[str]:
    """The models of a family, for its page."""
    yield "| model | parameters | multiply-adds | input | top-1, published | trained on |"
    yield "|---|---|---|---|---|---|"
    sources: list[str] = []
    order = _sizes(family)
    for row in sorted((row for row in rows() if row["family"] == family), key=lambda row: order.index(row["model"])):
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


def recipes(family: str) -> Iterator[str]:
    """The recipes of a family, for its page."""
    names = {row["model"] for row in rows() if row["family"] == family}
    yield "| recipe | published |"
    yield "|---|---|"
    found = [(recipe["model"].partition(".")[0], recipe) for recipe in models.recipes()]
    order = _sizes(family)

    def place(item: tuple[str, dict]) -> tuple[str, int]:
        """Sort by task and method, then by size. Recipes that are not named after their model come last."""
        model, recipe = item
        return recipe["recipe"].partition(model)[0], order.index(model)

    for _, recipe in sorted((item for item in found if item[0] in names), key=place):
        name = recipe["recipe"]
        yield f"| [{name}](../../recipes/conf/recipe/{name}.yaml) | {recipe['expected']} |"


def index() -> Iterator[str]:
    """The families, for the page that lists them."""
    yield "| family | each token attends to | weights for commercial use |"
    yield "|---|---|---|"
    for family in zoo.FAMILIES:
        about, entries = manifest.about(family), manifest.manifest(family)
        if any("-nc-" in entry["licence"] for entry in entries):
            commercial = "**no**"
        else:
            commercial = "see its licence" if any("licence_note" in entry for entry in entries) else "yes"
        yield f"| [{', '.join(about['names'])}]({family}.md) | {about['attends_to']} | {commercial} |"


def speed() -> Iterator[str]:
    """The examples of the families, with the times that were measured here, for the README."""
    yield "| family | model | parameters | top-1 | inference (timm's own model) | training (timm's own model) |"
    yield "|---|---|---|---|---|---|"
    for family in zoo.FAMILIES:
        about = manifest.about(family)
        papers = (f"[{name}](https://arxiv.org/abs/{paper})" for name, paper in about["names"].items())
        title = ", ".join(papers)
        for name in about["examples"]:
            row = next(row for row in rows() if row["model"] == name)
            measured = about.get("measured", {}).get(name, {})
            cells = [f"{row['parameters'] / 1e6:.1f} M", "" if row["top1"] is None else f"{row['top1']} %"]
            for what in ("inference", "training"):
                times = [f"{time:.2f}" for time in measured.get(what, ())]
                cells.append(f"{times[0]} ({times[1]})" if len(times) > 1 else "".join(times))
            yield f"| {f'{title} ' if title else ''}| `{name}` | {' | '.join(cells)} |"
            title = ""


def digits() -> Iterator[str]:
    """The accuracy of the demo with each family's test model, for the README."""
    found = {
        model: figures["digits"]
        for family in zoo.FAMILIES
        for model, figures in manifest.about(family).get("measured", {}).items()
        if "digits" in figures
    }
    yield f"| {' | '.join(f'`{model}`' for model in found)} |"
    yield "|---" * len(found) + "|"
    yield f"| {' | '.join(f'{accuracy} %' for accuracy in found.values())} |"


def tables() -> dict[tuple[Path, str], Callable[[], Iterator[str]]]:
    """What makes each table, by its document and its name."""
    found: dict[tuple[Path, str], Callable[[], Iterator[str]]] = {
        (INDEX, "families"): index,
        (README, "speed"): speed,
        (README, "digits"): digits,
    }
    for family in zoo.FAMILIES:
        page = INDEX.with_name(f"{family}.md")
        found[page, "variants"] = lambda family=family: variants(family)
        found[page, "recipes"] = lambda family=family: recipes(family)
    return found


def with_table(text: str, name: str, lines: Iterator[str]) -> str:
    """A document's text with the table `name` made of `lines`; the same text if it has no such table."""
    table = f"<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->"
    return re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _: table, text, count=1, flags=re.DOTALL)


def _sizes(family: str) -> list[str]:
    """The variants in the papers' order, from small to large."""
    return list(families.load(family).VARIANTS)
