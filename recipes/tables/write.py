"""Write recipes/conf/recipe/, and the published figures for zoo-models, from the tables in this folder: `make recipes`.

A table has `bases`, which are named settings, and `recipes`, whose names are paths below recipes/conf/recipe/. With
`rows`, each row makes a recipe, and its name replaces the * in the recipe's name, title, model and pretrained. A base,
a recipe and a row may have these keys:

base        bases that it starts from, in any table (a row's replace the recipe's); later settings win
options     configuration groups with the option to choose, such as {data: coco}
title, paper, source, note
            for the head comment; {name}, {method}, {epochs} and {updates} in a title are filled in
model       a timm name; if missing, the longest of `names` that the recipe's name ends in
drop_path   model_kwargs.drop_path_rate
top1, box_ap, mask_ap, pq, miou, miou_multi_scale
            published figures
published   where these were published
remark      a sentence that follows the figures
command     arguments of the command, besides recipe= and data.root=
evaluation  arguments of zoo-eval that give miou_multi_scale, besides eval.tta=multi_scale
run_folder  true if the command names the run folder, because another recipe starts from the weights in it
data, augment, optim, ...
            settings as in recipes/config.py; a comment after a setting is copied with it

`paper` and `published` at the top of a table apply to all of its recipes; `names` are the usual names of the models.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf

from zoo.messages import published_figures
from zoo.recipes import cli, config

TABLES = Path(__file__).parent
RECIPES = TABLES.parent / "conf" / "recipe"
PUBLISHED = TABLES.parents[1] / "checkpoints" / "recipes.json"  # for zoo-models, since tools do not import recipes
COMMON = "common"  # a base in this table names the source of all its settings
WIDTH = 120

FIGURES = tuple(item.name for item in dataclasses.fields(config.PublishedConfig) if item.type == "float | None")
WORDS = ("title", "paper", "source", "note", "model", "pretrained", "drop_path", *FIGURES, "published", "remark")
WORDS += ("command", "evaluation", "run_folder", "options", "base", "table", "rows")
SECTIONS = ("model_kwargs", "data", "augment", "optim", "schedule", "trainer", "exits", "dense", "eval", "mm")
# An option's settings in these sections are written out, so an option on the command line does not change them.
WRITTEN_OUT = ("schedule", "trainer", "dense")
METHODS = {
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
    "dino": "DINO",
    "mask2former": "Mask2Former",
    "upernet": "UPerNet",
    "semantic_fpn": "Semantic FPN",
}
SYNCHRONISED = ("cascade_mask_rcnn", "upernet", "semantic_fpn")  # their heads have batch norms over all GPUs
ROOTS = {
    "imagenet": "/data/imagenet",
    "coco": "/data/coco",
    "ade20k": "/data/ade",
    "cityscapes": "/data/cityscapes",
    "coco_stuff": "/data/coco_stuff",
    "coco_panoptic": "/data/coco",
    "ade20k_panoptic": "/data/ade",
    "ade20k_instance": "/data/ade",
    "cityscapes_panoptic": "/data/cityscapes",
}

Entry = dict[str, Any]  # a base, a recipe, a row or a part of one, as in its table
Settings = dict[tuple[str, ...], str]  # ("optim", "lr") -> "1.0e-3"


class Setting(str):
    """A value as its table spells it, and the comment after it."""

    comment = ""


def main() -> None:
    """Write the recipes that differ from their tables, and delete those that no table has."""
    wanted = recipes()
    for name in written() - wanted.keys():
        (RECIPES / f"{name}.yaml").unlink()
        print(f"deleted {name}")
    for name, text in wanted.items():
        path = RECIPES / f"{name}.yaml"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    PUBLISHED.write_text(published(wanted), encoding="utf-8")


def published(texts: dict[str, str]) -> str:
    """The text of recipes.json: the models and published figures of the recipes, by their names."""
    found = {name: yaml.safe_load(text).get("published") for name, text in sorted(texts.items())}
    return json.dumps({name: figures for name, figures in found.items() if figures}, indent=1) + "\n"


def written() -> set[str]:
    """The names of the recipes on disk."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}


def recipes() -> dict[str, str]:
    """The text of every recipe by its name."""
    tables = {path.stem: read(path) for path in sorted(TABLES.glob("*.yaml"))}
    bases = {name: base | {"table": table} for table in tables for name, base in tables[table].get("bases", {}).items()}
    found = {}
    for table, content in tables.items():
        shared = {key: content[key] for key in ("paper", "published") if key in content}
        for pattern, entry in content["recipes"].items():
            for row, own in entry.get("rows", {"": {}}).items():
                started = _ancestors(own if "base" in own else entry, bases)
                name = pattern.replace("*", row)
                found[name] = recipe(name, row, table, [shared, *started, entry, own], content.get("names", {}))
    return found


