"""zoo-models: list the models, their costs and published accuracies, and show how to use one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import zoo
from zoo import manifest
from zoo.messages import OptionError, UserError, did_you_mean, one_line, published_figures, size_text
from zoo.tools import cli

DESCRIPTION = """\
List the models of zoo and their published weights, or show everything about one model.

Parameters and multiply-adds are counted for a classifier with 1000 classes and an image of the size in the table.
Accuracies are those that the authors published; licences are those of the weights.

With --task, list the recipes for detection or segmentation, with the parameters and multiply-adds of the whole model
beside the published figures."""
EXAMPLES = """\
examples:
  zoo-models                                            all models
  zoo-models 'dinat*' --max-params 30M --sort top1      models with up to 30 million parameters, the best first
  zoo-models --min-top1 85 --licence mit apache-2.0 --sort macs
  zoo-models 'van*' --dense                             with published figures for detection and segmentation
  zoo-models 'van*' --task segment --sort macs           recipes with the costs of the whole segmentor
  zoo-models dinat_mini                                 everything about one model, with commands to copy
  zoo-models dinat_mini --layers                        its layers: outputs, parameters and multiply-adds
  zoo-models resnet50 --layers --freeze 2               those of a model of timm, and what trainer.freeze=2 trains"""

# Option of --sort -> field of a row, and whether the largest comes first.
SORTS = {
    "name": ("name", False),
    "params": ("parameters", False),
    "macs": ("multiply_adds", False),
    "top1": ("top1", True),
    "input": ("input_size", False),
}
DENSE_SORTS = {
    "name": ("recipe", False),
    "params": ("parameters", False),
    "macs": ("multiply_adds", False),
    "input": ("size", False),
    "score": ("score", True),
}
# The published figures of each task with their titles; the first that a recipe has is its score.
FIGURES = {
    "panoptic": {"pq": "PQ", "mask_ap": "mask AP", "miou": "mIoU"},
    "detect": {"box_ap": "box AP", "mask_ap": "mask AP"},
    "segment": {"miou": "mIoU", "miou_multi_scale": "several scales"},
}
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print."""
    options = parser().parse_args(arguments)
    with cli.friendly_errors("zoo-models"):
        _check_layers(options)
        entries = _entries()
        names = options.names[0] if options.layers else _chosen(options, entries)
        if options.layers:
            with cli.progress(f"zoo-models: counting {names}"):
                report = layers(names, options.size, options.freeze)
            show = _print_layers
        elif options.task:
            report = _dense_rows(options, [entry for entry in entries if entry["name"] in names])
            show = _print_dense_table
        elif isinstance(names, str):
            with cli.progress(f"zoo-models: loading {names}"):
                report = about(names)
            show = _print_one
        else:
            report = _rows(options, [entry for entry in entries if entry["name"] in names])
            show = _print_table
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            show(report, options)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="zoo-models", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a model, or patterns such as 'van*' or '*.in22k'")
    add("--family", nargs="+", metavar="NAME", help="show these families only")
    add("--max-params", type=_number, metavar="N", help="largest number of parameters, such as 30M")
    add("--max-macs", type=_number, metavar="N", help="largest number of multiply-adds, such as 4.5G")
    add("--min-top1", type=float, metavar="PERCENT", help="smallest published top-1 accuracy on ImageNet-1k")
    add("--licence", nargs="+", metavar="NAME", help="licences of the weights, such as mit")
    add(
        "--sort",
        choices=[*SORTS, "score"],
        default="name",
        help="order of the rows (name); top1, and score with --task, put the highest first, the others the lowest",
    )
    dense = parser.add_mutually_exclusive_group()
    dense.add_argument(
        "--dense", action="store_true", help="add the published figures of recipes for detection and segmentation"
    )
    dense.add_argument("--task", choices=FIGURES, help="list recipes for this task, with the costs of the whole model")
    add("--json", action="store_true", help="print the results as JSON")
    add("--layers", action="store_true", help="list the layers of one model, the zoo's or timm's, with their costs")
    add("--size", type=cli.count, nargs=2, metavar=("H", "W"), help="size of the image for --layers, in pixels")
    add("--freeze", metavar="WHAT", help="with --layers, count what trainer.freeze=WHAT trains: stages, or backbone")
    return parser


