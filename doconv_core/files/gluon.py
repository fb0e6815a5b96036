"""Gluon's `.params`: MXNet's list of arrays, as `save_parameters`, `export` and `nd.save` write it.

All numbers are little-endian. A file is the magic number and a reserved one, the number of arrays,
the arrays, the number of names, and the names with their lengths, each number of 64 bits. An array
is its version's magic number, its storage type, shape, device, element type and data; older
versions lack some of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

from doconv_core.files.checkpoint import Beginning, Checkpoint
from doconv_core.files.entries import (
    BFLOAT16,
    BITS,
    GLUON,
    CheckpointError,
    Entry,
    KernelSizes,
    Lazy,
    check_names,
    copy_bytes,
    read_array,
    storage_dtype,
    to_storage,
)
from doconv_core.files.folding import folded_kernel, outputs
from doconv_core.files.layers import Sizes, find_layers
from doconv_core.maths.numeric import Array

MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # V3: of MXNet's NumPy mode; V0 has no number
# By MXNet's number for the element type.
DTYPES = (
    "float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool", "int16", "uint16",
    "uint32", "uint64", "bfloat16",
)  # fmt: skip
MAX_NDIM, MAX_ARRAYS = 32, 1 << 20
INDICES = {0: 0, 1: 1, 2: 2}  # how many arrays of indices each storage type has beside its data
MAX_NAME = 1 << 16


NAME, SUFFIXES, FRAMEWORK = "Gluon", (".params",), GLUON
TYPES = frozenset(DTYPES) - {BFLOAT16}


def sniff(begin: Beginning) -> bool:
    """Return whether MXNet's magic number and a reserved one begin the file."""
    head = begin.head
    return head[:4] == b"\x12\x01\x00\x00" and head[4:16] in (bytes(12), bytes(4) + head[8:16])


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write parameters as `save_parameters` does, one array in memory at a time."""

    def stored(entry: Entry) -> Array:
        return arrays[entry.name].astype(entry.dtype, copy=False)

    write_params(path, Lazy({entry.name: partial(stored, entry) for entry in entries}))


@dataclass(frozen=True)
class Record:
    """Where an array lies. version: its magic number, or 0. tail: its bytes of device and type."""

    version: int
    shape: tuple[int, ...]
    dtype: str
    tail: bytes
    begin: int
    data: int
    end: int
    sparse: bool


class _Reader:
    """Numbers from a file, never beyond its end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = path.stat().st_size

    @property
    def position(self) -> int:
        return self.file.tell()

    def bytes(self, count: int) -> bytes:
        self.need(count)
        return self.file.read(count)

    def need(self, count: int) -> None:
        if count > self.size - self.position:
            raise self.error(f"{count} bytes are said to follow, beyond the file's end")

    def skip(self, count: int) -> None:
        self.need(count)
        self.file.seek(count, 1)

    def number(self, kind: str) -> int:
        value: int = struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]
        return value

    def shape(self, kind: str = "q", ndim: int | None = None) -> tuple[int, ...] | None:
        """Return a shape, None where it is said to be unknown."""
        ndim = self.number("i") if ndim is None else ndim
        if ndim == -1:
            return None
        if not 0 <= ndim <= MAX_NDIM:
            raise self.error(f"an array is said to have {ndim} dimensions")
        shape = tuple(self.number(kind) for _ in range(ndim))
        if min(shape, default=0) < 0:
            raise self.error(f"an array has the shape {shape}")
        return shape

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no whole Gluon file: {problem}, at byte {self.position}."
        )


