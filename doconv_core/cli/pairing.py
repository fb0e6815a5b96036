"""Which layer of one file is which of another: by name, or by order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.output import print_table, size
from doconv_core.cli.recognised import TRANSPOSED
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import CONVOLUTION, OTHER, Layer

AFTER = 4  # lines that a listing goes on behind the first difference


class Paired(NamedTuple):
    """The layers of two files: those of both, and those of the first or the second alone."""

    both: list[tuple[Layer, Layer]]
    first: list[Layer]
    second: list[Layer]


def pair_by_name(first: Sequence[Layer], second: Sequence[Layer]) -> Paired:
    """Return the layers paired where their names are the same, in the order of the first."""
    ours, theirs = _by_name(first), _by_name(second)
    return Paired(
        both=[(layer, theirs[name]) for name, layer in ours.items() if name in theirs],
        first=[layer for name, layer in ours.items() if name not in theirs],
        second=[layer for name, layer in theirs.items() if name not in ours],
    )


def _by_name(layers: Sequence[Layer]) -> dict[tuple[str, str], Layer]:
    """Return layers by their names; several at the root of a file have the same, but other kinds.

    A name that one layer alone has tells which it is, whatever its kind.
    """
    count = Counter(layer.name for layer in layers)
    return {(x.name, x.kind if count[x.name] > 1 else ""): x for x in layers}


def pair_by_order(
    first: Checkpoint, a: Sequence[Layer], second: Checkpoint, b: Sequence[Layer]
) -> Paired:
    """Return the n-th layer of one file paired with the n-th of the other.

    Raises Failure, with both sides listed on stderr, unless kinds and sizes agree throughout.
    """
    pairs = list(zip_longest(a, b))
    for number, (x, y) in enumerate(pairs):
        if x is None or y is None or not _alike(x, y):
            _list(first, second, pairs, number)
            raise Failure(
                f"{_differing(first, second, pairs, number)}; layers can be paired by order only "
                "where kinds and sizes agree throughout.",
                IMPOSSIBLE,
            )
    return Paired(pairs, [], [])


def alike_by_order(
    first: Checkpoint, a: Sequence[Layer], second: Checkpoint, b: Sequence[Layer]
) -> tuple[Paired, list[str]]:
    """Return the layers paired by order up to the first that differs, and what differs there.

    From there on, which layer is which cannot be told.
    """
    pairs = list(zip_longest(a, b))
    for number, (x, y) in enumerate(pairs):
        if x is None or y is None or not _alike(x, y):
            found = f"{_differing(first, second, pairs, number)}; no more layers were compared"
            return Paired(pairs[:number], [], []), [found]
    return Paired(pairs, [], []), []


def require_order(*checkpoints: Checkpoint) -> None:
    """Raise Failure for a file whose layers are not in the model's order."""
    for file in checkpoints:
        if not file.ordered:
            raise Failure(
                f"{file.path} has its layers in the order of their names, not of the model; a "
                ".pt, .params or .keras file tells that order. Or use --match name.",
                IMPOSSIBLE,
            )


def _differing(
    first: Checkpoint, second: Checkpoint, pairs: Sequence[tuple[Layer | None, ...]], number: int
) -> str:
    x, y = pairs[number]
    return (
        f"layer {number + 1} of {len(pairs)} differs: {_told(x)} in {first.path}, "
        f"{_told(y)} in {second.path}"
    )


def _list(
    first: Checkpoint, second: Checkpoint, pairs: Sequence[tuple[Layer | None, ...]], wrong: int
) -> None:
    """Print the layers side by side on stderr, up to a few behind the first that differs."""
    rows = [
        [">" if number == wrong else "", *map(_told, pair)]
        for number, pair in enumerate(pairs[: wrong + AFTER])
    ]
    left = len(pairs) - len(rows)
    rows += [["", f"and {left} more", ""]] * bool(left)
    print_table(["", str(first.path), str(second.path)], rows, text_columns=3, err=True)


def family(layer: Layer) -> str:
    """Return a layer's kind; a transposed convolution looks like an ordinary one in most files."""
    return CONVOLUTION if layer.kind == TRANSPOSED else layer.kind


def _alike(a: Layer, b: Layer) -> bool:
    if family(a) != family(b):
        return False
    if a.kernel_shape is not None and b.kernel_shape is not None:
        return a.kernel_shape == b.kernel_shape
    return True


def _told(layer: Layer | None) -> str:
    if layer is None:
        return "nothing"
    kind = layer.kind if layer.kind != OTHER else f"other ({', '.join(layer.entries)})"
    shape = f" {size(layer.kernel_shape)}" if layer.kernel_shape else ""
    return f"{layer.name or '(the model itself)'}, {kind}{shape}"
