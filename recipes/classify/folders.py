"""Class folders: finding the images and their classes, in one walk whose result is both checked and read."""

from __future__ import annotations

import io
import os
import re
import tarfile
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader

from zoo.messages import UserError
from zoo.recipes.files import is_hidden
from zoo.recipes.logs import log


class _ByClass(Reader):
    """A reader of images in class folders, for timm's ImageDataset.

    The classes are the folders of the first level, which may have subfolders. Hidden files and folders, and those that
    operating systems create, are ignored.

    Attributes:
        root: The folder or tar file.
        images: The paths of the images of each class; classes are in natural order (a2 before a10).
        samples: Paths with labels, in natural order.
    """

    def __init__(self, root: Path, images: dict[str, list[str]], stray: Sequence[str], nested: int):
        super().__init__()
        self.root, self.images = str(root), images
        self.samples: list[tuple[str, int]] = []
        if stray:
            log.warning(
                "%s has %d images outside of class folders, which are left out; the first is %s.",
                root,
                len(stray),
                stray[0],
            )
        if not images:
            raise UserError(f"{root} has no class folders: images belong in {root}/<class>/.")
        if nested:
            log.info(
                "%s: %d images lie deeper than their class folders; the classes are the folders of the first level.",
                root,
                nested,
            )

    def label(self, classes: Sequence[str]) -> None:
        """Label the images with the positions of their classes in `classes`; images of other classes are left out."""
        labels = {class_name(name): label for label, name in enumerate(classes)}
        samples = [(path, labels[name]) for name, paths in self.images.items() if name in labels for path in paths]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def files(self) -> list[str]:
        """The files that hold the images: the images themselves, or the tar file."""
        return [path for paths in self.images.values() for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class ClassFolders(_ByClass):
    """The images in a folder of class folders. Links are followed, but a class visits a folder only once.

    Args:
        root: The folder.
        endings: The extensions of image files, in lower case.

    Raises:
        UserError: A folder can't be read, there is no class folder, one has no images, or two have the same name.
    """

    def __init__(self, root: Path, endings: Collection[str]):
        _, folders, files = _listing(str(root))
        images: dict[str, list[str]] = {}
        nested = 0
        for folder in sorted(folders, key=natural_key):
            name, path = class_name(folder), os.path.join(root, folder)
            found = list(_images(path, endings, set()))
            if not found:
                raise UserError(
                    f"the class folder {path} has no images ({', '.join(sorted(endings))}): "
                    "add some or remove the folder."
                )
            if name in images:
                raise UserError(f"{root} has two folders of the class {name!r}: put their images into one.")
            images[name] = found
            nested += sum(os.path.dirname(image) != path for image in found)
        super().__init__(root, images, [name for name in files if _ending(name) in endings], nested)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label


class ClassTar(_ByClass):
    """The images in a tar file of class folders, or of one tar file per class; folders around all of them are skipped.

    Args:
        root: The uncompressed tar file.
        endings: The extensions of image files, in lower case.

    Raises:
        UserError: It can't be read to its end, or has no class folders.
    """

    def __init__(self, root: Path, endings: Collection[str]):
        self.places: dict[str, tuple[int, int]] = {}
        try:
            with open(root, "rb") as file:
                for path, *place in _members(file, 0, ""):
                    parts = [part for part in path.split("/") if part not in ("", ".")]
                    if _ending(path) in endings and not any(map(is_hidden, parts)):
                        self.places["/".join(parts)] = (place[0], place[1])
            if os.path.getsize(root) % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends within a file")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{root} can't be read as a tar file ({error}): repair or replace it.") from error
        tops = [path.split("/") for path in self.places]
        around = 0
        while tops and all(len(parts) > around + 2 and parts[around] == tops[0][around] for parts in tops):
            around += 1
        images: dict[str, list[str]] = {}
        for parts in sorted(tops, key=lambda parts: natural_key("/".join(parts))):
            if len(parts) > around + 1:
                images.setdefault(class_name(parts[around]), []).append("/".join(parts))
        images = {name: images[name] for name in sorted(images, key=natural_key)}
        stray = ["/".join(parts) for parts in tops if len(parts) == around + 1]
        super().__init__(root, images, stray, sum(len(parts) > around + 2 for parts in tops))

    def files(self) -> list[str]:
        """The tar file."""
        return [self.root]

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        offset, size = self.places[path]
        with open(self.root, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label


def class_name(text: str) -> str:
    """A class name for comparisons: file systems differ in how they compose letters with accents."""
    return unicodedata.normalize("NFC", text.strip())


def natural_key(text: str) -> tuple[list[int | str], str]:
    """A sort key that orders numbers within names by value, as timm does, and breaks ties by case."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())], text


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in `folder` that could be classes; raises UserError if it can't be read."""
    return _listing(str(folder))[1]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _listing(folder: str) -> tuple[tuple[int, int], list[str], list[str]]:
    """The identity of `folder` in the file system, and the names of its folders and files that are not hidden."""
    folders, files = [], []
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                # A broken link counts as an image that can't be read; a pipe would block for ever.
                elif entry.is_symlink() or entry.is_file():
                    files.append(entry.name)
    except OSError as error:
        raise UserError(f"{folder} can't be read ({error.strerror}): fix that, or remove it.") from error
    return (status.st_dev, status.st_ino), sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _images(folder: str, endings: Collection[str], visited: set[tuple[int, int]]) -> Iterator[str]:
    identity, folders, files = _listing(folder)
    if identity in visited:
        return
    visited.add(identity)
    yield from (os.path.join(folder, name) for name in files if _ending(name) in endings)
    for name in folders:
        yield from _images(os.path.join(folder, name), endings, visited)


def _members(file: BinaryIO, start: int, inside: str) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of the files in a tar file that begins at `start` of the outermost tar file."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if not info.isfile():
                continue
            path, place = inside + info.name, start + info.offset_data
            if _ending(path) == ".tar":
                yield from _members(archive.extractfile(info), place, path[: -len(".tar")] + "/")
            else:
                yield path, place, info.size