def _check_layers(options: argparse.Namespace) -> None:
    """Raise OptionError if --layers is not given one model, or its options are given without it."""
    if options.layers and len(options.names) != 1:
        raise OptionError("--layers needs the name of one model: zoo-models van_b0 --layers.")
    for name in ("size", "freeze"):
        if getattr(options, name) and not options.layers:
            raise OptionError(f"--{name} needs --layers: zoo-models van_b0 --layers --{name} ...")
    if options.freeze and not re.fullmatch("backbone|[0-9]{1,3}", options.freeze):
        raise OptionError(f"got --freeze {options.freeze}: give a number of stages, or backbone (all but the head).")


def _number(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGB]?)", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number such as 30M or 4.5G")
    return float(found[1]) * UNITS[found[2].upper()]


def _entries() -> list[dict[str, Any]]:
    """The entries of the manifest, each with `name` (model.tag) and `family`, followed by the test models."""
    known = [
        {"name": f"{entry['model']}.{entry['tag']}", "family": family, **entry}
        for family in zoo.FAMILIES
        for entry in manifest.manifest(family)
    ]
    tests = [(name, count["family"]) for name, count in manifest.counts().items() if "." not in name]
    return known + [{"name": name, "family": family, "model": name, "tag": None} for name, family in tests]


def _chosen(options: argparse.Namespace, entries: list[dict[str, Any]]) -> str | list[str]:
    """The names that match the patterns, or the one model that is named in full.

    Raises:
        UserError: Nothing matches a pattern.
    """
    names, models = [entry["name"] for entry in entries], {entry["model"] for entry in entries}
    if len(options.names) == 1 and options.names[0] in {*names, *models} and not options.task:
        return options.names[0]
    families = sorted({entry["family"] for entry in entries})
    for family in options.family or ():
        if family not in families:
            raise UserError(f"there is no family {family!r}: there are {', '.join(families)}.")
    chosen: list[str] = []
    for pattern in options.names:
        # test models are listed only if the pattern asks for them
        found = [
            entry["name"]
            for entry in entries
            if (fnmatchcase(entry["name"], pattern) or fnmatchcase(entry["model"], pattern))
            and (entry["tag"] or pattern.startswith("test"))
        ]
        if not found:
            known = [*models, *names] if "." in pattern else models
            hint = did_you_mean(pattern.strip("*"), sorted(known), count=3) or f"families are {', '.join(families)}."
            raise UserError(f"there is no model {pattern!r}: {hint}")
        chosen += found
    chosen = chosen if options.names else [entry["name"] for entry in entries if entry["tag"]]
    return [e["name"] for e in entries if e["name"] in chosen and e["family"] in (options.family or families)]


