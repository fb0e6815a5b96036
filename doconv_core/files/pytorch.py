"""PyTorch's files, as far as they can be told without PyTorch: zip archives and older pickles.

What reads and writes them is PyTorch, by way of the backend of that name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from doconv_core.backends import available_backends
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import Array, CheckpointError, Entry, KernelSizes, shown
from doconv_core.files.formats import Beginning

NAME, SUFFIXES, FRAMEWORK = "PyTorch", (".pt", ".pth", ".bin", ".ckpt"), "PyTorch"
TYPES = frozenset((
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
))  # fmt: skip

# How the number begins a file of torch.save from before it wrote archives.
MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def sniff(begin: Beginning) -> bool:
    """Return whether this is an archive with a data.pkl, or any pickle."""
    head = begin.head
    if head[:1] == b"\x80" and len(head) > 1 and head[8:9] != b"{":  # that is safetensors'
        return 2 <= head[1] <= 5
    return any(name.rpartition("/")[2] == "data.pkl" for name in begin.members)


def read(path: Path, kernel_sizes: KernelSizes) -> Checkpoint:
    """Return the open file, read by PyTorch with `weights_only=True`."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    zipped = head[:1] != b"\x80"
    if not zipped and MAGIC not in head[:64]:
        raise CheckpointError(
            f"{path} is a pickle that torch.save did not write{_calls(head)}; unpickling could run "
            "any code, so it is not read."
        )
    try:
        files = _backend()
    except ImportError as error:
        raise CheckpointError(f"{path} is a PyTorch file. {error}") from error
    checkpoint: Checkpoint = files.PyTorchCheckpoint(path, kernel_sizes, zipped=zipped)
    return checkpoint


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write a state dict; of `like`, what it has beside its tensors, and how they lie in it."""
    _backend().write(path, entries, arrays, like)


def _backend() -> Any:
    """Return what the backend has for files; ImportError where PyTorch is missing."""
    backend = available_backends().get("torch")
    if backend is None:
        raise ImportError("doconv_torch, which reads and writes PyTorch's files, is not installed.")
    return import_module(f"{backend.load().__name__}.files")


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
