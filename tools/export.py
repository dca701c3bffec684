"""zoo-export: export a model for torch.export or ONNX Runtime, and check the file against the model."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import zoo
from zoo import extras
from zoo.messages import OptionError, UserError, one_line, size_text
from zoo.tools import cli

if TYPE_CHECKING:
    import onnx_ir
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from zoo.opening import OpenModel

DESCRIPTION = """\
Export a model to a file that runs without zoo and timm: .pt2, which torch.export.load reads, or .onnx.

Batch, height and width stay dynamic where the model allows it; the command prints which are fixed. The file is compared
with the model on the CPU, at two sizes if it takes two, and kept only if they differ by at most 1e-4 (relative to the
largest output, if that is above 1). The input is images in float32, normalised as printed. The file also holds these
facts as JSON: under "zoo" in the metadata of an ONNX file, in the extra file "zoo.json" of a .pt2.

A segmentor's file returns logits at the size of the images. A RetinaNet's returns the scores and boxes of all anchors;
that of a Mask R-CNN or Cascade Mask R-CNN ends with the proposals. NMS and RoI heads are not part of a file."""
EXAMPLES = """\
examples:
  zoo-export van_b0 --pretrained                         published weights to van_b0.pt2
  zoo-export runs/mine -o mine.onnx                      the classifier in a run folder of zoo-train, with its last
                                                         weights; --checkpoint best takes its best weights
  zoo-export runs/streets -o streets.onnx                the segmentor or detector in a run folder, in the same way
  zoo-export dinat_mini --pretrained mine.safetensors --format onnx
  zoo-export cswin_tiny --features --size 512 768        four feature maps; the size of the example image
  zoo-export resnet18 --static --size 224 224 -o resnet18.onnx
                                                         one image of this size only; any model of timm works"""

LIMIT = 1e-4
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass
class Exported:
    """An exported program.

    Attributes:
        dims: The dynamic dimensions of the images, of 0, 2 and 3.
        least: The smallest height and width that the program takes.
        checks: Shapes of images, each with the largest difference from the model.
    """

    dims: tuple[int, ...]
    least: tuple[int, int]
    checks: list[tuple[tuple[int, ...], float]]


class TooNarrow(Exception):
    """The exporter fixed a dimension that has to be dynamic."""


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, export and check."""
    options = parser().parse_args(arguments)
    with cli.friendly_errors("zoo-export"):
        _export(options)


def command() -> NoReturn:
    """Run `main`, and end the process without Python's cleanup.

    The cleanup frees the exporters' graphs object by object, which takes many seconds on a busy machine.
    """
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="zoo-export", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name that timm.create_model takes, or the folder of a finished run")
    add(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write, or its folder (MODEL.pt2 or MODEL.onnx in this folder)",
    )
    add("--format", choices=("pt2", "onnx"), help="format of the file (by the suffix of -o, else pt2)")
    add("--features", action="store_true", help="export the feature maps of all stages in place of the classifier")
    add(
        "--size",
        type=cli.count,
        nargs=2,
        metavar=("H", "W"),
        help="size of the images in pixels (as the model expects it)",
    )
    add("--static", action="store_true", help="fix batch 1 and the size, as some runtimes need")
    add("--pretrained", nargs="?", const=True, metavar="FILE", help="load the published weights, or those in FILE")
    add(
        "--num-classes",
        type=cli.index,
        metavar="N",
        help="size of the classifier (that of the weights); 0 for pooled features",
    )
    add(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="weights of a run folder: those of the last epoch, or of the best on the validation images (last)",
    )
    add("--force", action="store_true", help="replace the file if there is one")
    add("--json", action="store_true", help="print the results as JSON")
    return parser


