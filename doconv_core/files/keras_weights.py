"""Keras' files in HDF5: `.weights.h5`, and the older kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from doconv_core.files.checkpoint import Beginning, Checkpoint
from doconv_core.files.entries import KERAS, Array, Entry, KernelSizes, shown
from doconv_core.files.hdf5 import Hdf5, fill
from doconv_core.files.keras_hdf5 import ADVICE, KerasHdf5Checkpoint
from doconv_core.files.keras_layers import NOT_A_MODEL, STEMS, KerasLayers, numbered, stem_of
from doconv_core.files.keras_legacy import KerasLegacyCheckpoint, is_legacy
from doconv_core.files.layers import Sizes
from doconv_core.maths.batchnorm import NotFoldable

NAME, SUFFIXES, FRAMEWORK = "Keras", (".weights.h5", ".h5"), KERAS
TYPES = frozenset((
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "bool",
))  # fmt: skip


def sniff(begin: Beginning) -> bool:
    """Return whether HDF5's signature begins the file."""
    return begin.head[:8] == b"\x89HDF\r\n\x1a\n"


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write a copy of `like`, which has been checked, in which these arrays are others."""
    assert isinstance(like, KerasHdf5Checkpoint)  # as Keras' names are those of one network
    shutil.copyfile(like.path, path)
    fill(path, entries, arrays)


class KerasWeightsCheckpoint(KerasHdf5Checkpoint):
    """An open `.weights.h5` file."""

    format, ordered = "Keras weights", False

    def __init__(self, path: Path, file: Hdf5, sizes: Sizes) -> None:
        self.path = path
        self._open(file, {}, {}, sizes)

    def _open(
        self, file: Hdf5, nodes: Mapping[str, Any], new_paths: Mapping[str, str], sizes: Sizes
    ) -> None:
        self._file, self._new_paths = file, new_paths
        inner = {
            name: Entry(name, tuple(array.shape), file.dtype(name))
            for name, array in file.arrays.items()
        }
        self.entries = {n: e for n, e in inner.items() if n.partition("/")[0] not in NOT_A_MODEL}
        self.others = tuple(name for name in NOT_A_MODEL if name in file.groups)
        self._owners = KerasLayers(file, nodes, self.entries)
        self.layers = self._owners.find(sizes)
        sizes.check_used()

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        self._write(target, report, self._renamed())

    def _renamed(self) -> dict[str, str]:
        """Return the new name, within its group, of each layer's group that has another."""
        renamed = {
            old: new.rpartition("/")[2]
            for old, new in self._new_paths.items()
            if old in self._file.groups and old.rpartition("/")[2] != new.rpartition("/")[2]
        }
        told = {path.rpartition("/")[0] for path in self._new_paths}
        for group in self._file.groups:
            is_list = group and not self._owners.is_owner(group)
            if is_list and group not in told and group.rpartition("/")[2] != "vars":
                renamed |= self._renamed_in(group)
        return renamed

    def _renamed_in(self, group: str) -> dict[str, str]:
        """Return the new names in a list of layers, of which no config tells the order."""
        names = [n for n in self._file.groups[group] if self._owners.is_owner(f"{group}/{n}")]
        stems = {stem_of(name)[0] for name in names}
        if not any(own in stems and ordinary in stems for own, ordinary in STEMS.items()):
            return {f"{group}/{name}": _renumbered(name) for name in names}
        made = [name for name in self._file.made(group) or () if name in names]
        parent, _, own_name = group.rpartition("/")
        # What an earlier attribute holds too has a number here, and no group.
        earlier = [
            name
            for name in self._file.groups[parent]
            if name < own_name and name not in ("vars", *NOT_A_MODEL)
        ]
        if not made or earlier or numbered([stem_of(name)[0] for name in made]) != made:
            raise NotFoldable(
                f"{self.path}: {shown(group)} has over-parameterized and ordinary convolutions, "
                "and nothing in the file tells how they follow each other, which decides the "
                f"names of the folded ones; {ADVICE}."
            )
        new = numbered([STEMS.get(stem, stem) for stem, _ in map(stem_of, made)])
        return {f"{group}/{old}": name for old, name in zip(made, new, strict=True)}


def read(path: Path, kernel_sizes: KernelSizes) -> KerasHdf5Checkpoint:
    """Return the open file, of today's kind or the older one."""
    file = Hdf5(path)
    try:
        kind = KerasLegacyCheckpoint if is_legacy(file) else KerasWeightsCheckpoint
        return kind(path, file, Sizes(kernel_sizes))
    except BaseException:
        file.close()
        raise


def _renumbered(name: str) -> str:
    stem = stem_of(name)[0]
    return STEMS.get(stem, stem) + name.removeprefix(stem)
