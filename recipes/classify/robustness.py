"""The accuracy of a classifier on corrupted images: `zoo-eval robustness=corruptions`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from timm.task import evaluation_sample_limit
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from zoo.messages import UserError, did_you_mean
from zoo.recipes import atomic_files, distributed, logs, reading, sheet
from zoo.recipes.classify.accuracy import Evaluation, Normalize, percentage
from zoo.recipes.classify.corruptions import NAMES, corrupt
from zoo.recipes.classify.data import Data, Samples, Stream, build_transform, build_val_loader
from zoo.recipes.classify.model import input_config
from zoo.recipes.classify.train_state import autocast
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.reading import Corruptions
from zoo.recipes.sheet import Tile


class _Rows(TypedDict):
    identity: str
    rows: dict[str, list[float]]


class Unfinished:
    """The finished parts of a long evaluation, in a file, so that an interrupted evaluation goes on.

    Args:
        path: The file.
        identity: What the parts depend on; parts of another identity are not used.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path = path
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.rows: dict[str, list[float]] = distributed.first(self._read)

    def _read(self) -> dict[str, list[float]]:
        with suppress(UserError):  # a damaged file only costs time
            found = reading.load(self.path, _Rows)
            return found["rows"] if found and found["identity"] == self.identity else {}
        return {}

    def add(self, name: str, row: list[float]) -> None:
        """Keep a part."""
        self.rows[name] = row
        if distributed.rank() == 0:
            atomic_files.write_json(self.path, {"identity": self.identity, "rows": self.rows})

    def close(self) -> None:
        """Remove the file: the evaluation is finished."""
        if distributed.rank() == 0:
            self.path.unlink(missing_ok=True)