def _export(options: argparse.Namespace) -> None:
    form, out = _target(options)
    with _progress(f"loading {options.model}"):
        loaded, names, facts = _load(options)
    model, config = loaded.model, loaded.config
    channels, *size = config["input_size"]
    size = tuple(options.size or size)
    with _progress(f"running it at {size_text(size)}"):
        try:
            outputs = _run(model, _images(1, channels, size))
        except Exception as error:
            raise UserError(
                f"{options.model} can't run on images of {size_text(size)} pixels: {one_line(error, 600)}."
            ) from error
    if options.features:
        names = [f"features_{i}" for i in range(len(outputs))]
    preprocessing = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct") if name in config}
    facts = {"model": options.model, "preprocessing": preprocessing, **facts}

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".zoo-export-") as folder:
        path = Path(folder) / out.name
        done, notes = _first_that_works(model, path, form, channels, size, names, facts, options)
        for shape, difference in done.checks:
            if not difference <= LIMIT:  # true for NaN, too
                raise UserError(
                    f"the program differs from the model by {difference:.1e} on images of {size_text(shape)}, more "
                    f"than {LIMIT:.0e}: {out} was not written."
                )
        written = sorted(Path(folder).iterdir())  # an ONNX file keeps weights of more than 2 GB in a second file
        size_in_bytes = sum(file.stat().st_size for file in written)
        for file in written:
            os.replace(file, out.parent / file.name)

    batch = "batch" if 0 in done.dims else 1
    sides = ("height", "width") if 2 in done.dims else size
    record = {
        "file": str(out),
        "format": form,
        "bytes": size_in_bytes,
        **facts,
        "weights": loaded.weights,
        "size": size,
        "input": {"name": "images", "dtype": "float32", "shape": (batch, channels, *sides), "least": done.least},
        "outputs": [
            {"name": name, "shape": (batch, *output.shape[1:])} for name, output in zip(names, outputs, strict=True)
        ],
        "fixed": notes,
        "checks": [{"shape": shape, "difference": difference} for shape, difference in done.checks],
        "limit": LIMIT,
    }
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        _report(record)


def _progress(text: str) -> AbstractContextManager[Any]:
    return cli.progress(f"zoo-export: {text} ...", log=True)


def _first_that_works(
    model: nn.Module,
    path: Path,
    form: str,
    channels: int,
    size: tuple[int, int],
    names: list[str],
    facts: dict[str, Any],
    options: argparse.Namespace,
) -> tuple[Exported, list[str]]:
    """Export with dynamic batch and size, else only the batch, else neither. Also returns why something is fixed."""
    step = facts.get("size_divisor") or 32
    wider = (size[0] + step, size[1] + 3 * step)
    notes = []
    attempts = [((), (1, channels, *size))]  # dynamic dimensions, and the shape of the images of the second check
    if not options.static:
        attempts.insert(0, ((0,), (3, channels, *size)))
        try:
            with _progress(f"running it at {size_text(wider)}"):
                _run(model, _images(1, channels, wider))
            attempts.insert(0, ((0, 2, 3), (3, channels, *wider)))
        except Exception as error:
            notes.append(f"height and width are fixed: the model takes no other size ({one_line(error, 600)})")
    for dims, shape in attempts:
        try:
            return _attempt(model, path, form, dims, [(1, channels, *size), shape], names, facts), notes
        except OSError:
            raise
        except Exception as error:
            what = "height and width are" if 2 in dims else "the batch is"
            notes.append(f"{what} fixed: the exporter can't make this dynamic ({one_line(error, 600)})")
    formats = {"onnx": "ONNX", "pt2": "a program of torch.export"}
    raise UserError(f"{options.model} can't become {formats[form]}: {notes[-1].partition('(')[2].rstrip(')')}.")


def _target(options: argparse.Namespace) -> tuple[str, Path]:
    """The format and the file to write."""
    ending = options.out.suffix if options.out and not options.out.is_dir() else ""
    form = options.format or {".onnx": "onnx", ".pt2": "pt2"}.get(ending, "pt2")
    if ending and ending != f".{form}":
        wanted = f"--format {form} writes .{form} files" if options.format else "its name has to end in .pt2 or .onnx"
        raise OptionError(f"got -o {options.out}: {wanted}.")
    if form == "onnx":
        extras.require("--format onnx", "onnx")
    stem = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model.rpartition("/")[2]
    name = f"{stem}{'_features' if options.features else ''}.{form}"
    if options.out is None:
        out = Path(name)
    elif options.out.is_dir():
        out = options.out / name
    else:
        out = options.out if ending else options.out.with_name(f"{options.out.name}.{form}")
    cli.check_target(out, options.force)
    return form, out


