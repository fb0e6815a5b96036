"""Which format the suffix of a file tells, by the formats that are registered."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

GROUP = "doconv.formats"
# Of files that others write of models, and of packed ones.
FOREIGN = frozenset((
    ".onnx", ".tflite", ".gguf", ".pt2", ".pb", ".mlmodel", ".npz", ".npy", ".msgpack", ".pdparams",
    ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z",
))  # fmt: skip


class SuffixError(ValueError):
    """A file is to be written under a suffix that says another format."""


def registered() -> dict[str, Any]:
    """Return the modules of all registered formats, by name. Raises ImportError where one fails."""
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    return {entry.name: entry.load() for entry in entries}


def format_by_suffix(name: str) -> Any:
    """Return the format that a file's suffix tells; None where it tells none."""
    # The longest suffix: that of a sharded file ends in others'.
    by_suffix = {suffix: each for each in registered().values() for suffix in each.SUFFIXES}
    fitting = [suffix for suffix in by_suffix if name.lower().endswith(suffix)]
    return by_suffix[max(fitting, key=len)] if fitting else None


def check_suffix(
    target: str | os.PathLike[str], name: str, suffixes: tuple[str, ...], advice: str = ""
) -> None:
    """Raise SuffixError where the suffix of `target` says another format than that of a name.

    suffixes: of the format's files. advice: what would be right.
    """
    file = os.path.basename(os.fspath(target))
    if os.path.splitext(file)[1].lower() in FOREIGN:
        raise SuffixError(
            f"{os.fspath(target)} would be a {name} file ({', '.join(suffixes)}), and its suffix "
            f"says a file that is not written here; name it otherwise{advice}."
        )
    told = format_by_suffix(file)
    if told is not None and suffixes != told.SUFFIXES:
        raise SuffixError(
            f"{os.fspath(target)} would be a {name} file ({', '.join(suffixes)}), and its suffix "
            f"says a {told.NAME} file ({', '.join(told.SUFFIXES)}); name it otherwise{advice}."
        )
