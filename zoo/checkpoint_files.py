"""Checkpoint files of any origin: read without running code, and unwrapped to the tensors of one model."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import stat
import string
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from zoo import tensorflow_files
from zoo.messages import first_few, one_line

__all__ = ["check_values", "first_names", "other_tensors", "read", "unwrap", "unwrap_whole"]

# Keys of a training checkpoint under which the weights are stored. Averaged weights come first.
WRAPPINGS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "module")
# Prefixes that averaging, data parallelism, torch.compile, Lightning modules and detectors put before names.
PREFIXES = ("ema_model.", "model_ema.", "module.", "_orig_mod.", "model.", "net.", "network.", "encoder.", "backbone.")
PARTS = ("encoder.", "backbone.")  # those that name a part of a detector
MAX_PREFIXES = 8  # in a row
COUNTS = ("total_ops", "total_params")  # buffers that thop, which counts operations, leaves in all modules
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# timm's trainer saves its command line as a Namespace, as do many official files. Restoring one only sets attributes.
# timm allows the type for local files but not for downloads; all loading stays weights_only. It has a full name here
# because the context manager in which timm reads a local file removes the bare type when it ends.
torch.serialization.add_safe_globals([(argparse.Namespace, "argparse.Namespace")])


class Ignored:
    """Takes the place of an object that a training run saved with its weights: accepts everything, does nothing."""

    def __new__(cls, *_: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What official files hold besides tensors and plain values: scores as NumPy scalars, configurations, MMEngine's curves.
# None of it is needed. Their names are allowed, and an inert object is made in their place.
IGNORED_TYPES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *(
        (Ignored, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *((Ignored, name) for name in ("numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "builtins.getattr")),
    (Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (OrderedDict, "yacs.config.CfgNode"),
]


def read(path: str | os.PathLike) -> Mapping[str, Any]:
    """The content of a checkpoint of torch, safetensors or TensorFlow. Code in the file is never run.

    Objects that official files hold besides their tensors are read, but not restored.

    Raises:
        ValueError: The file is no checkpoint, is damaged, or asks to run code. The message does not name the file.
        OSError: The file can't be opened.
    """
    _check_file(path)
    with open(path, "rb") as file:
        head = file.read(512)
    _check_head(head)
    try:
        if head[8:9] == b"{" and not head.startswith(b"PK"):
            return safetensors.torch.load_file(path)
        if tensorflow_files.is_checkpoint(path, head):
            return tensorflow_files.read(path)
        if head.startswith(b"PK"):
            _check_archive(path)
        with torch.serialization.safe_globals(IGNORED_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        asked = re.search(r"GLOBAL (\S+) w|Unsupported class (\S+)|call reduce for", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            what = first_names([next(filter(None, asked.groups()), "a function")])
            raise ValueError(
                f"the file asks for {what}, which could run any code and is not needed for weights: nothing was "
                "run; get the weights as safetensors or plain tensors."
            ) from error
        raise ValueError(
            f"the file is damaged, incomplete or not a checkpoint ({first_names([_first_line(error)])}): download it "
            "again."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"the file holds a {type(checkpoint).__name__}, not a state dict or a dict with one in it.")
    return checkpoint


def _check_file(path: str | os.PathLike) -> None:
    """Refuse files that can't be read to the end: opening a pipe waits for a writer, and some devices never end."""
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


def _check_head(head: bytes) -> None:
    """Refuse empty files, web pages and other text, recognised by their first bytes."""
    if not head:
        raise ValueError("the file is empty: download it again.")
    if head.lstrip().startswith(b"<"):
        raise ValueError("this is a web page, not a checkpoint: open its address in a browser to see what it says.")
    if all(byte in string.printable.encode() for byte in head):
        start = one_line(head.decode(), 40)
        raise ValueError(f"this is a text file, not a checkpoint (it begins with {start!r}): download it again.")


def _check_archive(path: str | os.PathLike) -> None:
    """Refuse an archive that unpacks to far more than its own size. torch does not compress its files."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > 8 * os.path.getsize(path):
            raise ValueError("it unpacks to more than eight times its size")


def _first_line(error: Exception) -> str:
    """Why torch or safetensors refused a file, without their advice."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return text.splitlines()[0].partition(". ")[0][:120].rstrip(".") if text else type(error).__name__


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a training checkpoint, without its wrappings (`state_dict`, ...) and prefixes (`module.`, ...).

    If only some names have a prefix, only their tensors are taken: a detector's file stores the backbone's weights
    under `backbone.`, and a Lightning module stores those of its model under `model.` or `net.`.

    Raises:
        ValueError: Nothing in the file is a tensor, or a tensor does not hold plain numbers.
    """
    return _split(checkpoint)[0]


def other_tensors(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of a larger model that `unwrap` leaves out, such as those of its neck and heads."""
    return _split(checkpoint)[1]


