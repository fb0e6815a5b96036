"""Zip archives from strangers: checked before anything in them is inflated."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from doconv_core.files.entries import COPIED_AT_ONCE, CheckpointError, check_names, shown

# What zipfile raises where a member is not what the archive says.
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError)
SMALL = 1 << 20  # what may be inflated whatever the ratio
MAX_RATIO = 100  # deflated weights hardly shrink; even zeros seldom make most of a file


def opened(path: Path) -> zipfile.ZipFile:
    """Return the zip archive at `path`, open and unchecked; CheckpointError where it is none."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole zip archive: {error}.") from error


def open_archive(path: Path) -> zipfile.ZipFile:
    """Return the zip archive at `path`, open.

    Raises CheckpointError where it is damaged, has a name twice or one that leads out of it, is
    encrypted, or says that it holds more than its size can give.
    """
    archive = opened(path)
    try:
        _check(path, archive)
    except BaseException:
        archive.close()
        raise
    return archive


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    check_names(path, (member.filename for member in members))
    size = path.stat().st_size
    if sum(member.compress_size for member in members) > size:
        raise CheckpointError(f"{path} is a zip bomb: its members overlap, or exceed the file.")
    for member in members:
        name = shown(member.filename)
        if member.flag_bits & 1:
            raise CheckpointError(f"{path}: member {name} is encrypted, which no checkpoint is.")
        stored = member.compress_type == zipfile.ZIP_STORED
        if stored and member.file_size != member.compress_size:
            raise CheckpointError(f"{path}: the sizes of member {name} disagree.")
        if member.file_size > max(SMALL, MAX_RATIO * member.compress_size):
            raise CheckpointError(
                f"{path} is a zip bomb: member {name} is to become {member.file_size} bytes, of "
                f"{member.compress_size}."
            )


def read_member(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Return a member's bytes; CheckpointError where there are more than `limit`, or damaged."""
    size = archive.getinfo(name).file_size
    if size > limit:
        raise CheckpointError(
            f"{path}: member {shown(name)} has {size} bytes; at most {limit} are read."
        )
    data = io.BytesIO()
    copy_member(path, archive, name, data)
    if data.tell() != size:
        raise CheckpointError(f"{path}: member {shown(name)} is damaged: it is of another size.")
    return data.getvalue()


def copy_member(
    path: Path, archive: zipfile.ZipFile, name: str, target: IO[bytes] | None = None
) -> None:
    """Copy a member's bytes to `target`, or only compare them with their check sum.

    Raises CheckpointError where the member is damaged, OSError where `target` cannot be written.
    """
    left = archive.getinfo(name).file_size
    for block in _blocks(path, archive, name):
        left -= len(block)
        if target is not None and left >= 0:
            target.write(block)


def _blocks(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    try:
        with archive.open(name) as member:
            while block := member.read(COPIED_AT_ONCE):
                yield block
    except DAMAGE as error:
        raise CheckpointError(f"{path}: member {shown(name)} is damaged: {error}.") from error
