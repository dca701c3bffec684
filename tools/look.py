"""zoo-look: pictures of how a model attends."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import FAMILIES, extras
from zoo.messages import UserError, one_line, size_text
from zoo.tools import cli

if TYPE_CHECKING:
    from zoo.opening import OpenModel
    from zoo.tools.look_picture import Picture

DESCRIPTION = "Draw how a model attends: what its attention can see, and what it does see, as a PNG."
EXAMPLES = """\
examples:
  zoo-look patterns                                   the attention patterns of all families; also of one
  zoo-look keys dinat_mini cat.jpg --pixel 120 200 --pretrained
  zoo-look cam runs/mine cat.jpg --class cat          of the classifier in a run folder
  zoo-look field van_b0 --pretrained

zoo-look COMMAND --help says more."""

PATTERNS = """\
The attention pattern of each family: which tokens of a map of 28x28 one token attends to.

It is computed from the modules that the models are made of. The background is transparent."""
KEYS = """\
The keys that a pixel of a picture attends to: in each stage, and each kind of attention in it.

For each the first block of its kind, and the weights averaged over the heads: neighbourhoods, stripes, windows, grids,
routed regions. VAN has no attention weights; shown is the share of each token in its kernel's absolute weights."""
KEYS_EXAMPLES = """\
examples:
  zoo-look keys dinat_mini cat.jpg --pixel 120 200 --pretrained
  zoo-look keys runs/mine digit.png --block -1                   the last block of each stage"""
CAM = """\
What speaks for a class: a class activation map (Grad-CAM) over a picture.

Of any classifier of timm whose features are maps, by the package grad-cam."""
CAM_EXAMPLES = """\
examples:
  zoo-look cam runs/mine cat.jpg                the class that it sees
  zoo-look cam runs/mine cat.jpg --class dog    what speaks for another
  zoo-look cam van_b0 cat.jpg --pretrained --stage 3"""
FIELD = """\
The effective receptive field: how much each pixel matters for the middle of each stage's features.

It is the mean absolute derivative, over images of noise; brightness is its square root. Any model of timm that gives
feature maps."""
FIELD_EXAMPLES = """\
examples:
  zoo-look field van_b0 --pretrained
  zoo-look field resnet18 --size 320 320 --images 64"""
