"""zoo-look: pictures of what a model attends to."""

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

DESCRIPTION = "Draw what the attention of a model can see, and what it does see, as a PNG."
EXAMPLES = """\
examples:
  zoo-look patterns                                   the attention patterns of all families
  zoo-look keys dinat_mini cat.jpg --pixel 120 200 --pretrained
  zoo-look cam runs/mine cat.jpg --class cat          for the classifier in a run folder
  zoo-look field van_b0 --pretrained

zoo-look COMMAND --help describes a command."""

PATTERNS = """\
The attention pattern of each family: the tokens in a map of 28x28 that one token attends to.

The attention modules of the models compute it. The background is transparent."""
KEYS = """\
The keys that a pixel of a picture attends to, in each stage and for each kind of attention in it.

The kinds are neighbourhoods, stripes, windows, grids, routed regions and whole maps. For each, the picture shows the
first block, with weights averaged over its heads; of weights that can be negative, as those of scans, the shares of
their absolute values. VAN has no attention weights: it shows the share of each token in the absolute weights of the
kernel."""
KEYS_EXAMPLES = """\
examples:
  zoo-look keys dinat_mini cat.jpg --pixel 120 200 --pretrained
  zoo-look keys runs/mine digit.png --block -1                   the last block of each stage"""
CAM = """\
The evidence for a class: a class activation map (Grad-CAM) over a picture.

It works for any classifier of timm whose features are maps, with the package grad-cam."""
CAM_EXAMPLES = """\
examples:
  zoo-look cam runs/mine cat.jpg                the predicted class
  zoo-look cam runs/mine cat.jpg --class dog    the evidence for another class
  zoo-look cam van_b0 cat.jpg --pretrained --stage 3"""
FIELD = """\
The effective receptive field: the influence of each pixel on the centre of each stage's features.

It is the mean absolute gradient over images of noise; the brightness is its square root. It works for any model of timm
that returns feature maps."""
FIELD_EXAMPLES = """\
examples:
  zoo-look field van_b0 --pretrained
  zoo-look field resnet18 --size 320 320 --images 64"""
BATCH = """\
Images of a training as the network gets them: cropped, mixed, erased, and padded, with their labels.

It takes the keys of zoo-train (zoo-train --help), loads no weights and trains nothing. For a detector or a segmentor,
the annotations are drawn. Random numbers are those of the training: another seed=N shows other crops."""
BATCH_EXAMPLES = """\
examples:
  zoo-look batch                                                       the digits of the demo
  zoo-look batch model=van_b0 data=imagefolder data.root=photos augment=strong
  zoo-look batch recipe=imagenet/van_b0 data.root=/data/imagenet --images 16
  zoo-look batch task=detect data=coco data.root=mine data.train_ann=train.json data.val_ann=val.json"""
