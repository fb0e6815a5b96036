"""Writing a converted file, by its format or as a canonical state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from doconv_core.cli.checkpoints import literal
from doconv_core.cli.errors import IMPOSSIBLE, MISSING, Failure
from doconv_core.cli.planning import Plan
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import Entry
from doconv_core.files.formats import Format
from doconv_core.state.file import State, read_state, write_state
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
    template: Path,
    source: Path | None,
    paths: Mapping[str, str],
) -> None:
    """Write a canonical state with the layers of `template`'s.

    source: the state that the arrays come from, if it is one; paths: of each of the template's
    layers, that of the source's. What the source tells of them goes with the arrays.
    """
    dtypes = {entry.name: entry.dtype for entry in plan.entries}
    arrays = {name: array.astype(dtypes[name]) for name, array in plan.arrays(step).items()}
    layers = read_state(template).layers
    if source is None:
        write_state(State(layers, arrays), path)
        return
    known = read_state(source)
    forms = {own: _with_told(form, known.layers[paths[own]]) for own, form in layers.items()}
    write_state(State(forms, arrays, known.origin), path)


def _with_told(form: LayerForm, known: LayerForm) -> LayerForm:
    """Return a layer's form with what another tells beyond the shapes, which agree."""
    norm = form.kind == known.kind == "batch_norm"
    return replace(
        form,
        spec=known.spec if norm else form.spec,
        geometry=form.geometry or known.geometry,
        flattening=known.flattening,
    )
