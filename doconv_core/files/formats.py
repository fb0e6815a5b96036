"""Which format a file has, by its content, and what reads it."""

from __future__ import annotations

import pickletools
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from doconv_core.files.checkpoint import CheckpointError
from doconv_core.files.names import shown

GROUP = "doconv.checkpoints"
SAFETENSORS, GLUON, KERAS, HDF5 = "safetensors", "gluon", "keras", "hdf5"
PYTORCH, PICKLE = "pytorch", "pickle"

# How the number begins a file of torch.save from before it wrote archives.
TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
LOOKED_AT = 1 << 16

KNOWN = (
    "safetensors, PyTorch (.pt, .pth, .bin), Keras (.keras, .weights.h5) and Gluon (.params) files"
)


def find_format(path: Path) -> Any:
    """Return what opens the file at `path`: a callable of the path and the kernel sizes.

    It is the entry point of the format's name in the group `doconv.checkpoints`. Raises
    CheckpointError for a file of no known format, or one whose package is missing.
    """
    name = recognise(path)
    for entry in metadata.entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except ImportError as error:
            raise CheckpointError(f"{path} is a {name} file. {error}") from error
    raise CheckpointError(
        f"{path} is a {name} file, and no installed package reads it: none is named {name!r} in "
        f"the entry-point group {GROUP}."
    )


def recognise(path: Path) -> str:
    """Return the format of the file at `path`, by its first bytes, or CheckpointError."""
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise CheckpointError(f"{path} is empty.")
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return HDF5
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _recognise_archive(path)
    if head[:4] == b"\x12\x01\x00\x00" and head[4:16] in (bytes(12), bytes(4) + head[8:16]):
        return GLUON
    if head[8:9] == b"{":
        return SAFETENSORS
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return _recognise_pickle(path)
    raise CheckpointError(
        f"{path} is no checkpoint that is known here; {KNOWN} are. A truncated file may look so."
    )


def _recognise_pickle(path: Path) -> str:
    """Return PICKLE for a file of `torch.save`; CheckpointError for any other pickle."""
    with path.open("rb") as file:
        begin = file.read(LOOKED_AT)
    if TORCH_MAGIC in begin[:64]:
        return PICKLE
    raise CheckpointError(
        f"{path} is a pickle that torch.save did not write{_calls(begin)}; unpickling could run "
        "any code, so it is not read."
    )


def _calls(begin: bytes) -> str:
    """Return what a pickle's first global is, to tell; nothing is unpickled."""
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(begin):
            if opcode.name in ("GLOBAL", "INST"):
                return f", and needs {shown(str(argument).replace(' ', '.'))}"
            if opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                return f", and needs {shown('.'.join(texts[-2:]))}"
            if isinstance(argument, str) and opcode.name != "PUT":
                texts.append(argument)
    except ValueError:  # truncated, perhaps by us
        return ""
    return ""


def _recognise_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole zip archive: {error}.") from error
    if "config.json" in names and "metadata.json" in names:
        return KERAS
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return PYTORCH
    raise CheckpointError(
        f"{path} is a zip archive, but neither a PyTorch nor a Keras file: it has no data.pkl and "
        "no config.json."
    )