def read(path: Path) -> Entry:
    """A table: nested dictionaries with a `Setting` at each leaf."""
    text = path.read_text(encoding="utf-8")
    return _plain(yaml.compose(text, Loader=yaml.SafeLoader), text)


def _plain(node: yaml.Node, text: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value, text) for key, value in node.value}
    prose = isinstance(node, yaml.ScalarNode) and node.style  # quoted or folded
    setting = Setting(node.value if prose else text[node.start_mark.index : node.end_mark.index])
    behind = text[node.end_mark.index :].partition("\n")[0].lstrip(" }")
    if behind.startswith("# ") and not prose:
        setting.comment = behind
    return setting


def _ancestors(entry: Entry, bases: dict[str, Entry]) -> list[Entry]:
    """The bases that an entry starts from, each after its own bases."""
    names = entry["base"].strip("[]").split(", ") if "base" in entry else []
    return [layer for name in names for layer in (*_ancestors(bases[name], bases), bases[name])]


def recipe(name: str, row: str, table: str, layers: list[Entry], names: dict[str, str]) -> str:
    """The text of a recipe.

    Args:
        name: Such as coco/mask_rcnn_van_b2.
        row: The name that replaces a *.
        table: The table that has the recipe.
        layers: Bases, the recipe and the row; later ones win.
        names: The usual names of the models.
    """
    words, options, own = _combined(name, layers)
    for key in {"title", "model", "pretrained"} & words.keys():
        words[key] = type(words[key])(words[key].replace("*", row))
    if "model" not in words:
        words["model"] = max((model for model in names if name.endswith(model)), key=len)
    if "drop_path" in words:
        own["model_kwargs", "drop_path_rate"] = words["drop_path"]
    figures = {key: words[key] for key in FIGURES if key in words}
    if figures:
        published = {"model": words["model"], **figures, "source": words["published"]}
        own |= {("published", key): value for key, value in published.items()}
    if "miou_multi_scale" in figures:
        # MMSegmentation's and, relative to the size, Mask2Former's; written out, because the figure depends on them.
        for key in (("eval", "scales"), ("eval", "flip")):
            own.setdefault(key, Setting(_spelt(_keys()[key])))

    chosen, given = _of_options(tuple(options.items()))
    method = ("dense", "method")  # that of dense=..., which another option changes
    settings = {key: given[key] for key in given if key[0] in WRITTEN_OUT and key != method} | own
    title = words["title"].format(
        name=names.get(words["model"].partition(".")[0]),
        method=METHODS.get(given.get(method)),
        epochs=int(settings.get(("trainer", "epochs"), 0)) + int(settings.get(("schedule", "cooldown_epochs"), 0)),
        updates=f"{int(settings.get(('dense', 'updates'), 0)):,}",
    )

    origin = f"# Written by `make recipes` from recipes/tables/{table}.yaml: edit that file."
    lines = ["# @package _global_", origin, "#", *_head(title, words, figures, layers), "#"]
    lines += _commands(name, words, settings, given.get(method))
    lines += ["defaults:", *(f"  - override /{group}: {option}" for group, option in options.items())]
    for section in ("data", "augment"):
        values = [f"{key[1]}:\xa0{value}" for key, value in given.items() if key[0] == section and key not in own]
        if values:
            lines += _comment(f"{section}={chosen[section]} sets {', '.join(values)}.")
    lines += ["", f"model: {words['model']}"]
    lines += [f"pretrained: {words['pretrained']}"] if "pretrained" in words else []
    return "\n".join([*lines, *_body(settings)]) + "\n"


def _combined(name: str, layers: list[Entry]) -> tuple[Entry, Entry, Settings]:
    """The words, options and settings of a recipe, from all of its layers."""
    words, options, settings = {}, {}, {}
    for layer in layers:
        if unknown := layer.keys() - {*WORDS, *SECTIONS}:
            raise SystemExit(
                f"{name} has the key {min(unknown)!r} in its table, which recipes/tables/write.py does not know."
            )
        words |= {key: layer[key] for key in WORDS if key in layer}
        options |= layer.get("options", {})
        settings |= _flat({section: layer[section] for section in SECTIONS if section in layer})
    return words, options, settings


def _flat(values: Entry, path: tuple[str, ...] = ()) -> Settings:
    if not isinstance(values, dict) or (path and not values):
        return {path: values}
    return {end: value for key, inner in values.items() for end, value in _flat(inner, (*path, key)).items()}


