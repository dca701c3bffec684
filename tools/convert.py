"""zoo-convert: convert an official checkpoint to a folder that timm loads, with safetensors and config.json."""

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

The checkpoint may come from a classifier, or from a detector or segmentor, of which only the backbone is converted. Its
format may be that of torch or safetensors, in any of the usual wrappings, or that of TensorFlow: an archive, or a file
.index with its data beside it. It is never unpickled. Every tensor has to fit: if one is missing, unexpected or of
another shape, it is named, and nothing is written."""
EXAMPLES = """\
examples:
  zoo-convert van_tiny_754.pth.tar                  writes van_b0.in1k/model.safetensors and config.json
  zoo-convert mine.pth --model dinat_tiny -o mine   if the weights fit several models (here also nat_tiny)
  zoo-convert upernet_nat_tiny.pth --json           the backbone of a segmentor; the result as JSON

timm then loads the folder: timm.create_model("local-dir:van_b0.in1k", pretrained=True)"""

PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass
class Converted:
    """A checkpoint, converted to a model of zoo.

    Attributes:
        name: The model. It has a tag if the checkpoint is a published one, or if the tag decides the shapes.
        entry: The manifest's entry of a published checkpoint, else None.
        model: The model with the weights.
        args: The arguments that `timm.create_model` needs besides the name.
        tensors: The weights.
        left_out: The number of tensors of each other part.
        sha256: The hash of the file.
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
    add("-o", "--out", type=Path, metavar="FOLDER", help="the folder to write (named after the model)")
    add("--model", metavar="NAME", help="the model of the checkpoint, such as van_b0 or dinat_large.in22k (recognised)")
    add("--force", action="store_true", help="replace the files of an earlier conversion")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def convert(file: Path, model: str | None = None, say: Callable[[str], None] = lambda text: None) -> Converted:
    """Convert the checkpoint `file` to weights of `model`, a name with or without tag; None recognises the model.

    Raises:
        UserError: The file can't be read, is not the one that its name says, or fits no model or several.
    """
    name = _model_name(model) if model else None
    try:
        return _convert(file, name, model, say)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}{similar_path(file)}") from None
    except (RuntimeError, ValueError) as error:  # the checkpoint is damaged or does not fit
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
                f"{file} does not look like a model of zoo (its tensors are called "
                f"{checkpoints.first_names(state_dict)}): zoo-models lists the models."
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
    """Return `name`, if it is a model of zoo.

    Raises:
        UserError: It is not.
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
    """The manifest's only entry with this file's hash or, if no entry has the hash, with its name.

    Raises:
        UserError: The entry of that name has another hash.
    """
    entries = _manifest()
    found = [entry for entry in entries if entry.get("sha256") == sha256]
    found = found or [entry for entry in entries if entry.get("url", "").rpartition("/")[2] == file.name]
    if len(found) != 1:
        return None
    recorded = found[0].get("sha256") or found[0].get("sha256_prefix", "")
    if not sha256.startswith(recorded):
        raise UserError(
            f"{file} is not the file that {found[0]['url']} published: its sha256 is {sha256[:8]}..., not "
            f"{recorded[:8]}...; download it again, or rename it if it is another file."
        )
    return found[0]


def _only(file: Path, names: list[str], checkpoint: Mapping[str, Any]) -> str:
    """The one of `names`, models with the same shapes, that the checkpoint belongs to.

    Raises:
        UserError: Several fit.
    """
    if len(names) > 1:
        trained = [
            checkpoint.get("arch"),
            getattr(checkpoint.get("args"), "model", None),
        ]  # as in checkpoints of timm's trainer
        names = [name for name in names if name in trained] or [name for name in names if _fits(name, checkpoint)]
    if len(names) != 1:
        choices = " or ".join(f"--model {name}" for name in names)
        raise UserError(
            f"{file} fits {' and '.join(names)} equally, because their tensors have the same shapes: add {choices}."
        )
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
    """The model with the weights of the checkpoint, the arguments that create it, and the weights by name.

    Raises:
        RuntimeError: The weights don't fit. The message says how.
    """
    import timm

    from zoo import checkpoints, families, key_maps

    family = families.family_of(name)
    cfg = timm.get_pretrained_cfg(name)
    mapped = checkpoints.remap(checkpoints.unwrap(checkpoint), family.KEY_MAP)
    classifier = key_maps.classifier_weight(mapped, cfg.classifier)
    args: dict[str, Any] = {"num_classes": 0 if classifier is None else classifier.shape[:1].numel()}
    norms = sorted({int(i) for key in mapped for i in re.findall(r"^output_norms\.(\d)\.", key)})
    if norms:  # a backbone for dense prediction; some have norms on only a few outputs
        args = {"num_classes": 0, "output_norm": True if len(norms) == 4 else norms}
    args |= families.tag_kwargs(name)  # timm finds them by the tag, but not from config.json
    first = mapped.get(key_maps.first_weights(cfg.first_conv)[0])
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        args["in_chans"] = first.shape[1]
    overlay = {"num_classes": args["num_classes"]}
    if not known:  # the origin and licence of the weights are unknown
        overlay |= dict.fromkeys(("license", "origin_url", "description", "notes"))
    model = timm.create_model(name, device="meta", pretrained_cfg_overlay=overlay, **args)
    model.load_state_dict(family.checkpoint_filter_fn(checkpoint, model), assign=True)
    tensors = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
    return model, args, tensors


def _check_folder(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder for {WEIGHTS} and {CONFIG} with -o.")
    there = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if there and not force:
        raise UserError(
            f"{folder} already holds {' and '.join(there)}: give another folder with -o, or replace them with --force."
        )


def write(found: Converted, folder: Path, source: str) -> None:
    """Write the weights and config.json to `folder`, each file completely or not at all.

    Raises:
        UserError: They can't be written.
    """
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf  # the public save_for_hf also writes the weights

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
        # safetensors raises an error of its own if the disk is full
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"could not write to {folder} ({reason}): correct that, or give another folder with -o."
            ) from error
        raise


def describe(found: Converted, folder: Path, file: Path) -> dict[str, Any]:
    """What was recognised and written, for the printed report and for JSON."""
    import timm

    facts, (variant, _, tag) = found.entry or {}, found.name.partition(".")
    num_classes = found.args["num_classes"]
    # local-dir: reads the arguments from config.json; a call with the file needs them
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
        or "unknown: no published file has this name or hash; --model NAME.TAG names the file",
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