ROLLOUT = """\
Attention rollout over a picture: the attention of all blocks, multiplied.

Without --pixel it is the mean over all tokens, which is what the classifier reads. Only isotropic models have the same
tokens in all blocks, so only they have it: nat_isotropic_*, dinat_isotropic_*, vitrpb_*."""
ROLLOUT_EXAMPLES = """\
examples:
  zoo-look rollout dinat_isotropic_small cat.jpg --pretrained
  zoo-look rollout vitrpb_small cat.jpg --pretrained --pixel 120 200"""


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and draw."""
    options = parser().parse_args(arguments)
    with cli.friendly_errors("zoo-look"):
        out = _target(options)
        with cli.progress(f"zoo-look {options.command}") as say:
            say("loading timm")
            facts = options.run(options, out, say)
        if options.json:
            print(json.dumps({"file": str(out), **facts}, indent=2))
        else:
            for line in facts.get("notes", ()):
                print(line)
            print(f"written: {out}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="zoo-look", description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)

    def command(
        name: str, description: str, epilog: str | None, run: Callable[..., dict[str, Any]], *operands: str
    ) -> Callable[..., argparse.Action]:
        summary = description.partition("\n")[0].rstrip(".")
        added = commands.add_parser(name, help=summary, description=description, epilog=epilog)
        added.set_defaults(run=run)
        add = added.add_argument
        if "model" in operands:
            add("model", metavar="MODEL", help="a name that timm.create_model takes, or the folder of a finished run")
        if "image" in operands:
            add("image", type=Path, metavar="IMAGE", help="a picture of any size")
        default = f"MODEL_{name}.png" if operands else f"{name}.png"
        add("-o", "--out", default="", metavar="FILE", help=f"what to write, or the folder for it ({default}, here)")
        add("--force", action="store_true", help="replace the file if there is one")
        add("--json", action="store_true", help="print what was found as JSON")
        if "model" in operands:
            help = "with the published weights, or those in FILE"
            add("--pretrained", nargs="?", const=True, default=False, metavar="FILE", help=help)
            help = "resize to this" if "image" in operands else "of the images"
            usual = "shorter side: what the model was made for" if "image" in operands else "what it was made for"
            add("--size", type=cli.count, nargs=2, metavar=("H", "W"), help=f"{help}, in pixels ({usual})")
        if "pixel" in operands:
            help = "row and column, in the file's pixels" + " (the middle)" * (name == "keys")
            add("--pixel", type=cli.index, nargs=2, metavar=("Y", "X"), help=help)
        return add

    add = command("patterns", PATTERNS, None, _patterns)
    add("family", metavar="FAMILY", nargs="?", choices=FAMILIES, help=f"only this one's: {', '.join(FAMILIES)}")
    add = command("keys", KEYS, KEYS_EXAMPLES, _keys, "model", "image", "pixel")
    add("--block", type=_block, metavar="N", help="of each stage, from 1 on; -1 is the last (the first of each kind)")
    add = command("cam", CAM, CAM_EXAMPLES, _cam, "model", "image")
    add("--class", dest="target", metavar="CLASS", help="its number from 0 on, or its name (what the model sees)")
    add("--stage", type=cli.count, metavar="N", help="whose features are weighed, from 1 on (the last)")
    add = command("field", FIELD, FIELD_EXAMPLES, _field, "model")
    add("--images", type=cli.count, default=16, metavar="N", help="of noise, to average over (16)")
    add("--seed", type=cli.index, default=0, metavar="N", help="of the noise (0)")
    command("rollout", ROLLOUT, ROLLOUT_EXAMPLES, _rollout, "model", "image", "pixel")
    return parser


def _block(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1 on, or -1 for the last")
    return int(text)


def _target(options: argparse.Namespace) -> Path:
    """The file to write.

    Raises:
        UserError: it exists, or can't be written.
    """
    stem = options.command
    if "model" in options:
        model = Path(options.model)
        name = model.resolve().name if model.is_dir() else options.model.rpartition("/")[2]
        stem = f"{name}_{options.command}"
    elif options.family:
        stem = f"{options.family}_{options.command}"
    given = Path(options.out)
    out = given / f"{stem}.png" if given.is_dir() or options.out.endswith(("/", os.sep)) else given
    if not out.suffix:
        out = out.with_name(f"{out.name}.png")
    if out.suffix != ".png":
        raise UserError(f"got -o {given}: its name has to end in .png.")
    if out.exists() and not options.force:
        raise UserError(f"{out} exists; --force replaces it.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out} can't be written: {parent} is not a folder that you may write to; choose another, -o.")
    return out


def _patterns(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from zoo.tools import look_patterns

    say("drawing")
    out.parent.mkdir(parents=True, exist_ok=True)
    look_patterns.draw(out, options.family)
    return {}


def _load(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[OpenModel, Picture, dict[str, Any]]:
    """Model, picture, and what is to be reported of them."""
    from zoo.opening import open_model
    from zoo.tools import look_picture

    say(f"loading {options.model}")
    loaded = open_model(options.model, options.pretrained, size=options.size)
    picture = look_picture.read_picture(options.image, loaded, options.size)
    return loaded, picture, _facts(loaded, picture.size)


def _facts(loaded: OpenModel, size: Sequence[int]) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights, "size": list(size), "notes": []}
    if loaded.weights == "random weights":
        facts["notes"].append(f"{loaded.name} has random weights here; --pretrained loads some.")
    return facts


def _about(facts: dict[str, Any]) -> str:
    return "{model}, {weights}, {size[0]}x{size[1]} pixels".format(**facts)


def _running(loaded: OpenModel, size: Sequence[int], compute: Callable[[], Any]) -> Any:
    """What `compute` returns; a model's refusal of the images becomes a UserError."""
    try:
        return compute()
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{loaded.name} can't run on images of {size_text(size)} pixels: {one_line(error, 600)}; --size H W "
            "sets another size."
        ) from error


