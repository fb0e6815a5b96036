"""Which layer of one file is which of another: by name, or by order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from doconv_core.cli.contents import Contents
from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.output import print_table, size
from doconv_core.cli.recognised import TRANSPOSED
from doconv_core.files.layers import CONVOLUTION, OTHER, Layer
from doconv_core.state.agreement import window
from doconv_core.state.match import pairs


class Paired(NamedTuple):
    """The layers of two files: those of both, and those of the first or the second alone.

    different: of layers paired by order, the number of the first pair that does not agree, and what
    it has; from there on, which layer is which cannot be told.
    """

    both: list[tuple[Layer, Layer]]
    first: list[Layer]
    second: list[Layer]
    different: tuple[int, str] | None = None


def pair_by_name(first: Sequence[Layer], second: Sequence[Layer]) -> Paired:
    """Return the layers paired where their names are the same, in the order of the first."""
    ours, theirs = _by_name(first), _by_name(second)
    found = pairs([*ours], [*theirs], {})
    return Paired(
        both=[(ours[a], theirs[b]) for a, b in found if a is not None and b is not None],
        first=[ours[a] for a, b in found if a is not None and b is None],
        second=[theirs[b] for a, b in found if a is None and b is not None],
    )


def _by_name(layers: Sequence[Layer]) -> dict[tuple[str, str], Layer]:
    """Return layers by their names; several at the root of a file have the same, but other kinds.

    A name that one layer alone has tells which it is, whatever its kind.
    """
    count = Counter(layer.name for layer in layers)
    return {(x.name, x.kind if count[x.name] > 1 else ""): x for x in layers}


def pair_by_order(
    first: Contents, a: Sequence[Layer], second: Contents, b: Sequence[Layer]
) -> Paired:
    """Return the n-th layer of one file paired with the n-th of the other, as far as they agree.

    Raises Failure for a file whose layers are not in the model's order.
    """
    for file in (first, second):
        if not file.ordered:
            raise Failure(
                f"{file.path} has its layers in the order of their names, not of the model; a "
                ".pt, .params or .keras file tells that order. Or use --match name.",
                IMPOSSIBLE,
            )
    found = pairs(range(len(a)), range(len(b)), "order")
    both: list[tuple[Layer, Layer]] = []
    for number, (i, j) in enumerate(found):
        x, y = None if i is None else a[i], None if j is None else b[j]
        if x is None or y is None or not _alike(x, y):
            text = f"layer {number + 1} of {len(found)} differs: {_described(x)} in {first.path}, "
            return Paired(both, [], [], (number, f"{text}{_described(y)} in {second.path}"))
        both.append((x, y))
    return Paired(both, [], [])


def print_side_by_side(
    files: tuple[Path, Path], a: Sequence[Layer], b: Sequence[Layer], marked: int
) -> None:
    """Print the layers of two files on stderr, around those that differ."""
    before, rows, after = window(pairs(range(len(a)), range(len(b)), "order"), marked)
    table = [["", f"{before} before", ""]] * bool(before)
    for number, (i, j) in enumerate(rows, before):
        texts = _described(None if i is None else a[i]), _described(None if j is None else b[j])
        table.append([">" if number == marked else "", *texts])
    table += [["", f"and {after} more", ""]] * bool(after)
    print_table(["", *map(str, files)], table, text_columns=3, err=True)


def family(layer: Layer) -> str:
    """Return a layer's kind; a transposed convolution looks like an ordinary one in most files."""
    return CONVOLUTION if layer.kind == TRANSPOSED else layer.kind


def _alike(a: Layer, b: Layer) -> bool:
    if family(a) != family(b):
        return False
    return a.kernel_shape == b.kernel_shape or None in (a.kernel_shape, b.kernel_shape)


def _described(layer: Layer | None) -> str:
    if layer is None:
        return "nothing"
    kind = layer.kind if layer.kind != OTHER else f"other ({', '.join(layer.entries)})"
    shape = f" {size(layer.kernel_shape)}" if layer.kernel_shape else ""
    return f"{layer.name or '(the model itself)'}, {kind}{shape}"
