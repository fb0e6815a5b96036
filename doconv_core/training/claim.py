"""Who works on what, where several processes, on one machine or many, share a folder.

A claim is a file that its owner creates, which only one can, and touches while it is at work. One
that is not touched any more, or whose process is gone, is left alone, and the next number claimed:
so two that find it at the same moment do not both take its place.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

BEAT = 20.0  # seconds from one touch to the next
STALE = 600.0  # seconds without a touch, after which nobody is taken to be at work


class ClaimLost(RuntimeError):
    """Another process has taken over what this one was at work on, after a long silence of it."""


class Claim:
    """What this process has claimed: a file, until it is released.

    >>> claim = claimed(Path("task"))
    >>> claim.file.name, claimed(Path("task"))
    ('task.claim-0', None)
    >>> claim.release()
    """

    def __init__(self, target: Path, file: Path, told: Mapping[str, Any], stale: float) -> None:
        self.target, self.file, self.told, self.stale = target, file, told, stale
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                if self._is_there():
                    os.utime(self.file)

    def _is_there(self) -> bool:
        """Return whether the file is still this claim's, and not one of the same number since."""
        with suppress(FileNotFoundError, ValueError):
            return bool(json.loads(self.file.read_text(encoding="utf-8")) == self.told)
        return False

    def check(self) -> None:
        """Raise ClaimLost where another process has claimed the same since."""
        last = _last(self.target)
        if last is None:
            raise ClaimLost(f"{self.file}, by which this process claims {self.target}, is gone.")
        if last != self.file or not self._is_there():
            raise ClaimLost(
                f"{self.target} was taken over by another process, as nothing had been heard of "
                f"this one for {self.stale:.0f} seconds."
            )

    def release(self) -> None:
        """Let others claim the same; remove what those before have left, who are gone."""
        self._ended.set()
        _HELD.discard(self.file)
        for file in [*_claims(self.target)] if self._is_there() else ():
            if _number(file) <= _number(self.file):
                file.unlink(missing_ok=True)


_HELD: set[Path] = set()  # by this process


def claimed(target: Path, stale: float = STALE) -> Claim | None:
    """Return the claim on a target, a path beside which its file is made; None where it is taken.

    stale: seconds without a touch, after which an owner elsewhere is taken to be gone. Raises
    OSError where no file can be made there.
    """
    last = _last(target)
    if last is not None and _is_at_work(last, stale):
        return None
    number = 0 if last is None else _number(last) + 1
    file = target.with_name(f"{target.name}.claim-{number}")
    told = {"host": socket.gethostname(), "process": os.getpid(), "claim": uuid4().hex}
    try:
        with file.open("x", encoding="utf-8") as opened:
            _HELD.add(file)  # before anyone can read whose it is
            json.dump(told, opened)
    except FileExistsError:  # another was faster
        return None
    except OSError:  # a full disk
        _HELD.discard(file)
        file.unlink(missing_ok=True)
        raise
    return Claim(target, file, told, stale)


def owner(target: Path) -> str:
    """Return who works on a target, as far as its claim tells.

    >>> owner(Path("nothing"))
    'another process'
    """
    last = _last(target)
    with suppress(OSError, ValueError):
        found = json.loads(last.read_text(encoding="utf-8")) if last is not None else {}
        if found:
            return f"process {found['process']} on {found['host']}, as {last} tells"
    return "another process"


@contextmanager
def held(target: Path) -> Iterator[Claim | None]:
    """Yield the claim on a target, which ends with the block; None where it is taken."""
    claim = claimed(target)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def _last(target: Path) -> Path | None:
    """Return the file of the latest claim."""
    return max(_claims(target), key=_number, default=None)


def _claims(target: Path) -> Iterator[Path]:
    return target.parent.glob(f"{escape(target.name)}.claim-*")


def _number(file: Path) -> int:
    return int(file.name.rpartition("-")[2])


def _is_at_work(file: Path, stale: float) -> bool:
    """Return whether a claim's owner seems to be at work."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8") or "{}")
        silent = _now(file.parent) - file.stat().st_mtime
    except FileNotFoundError:  # just released: what it was for may be done
        return True
    if owner.get("host") == socket.gethostname() and not _is_alive(owner["process"], file):
        return False
    return silent < stale


def _is_alive(process: int, file: Path) -> bool:
    if process == os.getpid():  # a former process may have had the same number
        return file in _HELD
    if os.name != "posix":  # where to ask is to end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now(folder: Path) -> float:
    """Return the time by the clock that the folder's files have theirs from."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
