"""Names of entries: those that a wrapper has prefixed, and those that no file should have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from doconv_core.files.checkpoint import CheckpointError

WRAPPERS = ("module.", "_orig_mod.")
OUTSIDE = r"(?:[A-Za-z]:)?/|(?:.*/)?\.\.(?:/|$)"
# What keys tell of dicts in a training checkpoint: that it is no model, or an average of one.
NO_MODEL = re.compile("optim|sched|scaler")
AVERAGED = re.compile("(^|[^a-z])(ema|swa|averaged?|shadow)([^a-z]|$)")
OF_WRAPPERS = ("n_averaged",)  # what a wrapper keeps beside the model


def without_wrappers(names: Sequence[str]) -> dict[str, str]:
    """Return names by what is left without a wrapper's prefix, where all of them have it.

    The prefixes are those of data parallelism, averaging and compilation.
    """
    keys = {name: name for name in names}
    while True:
        own = [key for key in keys if key not in OF_WRAPPERS]
        wrapper = next((w for w in WRAPPERS if own and all(k.startswith(w) for k in own)), None)
        if wrapper is None:
            return keys
        keys = {key.removeprefix(wrapper): name for key, name in keys.items()}


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a name twice, no text, or that leads out of where it is written.

    Nothing here writes files by such names, but what unpacks or converts the file might.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"{path} has the name {shown(name)} twice.")
        seen.add(name)
        if not _is_text(name):
            raise CheckpointError(f"{path} has an entry named {shown(name)}, which is no text.")
        if "\0" in name or re.match(OUTSIDE, name.replace("\\", "/")):
            raise CheckpointError(
                f"{path} has an entry named {shown(name)}, a path out of the file; it is not read."
            )


def _is_text(name: str) -> bool:
    """Return whether files can hold the name: a string may have halves of characters."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in name)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of pairs, for `json.loads`; CheckpointError for a name that is twice."""
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise CheckpointError(f"the name {shown(name)} occurs twice.")
        names.add(name)
    return dict(pairs)


def shown(name: str) -> str:
    """Return a name for a message: quoted, escaped, and not too long."""
    quoted = ascii(name)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}…'"
