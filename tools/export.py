"""zoo-export: a model as a program for torch.export or ONNX Runtime, checked against the model itself."""

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
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from zoo.opening import OpenModel

DESCRIPTION = """\
Write a model as a program that runs without zoo and timm: as .pt2, which torch.export.load reads, or as .onnx.

Batch, height and width stay open where the model's arithmetic allows it; what stays fixed is said. The file is
compared with the model on the CPU, at two sizes where it takes two, and only kept if they differ by 1e-4 at most (in
parts of the largest output, where that is above 1). It takes images in float32, normalised as is printed; these facts
are also in the file, as JSON: under "zoo" in the metadata of an ONNX file, in the extra file "zoo.json" of a .pt2."""
EXAMPLES = """\
examples:
  zoo-export van_b0 --pretrained                         published weights, to van_b0.pt2
  zoo-export runs/mine -o mine.onnx                      the classifier that zoo-train left in a run folder, as it was
                                                         at the end; with --checkpoint best, as it was at its best
  zoo-export dinat_mini --pretrained mine.safetensors --format onnx
  zoo-export cswin_tiny --features --size 512 768        four feature maps; an image to start from
  zoo-export resnet18 --static --size 224 224 -o resnet18.onnx
                                                         one image of this size only; any model of timm"""

LIMIT = 1e-4
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass
class Exported:
    """A program that was written: its open dimensions, of 0, 2 and 3, the least height and width, and its checks.

    `checks` are the shapes of the images and the largest differences from the model.
    """

    dims: tuple[int, ...]
    least: tuple[int, int]
    checks: list[tuple[tuple[int, ...], float]]


class TooNarrow(Exception):
    """The exporter left fewer dimensions open than were wanted."""


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, export and check."""
    options = parser().parse_args(arguments)
    with cli.friendly_errors("zoo-export"):
        _export(options)


def command() -> NoReturn:
    """Run `main` as a process, which ends once the file is written.

    Python would first take the exporters' graphs apart, object by object, for many seconds on a busy machine.
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
    add("-o", "--out", type=Path, metavar="FILE", help="what to write, or the folder for it (MODEL.pt2 or .onnx, here)")
    add("--format", choices=("pt2", "onnx"), help="(by the ending of -o; else pt2)")
    add("--features", action="store_true", help="the feature maps of all stages in place of the classification")
    add(
        "--size",
        type=cli.count,
        nargs=2,
        metavar=("H", "W"),
        help="of an image, in pixels (what the model was made for)",
    )
    add("--static", action="store_true", help="one image of this size only; some runtimes want that")
    add("--pretrained", nargs="?", const=True, metavar="FILE", help="with the published weights, or those in FILE")
    add(
        "--num-classes", type=cli.index, metavar="N", help="of the classifier (that of the weights); 0: pooled features"
    )
    add(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="of a run folder: the weights of its last epoch (last) or of its best on validation",
    )
    add("--force", action="store_true", help="replace the file if there is one")
    add("--json", action="store_true", help="print what was written as JSON")
    return parser


def _export(options: argparse.Namespace) -> None:
    form, out = _target(options)
    with _progress(f"loading {options.model}"):
        loaded = _load(options)
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
    else:
        names = ["embedding" if options.num_classes == 0 else "logits"]
    facts = _facts(model, options, config)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".zoo-export-") as folder:
        path = Path(folder) / out.name
        done, notes = _first_that_works(model, path, form, channels, size, names, facts, options)
        for shape, difference in done.checks:
            if not difference <= LIMIT:  # nor if it is not a number
                raise UserError(
                    f"the program differs from the model by {difference:.1e} on images of {size_text(shape)}, more "
                    f"than {LIMIT:.0e}: {out} was not written."
                )
        written = sorted(Path(folder).iterdir())  # weights of more than 2 GB lie beside an ONNX file
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
    """Batch and size open if that goes, else the batch, else nothing; and why not more."""
    wider = (size[0] + 32, size[1] + 96)
    notes = []
    attempts = [((), (1, channels, *size))]  # what to leave open, and the images of the second check
    if not options.static:
        attempts.insert(0, ((0,), (3, channels, *size)))
        try:
            with _progress(f"running it at {size_text(wider)}"):
                _run(model, _images(1, channels, wider))
            attempts.insert(0, ((0, 2, 3), (3, channels, *wider)))
        except Exception as error:
            notes.append(f"height and width are fixed: the model takes no others ({one_line(error, 600)})")
    for dims, shape in attempts:
        try:
            return _attempt(model, path, form, dims, [(1, channels, *size), shape], names, facts), notes
        except OSError:
            raise
        except Exception as error:
            what = "height and width are" if 2 in dims else "the batch is"
            notes.append(f"{what} fixed: the exporter can't leave them open ({one_line(error, 600)})")
    formats = {"onnx": "ONNX", "pt2": "a program of torch.export"}
    raise UserError(f"{options.model} can't become {formats[form]}: {notes[-1].partition('(')[2].rstrip(')')}.")