ROLLOUT = """\
Attention rollout over a picture: the product of the attention of all blocks.

Without --pixel it is the mean over all tokens, which the classifier reads. Rollout needs the same tokens in all blocks,
which only isotropic models have: nat_isotropic_*, dinat_isotropic_*, vitrpb_*."""
ROLLOUT_EXAMPLES = """\
examples:
  zoo-look rollout dinat_isotropic_small cat.jpg --pretrained
  zoo-look rollout vitrpb_small cat.jpg --pretrained --pixel 120 200"""


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and draw."""
    command = parser()
    options, rest = command.parse_known_args(arguments)
    if options.command == "batch":
        options.overrides += (
            rest  # options may stand between them; what else is wrong with them is said as by zoo-train
        )
    elif rest:
        command.error(f"unrecognized arguments: {' '.join(rest)}")
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
        add(
            "-o",
            "--out",
            default="",
            metavar="FILE",
            help=f"the file to write, or its folder ({default} in this folder)",
        )
        add("--force", action="store_true", help="replace the file if there is one")
        add("--json", action="store_true", help="print the results as JSON")
        if "model" in operands:
            help = "load the published weights, or those in FILE"
            add("--pretrained", nargs="?", const=True, default=False, metavar="FILE", help=help)
            help = "size to resize to" if "image" in operands else "size of the images"
            usual = "the shorter side as the model expects it" if "image" in operands else "as the model expects it"
            add("--size", type=cli.count, nargs=2, metavar=("H", "W"), help=f"{help}, in pixels ({usual})")
        if "pixel" in operands:
            help = "row and column, in pixels of the file" + " (the centre)" * (name == "keys")
            add("--pixel", type=cli.index, nargs=2, metavar=("Y", "X"), help=help)
        return add

    add = command("patterns", PATTERNS, None, _patterns)
    add("family", metavar="FAMILY", nargs="?", choices=FAMILIES, help=f"draw one family only: {', '.join(FAMILIES)}")
    add = command("keys", KEYS, KEYS_EXAMPLES, _keys, "model", "image", "pixel")
    add(
        "--block",
        type=_block,
        metavar="N",
        help="number of the block in each stage, from 1; -1 is the last (the first of each kind)",
    )
    add = command("cam", CAM, CAM_EXAMPLES, _cam, "model", "image")
    add("--class", dest="target", metavar="CLASS", help="number of the class from 0, or its name (the predicted class)")
    add("--stage", type=cli.count, metavar="N", help="number of the stage whose features are used, from 1 (the last)")
    add = command("field", FIELD, FIELD_EXAMPLES, _field, "model")
    add("--images", type=cli.count, default=16, metavar="N", help="number of noise images to average over (16)")
    add("--seed", type=cli.index, default=0, metavar="N", help="seed of the noise (0)")
    add = command("batch", BATCH, BATCH_EXAMPLES, _batch)
    add("overrides", metavar="KEY=VALUE", nargs="*", help="keys of zoo-train")
    add("--images", type=cli.count, default=32, metavar="N", help="largest number of images (32)")
    add("--config-dir", metavar="DIR", help="folder of a configuration file of your own, as for zoo-train")
    add("--config-name", metavar="NAME", help="name of that file, without .yaml")
    add("--cfg", metavar="job", help="print the resulting values of all keys instead")
    command("rollout", ROLLOUT, ROLLOUT_EXAMPLES, _rollout, "model", "image", "pixel")
    return parser


def _block(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1, or -1 for the last")
    return int(text)


def _target(options: argparse.Namespace) -> Path:
    """The file to write.

    Raises:
        UserError: It exists, or can't be written.
    """
    stem = options.command
    if "model" in options:
        model = Path(options.model)
        name = model.resolve().name if model.is_dir() else options.model.rpartition("/")[2]
        stem = f"{name}_{options.command}"
    elif options.command == "patterns" and options.family:
        stem = f"{options.family}_{options.command}"
    given = Path(options.out)
    out = given / f"{stem}.png" if given.is_dir() or options.out.endswith(("/", os.sep)) else given
    if not out.suffix:
        out = out.with_name(f"{out.name}.png")
    if out.suffix != ".png":
        raise UserError(f"got -o {given}: its name has to end in .png.")
    cli.check_target(out, options.force)
    return out


def _patterns(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from zoo.tools import look_patterns

    say("drawing")
    out.parent.mkdir(parents=True, exist_ok=True)
    look_patterns.draw(out, options.family)
    return {}


def _batch(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from zoo.recipes.preview import preview

    given = {"config-dir": options.config_dir, "config-name": options.config_name, "cfg": options.cfg}
    flags = [f"--{name}={value}" for name, value in given.items() if value]
    say("reading the data")
    return preview([*flags, *options.overrides], out, options.images)


def _load(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[OpenModel, Picture, dict[str, Any]]:
    """The model, the picture, and what is reported about them."""
    from zoo.opening import open_model
    from zoo.tools import look_picture

    say(f"loading {options.model}")
    loaded = open_model(options.model, options.pretrained, size=options.size)
    picture = look_picture.read_picture(options.image, loaded, options.size)
    return loaded, picture, _facts(loaded, picture.size)


def _facts(loaded: OpenModel, size: Sequence[int]) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights, "size": list(size), "notes": []}
    if loaded.weights == "random weights":
        facts["notes"].append(f"{loaded.name} has random weights; --pretrained loads the published ones.")
    return facts


def _about(facts: dict[str, Any]) -> str:
    return "{model}, {weights}, {size[0]}x{size[1]} pixels".format(**facts)


def _running(loaded: OpenModel, size: Sequence[int], compute: Callable[[], Any]) -> Any:
    """The result of `compute`. Raises UserError if the model refuses the images."""
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
    what = ", ".join(dict.fromkeys(keys.what for keys in found))
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
    captions = ("the picture", f"rollout: tokens in {whose}")
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
        raise UserError(f"{loaded.name} has no classifier: use zoo-look keys or zoo-look field.")
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
    captions = ("the picture", f"evidence for {label} ({100 * score:.1f} %)")
    look_draw.draw_heat(out, heat, picture, captions, _about(facts), "of the largest")
    if not heat.any():
        facts["notes"].append(f"there is no evidence for {label}: the map is zero everywhere.")
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
