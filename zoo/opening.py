"""Opening a model by its name, its tag, a checkpoint file or the folder of a run, with errors that help the user."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import split_model_name_tag
from torch import nn

from zoo.arguments import is_ep, is_number
from zoo.checkpoint_files import read, unwrap
from zoo.efficient_probing import attach, default_queries, queries_of
from zoo.messages import OptionError, UserError, one_line, similar_path, unknown_model
from zoo.pretrained import check_network, file_overlay

__all__ = ["OpenModel", "check_name", "open_model", "takes_one_size", "weights_file"]


@dataclass
class OpenModel:
    """A model in eval mode.

    Attributes:
        model: The model.
        name: Its name, for captions.
        weights: What its weights are, for captions.
        config: Its data configuration, as timm resolves it: `input_size`, `mean`, `std`, ...
        one_size: Whether it takes images of one size only.
    """

    model: nn.Module
    name: str
    weights: str
    config: dict[str, Any]
    one_size: bool


def open_model(
    name: str,
    pretrained: bool | str = False,
    *,
    size: int | Sequence[int] | None = None,
    checkpoint: str = "last",
    new_classifier: bool = False,
    **kwargs: Any,
) -> OpenModel:
    """Create the model `name`.

    Args:
        name: A name that `timm.create_model` takes, with or without tag or source ("hf-hub:..."), or the folder of a
            classifier's finished run.
        pretrained: Whether to load the published weights; or a checkpoint, or the folder of a run, to load instead.
            Without `num_classes`, the classifier gets as many classes as the checkpoint has.
        size: Side of the images, or height and width. Only models that take one size are created for it.
        checkpoint: Which weights of a run folder `name` to load: `last` or `best`.
        new_classifier: Whether the classifier that a checkpoint has is not loaded.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        OptionError: The arguments contradict each other.
        UserError: The model, the file or the weights do not exist or do not fit together.
    """
    folder, given = Path(name), dict(kwargs)
    source, label, weights = name, name.rpartition("/")[2], "random weights"
    probing: _Probing | None = None
    if folder.is_dir() and not timm.is_model(name):
        given |= _run_weights(folder, checkpoint)
        for option, text in ((pretrained, "pretrained weights"), ("num_classes" in kwargs, "number of classes")):
            if option:
                raise OptionError(f"{name} is a run folder, with its own weights and classes: leave out the {text}.")
        source, label, weights = f"local-dir:{name}", folder.resolve().name, f"its {checkpoint} weights"
        config = _read_config(folder / "config.json")
        one_size = config["pretrained_cfg"].get("fixed_input_size", False)
        probing = None if kwargs.get("features_only") else _probing_of_run(folder, config, checkpoint)
    elif checkpoint != "last":
        raise OptionError(f"{name} is not a run folder, so it has no {checkpoint} weights: leave out the checkpoint.")
    else:
        check_name(name)
        if ":" in name and isinstance(pretrained, str):
            raise OptionError(f"{name} has its own weights: leave out {pretrained}.")
        one_size = takes_one_size(name)
    if pretrained is True:
        given["pretrained"], weights = True, "published weights"
    elif pretrained:
        file = weights_file(Path(pretrained))
        given = _file_weights(name, file, given, new_classifier) | given
        weights = f"weights of {Path(pretrained).name}"
    if one_size and size:
        given.setdefault("img_size", size)
    if is_ep(given.get("global_pool")) and not _is_ours(source):
        own = weights_file(Path(pretrained)) if isinstance(pretrained, str) else None
        probing = _Probing(given.get("num_classes"), queries_of(given["global_pool"]), own)
    try:
        check_network(source, pretrained is True)
        model = (probing.create(source, given) if probing else timm.create_model(source, **given)).eval()
    except MemoryError:
        raise
    except Exception as error:  # timm, a download or a file can raise anything
        if pretrained and not isinstance(error, TypeError):
            using = f" with {pretrained if isinstance(pretrained, str) else 'the published weights'}"
        else:
            using = f" with {', '.join(f'{key}={value!r}' for key, value in kwargs.items())}" if kwargs else ""
        raise UserError(f"{name} can't be created{using}: {one_line(error, 600)}.") from error
    return OpenModel(model, label, weights, resolve_model_data_config(model), one_size)


def check_name(name: str) -> None:
    """Raise UserError if timm knows neither the model nor the tag. Names with a source, such as "hf-hub:", pass."""
    if ":" in name:
        return
    if "/" in name or name.startswith("."):
        hint = similar_path(Path(name))
        raise UserError(f"there is no folder {name}{hint} Give the folder of a finished run, or the name of a model.")
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        raise UserError(unknown_model(architecture, timm.list_models()))
    names = map(split_model_name_tag, timm.list_models(f"{architecture}*", include_tags=True))
    tags = [other for model, other in names if model == architecture and other]
    if tag and tag not in tags:
        raise UserError(f"{architecture} has no weights {tag!r}: it has {', '.join(tags) or 'none'}.")


def takes_one_size(name: str) -> bool:
    """Whether timm's model `name` takes images of one size only, the one that its argument `img_size` sets."""
    config = None if ":" in name else timm.get_pretrained_cfg(split_model_name_tag(name)[0])
    return bool(config and config.fixed_input_size)


