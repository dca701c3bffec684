"""Where the weights of a new model come from, and how timm is made to read them safely.

timm reads weights from a state dict, a local file, an address or the Hugging Face hub, as `pretrained_cfg` and
`pretrained_cfg_overlay` say. The functions here adjust these arguments of `build_model_with_cfg` before the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg, _builder, resolve_pretrained_cfg
from torch import Tensor

import zoo
from zoo import downloads
from zoo.checkpoint_files import check_values, read, unwrap
from zoo.key_maps import classifier_weight
from zoo.manifest import manifest

__all__ = ["check_network", "file_overlay", "published_cfg", "resolve_num_classes", "with_checked_file"]

FilterFn = Callable[..., dict[str, Tensor]]


def resolve_num_classes(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy of the `kwargs` of `build_model_with_cfg`, with a number of classes that fits the weights to be loaded.

    The `pretrained_cfg` of a published file has its number of classes, 0 if it has no classifier, and `pretrained=True`
    creates a model to match. Models that start from random weights or from the caller's file must not inherit this:
    they have 1000 classes unless the call says otherwise. A feature extractor never has a classifier.
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
    """The `pretrained_cfg` that `pretrained=True` loads; None if `kwargs` name the caller's own weights."""
    overlay, tag = kwargs.get("pretrained_cfg_overlay") or {}, kwargs.get("pretrained_cfg")
    own = any(overlay.get(source) for source in ("state_dict", "file", "url", "hf_hub_id"))
    if own or not isinstance(tag, str | None):  # a tag or None: the manifest's configuration
        return None
    return resolve_pretrained_cfg(variant, tag)


def with_checked_file(variant: str, kwargs: Mapping[str, Any], filter_fn: FilterFn) -> tuple[dict[str, Any], FilterFn]:
    """`kwargs` and `filter_fn` of `build_model_with_cfg`, changed so that `read` reads files and downloads.

    Both are unchanged if the weights come as a state dict, from the Hugging Face hub or from a local folder.

    Otherwise timm gets a state dict, because it then neither downloads nor opens anything: it builds the model and
    passes the state dict to `filter_fn`. This state dict is a placeholder that only names the source. The new
    `filter_fn` ignores it, and downloads and reads the file. The file's own state dict can't be passed instead: timm
    would copy it with the configuration, and the file would be downloaded before the model's arguments are checked.
    """
    load: partial[Mapping[str, Any]]
    if (file := _local_file(variant, kwargs)) is not None:
        load = partial(_read_local, file)
    elif (url := _download_url(variant, kwargs)) is not None:
        load = partial(_read_download, url, kwargs.get("cache_dir"))
    else:
        return dict(kwargs), filter_fn

    def load_and_filter(_: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
        model.pretrained_cfg.pop("state_dict", None)
        return filter_fn(load(), model)

    overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": {"source": load.args[0]}}
    return {**kwargs, "pretrained_cfg_overlay": overlay}, load_and_filter


def _read_local(file: str | os.PathLike) -> Mapping[str, Any]:
    try:
        return read(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_download(url: str, cache_dir: str | os.PathLike | None) -> Mapping[str, Any]:
    path = downloads.fetch(url, cache_dir, _known_hash(url), read)
    try:
        return read(path)
    except ValueError as error:
        raise RuntimeError(f"{path} can't be used; delete it, and it is downloaded again: {error}") from error


def _local_file(variant: str, kwargs: Mapping[str, Any]) -> str | os.PathLike | None:
    """The file that `build_model_with_cfg` would load; None if the weights come from elsewhere."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return None if cfg.source or cfg.state_dict or cfg.custom_load else cfg.file or None


def _download_url(variant: str, kwargs: Mapping[str, Any]) -> str | None:
    """What `build_model_with_cfg` would download by http or https; None if the weights come from elsewhere."""
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    url = cfg.url
    if cfg.source or cfg.state_dict or cfg.file or cfg.custom_load or not isinstance(url, str):
        return None
    # timm prefers the hub. An address in the call takes precedence over a repository that the call does not name.
    own = overlay.get("url") and not overlay.get("hf_hub_id")
    if cfg.hf_hub_id and not own and f"/{cfg.hf_hub_id}/" not in url:
        return None
    return url if url.startswith(("http://", "https://")) else None


def _known_hash(url: str) -> str:
    """The sha256 of a published file, or its first digits; "" if it is not known.

    It is in the manifest, or in the file's name if timm is told to check the hash there.
    """
    entries = (entry for family in zoo.FAMILIES for entry in manifest(family) if entry.get("url") == url)
    entry: Mapping[str, Any] = next(entries, {})
    named = torch.hub.HASH_REGEX.search(url.rpartition("/")[2]) if _builder._CHECK_HASH else None
    return entry.get("sha256") or entry.get("sha256_prefix") or (named[1] if named else "")


def check_network(name: str, pretrained: bool) -> None:
    """Raise RuntimeError if timm would ask the Hugging Face hub for the model `name`, and the hub does not answer.

    timm asks for the weights of its own models, and for names such as "hf-hub:owner/repository".
    """
    source, _, repo = name.rpartition(":")
    if source not in ("hf-hub", "hf_hub"):
        cfg = timm.get_pretrained_cfg(name) if pretrained and not source else None
        if cfg is None or timm.model_entrypoint(name.partition(".")[0]).__module__.startswith(f"{__package__}."):
            return
        repo = cfg.hf_hub_id or ""
    files = ("model.safetensors", "pytorch_model.bin")
    repo, _, revision = (repo or "").partition("@")
    if repo and not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        downloads.check_hub(repo, files[0], revision or None)


def file_overlay(
    file: str | os.PathLike, cfg: PretrainedCfg | None
) -> tuple[dict[str, Any], int | None, tuple[int, int] | None]:
    """The `pretrained_cfg_overlay` with which timm loads a file into any model, and what the file's classifier is.

    Args:
        file: The checkpoint.
        cfg: The model's pretrained configuration, which names its classifier.

    Returns:
        The overlay; the number of classes, None if the file has no classifier of that name; and the numbers of queries
        and of channels if the classifier has efficient probing, otherwise None.

    Raises:
        ValueError: The file can't be used. The message does not name it.
        OSError: The file can't be opened.
    """
    state_dict = unwrap(read(file))
    check_values(state_dict)
    overlay: dict[str, Any] = {"file": os.fspath(file), "custom_load": False}
    classifier = cfg.classifier if cfg else None
    weight = classifier_weight(state_dict, classifier)
    if weight is None or not weight.ndim:
        return overlay, None, None
    token = state_dict.get(f"{classifier}.0.cls_token")
    queries = (token.shape[1], token.shape[2]) if token is not None and token.ndim == 3 else None
    # timm keeps the classifier if the model's number of classes is this one, and drops it otherwise.
    return overlay | {"num_classes": len(weight)}, len(weight), queries
