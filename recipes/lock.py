"""A lock file that lets one run at a time write to a folder; the lock of a dead process is taken over."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo.messages import UserError

NAME = ".lock"
BEAT = 15.0  # seconds between two touches of the file
SILENCE = 90.0  # seconds without a touch after which an owner elsewhere is dead; NFS may show one 60 s late
_WRITING = 10.0  # the same for a file that names no owner, which is written right after it is created
_ANCIENT = 3600.0  # a file this old has no living owner, even if the clocks of two machines differ


class Lock:
    """The right to write to a folder, from `acquire` to `release`.

    The file .lock names its owner: machine, process, start time, command. On the owner's machine these tell whether
    the owner is alive. Other machines, which share a network file system, can only see whether the owner still touches
    the file, which it does every 15 s: after 90 s without a touch it counts as dead. All processes of a run are one
    owner; the first one acquires the lock.

    Args:
        folder: The folder, which has to exist.
        key: The setting that chooses another folder, for messages; None if it is an argument without a key.
    """

    def __init__(self, folder: Path, key: str | None = "run"):
        self.path, self.key = folder / NAME, key
        pid = os.getpid()
        self.owner = {
            "host": platform.node(),
            "machine": _machine(),
            "pid": pid,
            "started": _started(pid),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Lock the folder, and remove the unfinished files of dead processes.

        Raises:
            UserError: Another process has the lock.
            OSError: The folder can't be written to.
        """
        dead = None
        while not self._create():
            text = self._read()
            if text is None:
                continue  # it has just been released
            owner = _parse(text)
            if self._lives(owner, text):
                raise UserError(self._in_use(owner))
            dead = owner or dead
            self._remove(text)
        for path in self.path.parent.glob(".*.tmp"):
            if _left_over(path, dead):
                path.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Check that this process is still the owner.

        Raises:
            UserError: Another process has taken over the lock, because it did not see that this one is alive.
        """
        text = self._read()
        if text is not None and not self._own(text):
            raise UserError(
                f"{self._in_use(_parse(text))} It has taken over the folder, so this process no longer writes to it."
            )

    def release(self) -> None:
        """Release the lock."""
        self._ended.set()
        text = self._read()
        if text is not None and self._own(text):
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(file, json.dumps(self.owner).encode())
        finally:
            os.close(file)
        return True

    def _read(self) -> str | None:
        """The content of the file; None if there is no file."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _own(self, text: str) -> bool:
        return _parse(text) == self.owner

    def _remove(self, text: str) -> None:
        """Remove the file if its content is still `text`: another process may be taking over too."""
        aside = temporary(self.path)
        with suppress(FileNotFoundError):
            os.replace(self.path, aside)
            if aside.read_text(encoding="utf-8", errors="replace") != text:
                os.replace(aside, self.path)
            aside.unlink(missing_ok=True)

    def _lives(self, owner: dict[str, Any] | None, text: str) -> bool:
        """Whether the owner that the file names is alive; for an owner elsewhere, finding out may take 90 s."""
        if owner and owner["machine"] == self.owner["machine"]:
            now = _started(owner["pid"])
            if now is None or now != owner["started"]:
                return False  # its process id belongs to another process now
            if now:
                return True
        first = self._touched()
        if first is None or time.time() - first > _ANCIENT:
            return False
        patience = SILENCE if owner else _WRITING
        logging.getLogger("zoo").info("%s Waiting up to %.0f s for activity.", self._in_use(owner), patience)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(1.0, patience / 10))
            if self._touched() != first or self._read() != text:
                return self.path.exists()
        return False

    def _touched(self) -> float | None:
        """When the file was last touched; None if there is no file."""
        try:
            with open(self.path, "rb") as file:  # NFS asks its server when a file is opened, but not for a stat
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                text = self._read()
                if text is not None and self._own(text):
                    os.utime(self.path)

    def _in_use(self, owner: dict[str, Any] | None) -> str:
        touched = self._touched()
        age = f", last active {max(time.time() - touched, 0):.0f} s ago" if touched else ""
        folder, other = self.path.parent, f"choose another folder{f' with {self.key}=<folder>' if self.key else ''}"
        if owner is None:
            return f"{folder} is in use by an unknown process{age}: {other}, or delete {self.path}."
        who = f"process {owner['pid']} on {owner['host']} ({owner['command']}{age})"
        end = f"wait until it ends, stop it there, or {other}; if it is dead, delete {self.path}."
        return f"{folder} is in use by {who}: {end}"


def temporary(path: Path) -> Path:
    """The name under which this process, and no other, writes a file before it is renamed to `path`."""
    return path.with_name(f".{path.name[:40]}.{_short(_machine())}-{os.getpid()}.tmp")


def _left_over(path: Path, dead: dict[str, Any] | None) -> bool:
    """Whether a `temporary` file belongs to a dead process; `dead` is an owner that is known to be dead."""
    found = re.fullmatch(r"\..+\.([0-9a-f]{8})-([0-9]+)\.tmp", path.name)
    if found:
        machine, pid = found[1], int(found[2])
        if dead and (machine, pid) == (_short(dead["machine"]), dead["pid"]):
            return True
        if machine == _short(_machine()):
            return pid == os.getpid() or _started(pid) is None
    try:
        return time.time() - path.stat().st_mtime > _ANCIENT
    except FileNotFoundError:
        return False


def _parse(text: str) -> dict[str, Any] | None:
    """The owner that a lock file names; None if it names none."""
    kinds = {"host": str, "machine": str, "pid": int, "started": str, "command": str}
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(owner, dict) and owner.keys() == kinds.keys()
    return owner if fits and all(isinstance(owner[key], kind) for key, kind in kinds.items()) else None


def _machine() -> str:
    """An identity of this machine since its last boot; each container has its own."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _short(machine: str) -> str:
    return hashlib.sha256(machine.encode()).hexdigest()[:8]


def _started(pid: int) -> str | None:
    """When a process of this machine started; "" if the system does not say, None if no such process is alive."""
    try:
        # The name in brackets may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