def _keys(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from zoo.tools import look_attention, look_draw

    loaded, picture, facts = _load(options, say)
    pixel = picture.pixel(options.pixel)
    say("attending")
    found = _running(
        loaded,
        facts["size"],
        lambda: list(look_attention.keys(loaded.model, loaded.name, picture.images, pixel, options.block)),
    )
    say("drawing")
    out.parent.mkdir(parents=True, exist_ok=True)
    what = "averaged over heads" if found[0].softmax else "shares of the kernel's absolute weights"
    look_draw.draw_keys(out, found, picture, pixel, f"{_about(facts)}; pixel {pixel[0]}, {pixel[1]} of them; {what}")
    facts["pixel"] = pixel
    facts["attention"] = [
        {
            "stage": keys.stage,
            "block": keys.block,
            "kind": keys.kind,
            "keys": int((keys.weights > 0).sum()),
            "largest": keys.weights.max().item(),
            "padding": keys.padding,
            "key_pixels": keys.pixels,
            "weights": keys.weights.tolist(),
        }
        for keys in found
    ]
    return facts


def _rollout(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from zoo.tools import look_attention, look_draw

    loaded, picture, facts = _load(options, say)
    pixel = picture.pixel(options.pixel) if options.pixel else None
    total = _running(
        loaded, facts["size"], lambda: look_attention.rollout(loaded.model, loaded.name, picture.images, say)
    )
    stride = loaded.model.feature_info[0]["reduction"]
    if pixel is None:
        heat, whose = total.mean((0, 1)), "the mean of all tokens"
    else:
        heat = total[tuple(min(place // stride, side - 1) for place, side in zip(pixel, total.shape, strict=False))]
        whose = "the marked token"
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = ("the picture", f"rollout: what is in {whose}")
    look_draw.draw_heat(out, heat.numpy(), picture, captions, _about(facts), "share of a token", pixel, stride)
    return {**facts, "pixel": pixel, "weights": heat.tolist()}


def _cam(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    extras.require("zoo-look cam", "examples", ["pytorch_grad_cam"])
    import torch

    from zoo.tools import look_cam, look_draw

    loaded, picture, facts = _load(options, say)
    names = look_cam.class_names(loaded.model)
    count = loaded.model.num_classes
    if not count:
        raise UserError(f"{loaded.name} has no classifier: take zoo-look keys or zoo-look field.")
    target = None if options.target is None else look_cam.find_class(options.target, names, count)
    layer, channels = look_cam.layer(loaded, options.stage)
    say("running it")

    def compute() -> tuple[int, float, Any]:
        with torch.no_grad():
            scores = loaded.model(picture.images)[0].softmax(0)
        chosen = int(scores.argmax()) if target is None else target
        return chosen, scores[chosen].item(), look_cam.heat(loaded.model, picture.images, layer, channels, chosen)

    chosen, score, heat = _running(loaded, facts["size"], compute)
    label = names[chosen] if names else f"class {chosen}"
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = ("the picture", f"what speaks for {label} ({100 * score:.1f} %)")
    look_draw.draw_heat(out, heat, picture, captions, _about(facts), "of the largest")
    if not heat.any():
        facts["notes"].append(f"nothing speaks for {label}: the map is zero everywhere.")
    return {**facts, "class": chosen, "name": names[chosen] if names else None, "score": score}


def _field(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from zoo.opening import open_model
    from zoo.tools import look_attention, look_draw

    say(f"loading {options.model}")
    loaded = open_model(options.model, options.pretrained, size=options.size, features_only=True)
    channels, *usual = loaded.config["input_size"]
    size = options.size or usual
    facts = _facts(loaded, size)
    fields = _running(
        loaded,
        size,
        lambda: look_attention.field(loaded.model, channels, size, options.images, options.seed, say),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    look_draw.draw_field(out, fields, f"{_about(facts)}; mean of {options.images} images of noise")
    facts["stages"] = [
        {"stage": i, "half_within": look_attention.extent(x, 0.5), "95_percent_within": look_attention.extent(x, 0.95)}
        for i, x in enumerate(fields, 1)
    ]
    return facts


if __name__ == "__main__":
    main()
