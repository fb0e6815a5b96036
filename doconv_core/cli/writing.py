"""Writing a converted file, by its format or as a canonical state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from doconv_core.cli.checkpoints import literal
from doconv_core.cli.errors import IMPOSSIBLE, MISSING, Failure
from doconv_core.cli.plan import Plan
from doconv_core.files.checkpoint import Checkpoint, Format
from doconv_core.files.entries import Entry
from doconv_core.state.file import State, write_state
from doconv_core.state.layers import LayerForm

Step = Callable[[int, int], None]
WORDS = {"Gluon": "Gluon's"}  # files of a format, in a sentence


def write(
    path: Path, plan: Plan, step: Step, *, form: Format, like: Checkpoint | None = None
) -> None:
    """Write a file of a format. like: one whose form it is to have.

    Raises Failure for an entry of a type that these files lack, or that is not written here, and
    where what writes them is not installed.
    """
    for entry in plan.entries:
        if entry.dtype not in form.TYPES:
            name = entry.sources[0] if entry.sources else entry.name
            raise Failure(
                f"the entry {name!r} is {entry.dtype}, which is not written to "
                f"{WORDS.get(form.NAME, form.NAME)} files; --drop '{literal(name)}' leaves it out.",
                IMPOSSIBLE,
            )
    entries = [Entry(entry.name, entry.shape, entry.dtype) for entry in plan.entries]
    try:
        form.write(path, entries, plan.arrays(step), like)
    except ImportError as error:
        raise Failure(f"a {form.NAME} file cannot be written: {error}", MISSING) from error


def write_state_like(
    path: Path,
    plan: Plan,
    step: Step,
    forms: Mapping[str, LayerForm],
    origin: Mapping[str, str],
) -> None:
    """Write a canonical state of these layers. origin: who has trained it, if that is known."""
    dtypes = {entry.name: entry.dtype for entry in plan.entries}
    arrays = {name: array.astype(dtypes[name]) for name, array in plan.arrays(step).items()}
    write_state(State(forms, arrays, origin), path)
