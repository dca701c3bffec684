"""The tables of the documents that are written from the manifest, the recipes and the code: `make tables` writes them.

A table stands between `<!-- name -->` and `<!-- end -->`.
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import zoo
from zoo import families, manifest
from zoo.messages import size_text
from zoo.tools import models

from .pages import ROOT

INDEX = ROOT / "docs" / "families" / "index.md"
README = ROOT / "README.md"
OPERATORS = ROOT / "docs" / "operators.md"
KERNELS = ROOT / "docs" / "results"
RESULTS = ROOT / "docs" / "results" / "models-cpu.json"  # `make speed` writes it
COMPILED = [RESULTS.with_name(f"compiled{training}-cpu.json") for training in ("", "-training")]  # by `make compiled`
PROBES = RESULTS.with_name("probes.json")  # `make probes` writes it
PROBE_PAGE = ROOT / "docs" / "guides" / "probes.md"
SIZES = "sizes-cpu-{}.json"  # in docs/results, by the side of the images: `make sizes` writes them


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
    readme = False  # whether a figure is from there
    order = _sizes(family)
    for row in sorted((row for row in rows() if row["family"] == family), key=lambda row: order.index(row["model"])):
        top1 = "" if row["top1"] is None else f"{row['top1']} %"
        if top1 and row["top1_source"] == "README of the origin":
            readme = True
        elif top1:
            if row["top1_source"] not in sources:
                sources.append(row["top1_source"])
            top1 += f" ({sources.index(row['top1_source']) + 1})"
        height, width = row["input_size"]
        yield (
            f"| `{row['name']}` | {row['parameters'] / 1e6:.1f} M | {row['multiply_adds'] / 1e9:.2f} G "
            f"| {height}x{width} | {top1} | {row['dataset']} |"
        )
    notes = [f"({number}) {source.rstrip('.')}." for number, source in enumerate(sources, 1)]
    if readme:
        notes.insert(0, "Accuracies are those of the authors' README.")
    elif sources:
        notes.insert(0, "Sources of the accuracies:")
    if notes:
        yield "\n" + " ".join(notes)


def recipes(family: str) -> Iterator[str]:
    """The recipes of a family, for its page."""
    names = {row["model"] for row in rows() if row["family"] == family}
    found = [(recipe["model"].partition(".")[0], recipe) for recipe in models.recipes()]
    order = _sizes(family)

    def place(item: tuple[str, dict]) -> tuple[str, int]:
        """Sort by task and method, then by size. Recipes that are not named after their model come last."""
        model, recipe = item
        return recipe["recipe"].partition(model)[0], order.index(model)

    ours = sorted((item for item in found if item[0] in names), key=place)
    if ours:  # a recipe without published figures is named in the text
        yield "| recipe | published |"
        yield "|---|---|"
    for _, recipe in ours:
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


def results() -> dict:
    """What zoo-bench models measured."""
    return json.loads(RESULTS.read_text())


def size_results() -> list[dict]:
    """What zoo-bench models measured for images of each size, from small to large."""
    found = [json.loads(path.read_text()) for path in RESULTS.parent.glob(SIZES.format("*"))]
    return sorted(found, key=lambda one: one["settings"]["size"])


def speed(results: dict) -> Iterator[str]:
    """The examples of the families with their measured times, and timm's own models, for the README."""
    modes, found = _modes(results)
    yield f"| family | model | parameters | top-1 | {' | '.join(modes)} |"
    yield "|---" * (4 + len(modes)) + "|"
    against = results["settings"]["against"]

    def line(title: str, name: str, shown: str) -> str:
        entry = found[name, modes[0]]
        cells = [f"{entry['parameters'] / 1e6:.1f} M", f"{entry['top1']} %" if entry["top1"] else ""]
        figures = (found.get((name, mode), {}) for mode in modes)
        cells += [_passes(each, lambda measured: f"{measured['ratio']['median']:.2f}") for each in figures]
        return f"| {f'{title} ' if title else ''}| {shown} | {' | '.join(cells)} |"

    missing = [name for family in zoo.FAMILIES for name in manifest.examples(family) if (name, modes[0]) not in found]
    for family in zoo.FAMILIES:
        about = manifest.about(family)
        title = ", ".join(f"[{name}](https://arxiv.org/abs/{paper})" for name, paper in about["names"].items())
        for name in (name for name in about["examples"] if name not in missing):
            yield line(title, name, f"`{name}`")
            title = ""
            if peer := found[name, modes[0]]["timm"]:
                yield line("", peer, f"timm's `{peer}`")
    yield line("[Swin](https://arxiv.org/abs/2103.14030)", against, f"timm's `{against}`")
    machine, settings = results["machine"], results["settings"]
    kinds = [what for what in ("inference", "training") if what in found[against, modes[0]]]
    command = re.sub(r" --(json|picture) \S+", "", results["command"])
    turns = (f"{len(found[against, modes[0]][what]['times_s'])} for {what}" for what in kinds)
    sentences = [
        f"Times of {' / '.join(kinds)}, in units of those of timm's `{against}` in {modes[0]}; lower is faster.",
        *(["bfloat16 is by autocast."] if "bfloat16" in modes else []),
        f"They are medians (turns: {', '.join(turns)}) of `{command}`",
        f"for {_count(settings['batch_size'], 'image')} of {size_text(settings['size'])} with {_cores(machine)},",
        f"torch {machine['torch'].partition('+')[0]} and timm {machine['timm']}.",
        *([f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}."] if missing else []),
    ]
    yield from ["", *_wrapped(" ".join(sentences))]


def shares(results: dict) -> Iterator[str]:
    """How near the models come to the rate of a matrix product on the machine that was measured, for the README."""
    modes, found = _modes(results)
    yield f"| model | {' | '.join(modes)} |"
    yield "|---" * (1 + len(modes)) + "|"
    for name in dict.fromkeys(name for name, _ in found):
        shown = f"`{name}`" if found[name, modes[0]]["ours"] else f"timm's `{name}`"
        figures = (found.get((name, mode), {}) for mode in modes)
        cells = (_passes(each, lambda measured: f"{measured['matmul_share']['median']:.0%}") for each in figures)
        yield f"| {shown} | {' | '.join(cells)} |"
    product = results["matmul"]["inference"]
    rates = " and ".join(f"{one['flops_per_s'] / 1e9:,.0f} GFLOP/s in {one['dtype']}" for one in product)
    kinds = [what for what in ("inference", "training") if what in found[results["settings"]["against"], modes[0]]]
    yield from [
        "",
        *_wrapped(
            f"Operations per second of {' / '.join(kinds)}, as shares of those of a linear layer of "
            f"{product[0]['features']} features in the same dtype, which reached {rates} with "
            f"{_cores(results['machine'])}. The operations are the multiply-adds of `zoo-models`; those of a training "
            "step are three times as many."
        ),
    ]


def compiled(results: list[dict]) -> Iterator[str]:
    """The times of compiled models in units of those of the same model in eager mode, for the README.

    Args:
        results: What zoo-bench models measured, a kind of pass each.
    """
    found, columns = {}, {}  # the figures by kind of pass, dtype and model; what each column holds
    for one in results:
        for entry in (entry for entry in one["models"] if entry["compiled"]):
            for what in (what for what in ("inference", "training") if what in entry):
                found[what, entry["dtype"], entry["name"]] = entry[what]
                for title, baseline in (("eager", "ratio_to_eager"), ("timm's compiled", "ratio_to_timm")):
                    columns[f"{what}, {entry['dtype']}, / {title}"] = (what, entry["dtype"], baseline)
    yield f"| model | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, ours in {entry["name"]: entry["ours"] for entry in results[0]["models"]}.items():
        cells = []
        for what, dtype, baseline in columns.values():
            figures = found.get((what, dtype, name), {"status": ""})
            cells.append(f"{figures[baseline]['median']:.2f}" if baseline in figures else "")
            if baseline == "ratio_to_eager" and figures["status"] != "timed":
                cells[-1] = figures["status"]
        whose = "" if ours else "timm's "
        yield f"| {whose}`{name}` | {' | '.join(cells)} |"
    machine, settings = results[0]["machine"], results[0]["settings"]
    counted = {what: len(figures["times_s"]) for (what, _, _), figures in found.items() if "times_s" in figures}
    turns = ", ".join(f"{number} for {what}" for what, number in counted.items())
    yield from [
        "",
        *_wrapped(
            "Times of models compiled by `torch.compile`, in units of those in eager mode and of those of timm's model "
            f"of the family, compiled, too; medians (turns: {turns}) for {_count(settings['batch_size'], 'image')} of "
            f"{size_text(settings['size'])} with {_cores(machine)}, torch {machine['torch'].partition('+')[0]} and "
            f"timm {machine['timm']}. `make compiled` measures them."
        ),
    ]


def sizes(results: list[dict]) -> Iterator[str]:
    """Time and memory of some models for images of each size, for the README."""
    found = [{each["name"]: each["inference"] for each in one["models"]} for one in results]
    yield f"| model | {' | '.join(size_text(one['settings']['size']) for one in results)} |"
    yield "|---" * (1 + len(results)) + "|"
    for entry in results[0]["models"]:
        cells = []
        for size in found:
            one = size.get(entry["name"], {"status": "failed"})
            timed = one["status"] == "timed"
            cells.append(f"{one['median_s']:.2f} s, {one['peak_bytes'] / 2**20:,.0f} MiB" if timed else one["status"])
        whose = "" if entry["ours"] else "timm's "
        yield f"| {whose}`{entry['name']}` | {' | '.join(cells)} |"
    machine, batch = results[0]["machine"], results[0]["settings"]["batch_size"]
    yield from [
        "",
        *_wrapped(
            f"Inference with {_count(batch, 'image')} in float32: the median time, and the most memory that a call "
            f"allocates besides weights and images. `make sizes` measured both with {_cores(machine)}, torch "
            f"{machine['torch'].partition('+')[0]} and timm {machine['timm']}."
        ),
    ]


def _modes(results: dict) -> tuple[list[str], dict[tuple[str, str], dict]]:
    """The modes that were measured, in words, and the entries of the results by model and mode."""
    found = {}
    for entry in results["models"]:
        cast, compiled = " cast" * entry["cast"], ", compiled" * entry["compiled"]
        found[entry["name"], f"{entry['dtype']}{cast}{compiled}"] = entry
    return list(dict.fromkeys(mode for _, mode in found)), found


def _passes(entry: dict, cell: Callable[[dict], str]) -> str:
    """A cell of inference / training, empty if the model did not run in this mode."""
    figures = (entry[what] for what in ("inference", "training") if what in entry)
    return " / ".join(cell(each) if each["status"] == "timed" else each["status"] for each in figures)


def _cores(machine: dict) -> str:
    return f"{_count(machine['threads'], 'thread')} of an {machine['cpu']}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def _wrapped(text: str) -> list[str]:
    """The lines of a paragraph; code is not broken."""
    text = re.sub("`.*?`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def digits() -> Iterator[str]:
    """The accuracy of the demo with each family's test model, for the README."""
    found = {
        model: figures["digits"]
        for family in zoo.FAMILIES
        for model, figures in manifest.about(family).get("measured", {}).items()
        if "digits" in figures
    }
    yield "| model | top-1 |"
    yield "|---|---|"
    yield from (f"| `{model}` | {accuracy} % |" for model, accuracy in found.items())


def instructions() -> Iterator[str]:
    """The counts of compiled kernels, next to what a GPU measured, for the page of the operators."""
    counted = json.loads((KERNELS / "kernels-static.json").read_text())
    folder = max(
        (path.parent for path in KERNELS.glob("*H100*/kernels-float16.json")), key=lambda path: path.name[-10:]
    )
    timed, counters = (json.loads((folder / f"{name}-float16.json").read_text()) for name in ("kernels", "counters"))
    passes = Counter((result["case"], kernel) for result in timed["results"] for kernel in result["kernels"])
    measured: dict[tuple[str, str], list[float]] = {}
    for result in timed["results"]:
        for kernel, times in result["kernels"].items():
            measured[result["case"], kernel] = [times["ms"] * times["launches"] * 1e3, 0.0]
    for launch in counters:
        key = launch["case"], launch["kernel"]
        if key in measured:  # some kernels run in both passes, and the counters do not tell which
            measured[key][1] += launch["warp_instructions"] / 1e6 / passes[key]
    yield "| case | kernel | step | instructions | registers | modelled | H100: instructions | H100 |"
    yield "|---|---|---|---|---|---|---|---|"
    earlier = False
    for found in counted["passes"]:
        title = f"{found['operator']} {found['case']}" if found["kind"] == "forward" else ""
        rows: dict[str, list[dict]] = {}
        for kernel in found["kernels"]:
            rows.setdefault(kernel["name"], []).append(kernel)
        for name, parts in rows.items():
            total, modelled = (sum(part[key] for part in parts) for key in ("warp_instructions", "modelled_us"))
            if total < 1e6:  # adds up a table
                continue
            time, executed = measured.get((f"{found['operator']}_attention/{found['case']}", name), (None, None))
            beside = f"{executed:.1f} M | {time:.0f} us" if executed and time else "|"
            earlier |= not executed or abs(total / 1e6 / executed - 1) > 0.05
            yield (
                f"| {title} | `{name}` | {parts[0]['step']} | {total / 1e6:.1f} M | {parts[0]['registers']} "
                f"| {modelled:.0f} us | {beside} |"
            )
            title = ""
    machine = timed["machine"]
    yield (
        f"\nfp16, batch {counted['passes'][0]['batch']}. Counted and modelled for {counted['passes'][0]['target']}, "
        f"compiled by Triton {counted['versions']['triton']}; measured on an {machine['gpu']} on "
        f"{folder.name[-10:]} with PyTorch {machine['torch']} and Triton {machine['triton']}, the "
        "instructions by Nsight Compute."
        + " Where the two counts differ or one is missing, the GPU ran an earlier version of the kernel."
        * earlier
    )


def probes(found: dict) -> Iterator[str]:
    """The probes of the small models' features, on classes that they have not seen, as `make probes` measured them."""
    yield "| model | trained on 0-4 | k-NN, random weights | k-NN | linear | efficient probing |"
    yield "|---|---|---|---|---|---|"
    for name, row in found["models"].items():
        scores = (row["trained_top1"], row["random"]["knn"], *(row["probes"][kind] for kind in ("knn", "linear", "ep")))
        yield f"| `{name}` | {' | '.join('' if score is None else f'{score:.1f} %' for score in scores)} |"


def tables() -> dict[tuple[Path, str], Callable[[], Iterator[str]]]:
    """What makes each table, by its document and its name."""
    found: dict[tuple[Path, str], Callable[[], Iterator[str]]] = {
        (INDEX, "families"): index,
        (README, "speed"): lambda: speed(results()),
        (README, "shares"): lambda: shares(results()),
        (README, "compiled"): lambda: compiled([json.loads(path.read_text()) for path in COMPILED]),
        (README, "sizes"): lambda: sizes(size_results()),
        (README, "digits"): digits,
        (OPERATORS, "instructions"): instructions,
        (PROBE_PAGE, "probes"): lambda: probes(json.loads(PROBES.read_text())),
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
