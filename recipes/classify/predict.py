"""Predictions of a classifier for any images: `zoo-predict`."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from zoo.messages import UserError
from zoo.recipes import atomic_files, distributed, logs, run_folder
from zoo.recipes.classify import multi_label
from zoo.recipes.classify.accuracy import Normalize
from zoo.recipes.classify.data import build_transform
from zoo.recipes.classify.evaluate import from_run
from zoo.recipes.classify.model import input_config
from zoo.recipes.classify.train_state import autocast
from zoo.recipes.given_images import GivenImages
from zoo.recipes.inputs import Input, Inputs, as_text, shown
from zoo.recipes.logs import log
from zoo.recipes.progress import Progress
from zoo.recipes.results import Prediction
from zoo.recipes.run_weights import prediction_config
from zoo.recipes.subsets import evenly_spread

NAMES = ("predictions.csv", "predictions.json", "predictions.png")
_TOP = 5  # classes written for each image
_MOST_ROWS = 20  # rows of the printed table
_LEAST_ROOM = 32  # characters of a path in the table
_MOST_PICTURES = 40  # pictures on the contact sheet

Guesses = list[tuple[str, float]]  # classes with their probabilities, the most probable first


@dataclass
class _Prediction:
    path: Path
    guesses: Guesses
    labels: Guesses | None  # of a model of several labels per image
    thumbnail: Image.Image | None


def predict(settings: Any, inputs: Inputs, out: Path) -> None:
    """Print, write and draw the classes that the model of a run predicts for images.

    Args:
        settings: A `PredictConfig`.
        inputs: The images.
        out: The output folder; it does not have to exist.

    Raises:
        UserError: The user can correct the cause; or, at the end, images were left out.
    """
    inputs.protect(out / name for name in NAMES)
    classifier = _Classifier(settings)
    run_folder.make_folder(out, None)
    cfg, classes = classifier.cfg, classifier.classes
    pictured = set(evenly_spread(inputs.found, _MOST_PICTURES))
    predictions: list[_Prediction] = []

    def thumbnail(item: Input, image: Image.Image) -> Image.Image | None:
        return _thumbnail(image) if item in pictured else None

    try:
        with Progress(True) as bar:
            bar.start_evaluation(len(inputs.found))
            read = inputs.read(classifier.channels, cfg.data.max_pixels, bar.advance_evaluation)
            prepared = _prepared(read, classifier.transform, thumbnail, inputs.fail)
            for batch in _batches(prepared, cfg.trainer.batch_size):
                predictions += _classify(batch, classifier, inputs)
    finally:
        about = {"run": settings.run, "model": cfg.model, "weights": classifier.weights}
        about |= {"temperature": settings.temperature}
        _write(out, predictions, inputs, classes, about)
    _print(predictions)
    log.info("%d images%s. Written to %s", len(predictions), _summary(predictions), shown(out))
    inputs.conclude()


def results(settings: Any, given: GivenImages) -> list[Prediction]:
    """The predictions of the model of a run for the images of a program, in their order.

    Args:
        settings: A `PredictConfig`.
        given: The images.

    Raises:
        UserError: The user can correct the cause.
    """
    classifier = _Classifier(settings)
    classes, limits, found = classifier.classes, classifier.limits, []
    with Progress(True) as bar:
        bar.start_evaluation(len(given.found))
        read = given.read(classifier.channels, classifier.cfg.data.max_pixels, bar.advance_evaluation)
        prepared = _prepared(read, classifier.transform, lambda _, image: image.size, given.fail)
        for batch in _batches(prepared, classifier.cfg.trainer.batch_size):
            for (source, _, (width, height)), row in _rows(batch, classifier, given.fail):
                scores, order = row.sort(descending=True, stable=True)
                names = [classes[label] for label in order.tolist()]
                chosen = None if limits is None else scores.numpy() >= limits[order.numpy()]
                found.append(Prediction(source, (height, width), names, scores.numpy(), chosen=chosen))
    return found


class _Classifier:
    """The model of a run, which maps transformed images to probabilities.

    Args:
        settings: A `PredictConfig`.

    Raises:
        UserError: The user can correct the cause.
    """

    def __init__(self, settings: Any):
        if settings.score is not None:
            raise UserError(
                f"score={settings.score} is for detectors, but {settings.run} is a classifier's run: leave it out."
            )
        model, self.cfg, self.classes, self.weights = from_run(*prediction_config(settings))
        self.limits = multi_label.thresholds(self.cfg, self.classes) if self.cfg.data.multi_label else None
        if self.limits is None:
            multi_label.refuse_threshold(self.cfg)
        elif settings.temperature != 1:
            raise UserError(f"temperature={settings.temperature:g} is for images with one label each: leave it out.")
        self.temperature = settings.temperature
        self.device = distributed.setup(settings.device)
        data_config, channels_last = input_config(model, self.cfg.data), self.cfg.trainer.channels_last
        self.channels = data_config["input_size"][0]
        self.transform = build_transform(None, data_config)
        self.normalize = Normalize(data_config, self.device, channels_last)
        self.model = model.to(self.device).eval()
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """The probabilities (B, classes) of images (C, H, W), uint8."""
        with autocast(self.cfg.trainer.amp, self.device):
            logits = self.model(self.normalize(torch.stack(batch))).float() / self.temperature
        return (logits.softmax(1) if self.limits is None else logits.sigmoid()).cpu()


Prepared = tuple[Any, torch.Tensor, Any]
Fail = Callable[[Any, Exception], None]


def _prepared(
    read: Iterable[tuple[Any, Image.Image]], transform: Callable, keep: Callable[[Any, Image.Image], Any], fail: Fail
) -> Iterator[Prepared]:
    """Yield each image transformed for the model, with what `keep` returns; `fail` is called where this fails."""
    for item, image in read:
        try:
            prepared = item, torch.as_tensor(transform(image)), keep(item, image)
        except Exception as error:  # Pillow's, if memory runs out
            fail(item, error)
        else:
            yield prepared


def _batches(items: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(batch: list[Prepared], classifier: _Classifier, fail: Fail) -> Iterator[tuple[Prepared, torch.Tensor]]:
    """The items of a batch, each with its probabilities; `fail` is called with an image that has none."""
    try:
        probabilities = classifier([pixels for _, pixels, _ in batch])
    except Exception as error:  # models can raise any error
        if len(batch) == 1:
            fail(batch[0][0], error)
        else:  # one image is the cause, or the batch does not fit in memory
            for one in batch:
                yield from _rows([one], classifier, fail)
        return
    for item, row in zip(batch, probabilities, strict=True):
        if row.isfinite().all():
            yield item, row
        else:
            fail(item[0], ValueError("its scores are not finite"))


def _classify(batch: list[Prepared], classifier: _Classifier, inputs: Inputs) -> Iterator[_Prediction]:
    classes, limits = classifier.classes, classifier.limits
    for (item, _, thumbnail), row in _rows(batch, classifier, inputs.fail):
        # All classes can be among the labels.
        values, order = row.topk(min(_TOP, len(classes)) if limits is None else len(classes))
        named = [(as_text(classes[i]), round(p, 6)) for i, p in zip(order.tolist(), values.tolist(), strict=True)]
        labels = None
        if limits is not None:
            labels = [guess for guess, i in zip(named, order.tolist(), strict=True) if row[i] >= limits[i]]
        yield _Prediction(item.path, named[:_TOP], labels, thumbnail)


# Output.


def _write(
    out: Path, predictions: list[_Prediction], inputs: Inputs, classes: Sequence[str], about: dict[str, Any]
) -> None:
    columns = [f"{what}_{i}" for i in range(1, min(_TOP, len(classes)) + 1) for what in ("class", "probability")]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    several = any(item.labels is not None for item in predictions)
    writer.writerow(["image", *["labels"][:several], *columns])
    for item in predictions:
        labels = ["|".join(name for name, _ in item.labels)] if item.labels is not None else []
        writer.writerow([as_text(item.path), *labels, *(value for guess in item.guesses for value in guess)])
    atomic_files.write_text(out / "predictions.csv", table.getvalue())
    content = {
        **about,
        "images": [
            {
                "image": as_text(item.path),
                **({} if item.labels is None else {"labels": [name for name, _ in item.labels]}),
                "predictions": [{"class": name, "probability": probability} for name, probability in item.guesses],
            }
            for item in predictions
        ],
        "left_out": [as_text(path) for path in (*inputs.unread, *inputs.failed)],
    }
    atomic_files.write_json(out / "predictions.json", content)
    pictured = [item for item in predictions if item.thumbnail]
    if pictured:
        title = (
            f"{len(pictured)} of {len(predictions)} images, evenly spread" if len(pictured) < len(predictions) else ""
        )
        with atomic_files.atomic(out / "predictions.png") as file:
            _sheet(pictured, title).save(file, format="png")


def _print(predictions: list[_Prediction]) -> None:
    """Print a table of the first images, with as many classes as leave room for the paths."""
    if not predictions:
        return
    if predictions[0].labels is not None:
        _print_labels(predictions)
        return
    cells = [
        [cell for name, p in item.guesses for cell in (_cut(shown(name), 24), f"{100 * p:.1f}")]
        for item in predictions[:_MOST_ROWS]
    ]
    widths = [2 + max(4, *map(cell_len, column)) for column in zip(*cells, strict=True)]
    for count in range(min(6, len(widths)), 0, -2):
        room = logs.console.width - sum(widths[:count]) - 2
        if room >= _LEAST_ROOM:
            break
    table = Table("image", box=None, header_style="bold", pad_edge=False)
    for title in ("first", "second", "third")[: count // 2]:
        table.add_column(title)
        table.add_column("%", justify="right")
    for item, row in zip(predictions, cells, strict=False):
        path = shown(item.path)
        table.add_row(*map(Text, (path if len(path) <= room else f"…{path[1 - room :]}", *row[:count])))
    logs.console.print(table)
    _print_rest(predictions)


def _print_labels(predictions: list[_Prediction]) -> None:
    """Print a table of the first images with all their labels."""
    table = Table("image", "labels (%)", box=None, header_style="bold", pad_edge=False)
    for item in predictions[:_MOST_ROWS]:
        path = shown(item.path)
        labels = ", ".join(f"{shown(name)} {100 * p:.1f}" for name, p in item.labels or ()) or "-"
        table.add_row(Text(path if len(path) <= 2 * _LEAST_ROOM else f"…{path[1 - 2 * _LEAST_ROOM :]}"), Text(labels))
    logs.console.print(table)
    _print_rest(predictions)


def _print_rest(predictions: list[_Prediction]) -> None:
    if len(predictions) > _MOST_ROWS:
        logs.console.print(f"and {len(predictions) - _MOST_ROWS} more, all in predictions.csv", highlight=False)


def _summary(predictions: list[_Prediction]) -> str:
    """How often the most frequent classes are the first prediction, or are among the labels."""
    firsts = ([item.guesses[0]] if item.labels is None else item.labels for item in predictions)
    counts = Counter(name for guesses in firsts for name, _ in guesses)
    parts = [f"{shown(name)} ({count})" for name, count in counts.most_common(5)]
    if len(counts) > len(parts):
        parts.append(f"others ({sum(counts.values()) - sum(count for _, count in counts.most_common(5))})")
    return f": {', '.join(parts)}" if parts else ""


def _cut(text: str, length: int) -> str:
    """`text` shortened to `length` characters, with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