class GluonCheckpoint(Checkpoint):
    """An open `.params` file. Raises CheckpointError where it is damaged or hostile."""

    def __init__(self, path: Path, kernel_sizes: KernelSizes) -> None:
        self.path, self.format, self.framework = path, "Gluon parameters", FRAMEWORK
        self._file = path.open("rb")
        try:
            self._named, self._records = _read_list(_Reader(self._file, path))
            self.entries = {n: Entry(n, r.shape, r.dtype) for n, r in self._records.items()}
            keys: dict[str, str] = {}
            for name in self.entries:  # a name that is both an arg's and an aux's stays as it is
                key = name.removeprefix("arg:").removeprefix("aux:")
                keys[name if key in keys else key] = name
            sizes = Sizes(kernel_sizes)
            self.layers = find_layers(
                self.entries,
                keys,
                sizes,
                separators="._/",
                layouts=("OI*", "O*I"),
                norm=("gamma", "beta"),
            )
            sizes.check_used()
        except BaseException:
            self._file.close()
            raise

    def read_stored(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read_stored` says."""
        record = self._records[name]
        if record.sparse:
            raise CheckpointError(f"{self.path}: entry {name!r} is sparse, which is not read here.")
        self._file.seek(record.data)
        return read_array(self._file, self.path, record.shape, record.dtype)

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        planned = outputs(self)
        with target.open("wb") as file:
            file.write(struct.pack("<QQQ", MAGIC, 0, len(planned)))
            for output in planned:
                record = self._records[output.source]
                if output.layer is None:
                    self._file.seek(record.begin)
                    copy_bytes(self._file, file, record.end - record.begin, self.path)
                    continue
                kernel = folded_kernel(self, output.layer, output.shape)
                file.write(_head(record, output.shape))
                file.write(to_storage(kernel, record.dtype).data)
                report()
            _write_names(file, [output.name for output in planned] if self._named else [])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


read = GluonCheckpoint


def write_params(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays as MXNet's `nd.save` does. Raises TypeError for a type that it lacks.

    Those of bfloat16 are given as they are stored.
    """
    with path.open("wb") as file:
        file.write(struct.pack("<QQQ", MAGIC, 0, len(arrays)))
        for name, array in arrays.items():
            dtype = BFLOAT16 if array.dtype == BITS else array.dtype.name
            if dtype not in DTYPES:
                raise TypeError(f"entry {name!r} is {array.dtype}, which Gluon's files lack.")
            if not array.ndim:
                raise TypeError(f"entry {name!r} has no dimension, which Gluon's files lack.")
            tail = struct.pack("<iii", 1, 0, DTYPES.index(dtype))
            record = Record(V2, array.shape, dtype, tail, 0, 0, 0, False)
            file.write(_head(record, array.shape))
            file.write(to_storage(array, dtype).data)
        _write_names(file, [*arrays])


def _write_names(file: BinaryIO, names: Sequence[str]) -> None:
    file.write(struct.pack("<Q", len(names)))
    for name in map(str.encode, names):
        file.write(struct.pack("<Q", len(name)) + name)


def _head(record: Record, shape: tuple[int, ...]) -> bytes:
    """Return what stands before an array's data, in the record's version."""
    if record.version == 0:
        return struct.pack(f"<I{len(shape)}I", len(shape), *shape) + record.tail
    storage = struct.pack("<i", 0) if record.version in (V2, V3) else b""
    sizes = struct.pack(f"<i{len(shape)}q", len(shape), *shape)
    return struct.pack("<I", record.version) + storage + sizes + record.tail


def _read_list(reader: _Reader) -> tuple[bool, dict[str, Record]]:
    """Return whether the arrays have names, and where each lies, by its name or its number."""
    if reader.number("Q") != MAGIC:
        raise reader.error("its first number is another")
    reader.number("Q")
    count = reader.number("Q")
    if count > MAX_ARRAYS:
        raise reader.error(f"it is said to hold {count} arrays")
    records = [_read_record(reader) for _ in range(count)]
    named = reader.number("Q")
    if named not in (0, count):
        raise reader.error(f"there are {named} names for {count} arrays")
    names = []
    for _ in range(named):
        length = reader.number("Q")
        if length > MAX_NAME:
            raise reader.error(f"a name is said to have {length} bytes")
        try:
            names.append(reader.bytes(length).decode())
        except UnicodeDecodeError:
            raise reader.error("a name is not in UTF-8") from None
    if reader.position != reader.size:
        raise reader.error(f"{reader.size - reader.position} bytes follow the names")
    names = names or [str(number) for number in range(count)]
    check_names(reader.path, names)
    return bool(named), dict(zip(names, records, strict=True))


def _read_record(reader: _Reader) -> Record:
    begin = reader.position
    version = reader.number("I")
    indices = 0
    if version in (V2, V3):
        storage = reader.number("i")
        if storage not in INDICES:
            raise reader.error(f"an array has the unknown storage type {storage}")
        indices = INDICES[storage]
    else:
        storage = 0
    stored_shape = reader.shape() if indices else None
    if version in (V1, V2, V3):
        shape = reader.shape()
    else:
        shape, version = reader.shape("I", version), 0
    if shape is None or (not shape and version != V3):  # an array without values
        return Record(version, (), "float32", b"", begin, reader.position, reader.position, True)
    tail = reader.bytes(12)
    dtype = _dtype(reader, struct.unpack("<iii", tail)[2])
    total = prod(stored_shape or shape) * storage_dtype(dtype).itemsize
    for _ in range(indices):
        kind = _dtype(reader, reader.number("i"))
        total += prod(reader.shape() or ()) * storage_dtype(kind).itemsize
    data = reader.position
    reader.skip(total)
    return Record(version, shape, dtype, tail, begin, data, reader.position, bool(indices))


def _dtype(reader: _Reader, number: int) -> str:
    if not 0 <= number < len(DTYPES):
        raise reader.error(f"an array has the unknown element type {number}")
    return DTYPES[number]
