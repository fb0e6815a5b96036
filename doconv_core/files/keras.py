"""Keras' files: `.keras` archives and `.weights.h5`, and reference checkpoints in older HDF5."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from doconv_core.files.archive import copy_member, open_archive, read_member
from doconv_core.files.arrays import from_storage, to_storage
from doconv_core.files.checkpoint import Checkpoint, CheckpointError, Entry, Layer
from doconv_core.files.folding import Output, folded_kernel, outputs
from doconv_core.files.hdf5 import Hdf5
from doconv_core.files.hdf5_files import Window
from doconv_core.files.keras_layers import NOT_A_MODEL, KerasLayers
from doconv_core.files.keras_names import (
    STEMS,
    folded_config,
    is_node,
    numbered,
    stem_of,
    stored_nodes,
    unknown_class,
)
from doconv_core.files.layers import find_layers
from doconv_core.files.names import once, shown
from doconv_core.files.sizes import Sizes
from doconv_core.maths.batchnorm import NotFoldable

Array = NDArray[Any]

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
MAX_CONFIG = 1 << 28
ADVICE = "fold the model in Python and save that, or save it as .keras if it is not subclassed"


class KerasWeightsCheckpoint(Checkpoint):
    """An open `.weights.h5` file, or an older HDF5 file of the reference implementation's."""

    format = "Keras weights"

    def __init__(self, path: Path, kernel_sizes: Mapping[str, tuple[int, ...]]) -> None:
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
            self.entries, keys, sizes, separators="/", framework="TensorFlow", layouts=("*IO",)
        )

    def read(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read` says."""
        return from_storage(self.read_stored(name))

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
        self._file.copy(target, self._renamed(), replaced, dropped)

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


def _renumbered(name: str) -> str:
    stem = stem_of(name)[0]
    return STEMS.get(stem, stem) + name.removeprefix(stem)


class KerasCheckpoint(KerasWeightsCheckpoint):
    """An open `.keras` file."""

    format = "Keras"

    def __init__(self, path: Path, kernel_sizes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self._opened = ExitStack()
        self._archive = self._opened.enter_context(open_archive(path))
        try:
            self.config = config = self._read_config()
            stored = list(stored_nodes(config))
            self._unknown = unknown_class(config)
            self._folded_config = json.dumps(folded_config(config)).encode()
            nodes: dict[str, Any] = {}
            for old, _, node in stored:
                nodes.setdefault(old, node)
            new_paths = {old: new for old, new, _ in stored}
            self._open(Hdf5(path, self._weights()), nodes, new_paths, Sizes(kernel_sizes))
        except RecursionError as error:
            self.close()
            raise CheckpointError(f"{path}: {CONFIG} is nested too deeply.") from error
        except BaseException:
            self.close()
            raise

    def _read_config(self) -> dict[str, Any]:
        if WEIGHTS not in self._archive.namelist():
            raise CheckpointError(
                f"{self.path} has no {WEIGHTS}; weights in other formats are not read here."
            )
        text = read_member(self.path, self._archive, CONFIG, MAX_CONFIG)
        try:
            config = json.loads(text, object_pairs_hook=once)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: in {CONFIG}, {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {CONFIG} is no JSON: {error}.") from error
        if not is_node(config):
            raise CheckpointError(f"{self.path}: {CONFIG} is not the config of a Keras model.")
        return cast(dict[str, Any], config)

    def _weights(self) -> BinaryIO:
        """Return the weights as a file; those that are not compressed stay where they are."""
        member = self._archive.getinfo(WEIGHTS)
        if member.compress_type == zipfile.ZIP_STORED:
            file = self._opened.enter_context(self.path.open("rb"))
            file.seek(member.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
            if len(lengths) != 2:
                raise CheckpointError(f"{self.path} is truncated.")
            begin = member.header_offset + 30 + int(lengths.sum())
            return cast(BinaryIO, Window(file, begin, member.file_size))
        return cast(BinaryIO, self._opened.enter_context(self._inflated()))

    @contextmanager
    def _inflated(self) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            copy_member(self.path, self._archive, WEIGHTS, file)
            yield file

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        if any(self._unknown):
            raise NotFoldable(
                "{}: layer {!r} is a {} of this package's, which is not known here; a later "
                "version of the package may fold it.".format(self.path, *self._unknown[::-1])
            )
        copy_member(self.path, self._archive, WEIGHTS)  # the check sum, which h5py does not know
        weights = target.with_name(f"{target.name}.weights")
        super().write_folded(weights, report)
        with zipfile.ZipFile(target, "w") as archive:
            for member in self._archive.infolist():
                new = zipfile.ZipInfo(member.filename, member.date_time)
                new.compress_type, new.external_attr = member.compress_type, member.external_attr
                with archive.open(new, "w", force_zip64=True) as file:
                    if member.filename == CONFIG:
                        file.write(self._folded_config)
                    elif member.filename == WEIGHTS:
                        with weights.open("rb") as source:
                            shutil.copyfileobj(source, file)
                    else:
                        copy_member(self.path, self._archive, member.filename, file)
        weights.unlink()

    def close(self) -> None:
        """Close the file, and the temporary one where there is one."""
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()
        self._opened.close()