def weights_file(path: Path) -> Path:
    """The checkpoint that `path` names: the file itself, or the weights in the folder of a run.

    Raises:
        UserError: There is no such file, or the folder has no weights.
    """
    if not os.path.lexists(path):  # pathlib raises an error for some names that no file can have
        raise UserError(f"there is no checkpoint {path}{similar_path(path)}")
    if not os.path.isdir(path):
        return path
    for name in ("model.safetensors", "best.safetensors"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} has no model.safetensors or best.safetensors: is it the folder of a run?")


def _file_weights(name: str, file: Path, given: Mapping[str, Any], new_classifier: bool) -> dict[str, Any]:
    """Arguments of `timm.create_model` that load `file`, with as many classes as the file has.

    Args:
        name: The name of the model.
        file: The checkpoint.
        given: The caller's arguments.
        new_classifier: Whether the file's classifier is not loaded.
    """
    try:
        overlay, classes, found_queries = file_overlay(file, timm.get_pretrained_cfg(split_model_name_tag(name)[0]))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} can't be read as a checkpoint: {one_line(error, 600)}.") from error
    found = {} if classes is None else {"num_classes": classes}
    probing, same = is_ep(given.get("global_pool")), given.get("num_classes", classes) == classes
    if classes is not None and same and not given.get("features_only"):
        if found_queries and not new_classifier:
            queries, channels = found_queries
            way = f"give global_pool=ep{queries} (model_kwargs.global_pool=... to zoo-train and zoo-eval)"
            if not probing:
                raise UserError(f"{file} pools by efficient probing, but {name} is created without it: {way}.")
            asked = queries_of(given["global_pool"]) or default_queries(channels)
            if asked != queries:
                raise UserError(
                    f"{file} pools by efficient probing with {queries} queries, but {name} is created with {asked}: "
                    f"{way}."
                )
        # timm drops the file's classifier, and the model keeps its own. `_Probing` does this for timm's models.
        if new_classifier or (probing and not found_queries and _is_ours(name)):
            overlay["num_classes"] = 0
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, **found}


def _run_weights(folder: Path, checkpoint: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that load the weights of a run."""
    if not all((folder / file).is_file() for file in ("config.json", "model.safetensors")):
        raise UserError(
            f"{folder} has no config.json and model.safetensors: give the folder of a classifier's finished run."
        )
    if checkpoint == "last":
        return {"pretrained": True}
    best = folder / "best.safetensors"
    if not best.is_file():
        raise UserError(f"{folder} has no best.safetensors: its last weights are its only ones.")
    overlay = {"source": "", "file": str(best), "custom_load": False}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


@dataclass
class _Probing:
    """Efficient probing on one of timm's models, which do not have it themselves as those of the zoo do.

    Attributes:
        num_classes: Number of classes; that of the published weights if None.
        num_queries: Number of queries; None for the default.
        file: A checkpoint that may have the head's weights, too; or None.
        whole: Whether the file is a run's, whose weights are all loaded here.
    """

    num_classes: int | None
    num_queries: int | None
    file: Path | None
    whole: bool = False

    def create(self, source: str, given: Mapping[str, Any]) -> nn.Module:
        """`timm.create_model(source, **given)` with a head of efficient probing."""
        left_out = ("num_classes", "global_pool", *(("pretrained", "pretrained_cfg_overlay") if self.whole else ()))
        kwargs = {name: value for name, value in given.items() if name not in left_out}
        model: Any = timm.create_model(source, num_classes=0, **kwargs)
        classes = model.pretrained_cfg["num_classes"] if self.num_classes is None else self.num_classes
        attach(model, classes, self.num_queries, given.get("img_size"))
        if self.file:
            weights, place = read(self.file), model.pretrained_cfg["classifier"]
            weights = weights if self.whole else unwrap(weights)
            head = {key: value for key, value in weights.items() if key.startswith(f"{place}.")}
            if self.whole or (f"{place}.0.cls_token" in head and len(head.get(f"{place}.2.bias", ())) == classes):
                model.load_state_dict(weights if self.whole else {**model.state_dict(), **head})
        return model


def _is_ours(source: str) -> bool:
    """Whether timm's name of a model, without a source such as "hf-hub:", is one of the zoo's."""
    name = split_model_name_tag(source)[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith(f"{__package__}.")


def _probing_of_run(folder: Path, config: Mapping[str, Any], checkpoint: str) -> _Probing | None:
    """The head of efficient probing that a run gave to one of timm's models; None if it did not."""
    queries = config.get("efficient_probing")
    if queries is None:
        return None
    if not is_number(queries, 1, 2**14) or not is_number(config.get("num_classes"), 1, 10**7):
        raise UserError(f"{folder / 'config.json'} does not describe a model: its efficient_probing is {queries!r}.")
    file = folder / ("model.safetensors" if checkpoint == "last" else "best.safetensors")
    return _Probing(config["num_classes"], queries, file, whole=True)


def _read_config(path: Path) -> Mapping[str, Any]:
    """The content of a run's config.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({one_line(error, 600)}): train the model again.") from error
    config = content.get("pretrained_cfg") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not isinstance(content.get("architecture"), str):
        raise UserError(f"{path} does not describe a model: it has no architecture and pretrained_cfg.")
    return content
