"""The images that a command line names, read one by one; files that are not images are logged and left out."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from PIL import Image

from zoo.messages import UserError, one_line, similar_path
from zoo.recipes import images

log = logging.getLogger("zoo")
ENDINGS = images.ENDINGS | {".gif"}
_LONGEST_NAME = 200  # bytes; file systems allow 255, which also have to hold an extension and a number
# The aspect ratio beyond which an image is refused: resized to a model's size, its long side would fill the memory.
_MOST_NARROW = 200


@dataclass(frozen=True)
class Input:
    """An image file, and its name below an output folder; names are unique even without their extensions."""

    path: Path
    name: Path


class Inputs:
    """The images of a command, in files and folders; links to folders are not followed.

    Args:
        paths: Files and folders.
        out: The output folder, if there is one. Files below it are left out if it is inside one of `paths`.

    Attributes:
        found: The image files.
        unread: Those that can't be read as images.
        failed: Images on which the model failed.

    Raises:
        UserError: A path does not exist, or a folder has no images.
    """

    def __init__(self, paths: Sequence[Path], out: Path | None):
        self.found: list[Input] = []
        self.unread: list[Path] = []
        self.failed: list[Path] = []
        self.total = 0
        taken: set[str] = set()
        for path in paths:
            if os.path.isdir(path):
                found = [(file, file.relative_to(path)) for file in self._below(path, out)]
                if not found and not self.unread:
                    raise UserError(f"the folder {path} has no images ({', '.join(sorted(ENDINGS))}).")
            elif os.path.lexists(path):
                found = [(path, Path(path.name))]
            else:
                where = similar_path(path)
                raise UserError(f"{path} does not exist{where} Give images or folders, and the output folder last.")
            folders = {str(folder).casefold() for _, name in found for folder in name.parents}
            self.found += [Input(file, _unique(name, taken, folders)) for file, name in found]
            self.total += len(found)

    def _below(self, folder: Path, out: Path | None) -> list[Path]:
        files, target = [], os.path.realpath(out) if out else None
        for root, folders, names in os.walk(folder, onerror=self._leave_out_folder):
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) != target]
            files += [Path(root, name) for name in names if os.path.splitext(name)[1].lower() in ENDINGS]
        return sorted(files)

    def _leave_out_folder(self, error: OSError) -> None:
        self.unread.append(Path(error.filename))
        self.total += 1
        log.warning("The folder %s can't be read (%s).", shown(error.filename), error.strerror)

    def protect(self, targets: Iterable[Path]) -> None:
        """Refuse to overwrite an image.

        Raises:
            UserError: One of `targets` is an image of the command.
        """
        sources = {os.path.realpath(item.path) for item in self.found}
        for target in targets:
            if os.path.realpath(target) in sources:
                raise UserError(f"the image {shown(target)} would be overwritten: give another output folder.")

    def read(self, channels: int, max_pixels: int, advance: Callable[[], None]) -> Iterator[tuple[Input, Image.Image]]:
        """Yield the images that can be read, upright, with `channels` channels; `advance` is called after each file."""
        for item in self.found:
            try:
                image = open_input(item.path, channels, max_pixels)
            except (OSError, images.ImageError) as error:
                self.leave_out(item, error)
            else:
                yield item, image
            advance()

    def leave_out(self, item: Input, error: BaseException) -> None:
        """Leave out a file that can't be read as an image, for the reason `error`."""
        self.unread.append(item.path)
        reason = getattr(error, "strerror", None) or one_line(error)
        log.warning("%s can't be read as an image (%s).", shown(item.path), reason)

    def fail(self, item: Input, error: BaseException) -> None:
        """Leave out an image on which the model, its transform or its output raised `error`."""
        self.failed.append(item.path)
        reason = one_line(error, 200)
        log.warning("%s is left out: the model can't take it (%s).", shown(item.path), reason)

    def conclude(self) -> None:
        """At the end, check that no file was left out.

        Raises:
            UserError: Files were left out.
        """
        kinds = ((self.unread, "can't be read as images"), (self.failed, "are images that the model can't take"))
        parts = [
            f"{len(paths)} of {self.total} files {what}, beginning with {shown(paths[0])}"
            for paths, what in kinds
            if paths
        ]
        if parts:
            raise UserError(f"{'; '.join(parts)}.")


def open_input(path: Path, channels: int, max_pixels: int) -> Image.Image:
    """Read an image as `images.open_image` does; a pipe or a device, which could block for ever, is refused.

    Raises:
        ImageError: The file has no usable image.
        OSError: The file can't be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise images.ImageError("it is not a regular file")
    return checked_shape(images.open_image(path, channels, max_pixels))


def checked_shape(image: Image.Image) -> Image.Image:
    """Return `image`, or raise ImageError if it is too narrow."""
    if max(image.size) > _MOST_NARROW * min(image.size):
        size = f"{image.width}x{image.height}"
        raise images.ImageError(f"{size} pixels: one side is more than {_MOST_NARROW} times as long as the other")
    return image


def _unique(name: Path, taken: set[str], folders: set[str]) -> Path:
    """`name`, changed if it is taken, for example by an image with another extension."""
    if name.parts[0].casefold() == "labels":  # a segmentor writes its labels there
        name = Path("labels_", *name.parts[1:])
    stem, ending = name.stem, name.suffix
    if len(os.fsencode(stem)) > _LONGEST_NAME:
        stem = os.fsencode(stem)[:_LONGEST_NAME].decode("utf-8", "ignore")
    for candidate in chain([stem, f"{stem}_{ending[1:]}"], (f"{stem}_{ending[1:]}_{number}" for number in count(2))):
        key = str(name.with_name(candidate)).casefold()  # some file systems ignore case
        if key not in taken and f"{key}.png" not in folders:
            taken.add(key)
            return name.with_name(candidate + ending)
    raise AssertionError("unreachable: the candidates never end")


def as_text(text: str | Path) -> str:
    """A path or the name of a class as text that any file can hold; bytes that are not Unicode are escaped."""
    return str(text).encode(errors="backslashreplace").decode()


def shown(text: str | Path) -> str:
    """The same for messages: characters that can't be printed, such as newlines, are escaped too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in as_text(text))
