"""zoo-convert: an official checkpoint as a folder that timm loads: safetensors with its origin, and config.json."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.messages import UserError, did_you_mean, similar_path, size_text
from zoo.tools import cli

if TYPE_CHECKING:
    from torch import Tensor, nn

DESCRIPTION = """\
Recognise an official checkpoint of one of zoo's families, and write it as safetensors that timm loads.

The file may be of a classifier, a detector or a segmentor (its backbone is taken, its neck and heads are left out), of
torch or safetensors, in any of the usual wrappings. It is never unpickled. Every tensor has to fit: what is missing,
unexpected or of another shape is named, and nothing is written."""
EXAMPLES = """\
examples:
  zoo-convert van_tiny_754.pth.tar                  writes van_b0.in1k/model.safetensors and config.json
  zoo-convert mine.pth --model dinat_tiny -o mine   where the weights alone can't tell (here: from nat_tiny)
  zoo-convert upernet_nat_tiny.pth --json           the backbone of a segmentor; what was done as JSON

The folder is then a model: timm.create_model("local-dir:van_b0.in1k", pretrained=True)"""

PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass
class Converted:
    """A checkpoint as zoo's model.

    `name` has a tag where the file is a published one (`entry`, of the manifest, else None), or where the tag decides
    the model's shapes. `args` are those that `timm.create_model` needs beside the name; `left_out` counts the tensors
    of other parts.
    """

    name: str
    entry: Mapping[str, Any] | None
    model: nn.Module
    args: dict[str, Any]
    tensors: dict[str, Tensor]
    left_out: dict[str, int]
    sha256: str


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and convert."""
    options = parser().parse_args(arguments)
    with cli.friendly_errors("zoo-convert"):
        if options.out:
            _check_folder(options.out, options.force)
        with cli.progress(f"zoo-convert {options.file.name}") as say:
            found = convert(options.file, options.model, say)
            folder = options.out or Path(found.name)
            _check_folder(folder, options.force)
            say("writing")
            write(found, folder, options.file.name)
        report = describe(found, folder, options.file)
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            _print(report)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="zoo-convert", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the checkpoint")
    add("-o", "--out", type=Path, metavar="FOLDER", help="where to write (a folder named after the model)")
    add("--model", metavar="NAME", help="what the file is, such as van_b0 or dinat_large.in22k (recognised)")
    add("--force", action="store_true", help="replace what an earlier conversion wrote there")
    add("--json", action="store_true", help="print what was recognised and written as JSON")
    return parser


def convert(file: Path, model: str | None = None, say: Callable[[str], None] = lambda text: None) -> Converted:
    """The checkpoint in `file` as weights of `model`, a name with or without tag; recognised if None.

    Raises:
        UserError: the file can't be read, is not what its name says, or fits no model, or several.
    """
    name = _model_name(model) if model else None
    try:
        return _convert(file, name, model, say)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}{similar_path(file)}") from None
    except (RuntimeError, ValueError) as error:  # what is wrong with the checkpoint
        raise UserError(f"{file}: {error}") from error