# The contact sheet; sizes are in pixels.

_CELL, _PICTURE, _LINE, _GAP = 240, 180, 19, 14


def _thumbnail(image: Image.Image) -> Image.Image:
    """`image` as RGB, resized for the sheet."""
    small = ImageOps.contain(image, (_CELL, _PICTURE))
    background = Image.new("RGB", small.size, "white")
    background.paste(small, mask=small.getchannel("A") if small.mode == "RGBA" else None)
    return background


def _sheet(predictions: Sequence[_Prediction], title: str) -> Image.Image:
    """A picture of the images, each with its first three classes and its file name below; predicted ones are bold."""
    from matplotlib.font_manager import findfont  # ships DejaVu Sans

    plain = ImageFont.truetype(findfont("DejaVu Sans"), 13)
    bold = ImageFont.truetype(findfont("DejaVu Sans:bold"), 14)
    columns = min(5, len(predictions))
    rows = math.ceil(len(predictions) / columns)
    height, top = _PICTURE + 4 * _LINE + 2 * _GAP, 2 * _GAP + _LINE if title else _GAP
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, "black", bold)
    for number, item in enumerate(predictions):
        x = _GAP + number % columns * (_CELL + _GAP)
        y = top + number // columns * height
        picture = item.thumbnail
        draw.rectangle((x, y, x + _CELL, y + _PICTURE), "#f0f0f0")
        sheet.paste(picture, (x + (_CELL - picture.width) // 2, y + (_PICTURE - picture.height) // 2))
        y += _PICTURE + _GAP // 2
        for place, (name, probability) in enumerate(item.guesses[:3]):
            chosen = not place if item.labels is None else (name, probability) in item.labels
            font, color = (bold, "black") if chosen else (plain, "#606060")
            figure = f"{100 * probability:.0f} %" if probability >= 0.01 else "<1 %"
            draw.text((x, y), _fitting(shown(name), font, _CELL - 60), color, font)
            draw.text((x + _CELL, y), figure, color, font, anchor="ra")
            y += _LINE
        draw.text((x, y), _fitting(shown(item.path.name), plain, _CELL), "#1a5fb4", plain)
    return sheet


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` shortened to `width` pixels."""
    text = _cut(text, 60)
    while font.getlength(text) > width:
        text = f"{text[:-2]}…"
    return text
