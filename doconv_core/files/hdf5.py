"""HDF5 files from strangers: every object looked at before any is read, and copied with changes.

In which order the members of a group were made, HDF5's library does not tell: it gives them by
name. Folding a `.weights.h5` file needs it, as Keras numbers the layers of a list by class, in the
list's order. But a group of the older kind, which is what the library writes unless asked
otherwise, keeps the names in a heap of its own, one after the other as they came. Source: the HDF5
file format specification, version 2.0: superblock, object header, symbol table, local heap.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from doconv_core.files.entries import (
    BFLOAT16,
    BITS,
    Array,
    CheckpointError,
    Entry,
    check_names,
    shown,
    storage_dtype,
    to_storage,
)
from doconv_core.maths.batchnorm import NotFoldable

# What h5py raises where a file is not what it says.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError)
MAX_DEPTH, MAX_OBJECTS = 64, 1 << 20
SMALL = 1 << 20  # bytes that an array may have however few of them are stored
MAX_RATIO = 1000


class Hdf5:
    """An open HDF5 file whose groups and arrays have been checked.

    groups, arrays: by path, without a leading slash, in the order of their names. Raises
    CheckpointError for a damaged file, links that lead elsewhere, arrays of anything but numbers or
    kept elsewhere, and arrays far larger than what is stored of them.
    """

    def __init__(self, path: Path, stored: Path | None = None) -> None:
        h5py = _h5py(path)
        self.path, self._stored = path, stored or path
        self.groups: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}
        self._seen: set[Any] = set()
        _probe(path, self._stored)
        try:
            self.file = h5py.File(self._stored, "r")
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a whole HDF5 file: {error}.") from error
        try:
            self._visit(self.file, "")
        except BaseException as error:
            self.file.close()
            if not isinstance(error, DAMAGE) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged: {error}.") from error
        check_names(path, self.arrays)

    def _visit(self, group: Any, path: str) -> None:
        h5py = _h5py(self.path)
        self.groups[path] = group
        self._once(group, path)
        for name in group:
            inner = f"{path}/{name}" if path else name
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise self._refused(inner, f"is a link to elsewhere ({type(link).__name__})")
            item = group[name]
            if isinstance(item, h5py.Group):
                if path.count("/") > MAX_DEPTH:
                    raise self._refused(inner, f"is more than {MAX_DEPTH} groups deep")
                self._visit(item, inner)
            elif isinstance(item, h5py.Dataset):
                self._check(item, inner)
                self.arrays[inner] = item
            else:
                raise self._refused(inner, "is neither a group nor an array")

    def _once(self, item: Any, path: str) -> None:
        address = _h5py(self.path).h5o.get_info(item.id).addr
        if address in self._seen:
            raise self._refused(path, "is in the file under two names")
        if len(self._seen) >= MAX_OBJECTS:
            raise CheckpointError(f"{self.path} has more than {MAX_OBJECTS} objects.")
        self._seen.add(address)

    def _check(self, array: Any, path: str) -> None:
        self._once(array, path)
        if array.external or array.is_virtual:
            raise self._refused(path, "is kept in another file")
        if array.dtype.kind not in "biuf" and array.dtype.str not in ("|V2", "<V2"):
            raise self._refused(path, f"is of {array.dtype}, not of numbers")
        if array.shape is None:
            raise self._refused(path, "has no shape")
        size = prod(array.shape) * array.dtype.itemsize
        stored = array.id.get_storage_size()
        if size > max(SMALL, MAX_RATIO * stored):
            raise self._refused(path, f"is to become {size} bytes of {stored} that are stored")

    def _refused(self, path: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {shown(path)} {problem}; it is not read.")

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Tell of what the library refuses in the block, which reads what is at `path`."""
        try:
            yield
        except DAMAGE as error:
            raise CheckpointError(f"{self.path}: {shown(path)} is damaged: {error}.") from error

    def dtype(self, path: str) -> str:
        """Return the element type of an array: NumPy's word, or "bfloat16"."""
        dtype = self.arrays[path].dtype
        return BFLOAT16 if dtype.kind == "V" else str(dtype.newbyteorder("="))

    def made(self, path: str) -> list[str] | None:
        """Return a group's members in the order of their making, None where that is lost."""
        group = self.groups[path]
        address = _h5py(self.path).h5o.get_info(group.id).addr
        with self._stored.open("rb") as file:
            return creation_order(file, address, list(group))

    def read(self, path: str) -> Array:
        """Return the values of an array as they are stored."""
        with self._reading(path):
            values = np.empty(self.arrays[path].shape, self.arrays[path].dtype)
            if values.size:
                self.arrays[path].read_direct(values)
        if values.dtype.kind == "V":
            return values.view(BITS)
        return values.astype(storage_dtype(str(values.dtype.newbyteorder("="))), copy=False)

    def attribute(self, path: str, name: str) -> str:
        """Return a text attribute of a group, "" where it has none."""
        with self._reading(path):
            value = self.groups[path].attrs.get(name, "")
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        return value if isinstance(value, str) else ""

    def texts(self, path: str, name: str) -> list[str] | None:
        """Return the texts in an attribute of a group, None where it has none.

        Keras writes a long list in parts, which have numbers behind the name.
        """
        attributes = self.groups[path].attrs
        if name in attributes:
            return self._texts(path, name)
        parts: list[str] = []
        for number in count():
            if f"{name}{number}" not in attributes:
                return parts if number else None
            parts += self._texts(path, f"{name}{number}")
        raise AssertionError  # as the numbers have no end

    def _texts(self, path: str, name: str) -> list[str]:
        with self._reading(path):
            values = np.asarray(self.groups[path].attrs[name]).ravel().tolist()
        try:
            texts = [v.decode() if isinstance(v, bytes) else v for v in values]
        except UnicodeDecodeError:
            texts = [None]
        if not all(isinstance(text, str) for text in texts):
            raise CheckpointError(
                f"{self.path}: the attribute {name} of {shown(path or '/')} is no list of names."
            )
        return texts

    def copy(
        self,
        target: Path,
        names: Mapping[str, str],
        replaced: Mapping[str, Callable[[], Array]],
        dropped: set[str],
        size: int,
        told: Mapping[str, str] = {},  # never changed
        added: Mapping[str, tuple[str, Callable[[], Array]]] = {},
        gone: Container[str] = (),
    ) -> None:
        """Write the file to `target` with changes.

        names: the new name, within its group, of a group. replaced: what gives an array's new
        values, as stored. dropped: the arrays that go; an attribute `weight_names`, of older
        files, that lists them, is changed with them. size: of all arrays then, in bytes. told: the
        new texts of attributes of the file itself. added: by its name, of a new array, that of
        which it has the type, and what gives its values as stored. gone: groups that go. Raises
        OSError where `target` cannot be written, CheckpointError where the file is damaged.
        """

        def visit(path: str, new: Any) -> None:
            group = self.groups[path]
            self._copy_attributes(path, group, new, dropped, {} if path else told)
            for name in self.made(path) or group:
                inner = f"{path}/{name}" if path else name
                if inner in gone:
                    continue
                if inner in self.groups:
                    visit(inner, new.create_group(names.get(inner, name)))
                elif inner in replaced:
                    self._create(new, name, inner, replaced[inner])
                elif inner not in dropped:
                    group.copy(name, new)
            for name, (source, values) in below.get(path, {}).items():
                self._create(new, name, source, values)

        below: dict[str, dict[str, tuple[str, Callable[[], Array]]]] = {}
        for name, each in added.items():
            path, _, own = name.rpartition("/")
            below.setdefault(path, {})[own] = each

        _reserve(target, size)
        try:
            with _h5py(self.path).File(target, "w") as file:
                visit("", file)
        except (CheckpointError, NotFoldable):
            raise
        except (OSError, RuntimeError, KeyError, ValueError) as error:  # also one name for two
            _reserve(target, size + SMALL)  # what the library says of a full disk is like damage
            raise CheckpointError(f"{self.path} could not be copied: {error}.") from error

    def _create(self, group: Any, name: str, source: str, made: Callable[[], Array]) -> None:
        """Write an array of the type, and with the attributes, of another."""
        values, old = made(), self.arrays[source]
        if old.dtype.kind == "V":
            values = values.view(old.dtype)
        self._copy_attributes(source, old, group.create_dataset(name, data=values), set())

    def _copy_attributes(
        self, path: str, old: Any, new: Any, gone: set[str], told: Mapping[str, str] = {}
    ) -> None:
        with self._reading(path):
            for name, value in old.attrs.items():
                if name in told:
                    new.attrs[name] = told[name].encode()
                    continue
                if re.fullmatch(r"weight_names\d*", name):
                    value = [v for v in value if {_text(v), f"{path}/{_text(v)}"}.isdisjoint(gone)]
                new.attrs.create(name, value, dtype=old.attrs.get_id(name).dtype)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _h5py(path: Path) -> Any:
    """Return h5py, which only those have who read such files."""
    try:
        return import_module("h5py")
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs h5py to be read; install it with: python -m pip install h5py"
        ) from error