def _convert(file: Path, name: str | None, model: str | None, say: Callable[[str], None]) -> Converted:
    say("reading")
    from zoo import checkpoints

    checkpoint = checkpoints.read(file)
    state_dict = checkpoints.unwrap(checkpoint)
    checkpoints.check_values(state_dict)
    say("checking its hash")
    with open(file, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    entry = _published(file, sha256)
    say("recognising the model")
    if name is None:
        names, share = checkpoints.closest_models(state_dict)
        if share < 0.1:
            raise UserError(
                f"{file} looks like no model of zoo (its tensors are called {checkpoints.first_names(state_dict)}): "
                "zoo-models lists those that it has."
            )
        if entry and entry["model"] in {name.partition(".")[0] for name in names}:
            names = [f"{entry['model']}.{entry['tag']}"]
        name = _only(file, names, checkpoint)
    variant, _, tag = name.partition(".")
    if model and tag:
        entry = next(e for e in _manifest() if (e["model"], e["tag"]) == (variant, tag))
    elif entry and entry["model"] == variant:
        name = f"{variant}.{entry['tag']}"
    else:
        entry = None
    built, args, tensors = _fit(name, checkpoint, known=entry is not None)
    left_out = Counter(
        checkpoints.first_names([key.removeprefix("module.").partition(".")[0]])
        for key in checkpoints.other_tensors(checkpoint)
    )
    return Converted(name, entry, built, args, tensors, dict(left_out), sha256)


def _model_name(name: str) -> str:
    """`name` as given, if zoo has it.

    Raises:
        UserError: it does not.
    """
    import timm

    import zoo

    names = [n for family in zoo.FAMILIES for n in timm.list_models(module=family)]
    tags = [n for family in zoo.FAMILIES for n in timm.list_models(module=family, pretrained=True)]
    if name not in names and name not in tags:
        hint = did_you_mean(name, tags if "." in name else names) or "zoo-models lists its models."
        raise UserError(f"there is no model {name!r} in zoo: {hint}")
    return name


def _manifest() -> list[dict[str, Any]]:
    import zoo
    from zoo import checkpoints

    return [entry for family in zoo.FAMILIES for entry in checkpoints.manifest(family)]


def _published(file: Path, sha256: str) -> dict[str, Any] | None:
    """The entry of the manifest that has this file's hash or, where no other has it too, its name.

    Raises:
        UserError: the file has the name of one with another hash.
    """
    entries = _manifest()
    found = [entry for entry in entries if entry.get("sha256") == sha256]
    found = found or [entry for entry in entries if entry["url"].rpartition("/")[2] == file.name]
    if len(found) != 1:
        return None
    recorded = found[0].get("sha256") or found[0].get("sha256_prefix", "")
    if not sha256.startswith(recorded):
        raise UserError(
            f"{file} is not the file that {found[0]['url']} published: its sha256 is {sha256[:8]}..., recorded is "
            f"{recorded[:8]}...; download it again, or rename it if it is another."
        )
    return found[0]


def _only(file: Path, names: list[str], checkpoint: Mapping[str, Any]) -> str:
    """The one of `names`, all of the same shapes, that the checkpoint is of.

    Raises:
        UserError: nothing tells which.
    """
    if len(names) > 1:
        trained = [checkpoint.get("arch"), getattr(checkpoint.get("args"), "model", None)]  # as timm's trainer has it
        names = [name for name in names if name in trained] or [name for name in names if _fits(name, checkpoint)]
    if len(names) != 1:
        choices = " or ".join(f"--model {name}" for name in names)
        raise UserError(f"{file} fits {' and '.join(names)} alike, as they differ in no tensor: say {choices}.")
    return names[0]


def _fits(name: str, checkpoint: Mapping[str, Any]) -> bool:
    try:
        _fit(name, checkpoint)
    except RuntimeError:
        return False
    return True


def _fit(
    name: str, checkpoint: Mapping[str, Any], known: bool = False
) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    """The model without memory, the arguments that make it, and its weights from the checkpoint.

    Raises:
        RuntimeError: they don't fit; says how.
    """
    import timm

    from zoo import checkpoints, families

    family = families.family_of(name)
    cfg = timm.get_pretrained_cfg(name)
    mapped = checkpoints.remap(checkpoints.unwrap(checkpoint), family.KEY_MAP)
    classifier = mapped.get(f"{cfg.classifier}.weight")
    args: dict[str, Any] = {"num_classes": 0 if classifier is None else classifier.shape[:1].numel()}
    norms = sorted({int(i) for key in mapped for i in re.findall(r"^output_norms\.(\d)\.", key)})
    if norms:  # a backbone for dense prediction, some of which have them on a part of the outputs
        args = {"num_classes": 0, "output_norm": True if len(norms) == 4 else norms}
    args |= families.tag_kwargs(name)  # a call with the tag finds them by itself, and config.json has to say them
    first = mapped.get(f"{cfg.first_conv}.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        args["in_chans"] = first.shape[1]
    overlay = {"num_classes": args["num_classes"]}
    if not known:  # whose weights these are is not known, so nothing is claimed
        overlay |= dict.fromkeys(("license", "origin_url", "description", "notes"))
    model = timm.create_model(name, device="meta", pretrained_cfg_overlay=overlay, **args)
    model.load_state_dict(family.checkpoint_filter_fn(checkpoint, model), assign=True)
    tensors = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
    return model, args, tensors


def _check_folder(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder with -o, which gets {WEIGHTS} and {CONFIG}.")
    there = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if there and not force:
        raise UserError(
            f"{folder} already holds {' and '.join(there)}: give another folder with -o, or replace them with --force."
        )


def write(found: Converted, folder: Path, source: str) -> None:
    """Write the weights and their description to `folder`, each complete or not at all.

    Raises:
        UserError: they can't be written.
    """
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf  # its public sibling, save_for_hf, also writes the weights

    facts = found.entry or {}
    preprocessing = {key: found.model.pretrained_cfg[key] for key in PREPROCESSING}
    metadata = {
        "format": "pt",
        "model": found.name,
        "source": source,
        "source_sha256": found.sha256,
        "licence": facts.get("licence", "unknown"),
        "preprocessing": json.dumps(preprocessing),
    }
    metadata |= {key: facts[key] for key in ("licence_note", "origin_url", "dataset") if key in facts}
    new = not folder.exists()
    temporary = {name: folder / f".{name}.tmp" for name in (WEIGHTS, CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(found.tensors, temporary[WEIGHTS], metadata)
        save_config_for_hf(found.model, str(temporary[CONFIG]))
        for name, path in temporary.items():
            path.replace(folder / name)
    except BaseException as error:
        with suppress(OSError):
            for path in temporary.values():
                path.unlink(missing_ok=True)
            if new:
                folder.rmdir()
        # safetensors has an error of its own for a full disk
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"could not write to {folder} ({reason}): mend that, or give another with -o.") from error
        raise


def describe(found: Converted, folder: Path, file: Path) -> dict[str, Any]:
    """What was recognised and written, for people and programs."""
    import timm

    facts, (variant, _, tag) = found.entry or {}, found.name.partition(".")
    num_classes = found.args["num_classes"]
    # as local-dir: takes them from config.json, and as a call with the file has to say them
    features = "" if num_classes else ", features_only=True"
    overlay = f'file="{folder / WEIGHTS}"'
    given = "".join(f", {key}={value}" for key, value in found.args.items() if key != "num_classes") + features
    if num_classes and num_classes != (timm.get_pretrained_cfg(found.name).num_classes or 1000):
        overlay += f", num_classes={num_classes}"
        given += f", num_classes={num_classes}"
    return {
        "file": str(file),
        "sha256": found.sha256,
        "model": variant,
        "tag": tag or None,
        "published": found.entry is not None,
        "parameters": sum(parameter.numel() for parameter in found.model.parameters()),
        "tensors": len(found.tensors),
        "num_classes": num_classes,
        "output_norms": "output_norm" in found.args,
        "left_out": found.left_out,
        "licence": facts.get("licence"),
        "licence_note": facts.get("licence_note"),
        "preprocessing": {key: found.model.pretrained_cfg[key] for key in PREPROCESSING},
        "folder": str(folder),
        "files": [WEIGHTS, CONFIG],
        "python": [
            f'timm.create_model("local-dir:{folder}", pretrained=True{features})',
            f'timm.create_model("{found.name}", pretrained=True, pretrained_cfg_overlay=dict({overlay}){given})',
        ],
    }


def _print(report: Mapping[str, Any]) -> None:
    name = ".".join(filter(None, (report["model"], report["tag"])))
    parts = ", ".join(f"{count} of {part}" for part, count in report["left_out"].items())
    shown = report["preprocessing"]
    side = size_text(shown["input_size"][1:])
    rows = {
        "model": f"{name}, {report['parameters'] / 1e6:.1f} M parameters in {report['tensors']} tensors",
        "classifier": f"{report['num_classes']} classes" if report["num_classes"] else "none: for features",
        "norms": "one on each output, for dense prediction" if report["output_norms"] else None,
        "left out": f"{sum(report['left_out'].values())} tensors: {parts}" if parts else None,
        "sha256": report["sha256"],
        "licence": " ".join(filter(None, (report["licence"], report["licence_note"])))
        or "unknown: this is none of the published files by name or hash; --model NAME.TAG says which it is",
        "images": f"{side}, crop {shown['crop_pct']} ({shown['crop_mode']}), {shown['interpolation']}, mean "
        f"{shown['mean']}, std {shown['std']}" + ("" if report["published"] else " (the model's default)"),
        "written": " and ".join(str(Path(report["folder"]) / file) for file in report["files"]),
    }
    console = cli.console()
    for label, text in rows.items():
        if text:
            console.print(f"{label:<11}{text}", markup=False)
    console.print("\nimport timm, zoo", *report["python"], sep="\n", markup=False)


if __name__ == "__main__":
    main()
