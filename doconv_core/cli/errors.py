"""What can go wrong for a user, and the exit code that says so."""

from __future__ import annotations

import errno
from typing import Final

import click

from doconv_core.files.entries import CheckpointError
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.state.file import StateError

DIFFERENT: Final = 1
USAGE: Final = 2
BAD_FILE: Final = 3
IMPOSSIBLE: Final = 4
TARGET: Final = 5
MISSING: Final = 6
CRASH: Final = 70  # as sysexits.h has it: an error of the software itself
INTERRUPTED: Final = 128 + 2
PIPE: Final = 128 + 13
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # a disk that takes no more


class Failure(click.ClickException):
    """An error that is not this package's own. code: one of those above."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # declared per class, read per instance


def as_failure(error: Exception) -> Failure | None:
    """Return what to tell the user of an error; None for one that is a fault of this package."""
    if isinstance(error, NotFoldable):
        return Failure(str(error), IMPOSSIBLE)
    if isinstance(error, CheckpointError) and isinstance(error.__cause__, ImportError):
        return Failure(str(error), MISSING)
    if isinstance(error, (CheckpointError, StateError)):
        return Failure(str(error), BAD_FILE)
    if isinstance(error, ImportError):
        return Failure(str(error), MISSING)
    if isinstance(error, FileExistsError):
        return Failure(_told(error), TARGET)
    if isinstance(error, OSError):
        return Failure(_told(error), TARGET if error.errno in FULL else USAGE)
    return None


def _told(error: OSError) -> str:
    if error.strerror is None:  # one of ours, whose text is a sentence already
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}."


def one_line(text: str) -> str:
    """Return text on one line, with what could steer a terminal written out.

    Names come from files, and a file may have been made to deceive whoever prints them.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split(None)))