def _load(options: argparse.Namespace) -> tuple[OpenModel, list[str], dict[str, Any]]:
    """The model, the names of its outputs (without those of `--features`), and what a user has to know about it."""
    from zoo.opening import open_model

    if _is_dense_run(options.model):
        return _load_dense(options)
    settings: dict[str, Any] = {}
    if options.features:
        settings["features_only"] = True
    elif options.num_classes is not None:
        settings["num_classes"] = options.num_classes
    loaded = open_model(options.model, options.pretrained, size=options.size, checkpoint=options.checkpoint, **settings)
    classes = None if settings else loaded.model.pretrained_cfg.get("label_names")
    facts: dict[str, Any] = {"classes": classes and list(classes)}
    if classes and _has_several_labels(Path(options.model)):
        facts["multi_label"] = True
    return loaded, ["embedding" if options.num_classes == 0 else "logits"], facts


def _has_several_labels(folder: Path) -> bool:
    """Whether `folder` is that of a run of images with several labels, each with a probability of its own."""
    if not (folder / "config.yaml").is_file():
        return False
    from zoo.recipes import reading

    return bool(reading.load_config(folder).get("data", {}).get("multi_label"))


def _is_dense_run(name: str) -> bool:
    """Whether `name` is the folder of a detector's or segmentor's run; those of finished classifiers have config.json.

    Raises:
        UserError: It is a run folder that can't be read.
    """
    folder = Path(name)
    if not (folder / "config.yaml").is_file() or (folder / "config.json").exists():
        return False
    from zoo.recipes import reading

    return reading.load_config(folder).get("task", "classify") != "classify"


def _load_dense(options: argparse.Namespace) -> tuple[OpenModel, list[str], dict[str, Any]]:
    from zoo.recipes import reading, tasks

    given = {
        "the pretrained weights": options.pretrained,
        "the number of classes": options.num_classes is not None,
        "--features": options.features,
    }
    for option, is_given in given.items():
        if is_given:
            raise OptionError(
                f"{options.model} is the run folder of a detector or segmentor, which is exported as it is: leave out "
                f"{option}."
            )
    folder = Path(options.model)
    return tasks.load(reading.load_config(folder).task, "export").open_run(folder, options.checkpoint)


def _attempt(
    model: nn.Module,
    path: Path,
    form: str,
    dims: tuple[int, ...],
    shapes: Sequence[tuple[int, ...]],
    names: list[str],
    facts: dict[str, Any],
) -> Exported:
    """Write `model` to `path` with dynamic dimensions `dims`, and run the file on images of `shapes`.

    Raises:
        TooNarrow: The exporter fixed one of the dimensions, or its range excludes the images.
        Exception: Any other error of the exporter or the runtime.
    """
    import torch

    from zoo.kernels import implementation

    _, channels, *size = shapes[0]
    example = _images(2 if dims else 1, channels, size)  # with one image, the exporter fixes the batch
    auto = dict.fromkeys(dims, torch.export.Dim.AUTO)
    label = {3: "dynamic batch, height and width", 1: "dynamic batch", 0: "static"}[len(dims)]
    with _progress(f"exporting at {size_text(size)}, {label}"), _silence(), torch.no_grad(), implementation("torch"):
        program = torch.export.export(model, (example,), dynamic_shapes=(auto,))
    least = _least(program, dims, shapes) if dims else (size[0], size[1])
    with _progress(f"writing {form}"), _silence(), torch.no_grad():
        _write(program, path, form, dims, names, facts)
    checks = []
    with _progress("comparing the file with the model"), _silence(), torch.no_grad():
        run = _load_onnx(path) if form == "onnx" else _load_pt2(path)
        for seed, shape in enumerate(shapes):
            images = _images(*shape[:2], shape[2:], seed)
            checks.append((shape, _difference(run(images), _run(model, images))))
        if 2 in dims:
            least = _least_that_works(model, run, channels, least, (size[0], size[1]))
    return Exported(dims, least, checks)