def unwrap_whole(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """`unwrap` for a whole detector or segmentor: the names keep `backbone.`, `neck.`, `encoder.`, ...

    Raises:
        ValueError: Nothing in the file is a tensor, or a tensor does not hold plain numbers.
    """
    return _split(checkpoint, tuple(prefix for prefix in PREFIXES if prefix not in PARTS))[0]


def _split(checkpoint: Mapping[str, Any], prefixes: tuple[str, ...] = PREFIXES) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors, and the names of the others."""
    state_dict = _tensors(_innermost(checkpoint))
    if any("/" in key for key in state_dict):
        state_dict = tensorflow_files.to_torch(state_dict)
    others: list[str] = []
    for _ in range(MAX_PREFIXES):
        prefix = next((p for p in prefixes if any(_is_wrapped(key, p) for key in state_dict)), None)
        if prefix is None:
            break
        others += [key for key in state_dict if not key.startswith(prefix)]
        state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    for key, value in state_dict.items():
        if fault := _unusual(value):
            raise ValueError(
                f"The checkpoint's {first_names([key])} {fault}: save the weights as dense tensors of floats."
            )
    return state_dict, others


def _is_wrapped(key: str, prefix: str) -> bool:
    """Whether a name has the prefix. A number after it means a list of that name, which belongs to the model itself."""
    return key.startswith(prefix) and not key[len(prefix) :][:1].isdigit()


def _innermost(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping inside all wrappings."""
    seen = {id(checkpoint)}
    while wrapping := next((name for name in WRAPPINGS if _is_filled(checkpoint.get(name))), None):
        checkpoint = checkpoint[wrapping]
        if id(checkpoint) in seen:
            raise ValueError(f"The checkpoint contains itself under {wrapping!r}: save the model's state dict alone.")
        seen.add(id(checkpoint))
    return checkpoint


def _is_filled(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    state_dict = {
        key: value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor) and not (isinstance(key, str) and key.rpartition(".")[2] in COUNTS)
    }
    if not state_dict:
        raise ValueError(
            f"The checkpoint holds no tensors, only {first_names(checkpoint) or 'nothing'}: pass a state dict, "
            f"or a dict with one under {', '.join(map(repr, WRAPPINGS))}."
        )
    if unnamed := [key for key in state_dict if not isinstance(key, str)]:
        raise ValueError(
            f"The checkpoint has {len(unnamed)} tensors under {first_names(unnamed)}, not under names: pass a state "
            "dict."
        )
    return state_dict


def _unusual(value: Tensor) -> str | None:
    """Why a tensor can't be read as plain numbers; None if it can."""
    if value.is_sparse or value.layout is not torch.strided or value.is_nested:
        return "is sparse or nested"
    if value.is_quantized:
        return "is quantized"
    if value.is_complex():
        return "is complex"
    # An expanded tensor is small in the file and large once it is copied.
    if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
        size = value.numel() * value.element_size()
        if size > max(value.untyped_storage().nbytes(), 2**30):
            return f"expands {value.untyped_storage().nbytes():,} bytes to {size:,}"
    return None


def check_values(state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor has no values, or values that are NaN or infinite."""
    if missing := [key for key, value in state_dict.items() if value.is_meta]:
        raise ValueError(
            f"{len(missing)} tensors of the checkpoint have no values ({first_names(missing)}): it was saved from the "
            "meta device, before the weights were loaded."
        )
    floats = {key: value for key, value in state_dict.items() if value.dtype in FLOATS}
    if broken := {key: count for key, value in floats.items() if (count := int((~value.isfinite()).sum()))}:
        raise ValueError(
            f"{len(broken)} tensors of the checkpoint have values that are NaN or infinite "
            f"({first_names(f'{count} in {first_names([key])}' for key, count in broken.items())}): its training "
            "failed; take an earlier checkpoint."
        )


def first_names(names: Iterable[Any], limit: int = 3) -> str:
    """The first of the names, for a sentence. Keys may have any type, length and characters."""
    return first_few(map(_printable, names), limit)


def _printable(name: Any) -> str:
    if not isinstance(name, str):
        return f"a key of type {type(name).__name__}"
    name = name if len(name) <= 100 else f"{name[:100]}..."
    return name if name.isprintable() else ascii(name)