def _target(options: argparse.Namespace) -> tuple[str, Path]:
    """The format, and the file to write."""
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
    if out.exists() and not options.force:
        raise UserError(f"{out} exists; --force replaces it.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{out} can't be written: {parent} is not a folder that you may write to; choose another with -o."
        )
    return form, out


def _load(options: argparse.Namespace) -> OpenModel:
    from zoo.opening import open_model

    settings: dict[str, Any] = {}
    if options.features:
        settings["features_only"] = True
    elif options.num_classes is not None:
        settings["num_classes"] = options.num_classes
    return open_model(options.model, options.pretrained, size=options.size, checkpoint=options.checkpoint, **settings)


def _facts(model: nn.Module, options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """What a user of the file has to know of the model."""
    names = None if options.features or options.num_classes is not None else model.pretrained_cfg.get("label_names")
    preprocessing = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    return {"model": options.model, "preprocessing": preprocessing, "classes": names and list(names)}


def _attempt(
    model: nn.Module,
    path: Path,
    form: str,
    dims: tuple[int, ...],
    shapes: Sequence[tuple[int, ...]],
    names: list[str],
    facts: dict[str, Any],
) -> Exported:
    """Write `model` to `path` with the dimensions `dims` open, and run the file on images of `shapes`.

    Raises:
        TooNarrow: the exporter fixed one of them, or its range leaves the images out.
        Exception: whatever else the exporter or the runtime fails with.
    """
    import torch

    from zoo.kernels import implementation

    _, channels, *size = shapes[0]
    example = _images(2 if dims else 1, channels, size)  # of one image alone the exporter would fix the batch
    auto = dict.fromkeys(dims, torch.export.Dim.AUTO)
    label = {3: "batch, height and width open", 1: "batch open", 0: "nothing open"}[len(dims)]
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
    """The least height and width that `program` takes; raises TooNarrow if it does not take all of `shapes`."""
    import torch

    (name,) = program.graph_signature.user_inputs
    shape = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape
    least = {2: shapes[0][2], 3: shapes[0][3]}
    for dim in dims:
        if not isinstance(shape[dim], torch.SymInt):
            raise TooNarrow(f"it fixes the {AXES[dim]}")
        if dim == 0:
            continue  # one image is out of its range, and works
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
    """The least height and width at which the file `run` is its model, which may refuse `least`; or `size`."""
    for height, width in (least, (max(32, least[0]), max(32, least[1]))):
        images = _images(1, channels, (height, width))
        try:
            if _difference(run(images), _run(model, images)) <= LIMIT:
                return height, width
        except Exception:  # theirs, of any kind
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
    )
    written.model.metadata_props["zoo"] = text
    written.save(path)


def _load_pt2(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import torch

    module = torch.export.load(path).module()
    return lambda images: _as_list(module(images))


def _load_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime
    import torch

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    settings.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for work would keep cores busy that others, or their own work, have need of.
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
    """The largest difference; of outputs above 1, in parts of the largest. Not a number where an output is none."""
    import torch

    scaled = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(got, want, strict=True)]
    return torch.stack(scaled).max().item()


def _images(batch: int, channels: int, size: Sequence[int], seed: int = 0) -> Tensor:
    import torch

    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _silence() -> Iterator[None]:
    """The exporters report their progress, and what they may do one day; neither is for the user."""
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
    for output in record["outputs"]:
        at = f", at {size_text(record['size'])} pixels" if is_open and len(output["shape"]) > 2 else ""
        print(f"output: {output['name']} ({', '.join(map(str, output['shape']))}){at}")
    checks = ", ".join(f"{check['difference']:.1e} at {size_text(check['shape'])}" for check in record["checks"])
    print(f"largest difference from the model: {checks} (limit {record['limit']:.0e})")


if __name__ == "__main__":
    command()