class Corrupted(Samples):
    """`Samples` for evaluation in which each image is a stack of its corrupted copies (severities, C, H, W).

    They are made of the transformed image, that is, at the size of the model's input.
    """

    def __init__(self, *arguments: Any, name: str, severities: Sequence[int], **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.corruption, self.severities = name, list(severities)
        self.input_size = (len(self.severities), *self.input_size)  # of an unread image

    def finish(self, image: Any) -> torch.Tensor:
        """Transform an image and corrupt it."""
        clean = super().finish(image).permute(1, 2, 0).numpy()
        copies = [corrupt(clean, self.corruption, severity, self.seed) for severity in self.severities]
        return torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def predictions(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    autocast: AbstractContextManager,
    on_batch: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The labels (N,), the predicted classes (N,) or (N, V), and the names of corrupt images, of all processes.

    Args:
        model: Maps images to logits (B, classes).
        loader: Batches of data.collate, whose images may be stacks (B, V, C, H, W); the label -1 marks those that can't
            be read, which do not count.
        normalize: Converts uint8 images to the model's input.
        autocast: The context of the forward pass, entered once per batch.
        on_batch: Called after every batch.
    """
    left = evaluation_sample_limit(loader)
    labels, answers, corrupt = [], [], []
    model.eval()
    for images, targets, names in loader:
        count = len(targets) if left is None else min(left, len(targets))
        left = None if left is None else left - count
        with autocast:
            logits = model(normalize(images.flatten(0, -4)))
        found = logits.argmax(1).view(images.shape[:-3]).cpu()
        good = targets[:count] >= 0
        labels.append(targets[:count][good])
        answers.append(found[:count][good])
        corrupt += names if count else []
        on_batch()
    own = (torch.cat(labels).numpy(), torch.cat(answers).numpy()) if labels else ([], [])
    parts = distributed.gather((*own, corrupt))
    unread = sorted({name for part in parts for name in part[2]})
    given = [part for part in parts if len(part[0])]
    if not given:
        raise UserError(f"no image could be read: the first of {len(unread)} corrupt ones is {unread[:1]}.")
    return np.concatenate([part[0] for part in given]), np.concatenate([part[1] for part in given]), unread


def weights_hash(model: nn.Module) -> str:
    """A hash of the model's parameters and buffers."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def chosen(cfg: DictConfig) -> list[str]:
    """The names of the corruptions that `cfg` asks for.

    Raises:
        UserError: There is no such corruption.
    """
    for name in cfg.corruptions or ():
        if name not in NAMES:
            hint = did_you_mean(name, NAMES, cutoff=0.5)
            raise UserError(
                f"corruptions: there is no {name!r}{': ' + hint if hint else '.'} There are {', '.join(NAMES)}."
            )
    return [name for name in NAMES if name in (cfg.corruptions or NAMES)]


def evaluate(
    cfg: DictConfig, model: nn.Module, data: Data, device: torch.device, clean: Evaluation, folder: Path
) -> Corruptions:
    """Evaluate `model` on corrupted copies of the validation images, print a table and draw the corruptions.

    Args:
        cfg: The configuration.
        model: Is on `device`.
        data: The validation images.
        device: Where to evaluate.
        clean: The result on the images as they are.
        folder: The output folder. An evaluation that is interrupted goes on with what it left there.

    Raises:
        UserError: There is no such corruption, or the folder can't be written to.
    """
    names, severities = chosen(cfg), sorted(set(cfg.severities))
    data_config = input_config(model, cfg.data)
    transform, size = build_transform(None, data_config), data_config["input_size"]
    normalize = Normalize(data_config, device, cfg.trainer.channels_last)
    batch = max(1, cfg.trainer.batch_size // len(severities))
    unfinished = Unfinished(
        folder / "corruptions.part.json",
        {
            "weights": weights_hash(model),
            "data": OmegaConf.to_container(cfg.data),
            "settings": [cfg.model, cfg.seed, cfg.trainer.amp, severities],
            "clean": [clean.targets.tolist(), clean.predictions.tolist()],
        },
    )

    def loader(name: str) -> DataLoader:
        samples = Corrupted(
            data.val, transform, cfg.seed, False, size, max_pixels=cfg.data.max_pixels, name=name, severities=severities
        )
        return build_val_loader(data, samples, batch, cfg.data, device)

    left = [name for name in names if name not in unfinished.rows]
    if len(left) < len(names):
        log.info("Continues: %d of %d corruptions are done.", len(names) - len(left), len(names))
    begun = time.monotonic()
    with Progress(distributed.rank() == 0) as bar:
        try:
            for number, name in enumerate(left, 1):
                batches = loader(name)
                if number == 1:
                    bar.start_evaluation(None if data.val_indices is None else len(left) * len(batches))
                context = autocast(cfg.trainer.amp, device)
                labels, answers, _ = predictions(model, batches, normalize, context, bar.advance_evaluation)
                unfinished.add(name, (100 * (answers == labels[:, None]).mean(0)).tolist())
                if not logs.console.is_terminal:
                    rest = round((time.monotonic() - begun) / number * (len(left) - number))
                    mean = percentage(float(np.mean(unfinished.rows[name])))
                    log.info("%s: %s; about %d:%02d min left", name, mean, *divmod(rest, 60))
        except KeyboardInterrupt:
            place = "" if cfg.run or cfg.out else f" with out={folder}"
            done = len(unfinished.rows)
            log.info("%d of %d corruptions are done; the same command%s goes on from there.", done, len(names), place)
            raise
    rows = {name: unfinished.rows[name] for name in names}
    mean, top1 = float(np.mean(list(rows.values()))), clean.metrics["top1"]
    found: Corruptions = {
        "severities": severities,
        "seed": cfg.seed,
        "image_size": list(size[1:]),
        "images": len(clean.targets),
        "clean": top1,
        "top1": rows,
        "mean": mean,
        "relative": 100 * mean / top1 if top1 else 0.0,
    }
    if distributed.rank() == 0:
        _print(found)
        samples = Samples(data.val, transform, cfg.seed, False, size, max_pixels=cfg.data.max_pixels)
        _draw(folder / "corruptions.png", data, samples, names, severities)
    unfinished.close()
    return found


def _print(found: Corruptions) -> None:
    table = Table("corruption, severity", *map(str, found["severities"]), "mean")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in found["top1"].items():
        table.add_row(name, *(f"{value:.1f}" for value in (*row, float(np.mean(row)))))
    table.add_section()
    columns = np.mean(list(found["top1"].values()), axis=0)
    table.add_row("mean", *(f"{value:.1f}" for value in (*columns, found["mean"])))
    logs.console.print(table)
    log.info(
        "Corrupted: top-1 %s on average, %.1f %% of the %s without corruption",
        percentage(found["mean"]),
        found["relative"],
        percentage(found["clean"]),
    )


def _draw(path: Path, data: Data, samples: Samples, names: Sequence[str], severities: Sequence[int]) -> None:
    """Draw one image with all corruptions, at the lowest, the middle and the highest severity."""
    items = (
        iter(Stream(data.val, samples))
        if data.val_indices is None
        else (samples[0, index] for index in data.val_indices)
    )
    clean = next(image for image, label, _ in items if label >= 0).permute(1, 2, 0).numpy()
    shown = sorted({severities[0], severities[len(severities) // 2], severities[-1]})
    groups = [
        [
            Tile(to_pil_image(corrupt(clean, name, severity, samples.seed)).convert("RGB"), f"{name} {severity}")
            for severity in shown
        ]
        for name in names
    ]
    listed = " and ".join(filter(None, (", ".join(map(str, shown[:-1])), str(shown[-1]))))
    title = f"One image, at severit{'y' if len(shown) == 1 else 'ies'} {listed}."
    sheet.write(path, groups, title=title, columns=3 * len(shown))
