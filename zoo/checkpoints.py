"""Published weights: what is known of them, and how a file becomes the state dict of one of our models.

`manifest.json` (its fields: `checkpoints/README.md`) becomes timm's pretrained configurations in `default_cfgs`. A
family's `checkpoint_filter_fn` is one call of `convert`, which timm makes on every road: `pretrained=True`,
`pretrained_cfg_overlay=dict(file=...)` and `pretrained_cfg_overlay=dict(state_dict=...)`. Files are read by `read`.
"""

import argparse
import math
import os
import pickle
import re
import stat
import string
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import DefaultCfg, PretrainedCfg, _builder, generate_default_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo import downloads
from zoo.manifest import manifest

__all__ = [
    "check_network",
    "check_values",
    "closest",
    "convert",
    "default_cfgs",
    "file_overlay",
    "left_out",
    "looks_like",
    "manifest",
    "published_cfg",
    "read",
    "reading",
    "remap",
    "resize_table",
    "settle_num_classes",
    "some",
    "unwrap",
]

# A family's official names in ours: regular expressions with their replacements, applied in order to every key. None
# drops the tensor.
KeyMap = Iterable[tuple[str, str | None]]

# Keys of a training checkpoint under which the weights lie, and what stands before their names: averaged weights first.
WRAPPINGS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "module")
# Averages, data parallel and averaged models, torch.compile, Lightning's and others' modules around a model, detectors.
PREFIXES = ("ema_model.", "model_ema.", "module.", "_orig_mod.", "model.", "net.", "network.", "encoder.", "backbone.")
MAX_PREFIXES = 8  # one in another
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Files by timm's trainer, the official ones among them, carry their command line as a Namespace. It is inert: restoring
# it only sets attributes. timm allows it for local files but not for downloads; loading stays weights_only everywhere.
# Named in full, because the context manager in which timm reads a local file removes the bare type at its end.
torch.serialization.add_safe_globals([(argparse.Namespace, "argparse.Namespace")])