def _rows(options: argparse.Namespace, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table that pass the filters, sorted.

    Raises:
        UserError: No row passes.
    """
    licences = sorted({entry["licence"] for entry in entries if "licence" in entry})
    rows = _cheap_enough(options, [_row(entry) for entry in _licensed(options, entries)])
    if not rows:
        raise UserError(f"no model passes all of these filters; licences among those named are {', '.join(licences)}.")
    return _sorted(options, rows, SORTS)


def _licensed(options: argparse.Namespace, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that pass the filters of the weights."""
    return [
        entry
        for entry in entries
        if (not options.licence or entry.get("licence") in options.licence)
        and (options.min_top1 is None or entry.get("top1", {}).get("value", 0) >= options.min_top1)
    ]


def _cheap_enough(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that pass the filters of the costs; those that are not counted pass none."""
    limits = {"parameters": options.max_params, "multiply_adds": options.max_macs}
    return [
        row
        for row in rows
        if all(limit is None or (row[key] is not None and row[key] <= limit) for key, limit in limits.items())
    ]


def _sorted(
    options: argparse.Namespace, rows: list[dict[str, Any]], sorts: dict[str, tuple[str, bool]]
) -> list[dict[str, Any]]:
    """The rows in the order of `--sort`, those without the figure last.

    Raises:
        OptionError: These rows have no such figure.
    """
    if options.sort not in sorts:
        what = f"with --task {options.task}" if options.task else "without --task"
        raise OptionError(f"got --sort {options.sort}: {what}, the rows can be sorted by {', '.join(sorts)}.")
    field, falling = sorts[options.sort]
    have = [row for row in rows if row[field] is not None]
    have.sort(key=lambda row: row[field], reverse=falling)
    return have + [row for row in rows if row[field] is None]


def _dense_rows(options: argparse.Namespace, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recipes for `options.task` that start from these weights and pass the filters, sorted.

    Raises:
        UserError: There is none.
        OptionError: They can't be sorted like this.
    """
    figures, rows = FIGURES[options.task], []
    for entry in _licensed(options, entries):
        for recipe in (recipe for recipe in recipes() if _is_for(recipe, entry)):
            if _task(recipe) == options.task:
                found = [recipe[key] for key in figures if key in recipe]
                count = manifest.dense_counts().get(recipe["recipe"], {})
                counted = {key: count.get(key) for key in ("method", "parameters", "multiply_adds", "size")}
                rows.append({**recipe, "task": options.task, "weights": entry["name"], **counted, "score": found[0]})
    rows = _cheap_enough(options, rows)
    if not rows:
        raise UserError(
            f"no recipe for task={options.task} is for one of these models and passes all filters: "
            f"zoo-models --task {options.task} lists all."
        )
    return _sorted(options, rows, DENSE_SORTS)


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """The row of a model with the weights of a tag, as in the JSON output."""
    count, top1 = manifest.counts()[entry["name"]], entry.get("top1", {})
    return {
        "name": entry["name"],
        "model": entry["model"],
        "tag": entry["tag"],
        "family": entry["family"],
        "parameters": count["parameters"],
        "multiply_adds": count["multiply_adds"],
        "input_size": count["input_size"][1:],
        "top1": top1.get("value"),
        "top1_source": top1.get("source"),
        "licence": entry.get("licence"),
        "licence_note": entry.get("licence_note"),
        "url": entry.get("url"),
        "dataset": entry.get("dataset"),
        "weights_classes": entry.get("num_classes"),
        "note": entry.get("note"),
        "dense": [recipe for recipe in recipes() if recipe["task"] != "imagenet" and _is_for(recipe, entry)],
    }


def _is_for(recipe: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether a recipe starts from these weights. Without a tag, it starts from the first weights of the model."""
    model, _, tag = recipe["model"].partition(".")
    first = next((other["tag"] for other in manifest.manifest(entry["family"]) if other["model"] == model), None)
    return model == entry["model"] and (tag or first) == entry["tag"]


@cache
def recipes() -> tuple[dict[str, Any], ...]:
    """The recipes with published figures: `recipe`, `task`, `model`, `source`, the figures, and `expected` in words."""
    found = []
    for name, published in manifest.recipes().items():
        figures = {key: value for key, value in published.items() if key not in ("model", "source")}
        words = {"expected": published_figures(figures, published["source"]), "source": published["source"]}
        recipe = {"recipe": name, "task": name.partition("/")[0], "model": published["model"]}
        found.append(recipe | words | figures)
    return tuple(found)


def about(name: str) -> dict[str, Any]:
    """Everything about the model `name`, with or without tag."""
    import timm

    entries = [entry for entry in _entries() if entry["model"] == name.partition(".")[0]]
    rows = [_row(entry) for entry in entries]
    first = next((row for row in rows if row["name"] == name), rows[0])
    entry = next(entry for entry in entries if entry["name"] == first["name"])
    model = timm.create_model(first["name"], device="meta", num_classes=1000)
    cfg = model.pretrained_cfg
    return {
        **{key: first[key] for key in ("name", "model", "tag", "family", "parameters", "multiply_adds", "input_size")},
        "summary": (timm.model_entrypoint(first["model"]).__doc__ or "").strip(),
        "paper": entry.get("paper_name"),
        "paper_id": entry.get("paper_ids"),
        "origin": entry.get("origin_url"),
        "preprocessing": {key: cfg[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")},
        "features": [{"channels": info["num_chs"], "stride": info["reduction"]} for info in model.feature_info],
        "weights": [row for row in rows if row["tag"]],
        "recipes": [recipe for recipe in recipes() if recipe["model"].partition(".")[0] == first["model"]],
        "python": _python(first),
        "commands": _commands(first),
    }


def layers(name: str, size: Sequence[int] | None = None, freeze: str | None = None) -> dict[str, Any]:
    """The layers of the model `name`, the zoo's or timm's, as a classifier with 1000 classes.

    Args:
        name: The model, with or without tag.
        size: Height and width of the image; those that the model expects if None.
        freeze: What is frozen, as `trainer.freeze` of zoo-train takes it.

    Raises:
        UserError: There is no such model, it can't be counted with this size, or it has no such stages.
    """
    import timm
    import torch

    from zoo import costs, freezing
    from zoo.opening import check_name, takes_one_size

    check_name(name)
    given = {"img_size": tuple(size)} if size and takes_one_size(name) else {}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=1000, **given)
        channels, *usual = model.pretrained_cfg["input_size"]
        frozen = freezing.freeze(model, name, freeze, "--freeze ") if freeze else None
        found = costs.layers(model, (channels, *(size or usual)))
    except UserError:
        raise
    except Exception as error:  # a model of timm may do anything on the meta device
        where = f" for images of {size_text(size)} pixels" if size else ""
        raise UserError(f"the layers of {name} can't be counted{where}: {one_line(error, 300)}.") from error
    return {
        "name": name,
        "input_size": [channels, *(size or usual)],
        "frozen": frozen,
        "layers": [dataclasses.asdict(layer) for layer in found],
        **{key: sum(getattr(layer, key) for layer in found) for key in ("parameters", "trained", "multiply_adds")},
    }


def _python(row: dict[str, Any]) -> list[str]:
    weights = ", pretrained=True" if row["url"] else ""
    lines = ["import timm, torch, zoo", "image = torch.rand(1, 3, {}, {})".format(*row["input_size"])]
    if row["weights_classes"] != 0:
        lines += [f'model = timm.create_model("{row["name"]}"{weights}).eval()', "model(image).softmax(-1)"]
    lines += [
        f'backbone = timm.create_model("{row["name"]}"{weights}, features_only=True).eval()',
        "[feature.shape for feature in backbone(image)]",
    ]
    return lines


def _commands(row: dict[str, Any]) -> list[str]:
    weights = " pretrained=true" if row["url"] else ""
    commands = [f"zoo-train model={row['name']}{weights} data=imagefolder data.root=FOLDER"]
    commands += [
        f"zoo-train recipe={recipe['recipe']} data.root=FOLDER"
        for recipe in recipes()
        if recipe["model"].partition(".")[0] == row["model"]
    ]
    if row["url"] and row["weights_classes"] == 1000:
        commands.append(f"zoo-eval model={row['name']} pretrained=true data=imagefolder data.root=FOLDER")
    return commands


def _task(recipe: dict[str, Any]) -> str | None:
    """The task of a recipe by its published figures; None for ImageNet's."""
    if "pq" in recipe:
        return "panoptic"
    if recipe.keys() & {"box_ap", "mask_ap"}:
        return "detect"
    return "segment" if recipe.keys() & FIGURES["segment"].keys() else None


def _print_dense_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    figures = FIGURES[options.task]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("recipe", "weights"):
        table.add_column(column, no_wrap=True)
    for column in ("params (M)", "mult-adds (G)", "size", *figures.values()):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("figures of", overflow="fold")
    for row in rows:
        counted = ("", "", "")
        if row["parameters"]:
            counted = (f"{row['parameters'] / 1e6:.1f}", f"{row['multiply_adds'] / 1e9:.0f}", size_text(row["size"]))
        scores = (f"{row[key]:.1f}" if row.get(key) else "" for key in figures)
        table.add_row(row["recipe"], row["weights"], *counted, *scores, row["source"])
    console = cli.console()
    console.print(table)
    console.print(
        "Parameters and multiply-adds are those of the whole model for an image of this height and width.",
        markup=False,
    )


def _print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    console = cli.console()
    sources = {source: chr(ord("a") + i) for i, source in enumerate(_unique(row["top1_source"] for row in rows))}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in ("params (M)", "mult-adds (G)", "input", "top-1 (%)"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("weights from", "licence"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['multiply_adds'] / 1e9:.2f}",
            size_text(row["input_size"]),
            f"{row['top1']:.1f} {sources[row['top1_source']]}" if row["top1"] else "",
            _host(row),
            row["licence"] or "",
        )
    console.print(table)
    for source, letter in sources.items():
        console.print(f"{letter}  {source}", markup=False)
    if any(row["weights_classes"] == 0 for row in rows):
        console.print("f  the file has no classifier")
    if any(row["note"] for row in rows):
        console.print("*  read its note first: zoo-models NAME")
    if options.dense:
        _print_dense(rows)


def _print_dense(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "recipe"):
        table.add_column(column, no_wrap=True)
    for column in ("box AP", "mask AP", "PQ", "mIoU", "several scales"):
        table.add_column(column, justify="right")
    table.add_column("figures of")
    table.title, table.title_justify = "detection and segmentation, as published", "left"
    for row in rows:
        for recipe in row["dense"]:
            figures = (recipe.get(key) for key in ("box_ap", "mask_ap", "pq", "miou", "miou_multi_scale"))
            table.add_row(row["name"], recipe["recipe"], *(f"{x:.1f}" if x else "" for x in figures), recipe["source"])
    cli.console().print(table if table.row_count else "No recipe for detection or segmentation is for one of these.")


def _print_layers(report: dict[str, Any], options: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    console = cli.console()
    size = size_text(report["input_size"])
    console.print(f"{report['name']}: an image of {size}, 1000 classes", style="bold", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "kind"):
        table.add_column(column, no_wrap=True)
    trained = ("trained",) if report["frozen"] else ()
    for column in ("output", "parameters", "share", *trained, "mult-adds (M)", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*report["layers"], {**report, "name": "all", "kind": "", "output": None}]:
        parameters, macs = row["parameters"], row["multiply_adds"]
        shares = [
            f"{100 * part / max(report[key], 1):.1f} %"
            for key, part in (("parameters", parameters), ("multiply_adds", macs))
        ]
        table.add_row(
            row["name"] or "(others)",
            row["kind"],
            size_text(row["output"] or ()),
            f"{parameters:,}",
            shares[0],
            *(f"{100 * row['trained'] / parameters if parameters else 0:.0f} %" for _ in trained),
            f"{macs / 1e6:,.1f}",
            shares[1],
        )
    console.print(table)
    if report["frozen"]:
        console.print(
            f"Frozen: {report['frozen']}. The column says which share of the parameters is trained.", markup=False
        )


def _print_one(report: dict[str, Any], options: argparse.Namespace) -> None:
    console = cli.console()
    console.print(f"{report['model']}: {report['summary']}", style="bold", markup=False)
    shown = report["preprocessing"]
    features = ", ".join(f"{f['channels']} at stride {f['stride']}" for f in report["features"])
    rows = {
        "family": report["family"],
        "paper": report["paper"] and f"{report['paper']}, {report['paper_id']}",
        "origin": report["origin"],
        "parameters": f"{report['parameters'] / 1e6:.2f} M, with a classifier of 1000 classes",
        "mult-adds": f"{report['multiply_adds'] / 1e9:.2f} G at {size_text(report['input_size'])}",
        "features": features,
        "images": f"{size_text(report['input_size'])}, crop {shown['crop_pct']} ({shown['crop_mode']}), "
        f"{shown['interpolation']}, mean {tuple(shown['mean'])}, std {tuple(shown['std'])}",
    }
    for label, text in rows.items():
        if text:
            console.print(f"  {label:<12}{text}", markup=False)
    for row in report["weights"]:
        console.print(f"\nweights {row['name']}", style="bold", markup=False)
        classes = f"{row['weights_classes']} classes" if row["weights_classes"] else "no classifier"
        facts = {
            "trained on": f"{row['dataset']}, {classes}, {size_text(row['input_size'])}",
            "top-1": row["top1"] and f"{row['top1']} % ({row['top1_source']})",
            "licence": " ".join(filter(None, (row["licence"], row["licence_note"]))),
            "from": row["url"] or "not published",
            "note": row["note"],
        }
        for label, text in facts.items():
            if text:
                console.print(f"  {label:<12}{text}", markup=False)
    if report["recipes"]:
        console.print("\nrecipes with their published figures", style="bold")
        width = max(len(recipe["recipe"]) for recipe in report["recipes"])
        for recipe in report["recipes"]:
            console.print(f"  {recipe['recipe']:<{width}}  {recipe['expected']}", markup=False)
    console.print("\npython", style="bold")
    console.print(*(f"  {line}" for line in report["python"]), sep="\n", markup=False)
    console.print("\ncommands", style="bold")
    console.print(*(f"  {line}" for line in report["commands"]), sep="\n", markup=False)


def _host(row: dict[str, Any]) -> str:
    """The host that the weights are downloaded from, with marks for the footnotes."""
    if not row["url"]:
        return ""
    return urlsplit(row["url"]).hostname + " f" * (row["weights_classes"] == 0) + " *" * bool(row["note"])


def _unique(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(filter(None, values)))


if __name__ == "__main__":
    main()