def _least(program: ExportedProgram, dims: Sequence[int], shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The smallest height and width that `program` takes. Raises TooNarrow if it does not take all of `shapes`."""
    import torch

    (name,) = program.graph_signature.user_inputs
    shape = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape
    least = {2: shapes[0][2], 3: shapes[0][3]}
    for dim in dims:
        if not isinstance(shape[dim], torch.SymInt):
            raise TooNarrow(f"it fixes the {AXES[dim]}")
        if dim == 0:
            continue  # the range starts at 2, but one image works
        known = program.range_constraints.get(shape[dim].node.expr)
        if known is not None and not all(known.lower <= sizes[dim] <= known.upper for sizes in shapes):
            raise TooNarrow(f"it takes {AXES[dim]}s from {known.lower} to {known.upper} only")
        least[dim] = int(known.lower) if known is not None else 1
    return least[2], least[3]


def _least_that_works(
    model: nn.Module,
    run: Callable[[Tensor], list[Tensor]],
    channels: int,
    least: tuple[int, int],
    size: tuple[int, int],
) -> tuple[int, int]:
    """The smallest height and width at which the file agrees with the model; `size` if smaller ones fail."""
    for height, width in (least, (max(32, least[0]), max(32, least[1]))):
        images = _images(1, channels, (height, width))
        try:
            if _difference(run(images), _run(model, images)) <= LIMIT:
                return height, width
        except Exception:  # of the runtime or the model
            continue
    return size


def _write(
    program: ExportedProgram, path: Path, form: str, dims: Sequence[int], names: list[str], facts: dict[str, Any]
) -> None:
    import torch

    text = json.dumps({**facts, "zoo": zoo.__version__})
    if form == "pt2":
        torch.export.save(program, path, extra_files={"zoo.json": text})
        return
    symbols = {dim: AXES[dim] for dim in dims}
    written = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=names,
        dynamic_shapes=(symbols,) if dims else None,
        dynamo=True,
        verbose=False,
        optimize=False,
    )
    _simplify(written.model)
    written.model.metadata_props["zoo"] = text
    written.save(path)


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants, and remove nodes that are unused or there twice.

    The exporter's own optimization does this, too, but searches the whole graph for patterns at each node, which takes
    half an hour for a model of 10,000 nodes. Runtimes fuse nodes themselves.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.OutputFixPass(),  # no value is an input and an output, or two outputs
        common.NameFixPass(),
    ):
        simplify(model)


def _load_pt2(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import torch

    module = torch.export.load(path).module()
    return lambda images: _as_list(module(images))


def _load_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime
    import torch

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only
    settings.intra_op_num_threads = torch.get_num_threads()
    # Spinning threads would keep cores busy that other work needs.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def _run(model: nn.Module, images: Tensor) -> list[Tensor]:
    import torch

    with torch.no_grad():
        return _as_list(model(images))


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of an output if that is above 1. NaN if one is NaN."""
    import torch

    scaled = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(got, want, strict=True)]
    return torch.stack(scaled).max().item()


def _images(batch: int, channels: int, size: Sequence[int], seed: int = 0) -> Tensor:
    import torch

    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporters' progress and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _report(record: dict[str, Any]) -> None:
    print(f"written: {record['file']} ({record['bytes'] / 2**20:.1f} MiB), {record['model']} with {record['weights']}")
    given, preprocessing = record["input"], record["preprocessing"]
    is_open = "height" in given["shape"]
    sides = f", from {size_text(given['least'])} pixels" if is_open else ""
    print(f"input: {given['name']} ({', '.join(map(str, given['shape']))}), {given['dtype']}{sides}")
    for note in record["fixed"]:
        print(f"  {note}")
    mean, std = (f"({', '.join(f'{value:.4g}' for value in preprocessing[name])})" for name in ("mean", "std"))
    print(f"  of pixels from 0 to 1, minus {mean}, divided by {std}")
    if divisor := record.get("size_divisor"):
        print(f"  padded with zeros on the right and below to a multiple of {divisor} pixels")
    for output in record["outputs"]:
        at = f", at {size_text(record['size'])} pixels" if is_open and len(output["shape"]) > 2 else ""
        print(f"output: {output['name']} ({', '.join(map(str, output['shape']))}){at}")
    if record.get("outside"):
        print(f"not in the file: {record['outside']}")
    checks = ", ".join(f"{check['difference']:.1e} at {size_text(check['shape'])}" for check in record["checks"])
    print(f"largest difference from the model: {checks} (limit {record['limit']:.0e})")


if __name__ == "__main__":
    command()