def default_cfgs(
    family: str,
    first_conv: str,
    tests: Iterable[str] | None = None,
    exceptions: Mapping[str, tuple[str, int]] | None = None,
) -> dict[str, DefaultCfg]:
    """Timm's configurations of every known checkpoint of `family`, and of its models for tests.

    Args:
        family: its name in the manifest.
        first_conv: name of the convolution that reads the images.
        tests: the models for tests; `test_<family>` if None.
        exceptions: models with another `first_conv`, or whose last features have another stride than 32: both.
    """
    small = {"input_size": (3, 64, 64), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    facts = {f"{entry['model']}.{entry['tag']}": _facts(entry) for entry in manifest(family)}
    facts |= dict.fromkeys([f"test_{family}"] if tests is None else tests, small)
    cfgs = {}
    for name, known in facts.items():
        conv, stride = (exceptions or {}).get(name.split(".")[0], (first_conv, 32))
        side = known["input_size"][1] // stride
        cfgs[name] = {"pool_size": (side, side), "first_conv": conv, "classifier": "head", **known}
    return generate_default_cfgs(cfgs)


def _facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of the manifest says, in timm's words."""
    return {
        "url": entry["url"],
        "hf_hub_id": entry.get("hf_hub_id"),
        "input_size": tuple(entry["input_size"]),
        "mean": tuple(entry["mean"]),
        "std": tuple(entry["std"]),
        "crop_pct": entry["crop_pct"],
        "interpolation": entry["interpolation"],
        "crop_mode": entry.get("crop_mode", "center"),
        "num_classes": entry["num_classes"],
        "license": entry["licence"],
        "origin_url": entry["origin_url"],
        "paper_ids": entry["paper_ids"],
        "paper_name": entry["paper_name"],
        "description": f"Trained on {entry['dataset']}.",
        "notes": tuple(entry[field] for field in ("note", "licence_note") if field in entry) or None,
    }


def settle_num_classes(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` of `build_model_with_cfg`, with the number of classes that the weights to be loaded really have.

    A published file without a classifier is configured with 0 classes, one of ImageNet-22k with its own, and
    `pretrained=True` then gives a model like it. That shall not reach a model which starts from nothing or from the
    caller's own file: it has 1000 classes like every other, unless the call says otherwise. A feature extractor never
    has a classifier.
    """
    kwargs = dict(kwargs)
    if kwargs.get("features_only"):
        kwargs["num_classes"] = 0
    tag = kwargs.get("pretrained_cfg")
    if isinstance(tag, str | None) and (not pretrained or published_cfg(variant, kwargs) is None):
        num_classes = resolve_pretrained_cfg(variant, tag).num_classes
        if num_classes == 0 or (tag is None and num_classes != 1000):
            kwargs["pretrained_cfg_overlay"] = {"num_classes": 1000, **(kwargs.get("pretrained_cfg_overlay") or {})}
    return kwargs


def published_cfg(variant: str, kwargs: Mapping[str, Any]) -> PretrainedCfg | None:
    """Configuration of the weights that `pretrained=True` takes; None if a call with `kwargs` brings its own."""
    overlay, tag = kwargs.get("pretrained_cfg_overlay") or {}, kwargs.get("pretrained_cfg")
    own = any(overlay.get(source) for source in ("state_dict", "file", "url", "hf_hub_id"))
    if own or not isinstance(tag, str | None):  # a tag or nothing: the manifest's configuration
        return None
    return resolve_pretrained_cfg(variant, tag)


def reading(
    variant: str, kwargs: Mapping[str, Any], filter_fn: Callable[..., dict[str, Tensor]]
) -> tuple[dict[str, Any], Callable[..., dict[str, Tensor]]]:
    """`kwargs` and `filter_fn` of `build_model_with_cfg`, changed if it takes the weights from a file or an address.

    They are then read by `read` when timm filters them, from an address by `zoo.downloads.fetch`; the Hugging Face hub
    and local folders stay timm's.
    """
    file, url, kwargs = _file(variant, kwargs), _address(variant, kwargs), dict(kwargs)
    if file is None and url is None:
        return kwargs, filter_fn

    def read_and_filter(_: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        model.pretrained_cfg.pop("state_dict", None)
        path = file or downloads.fetch(url, kwargs.get("cache_dir"), _known_hash(url), read)
        try:
            checkpoint = read(path)
        except ValueError as error:
            if file:
                raise ValueError(f"{file}: {error}") from error
            raise RuntimeError(f"{path} can't be used; delete it, and it is downloaded anew: {error}") from error
        return filter_fn(checkpoint, model)

    # A state dict goes before files and addresses, and what is in it is of no concern to timm before it is filtered.
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": {"source": file or url}}
    return kwargs, read_and_filter


def _file(variant: str, kwargs: Mapping[str, Any]) -> str | os.PathLike | None:
    """The file that `build_model_with_cfg` would load; None if it takes the weights from elsewhere."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return None if cfg.source or cfg.state_dict or cfg.custom_load else cfg.file or None


def _address(variant: str, kwargs: Mapping[str, Any]) -> str | None:
    """What `build_model_with_cfg` would download by http or https; None if it takes the weights from elsewhere."""
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    url = cfg.url
    if cfg.source or cfg.state_dict or cfg.file or cfg.custom_load or not isinstance(url, str):
        return None
    # timm prefers the hub; an address that the call gives goes before a repository that it does not.
    own = overlay.get("url") and not overlay.get("hf_hub_id")
    if cfg.hf_hub_id and not own and f"/{cfg.hf_hub_id}/" not in url:
        return None
    return url if url.startswith(("http://", "https://")) else None


def check_network(name: str, pretrained: bool) -> None:
    """Raise RuntimeError if timm would ask the Hugging Face hub for the model `name`, and it doesn't answer.

    That is so for weights of timm's own models and for names such as "hf-hub:owner/repository".
    """
    source, _, repo = name.rpartition(":")
    if source not in ("hf-hub", "hf_hub"):
        cfg = timm.get_pretrained_cfg(name) if pretrained and not source else None
        if cfg is None or timm.model_entrypoint(name.partition(".")[0]).__module__.startswith(f"{__package__}."):
            return
        repo = cfg.hf_hub_id
    files = ("model.safetensors", "pytorch_model.bin")
    repo, _, revision = (repo or "").partition("@")
    if repo and not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        downloads.check_hub(repo, files[0], revision or None)


def _known_hash(url: str) -> str:
    """The sha256 of a file, or its beginning, by the manifest or, if timm is asked to check it, the file's name."""
    entries = (entry for family in zoo.FAMILIES for entry in manifest(family) if entry["url"] == url)
    entry = next(entries, {})
    named = torch.hub.HASH_REGEX.search(url.rpartition("/")[2]) if _builder._CHECK_HASH else None
    return entry.get("sha256") or entry.get("sha256_prefix") or (named[1] if named else "")


class _Inert:
    """Stands for what a training run saved beside its weights: takes everything and does nothing."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What official files hold beside tensors and plain values: scores as NumPy scalars, configurations, MMEngine's curves.
# None of it is of use here, so that nothing of it is made: only its names are allowed.
_BYSTANDERS = [
    *((_Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((_Inert, name) for name in ("numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "builtins.getattr")),
    (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (OrderedDict, "yacs.config.CfgNode"),
]


def read(path: str | os.PathLike) -> Mapping[str, Any]:
    """The content of a checkpoint file, of safetensors or of torch; nothing that it may hold is run.

    Training's leftovers that official files hold beside their tensors are read, but not restored.

    Raises:
        ValueError: it is no such file, damaged, or asks to run code; one sentence without the file's name.
        OSError: it can't be opened.
    """
    _check_file(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError("the file is empty: download it again.")
    if head.lstrip().startswith(b"<"):
        raise ValueError("this is a web page, not a checkpoint: open its address in a browser to see what it says.")
    if all(byte in string.printable.encode() for byte in head):
        start = " ".join(head.decode().split())[:40]
        raise ValueError(f"this is a text file, not a checkpoint (it begins with {start!r}): download it again.")
    try:
        if head[8:9] == b"{" and not head.startswith(b"PK"):
            return safetensors.torch.load_file(path)
        if head.startswith(b"PK"):
            _check_archive(path)
        with torch.serialization.safe_globals(_BYSTANDERS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        asked = re.search(r"GLOBAL (\S+) w|Unsupported class (\S+)|call reduce for", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            what = some([next(filter(None, asked.groups()), "a function")])
            raise ValueError(
                f"the file asks for {what}, which could run any code and which weights have no need of: nothing of it "
                "was run; get them as safetensors or plain tensors."
            ) from error
        raise ValueError(
            f"the file is damaged, incomplete or no checkpoint ({some([_first_line(error)])}): download it again."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"the file holds a {type(checkpoint).__name__}, not a state dict or a dict with one in it.")
    return checkpoint


def _check_file(path: str | os.PathLike) -> None:
    """Refuse what can't be read to its end: to open a pipe waits for a writer, and some devices never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise ValueError(f"this is {what}, not a checkpoint file: give the file itself.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    if memory and status.st_size > memory:
        raise ValueError(
            f"the file has {status.st_size / 2**30:,.0f} GiB, more than the {memory / 2**30:,.0f} GiB of memory here: "
            "weights alone, without the optimizer's state, are smaller."
        )


def _check_archive(path: str | os.PathLike) -> None:
    """Refuse an archive that unpacks to much more than it is; torch packs nothing."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > 8 * os.path.getsize(path):
            raise ValueError("it unpacks to more than eight times its size")


def file_overlay(file: str | os.PathLike, cfg: PretrainedCfg | None) -> tuple[dict[str, Any], int | None]:
    """The `pretrained_cfg_overlay` by which timm loads a file into any model, and how many classes the file has.

    Args:
        file: the checkpoint.
        cfg: the model's pretrained configuration, which names its classifier.

    Returns:
        The overlay; and the size of the classifier, None where the file has none by that name.

    Raises:
        ValueError: it can't be used; one sentence without the file's name.
        OSError: it can't be opened.
    """
    state_dict = unwrap(read(file))
    check_values(state_dict)
    overlay: dict[str, Any] = {"file": os.fspath(file), "custom_load": False}
    classifier = cfg.classifier if cfg else None
    weight = state_dict.get(f"{classifier[0] if isinstance(classifier, tuple | list) else classifier}.weight")
    if weight is None or not weight.ndim:
        return overlay, None
    # timm keeps or drops the classifier by comparing the model's number of classes with this one.
    return overlay | {"num_classes": len(weight)}, len(weight)


def _first_line(error: Exception) -> str:
    """Why torch or safetensors refused a file, without their advice."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return text.splitlines()[0].partition(". ")[0][:120].rstrip(".") if text else type(error).__name__


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a training checkpoint, free of wrappings (`state_dict`, ...) and prefixes (`module.`, ...).

    Where some names have a prefix and others none, as in the file of a detector whose weights lie under `backbone.` or
    of a module of Lightning that holds the model as `model` or `net`, those with it are taken.

    Raises:
        ValueError: nothing in the file is a tensor, or one is not of plain numbers.
    """
    return _unwrap(checkpoint)[0]


def left_out(checkpoint: Mapping[str, Any]) -> list[str]:
    """The tensors of a larger model that `unwrap` leaves out: those of its neck and heads."""
    return _unwrap(checkpoint)[1]


def _unwrap(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    others: list[str] = []
    seen = {id(checkpoint)}
    while wrapping := next((name for name in WRAPPINGS if _is_filled(checkpoint.get(name))), None):
        checkpoint = checkpoint[wrapping]
        if id(checkpoint) in seen:
            raise ValueError(f"The checkpoint contains itself under {wrapping!r}: save the model's state dict alone.")
        seen.add(id(checkpoint))
    state_dict = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state_dict:
        raise ValueError(
            f"The checkpoint holds no tensors, only {some(checkpoint) or 'nothing'}: pass a state dict, "
            f"or a dict with one under {', '.join(map(repr, WRAPPINGS))}."
        )
    if unnamed := [key for key in state_dict if not isinstance(key, str)]:
        raise ValueError(
            f"The checkpoint has {len(unnamed)} tensors under {some(unnamed)}, not under names: pass a state dict."
        )
    for _ in range(MAX_PREFIXES):
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state_dict)), None)
        if prefix is None:
            break
        others += [key for key in state_dict if not key.startswith(prefix)]
        state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    for key, value in state_dict.items():
        if fault := _unusual(value):
            raise ValueError(f"The checkpoint's {some([key])} {fault}: save the weights as dense tensors of floats.")
    return state_dict, others


def _is_filled(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _unusual(value: Tensor) -> str | None:
    """What keeps a tensor from being read as plain numbers, if anything does."""
    if value.is_sparse or value.layout is not torch.strided or value.is_nested:
        return "is sparse or nested"
    if value.is_quantized:
        return "is quantized"
    if value.is_complex():
        return "is complex"
    # Of an expanded tensor only the size is large, until it is copied.
    if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
        size = value.numel() * value.element_size()
        if size > max(value.untyped_storage().nbytes(), 2**30):
            return f"is {value.untyped_storage().nbytes():,} bytes that stand for {size:,}"
    return None


def check_values(state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor has no values, or some that are no finite numbers."""
    if missing := [key for key, value in state_dict.items() if value.is_meta]:
        raise ValueError(
            f"{len(missing)} tensors of the checkpoint have no values ({some(missing)}): it was saved from the meta "
            "device, before the weights were loaded."
        )
    floats = {key: value for key, value in state_dict.items() if value.dtype in FLOATS}
    if broken := {key: count for key, value in floats.items() if (count := int((~value.isfinite()).sum()))}:
        raise ValueError(
            f"{len(broken)} tensors of the checkpoint have values that are NaN or infinite "
            f"({some(f'{count} in {some([key])}' for key, count in broken.items())}): its training failed; take an "
            "earlier checkpoint."
        )


def remap(state_dict: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """`state_dict` under the names that `key_map` gives.

    Raises:
        ValueError: two keys get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _rename(key, key_map)
        if name in renamed:
            raise ValueError(
                f"Two tensors of the checkpoint are called {some([name])} in our naming: it mixes two models."
            )
        if name is not None:
            renamed[name] = value
    return renamed


def _rename(key: str, key_map: KeyMap) -> str | None:
    for pattern, replacement in key_map:
        if replacement is not None:
            key = re.sub(pattern, replacement, key)
        elif re.search(pattern, key):
            return None
    return key


def convert(
    checkpoint: Mapping[str, Any], model: nn.Module, key_map: KeyMap, resize: str = "bicubic"
) -> dict[str, Tensor]:
    """The state dict that `model` shall load from `checkpoint`, which has official names or ours, wrapped or not.

    Relative-position tables, whose names end in "bias_table", become those of the model's windows: by interpolation as
    `resize` says ("bicubic" or "bilinear"), from the form ((2 wh - 1)(2 ww - 1), N) too, which Swin's code has. The
    weights of 1 x 1 convolutions become those of linear layers, where the model has such.

    Left to timm, which adapts them after this function: a classifier of another number of classes than the pretrained
    configuration says the weights have, and the first convolution where the number of input channels differs.

    Raises:
        ValueError: the file holds no tensors, a name twice, or values that are no finite numbers.
        RuntimeError: a tensor is missing, unexpected or of another shape; says which model the file looks like.
    """
    want = model.state_dict()
    given = remap(unwrap(checkpoint), key_map)
    state_dict = dict(given)
    for key in state_dict.keys() & want.keys():
        if key.endswith("bias_table"):
            state_dict[key] = _as_table(state_dict[key], want[key].shape, resize)
        elif want[key].ndim == 2 and _matrix_shape(state_dict[key]) == want[key].shape:
            state_dict[key] = state_dict[key].flatten(1)
    state_dict = _settle_output_norms(state_dict, want)
    cfg = getattr(model, "pretrained_cfg", {})
    classifier = {key for key in want.keys() | state_dict.keys() if _is_part(key, cfg.get("classifier"))}
    headless = not classifier & want.keys()
    if headless or model.num_classes != cfg.get("num_classes", model.num_classes):
        state_dict = {key: value for key, value in state_dict.items() if key not in classifier}
    else:
        classifier = set()

    # torch itself fills in the counters of batch norm, which conversions to other formats drop
    missing = [k for k in want if k not in state_dict and k not in classifier and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state_dict if k not in want]
    reshaped = [k for k, v in state_dict.items() if k in want and not _fits(k, v, want[k], cfg.get("first_conv"))]
    if missing or unexpected or reshaped:
        shapes = [f"{k} {tuple(state_dict[k].shape)} for {tuple(want[k].shape)}" for k in reshaped]
        counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        faults = "; ".join(f"{len(keys)} {what} ({some(keys)})" for what, keys in counts if keys)
        name = cfg.get("architecture", type(model).__name__)
        remedy = _remedy({*missing, *unexpected, *reshaped}, name, cfg, unwrap(checkpoint))
        raise RuntimeError(f"The checkpoint does not fit {name}: {faults}. {remedy}")
    for key, value in given.items():
        if key in want and want[key].is_floating_point() and value.dtype not in FLOATS:
            raise ValueError(f"The checkpoint's {key} is of {value.dtype}: save the weights as float32.")
    if not all(value.is_meta for value in want.values()):  # names and shapes are all that a model without values asks
        check_values(given)
    return state_dict


def resize_table(table: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """A relative-position table (N, h, w) for windows of other sizes: (N, *size), the corners kept at half a pixel."""
    return F.interpolate(table[None], size=size, mode=mode, align_corners=False)[0]


def _as_table(value: Tensor, shape: torch.Size, mode: str) -> Tensor:
    """`value` as a table of `shape` (N, h, w), if it is one at all."""
    side = math.isqrt(value.shape[0]) if value.ndim == 2 else 0
    if side and value.shape == (side**2, shape[0]):
        value = value.T.reshape(shape[0], side, side)
    if value.ndim != 3 or value.shape[0] != shape[0] or value.shape == shape:
        return value
    return resize_table(value, tuple(shape[1:]), mode)


def _settle_output_norms(state_dict: dict[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit a file with norms of each output (dense prediction) to a model without, and the other way round.

    Features before the norms do not depend on them: a model without takes the rest of such a file, whose missing final
    norm it keeps as it is. A model with norms starts them anew where the file, a classifier's, has none.
    """
    ours, theirs = ({k for k in x if _is_part(k, "output_norms")} for x in (want, state_dict))
    final = {k for k in want.keys() | state_dict.keys() if _is_final(k)}
    if theirs and not ours:
        kept = {k: v for k, v in state_dict.items() if k not in theirs}
        return {k: want[k] for k in final & want.keys()} | kept
    if ours and not theirs:
        kept = {k: v for k, v in state_dict.items() if k not in final - want.keys()}
        return {k: want[k] for k in ours} | kept
    return state_dict


def looks_like(state_dict: Mapping[str, Tensor]) -> tuple[str | None, float]:
    """The model of this package that shares most tensors (name and shape) with an unwrapped state dict, and the share.

    As `closest` has it; None if none shares any.
    """
    names, share = closest(state_dict)
    return (names[0] if names else None), share


def closest(state_dict: Mapping[str, Tensor]) -> tuple[list[str], float]:
    """The models that share most tensors (name and shape) with an unwrapped state dict, and the share.

    The share is that of the larger of the two, classifiers left out. Several models have it where the shapes cannot
    tell them apart (a NAT and its DiNAT). A model whose tag changes its shapes is named with the tag.
    It builds every model, without memory but not without time: for error messages and conversions.
    """
    shares: dict[str, float] = {}
    for family in zoo.FAMILIES:
        renamed = remap(state_dict, sys.modules[f"{__package__}.{family}"].KEY_MAP)
        have = {key: _our_shape(key, value) for key, value in renamed.items()}
        known = {name: _share(have, name) for name in timm.list_models(module=family)}
        best = max(known, key=known.__getitem__)
        if 0.1 < known[best] < 1:
            tagged = {name: _share(have, name) for name in timm.list_pretrained(f"{best}.*")}
            known |= {name: share for name, share in tagged.items() if share > known[best]}
        shares |= known
    most = max(shares.values())
    return [name for name, share in shares.items() if share == most > 0], most


def _share(have: Mapping[str, torch.Size], name: str) -> float:
    want, classifier = _tensors(name)
    rest = {key for key in have if not _is_part(key, classifier)}
    if any(_is_part(key, "output_norms") for key in rest):  # a backbone for dense prediction has these instead
        rest = {key for key in rest if not _is_part(key, "output_norms")}
        want = {key: shape for key, shape in want.items() if not _is_final(key)}
    return sum(have[key] == want.get(key) for key in rest) / max(len(want), len(rest), 1)


@cache
def _tensors(name: str) -> tuple[dict[str, torch.Size], str]:
    """The shapes of a model's tensors without its classifier, and the classifier's name."""
    model = timm.create_model(name, device="meta", num_classes=0)
    shapes = {key: _our_shape(key, value) for key, value in model.state_dict().items()}
    return shapes, model.pretrained_cfg["classifier"]


def _remedy(faulty: set[str], name: str, cfg: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> str:
    if all(_is_part(key, cfg.get("classifier")) for key in faulty):
        return (
            "The rest fits: use features_only=True or num_classes=0, or say how many classes the file has (0 without "
            "a classifier) with pretrained_cfg_overlay=dict(num_classes=...), and the model gets a new classifier."
        )
    best, share = looks_like(state_dict)
    if best is None or share < 0.1:
        return "It looks like no model of zoo: check which family the file belongs to."
    if best == name:
        return f"{share:.0%} of it is {name}: the file is incomplete or altered."
    if share < 1:
        return f"It looks most like {best} ({share:.0%} of the tensors agree)."
    return f"It looks like {best}: create that model instead."


def _fits(key: str, have: Tensor, want: Tensor, first_conv: str | None) -> bool:
    """Whether shapes agree, up to the input channels of the first convolution."""
    if first_conv is not None and key == f"{first_conv}.weight":
        return have.ndim == want.ndim and (have.shape[0], *have.shape[2:]) == (want.shape[0], *want.shape[2:])
    return have.shape == want.shape


def _matrix_shape(value: Tensor) -> torch.Size:
    """The shape of a tensor; of a 1 x 1 convolution's weight, that of the linear layer which it is."""
    return value.shape[:2] if value.ndim == 4 and value.shape[2:] == (1, 1) else value.shape


def _our_shape(key: str, value: Tensor) -> torch.Size:
    """The shape that a tensor has in our models: `_matrix_shape`, and (N, h, w) for a table of Swin's form."""
    side = math.isqrt(value.shape[0]) if value.ndim == 2 and key.endswith("bias_table") else 0
    if side and side**2 == value.shape[0]:
        return torch.Size((value.shape[1], side, side))
    return _matrix_shape(value)


def _is_final(key: str) -> bool:
    """Whether the tensor is of what stands between the last stage and the classifier."""
    return _is_part(key, "norm") or _is_part(key, "pre_logits")


def _is_part(key: str, module: str | None) -> bool:
    return module is not None and key.startswith(f"{module}.")


def some(keys: Iterable[Any], limit: int = 3) -> str:
    """The first of the keys, for a sentence: they are a stranger's, and may be of any type, length and characters."""
    keys = [key if isinstance(key, str) else f"a key of type {type(key).__name__}" for key in keys]
    shown = (key if len(key) <= 100 else f"{key[:100]}..." for key in keys[:limit])
    shown = (key if key.isprintable() else ascii(key) for key in shown)
    return ", ".join(shown) + (", ..." if len(keys) > limit else "")
