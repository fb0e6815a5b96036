"""In which order the members of an HDF5 group were made, which its library does not tell.

Folding a `.weights.h5` file needs it: Keras numbers the layers of a list by class, in the list's
order. The library gives members by name. But a group of the older kind, which is what it writes
unless asked otherwise, keeps the names in a heap of its own, one after the other as they came.
Source: the HDF5 file format specification, version 2.0: superblock, object header, symbol table,
local heap.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

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
    found: list[str] = []
    position = 0
    while position < len(heap) and len(found) < len(expected):
        end = heap.find(b"\0", position)
        if end < 0:
            return None
        name = heap[position:end].decode(errors="replace")
        if name and (name not in expected or name in found):
            return None
        found += [name] if name else []
        position += (end - position) // 8 * 8 + 8
    return found if len(found) == len(expected) else None


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