@cache
def _keys() -> dict[tuple[str, ...], Any]:
    """The keys of the schema, in its order, with their defaults."""
    return _flat(OmegaConf.to_container(OmegaConf.structured(config.Config)))


def _place(path: tuple[str, ...]) -> tuple[int, int]:
    """The sort key of a setting: its place in the schema; model_kwargs and mm keep the order of their table."""
    keys = list(_keys())
    sections = list(dict.fromkeys(key[0] for key in keys))
    return sections.index(path[0]), next((keys.index(path[:n]) for n in (3, 2, 1) if path[:n] in keys), 0)


@cache
def _of_options(options: tuple[tuple[str, str], ...]) -> tuple[dict[str, str], Settings]:
    """The option of every group, and the settings in which these options differ from the schema's defaults."""
    config.register()
    with hydra.initialize_config_dir(cli.CONF, version_base="1.3"):
        cfg = hydra.compose("config", [f"{group}={option}" for group, option in options], return_hydra_config=True)
    found = {key: OmegaConf.select(cfg, ".".join(key)) for key in _keys() if key[0] in SECTIONS}
    changed = {key: _spelt(value) for key, value in found.items() if value != _keys()[key]}
    return dict(cfg.hydra.runtime.choices), changed


def _spelt(value: Any) -> str:
    if OmegaConf.is_config(value):
        whole = all(float(number).is_integer() for number in value)
        value = [int(number) if whole else number for number in value]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _body(settings: Settings) -> Iterator[str]:
    """The lines of the settings, in sections."""
    before: tuple[str, ...] = ()
    for path in sorted(settings, key=_place):
        same = next((i for i, (key, other) in enumerate(zip(path, before, strict=False)) if key != other), len(before))
        yield from (f"{'  ' * i}{path[i]}:" for i in range(same, len(path) - 1))
        comment = getattr(settings[path], "comment", "")
        yield f"{'  ' * (len(path) - 1)}{path[-1]}: {settings[path]}  {comment}".rstrip()
        before = path


def _head(title: str, words: Entry, figures: Entry, layers: list[Entry]) -> Iterator[str]:
    """The head comment: the recipe, its expected figures, and the source of its settings."""
    yield from _comment(f"{title} ({words['paper']})." if "paper" in words else f"{title}.")
    if figures:
        told = published_figures({key: float(value) for key, value in figures.items()}, words["published"])
        yield from _comment(f"Expected: {told}; not run here. {words.get('remark', '')}")
    sources = []
    for layer in reversed(layers):
        sources += [layer["source"]] if "source" in layer else []
        if layer.get("table") == COMMON and sources:
            break
    yield from _comment(f"Source: {sources[0]}." + "".join(f" The rest: {source}." for source in sources[1:]))
    for layer in layers:
        yield from _comment(layer["note"]) if "note" in layer else ()


def _commands(name: str, words: Entry, settings: Settings, method: str | None) -> Iterator[str]:
    """The comment on how to run the recipe."""
    folder, _, short = name.partition("/")
    command = ["# Run: torchrun --nproc-per-node 8 -m zoo.recipes.train", f"recipe={name}"]
    command += [words["command"]] if "command" in words else []
    command += [f"run=runs/{short}"] if "run_folder" in words else []
    root = f"data.root={ROOTS[folder]}"
    one_line = " ".join([*command, root])
    yield from [one_line] if len(one_line) <= WIDTH else [f"{' '.join(command)} \\", f"#   {root}"]
    images = settings["trainer", "effective_batch_size"]
    hint = f"On fewer GPUs the same command accumulates gradients: an update stays at {images} images."
    if method in SYNCHRONISED:
        hint += " Its batch norms then see fewer images, those of one pass, which can cost accuracy."
    saves = settings.get(("trainer", "amp"), "none") == "none"
    yield from _comment(hint + (" trainer.amp=bf16 saves time." if saves else ""))
    if "miou_multi_scale" in words:
        further = words.get("evaluation", "")
        yield from _comment(f"Several scales: zoo-eval runs/<folder> eval.tta=multi_scale {further}")
    if "/" in words.get("pretrained", ""):
        instead = f"instead of {words['pretrained']}"
        yield from _comment(f"pretrained=<path> takes another run folder, or a checkpoint file, {instead}.")


def _comment(text: str) -> list[str]:
    """Lines of at most 120 characters; a no-break space stays a space."""
    wrap = textwrap.TextWrapper(WIDTH, "# ", "# ", break_on_hyphens=False, break_long_words=False)
    return [line.replace("\xa0", " ") for line in wrap.wrap(re.sub("[ \n]+", " ", text).strip())]


if __name__ == "__main__":
    main()
