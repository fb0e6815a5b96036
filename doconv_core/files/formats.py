"""Formats of checkpoint files: each is one module, which the entry-point group names.

The group is `doconv.formats`. A format's module has what `Format` says; a file is of the format
whose `sniff` knows its first bytes. No list of formats stands here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Protocol

from doconv_core.files.archive import opened
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import Array, CheckpointError, Entry, KernelSizes

GROUP = "doconv.formats"
LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class Beginning:
    """What tells a file's format. head: its first bytes, at most 64 KiB."""

    path: Path
    head: bytes

    @cached_property
    def members(self) -> frozenset[str]:
        """The names in a zip archive; none in another file. CheckpointError for a damaged one."""
        if self.head[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
            return frozenset()
        with opened(self.path) as archive:
            return frozenset(archive.namelist())


class Format(Protocol):
    """What a format's module has.

    NAME: in words. SUFFIXES: by which a file to be written is told to be of it. FRAMEWORK: whose
    names and layouts its files have. TYPES: of the arrays that it can write.
    """

    NAME: str
    SUFFIXES: tuple[str, ...]
    FRAMEWORK: str
    TYPES: frozenset[str]

    def sniff(self, begin: Beginning) -> bool:
        """Return whether a file is of this format; nothing in it is believed yet."""

    def read(self, path: Path, kernel_sizes: KernelSizes) -> Checkpoint:
        """Return the open file; CheckpointError, of one line, for one damaged or hostile."""

    def write(
        self,
        path: Path,
        entries: Sequence[Entry],
        arrays: Mapping[str, Array],
        like: Checkpoint | None = None,
    ) -> None:
        """Write these entries, whose arrays are read in their order, each once.

        like: an open file of the same format whose form the new one is to have. Files beside `path`
        that belong to it are written there, too.
        """


def formats() -> dict[str, Format]:
    """Return the modules of all registered formats, by name. Raises ImportError where one fails."""
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    if not entries:
        raise ImportError(
            f"no installed package reads files: the entry-point group {GROUP} is empty; install "
            "doconv with pip."
        )
    return {entry.name: entry.load() for entry in entries}


def format_of(path: Path) -> Format:
    """Return the format of the file at `path`, by its first bytes; CheckpointError for none."""
    with path.open("rb") as file:
        begin = Beginning(path, file.read(LOOKED_AT))
    if not begin.head:
        raise CheckpointError(f"{path} is empty.")
    known = formats().values()
    for each in known:
        if each.sniff(begin):
            return each
    if begin.members:
        raise CheckpointError(
            f"{path} is a zip archive, but neither a PyTorch nor a Keras file: it has no data.pkl "
            "and no config.json."
        )
    *most, last = [f"{each.NAME} ({', '.join(each.SUFFIXES)})" for each in known]
    raise CheckpointError(
        f"{path} is no checkpoint that is known here; {', '.join(most)} and {last} files are. A "
        "truncated file may look so."
    )


def open_checkpoint(
    path: str | os.PathLike[str], *, kernel_sizes: KernelSizes | None = None
) -> Checkpoint:
    """Return the checkpoint at `path`, open.

    kernel_sizes: for layers whose kernel size is not in the file, by glob pattern on `Layer.name`
    or `Layer.path`; the first that matches counts.
    Raises CheckpointError for a file that is damaged, hostile or of no known format, or whose
    format needs a package that is missing; FileNotFoundError, IsADirectoryError; ValueError for a
    pattern that matches no over-parameterized layer or a kernel size that does not fit.

    >>> form, weight = LayerForm(LinearSpec(3, 2), bias=False), np.zeros((2, 3))
    >>> write_state(State({"fc": form}, {"fc.weight": weight}), "state.safetensors")
    >>> with open_checkpoint("state.safetensors") as checkpoint:
    ...     checkpoint.read("fc.weight").shape
    (2, 3)
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a checkpoint file.")
    module = format_of(file)
    checkpoint = module.read(file, dict(kernel_sizes or {}))
    checkpoint.module = module
    return checkpoint
