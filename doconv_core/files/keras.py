"""Keras' `.keras` archives: a config, and the weights in HDF5."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from doconv_core.files.checkpoint import Beginning, Checkpoint
from doconv_core.files.entries import (
    KERAS,
    Array,
    CheckpointError,
    Entry,
    KernelSizes,
    copy_member,
    open_archive,
    read_member,
)
from doconv_core.files.hdf5 import Hdf5, fill
from doconv_core.files.keras_layers import (
    folded_config,
    group_of,
    is_node,
    parsed_config,
    stored_nodes,
)
from doconv_core.files.keras_weights import TYPES as TYPES
from doconv_core.files.keras_weights import KerasWeightsCheckpoint
from doconv_core.files.layers import Layer, Sizes

NAME, SUFFIXES, FRAMEWORK = "Keras", (".keras",), KERAS
CONFIG, WEIGHTS = "config.json", "model.weights.h5"
MAX_CONFIG = 1 << 28


def sniff(begin: Beginning) -> bool:
    """Return whether this is an archive with Keras' members."""
    return {CONFIG, "metadata.json"} <= begin.members


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write a copy of `like`, which has been checked, in which these arrays are others."""
    assert isinstance(like, KerasCheckpoint)  # as Keras' names are those of one network
    weights = path.with_name(f"{path.name}.weights")
    shutil.copyfile(like.weights, weights)
    fill(weights, entries, arrays)
    like.repack(path, weights)
    weights.unlink()


class KerasCheckpoint(KerasWeightsCheckpoint):
    """An open `.keras` file."""

    format = "Keras"

    def __init__(self, path: Path, kernel_sizes: KernelSizes) -> None:
        self.path = path
        self._opened = ExitStack()
        self._archive = self._opened.enter_context(open_archive(path))
        try:
            self.config = config = self._read_config()
            stored = list(stored_nodes(config))
            self._folded_config = json.dumps(folded_config(config)).encode()
            nodes: dict[str, Any] = {}
            for old, _, node in stored:
                nodes.setdefault(old, node)
            self.nodes, self.weights = nodes, self._weights()
            new_paths = {old: new for old, new, _ in stored}
            self._open(Hdf5(path, self.weights), nodes, new_paths, Sizes(kernel_sizes))
            self.ordered = all(group_of(layer) in nodes for layer in self.layers)
            self._note_unfolded(config.get("compile_config"), "optimizer")
        except RecursionError as error:
            self.close()
            raise CheckpointError(f"{path}: {CONFIG} is nested too deeply.") from error
        except BaseException:
            self.close()
            raise

    @property
    def in_order(self) -> tuple[Layer, ...]:
        """The layers in the order of the config's; behind them those that it does not tell."""
        order = {group: place for place, group in enumerate(self.nodes or {})}
        return tuple(sorted(self.layers, key=lambda x: order.get(group_of(x), len(order))))

    def _read_config(self) -> dict[str, Any]:
        if WEIGHTS not in self._archive.namelist():
            raise CheckpointError(
                f"{self.path} has no {WEIGHTS}; weights in other formats are not read here."
            )
        text = read_member(self.path, self._archive, CONFIG, MAX_CONFIG)
        config = parsed_config(self.path, CONFIG, text)
        if not is_node(config):
            raise CheckpointError(f"{self.path}: {CONFIG} is not the config of a Keras model.")
        return config

    def _weights(self) -> Path:
        """Return the weights as a file of their own, compared with their check sum."""
        try:
            folder = self._opened.enter_context(tempfile.TemporaryDirectory())
        except FileNotFoundError as error:  # none in which a file can be written
            raise OSError(errno.ENOSPC, error.strerror) from error
        weights = Path(folder) / WEIGHTS
        try:
            with weights.open("wb") as file:
                copy_member(self.path, self._archive, WEIGHTS, file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(weights)) from error
        return weights

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        self._check_foldable()
        weights = target.with_name(f"{target.name}.weights")
        super().write_folded(weights, report)
        self.repack(target, weights, self._folded_config)
        weights.unlink()

    def repack(self, target: Path, weights: Path, config: bytes | None = None) -> None:
        """Write the archive to `target` with other weights, and another config if one is given."""
        with zipfile.ZipFile(target, "w") as archive:
            for member in self._archive.infolist():
                new = zipfile.ZipInfo(member.filename, member.date_time)
                new.compress_type, new.external_attr = member.compress_type, member.external_attr
                with archive.open(new, "w", force_zip64=True) as file:
                    if member.filename == CONFIG and config is not None:
                        file.write(config)
                    elif member.filename == WEIGHTS:
                        with weights.open("rb") as source:
                            shutil.copyfileobj(source, file)
                    else:
                        copy_member(self.path, self._archive, member.filename, file)

    def close(self) -> None:
        """Close the file, and the temporary one where there is one."""
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()
        self._opened.close()


read = KerasCheckpoint
