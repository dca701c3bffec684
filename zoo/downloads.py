"""Checkpoint files by URL: from the cache, or downloaded and checked. Downloads resume after a broken connection.

huggingface_hub downloads files of the Hugging Face hub, into its own cache and with its settings (`HF_HOME`,
`HF_HUB_OFFLINE`, `HF_ENDPOINT`, ...). All others go where torch.hub stores its files (`TORCH_HOME`), under the same
names. The environment sets the proxies (`https_proxy`, `no_proxy`). `HF_HUB_DISABLE_PROGRESS_BARS` turns the progress
bars off. A server that has not answered after 4 seconds, or `HF_HUB_ETAG_TIMEOUT` seconds, is reported as unreachable.
Once it has answered, a slow network has no time limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from email.utils import formatdate
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from ssl import SSLError
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock, get_session, tqdm

from zoo.messages import one_line

__all__ = ["check_hub", "fetch"]

_HUB = re.compile(r"https://huggingface\.co/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<filename>[^?]+)")
_BY_HAND = (
    "or get the file by other means and pass it: pretrained=<file> to zoo-train and zoo-eval (distill.weights=<file> "
    "for a teacher), --pretrained <file> to zoo-export and zoo-look, pretrained_cfg_overlay=dict(file=...) in Python"
)
_TIMEOUT = 30  # seconds without an answer
_FIRST_TIMEOUT = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 4)  # seconds without the first answer

T = TypeVar("T")


def fetch(
    url: str,
    folder: str | os.PathLike | None = None,
    sha256: str = "",
    check: Callable[[Path], Any] = lambda path: None,
) -> Path:
    """The file at the address `url` (http or https), from the cache if it is there.

    A download gets its final name only if it has the length that the server announced, passes `check`, and has the
    right sha256. This is the one given, the hub's, or that of an earlier download, which is stored beside the file in
    `<name>.download.json`. If several processes ask for a file, one downloads it and the others wait. A file in the
    cache is not checked again.

    Args:
        url: The address.
        folder: The cache; None for the default.
        sha256: The file's hash in hexadecimal digits, or its first digits; "" if it is not known.
        check: Raises ValueError, with the reason in a sentence, if a new download is of no use.

    Raises:
        RuntimeError: The file can't be downloaded or is not the right one. Nothing is left in the cache.
        OSError: It can't be written.
    """
    if found := _HUB.fullmatch(url.partition("?")[0]):
        return _from_hub(**found.groupdict(), folder=folder, sha256=sha256, check=check)
    folder = Path(torch.hub.get_dir(), "checkpoints") if folder is None else Path(folder)
    path = _place(url, folder)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / f".{_name(url)}.lock"):
        path = _place(url, folder)  # another process may have stored it meanwhile, or another file of this name
        if not path.exists():
            partial = folder / f"{_name(url)}.{_digits(url)}.partial"
            _download(url, partial)
            known, source = sha256, "is published"
            if not known:
                known, source = _record(path).get("sha256", ""), f"{_record_file(path)} has from an earlier download"
            try:
                digest = _verify(partial, url, known, source, check)
            except RuntimeError:
                partial.unlink()
                raise
            _record_file(path).write_text(json.dumps({"url": url, "sha256": digest}) + "\n")
            partial.replace(path)
    return path


def _name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name or "checkpoint"


def _digits(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def _place(url: str, folder: Path) -> Path:
    """The path that torch.hub would use, or one with a hash in its name if a file of another address has that path."""
    path = folder / _name(url)
    if _record(path).get("url", url) == url:
        return path
    return path.with_name(f"{path.stem}-{_digits(url)}{path.suffix}")


def _record_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.download.json")


def _record(path: Path) -> dict[str, str]:
    """The address and hash of a downloaded file; empty if it was not downloaded here."""
    try:
        return json.loads(_record_file(path).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _download(url: str, partial: Path) -> None:
    """Complete `partial`. After a broken connection, resume as long as every attempt has added something."""
    before = -1
    while True:
        complete, total = _receive(url, partial, _FIRST_TIMEOUT if before < 0 else _TIMEOUT)
        if complete:
            return
        if _size(partial) <= before:
            of = "" if total is None else f" of {total:,}"
            raise RuntimeError(f"{url} broke off after {_size(partial):,}{of} bytes; try again to resume, {_BY_HAND}.")
        before = _size(partial)


def _receive(url: str, partial: Path, timeout: float) -> tuple[bool, int | None]:
    """Append one answer of the server to `partial`. Returns whether the file is complete, and its length if known.

    The answer has to begin within `timeout` seconds.
    """
    start = _size(partial)
    try:
        answer = _within(timeout, lambda: _ask_for_rest(url, partial, start) or _ask(url))
    except HTTPError as error:
        why = f"{error.code} {error.reason}"
        raise RuntimeError(f"{url} gives no file ({why}); check the address, {_BY_HAND}.") from error
    except (OSError, HTTPException) as error:
        why = one_line(getattr(error, "reason", error), 200)
        raise RuntimeError(f"{url} can't be reached ({why}); check the connection and proxy, {_BY_HAND}.") from error
    total: int | None
    if start and answer.status == 206:
        total = int(answer.headers["Content-Range"].rpartition("/")[2])
    else:
        start, length = 0, answer.headers.get("Content-Length")
        total = None if length is None else int(length)
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=_name(url), disable=None)
    with answer, bar, open(partial, "ab" if start else "wb") as file:
        try:
            while chunk := answer.read1(2**20):
                file.write(chunk)
                bar.update(len(chunk))
        except (HTTPException, ConnectionError, TimeoutError, SSLError):
            return False, total
        return total is None or file.tell() >= total, total


def _ask(url: str, **headers: str) -> HTTPResponse:
    """The answer to a request for the file."""
    # Uncompressed, since the length of a compressed answer is not that of the file.
    return urlopen(
        Request(url, headers={"User-Agent": "zoo", "Accept-Encoding": "identity", **headers}), timeout=_TIMEOUT
    )


def _ask_for_rest(url: str, partial: Path, start: int) -> HTTPResponse | None:
    """The answer to a request for the file from byte `start` on; None if the server can't resume there.

    A server without support for ranges answers with the whole file.
    """
    if not start:
        return None
    unmodified = formatdate(partial.stat().st_mtime, usegmt=True)
    try:
        answer = _ask(url, **{"Range": f"bytes={start}-", "If-Unmodified-Since": unmodified})
    except HTTPError as error:
        if error.code in (412, 416):  # the file was modified since, or has no more bytes
            return None
        raise
    part = answer.headers.get("Content-Range", "")
    if answer.status == 206 and not re.fullmatch(rf"bytes {start}-\d+/\d+", part):
        answer.close()
        return None
    return answer


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Return the result of `function` or raise its error; raise TimeoutError after this many `seconds`.

    `function` runs in a thread, since looking up a host name has no time limit of its own.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    return results[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verify(path: Path, url: str, sha256: str, source: str, check: Callable[[Path], Any]) -> str:
    """The sha256 of `path`.

    Raises:
        RuntimeError: It is not `sha256`, which `source` describes, or the file does not pass `check`.
    """
    try:
        check(path)
    except ValueError as error:
        raise RuntimeError(f"{url} gave {_size(path):,} bytes that were not kept: {error}") from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(sha256):
        raise RuntimeError(
            f"{url} gave a file of sha256 {digest[: len(sha256)]}, not {sha256}, which {source}; it was not kept: try "
            f"again, {_BY_HAND}."
        )
    return digest


def _from_hub(
    repo: str,
    revision: str,
    filename: str,
    folder: str | os.PathLike | None,
    sha256: str,
    check: Callable[[Path], Any],
) -> Path:
    cache_dir = None if folder is None else Path(folder)
    known = try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision)
    if not known:
        check_hub(repo, filename, revision)
    try:
        path = Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # from huggingface_hub, its HTTP library or the system
        raise _not_from_hub(repo, filename, error) from error
    if str(path) == known:
        return path
    # huggingface_hub checks the length. In its cache, a large file is named after its sha256; `path` is a link to it.
    blob = Path(os.readlink(path)) if path.is_symlink() else path
    source = "is published"
    if not sha256 and re.fullmatch("[0-9a-f]{64}", blob.name):
        sha256, source = blob.name, "the hub has"
    try:
        _verify(path, f"{filename} of {repo}, on the Hugging Face hub,", sha256, source, check)
    except RuntimeError:
        (path.parent / blob).unlink()
        path.unlink(missing_ok=True)
        raise
    return path


def check_hub(repo: str, filename: str, revision: str | None = None) -> None:
    """Raise RuntimeError if the Hugging Face hub does not answer; huggingface_hub itself tries for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return  # huggingface_hub reports it at once
    address = hf_hub_url(repo, filename, revision=revision)
    try:
        _within(_FIRST_TIMEOUT, lambda: get_session().head(address, timeout=_TIMEOUT))
    except Exception as error:
        raise _not_from_hub(repo, filename, error) from error


def _not_from_hub(repo: str, filename: str, error: Exception) -> RuntimeError:
    why = one_line(error.__cause__ or error, 200)
    return RuntimeError(
        f"{filename} of {repo}, on the Hugging Face hub, can't be downloaded ({why}); check the connection and "
        f"HF_HUB_OFFLINE, {_BY_HAND}."
    )
