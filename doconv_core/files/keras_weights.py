"""Keras' `.weights.h5`, and reference checkpoints in older HDF5."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from doconv_core.files.checkpoint import Beginning, Checkpoint, Output, folded_kernel, outputs
from doconv_core.files.entries import (
    KERAS,
    TENSORFLOW,
    Array,
    CheckpointError,
    Entry,
    KernelSizes,
    shown,
    storage_dtype,
    to_storage,
)
from doconv_core.files.hdf5 import Hdf5, fill
from doconv_core.files.keras_layers import NOT_A_MODEL, STEMS, KerasLayers, numbered, stem_of
from doconv_core.files.layers import Layer, Sizes, find_layers
from doconv_core.maths.batchnorm import NotFoldable

NAME, SUFFIXES, FRAMEWORK = "Keras", (".weights.h5", ".h5"), KERAS
TYPES = frozenset((
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "bool",
))  # fmt: skip

ADVICE = "fold the model in Python and save that, or save it as .keras if it is not subclassed"


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
    assert isinstance(like, KerasWeightsCheckpoint)  # as Keras' names are those of one network
    shutil.copyfile(like.path, path)
    fill(path, entries, arrays)


class KerasWeightsCheckpoint(Checkpoint):
    """An open `.weights.h5` file, or an older HDF5 file of the reference implementation's."""

    format, framework, ordered = "Keras weights", FRAMEWORK, False

    def __init__(self, path: Path, kernel_sizes: KernelSizes) -> None:
        self.path = path
        sizes = Sizes(kernel_sizes)
        file = Hdf5(path)
        try:
            self._open(file, {}, {}, sizes)
        except BaseException:
            file.close()
            raise

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
        if any(True for _ in self._owners.owners()) or not self.entries:
            self.layers = self._owners.find(sizes)
        else:
            self.format, self.layers = "Keras weights (older HDF5)", self._older(sizes)
        sizes.check_used()

    def _older(self, sizes: Sizes) -> tuple[Layer, ...]:
        """Return the layers of a file of Keras 2: arrays by the names of the variables."""
        keys = {name.split(":")[0]: name for name in self.entries}
        for key, name in keys.items():
            prefix, _, own_name = key.rpartition("/")
            # Ordinary depthwise and separable layers have a depthwise_kernel, but no other beside.
            kernels = {f"{prefix}/{kind}".lstrip("/") for kind in ("kernel", "depthwise_kernel")}
            is_d = own_name in ("depthwise_kernel", "d_kernel")
            if is_d and len(self.entries[name].shape) == 3 and (kernels - {key}) & keys.keys():
                raise CheckpointError(
                    f"{self.path} is an HDF5 file of the older kind, with an over-parameterized "
                    f"layer, {shown(name)}; load it in Keras, and {ADVICE}."
                )
        return find_layers(
            self.entries, keys, sizes, separators="/", framework=TENSORFLOW, layouts=("*IO",)
        )

    def read_stored(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read_stored` says."""
        return self._file.read(name)

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        planned = outputs(self)
        kept = {output.source for output in planned}
        dropped = set(self.entries) - kept
        replaced = {
            output.source: self._kernel(output, report) for output in planned if output.layer
        }
        if "model_config" in self._file.groups[""].attrs and replaced:
            raise NotFoldable(
                f"{self.path} holds a whole model in the older HDF5 format; load it in Keras, and "
                f"{ADVICE}."
            )
        size = sum(
            prod(o.shape) * storage_dtype(self.entries[o.source].dtype).itemsize for o in planned
        )
        self._file.copy(target, self._renamed(), replaced, dropped, size)

    def _kernel(self, output: Output, report: Callable[[], None]) -> Callable[[], Array]:
        def kernel() -> Array:
            assert output.layer is not None  # as the caller has checked
            values = folded_kernel(self, output.layer, output.shape)
            report()
            return to_storage(values, self.entries[output.source].dtype)

        return kernel

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

    def close(self) -> None:
        """Close the file."""
        self._file.close()


read = KerasWeightsCheckpoint


def _renumbered(name: str) -> str:
    stem = stem_of(name)[0]
    return STEMS.get(stem, stem) + name.removeprefix(stem)