def _probe(path: Path, stored: Path) -> None:
    """Raise CheckpointError where HDF5's library does not survive the file, or find its end."""
    # Not run as a module of this package, all of which it would have to import.
    command = [sys.executable, "-I", str(Path(__file__).with_name("hdf5_probe.py")), str(stored)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        code, elsewhere = done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired:
        code, elsewhere = -1, ""
    if elsewhere:  # found there alone, as a process that opens such an array may crash at its end
        raise CheckpointError(
            f"{path}: {shown(elsewhere)} is kept in another file; it is not read."
        )
    if code < 0:
        raise CheckpointError(
            f"{path} is not a whole HDF5 file: HDF5's library takes too long or too much memory to "
            "read it, or crashes."
        )


def _reserve(target: Path, size: int) -> None:
    """Raise OSError where there is no room for a file of `size` bytes; what is there is lost.

    The library cannot close a file that it could not write, and may crash when the process ends.
    """
    with target.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def fill(path: Path, entries: Sequence[Entry], arrays: Mapping[str, Array]) -> None:
    """Give arrays of an HDF5 file, that are there, other values of the same shapes and types."""
    with _h5py(path).File(path, "r+") as file:
        for entry in entries:
            values = to_storage(arrays[entry.name], entry.dtype)
            dataset = file[entry.name]
            dataset[...] = values.view(dataset.dtype) if dataset.dtype.kind == "V" else values


SYMBOL_TABLE, CONTINUATION = 0x11, 0x10
MAX_MESSAGES, MAX_HEAP = 64, 1 << 26


def creation_order(file: Any, address: int, names: Collection[str]) -> list[str] | None:
    """Return the names of a group's members, in the order of their making, or None.

    file: the whole file, for reading. address: of the group's object header. names: the members'.
    None where the file keeps them otherwise. Members that were removed can have left their places
    to later ones, so that what is known of the order otherwise should be compared with this.
    """
    head = _at(file, 0, 16)
    if head[8:9] != b"\0" or head[13:15] != b"\x08\x08":  # the first superblock, numbers of 8 bytes
        return None
    heap = _heap_address(file, address)
    if heap is None:
        return None
    header = _at(file, heap, 32)
    size, begin = _number(header[8:16]), _number(header[24:32])
    if header[:4] != b"HEAP" or size > MAX_HEAP:
        return None
    return _names_in(_at(file, begin, size), set(names))


def _names_in(heap: bytes, expected: set[str]) -> list[str] | None:
    """Return the names that lie in a heap, each in steps of 8 bytes, if they are the expected."""
    found: dict[str, None] = {}
    position = 0
    while position < len(heap) and len(found) < len(expected):
        end = heap.find(b"\0", position)
        if end < 0:
            return None
        name = heap[position:end].decode(errors="replace")
        if name and (name not in expected or name in found):
            return None
        found |= {name: None} if name else {}
        position += (end - position) // 8 * 8 + 8
    return [*found] if len(found) == len(expected) else None


def _heap_address(file: Any, address: int) -> int | None:
    """Return where the heap of the group with this object header is."""
    header = _at(file, address, 16)
    if header[:1] != b"\1":  # the version of groups of the older kind
        return None
    blocks = [(address + 16, _number(header[8:12]))]
    for _ in range(MAX_MESSAGES):
        if not blocks:
            return None
        begin, size = blocks.pop(0)
        if size < 8:
            continue
        message = _at(file, begin, 24)
        kind, length = _number(message[:2]), _number(message[2:4])
        if kind == SYMBOL_TABLE:
            return _number(message[16:24])
        blocks.append((begin + 8 + length, size - 8 - length))
        if kind == CONTINUATION:
            blocks.append((_number(message[8:16]), _number(message[16:24])))
    return None


def _at(file: Any, position: int, size: int) -> bytes:
    if position > file.seek(0, 2):
        return b""
    file.seek(position)
    data: bytes = file.read(size)
    return data


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
