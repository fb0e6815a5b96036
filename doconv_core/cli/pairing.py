"""Which layer of one file is which of another, and whether what both tell of it agrees.

Canonical states and `.keras` files tell strides, epsilons and the like; the others hold arrays
alone. Where both files of a conversion tell, they must agree; where one does, the network of the
other must have the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from doconv_core.cli.command import IMPOSSIBLE, Failure, print_table, size
from doconv_core.cli.contents import Contents
from doconv_core.files.layers import CONVOLUTION, OTHER, TRANSPOSED, Layer
from doconv_core.maths.geometry import Geometry, Pad
from doconv_core.models.report import place
from doconv_core.state.agreement import (
    Metadata,
    Sides,
    check_epsilon,
    check_geometry,
    check_groups,
    window,
)
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
    """Return the layers paired where their names are the same, in the order of the first.

    Those left over are paired by what is left of their names without the `module` that data
    parallelism puts between them, where that tells them apart.
    """
    ours, theirs = _by_name(first), _by_name(second)
    found = pairs([*ours], [*theirs], {})
    pairs_ = [(ours[a], theirs[b]) for a, b in found if a is not None and b is not None]
    alone = [ours[a] for a, b in found if a is not None and b is None]
    others = [theirs[b] for a, b in found if a is None and b is not None]
    short = _by_short_name(alone), _by_short_name(others)
    known = [name for name in short[0] if name in short[1]]
    pairs_ += [(short[0][name], short[1][name]) for name in known]
    paired = {id(layer) for pair in pairs_ for layer in pair}
    order = {id(layer): place for place, layer in enumerate(first)}
    return Paired(
        both=sorted(pairs_, key=lambda pair: order[id(pair[0])]) if known else pairs_,
        first=[layer for layer in alone if id(layer) not in paired],
        second=[layer for layer in others if id(layer) not in paired],
    )


_MODULE = re.compile(r"(?<![^./])module\.")


def _by_short_name(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Return the layers whose names without wrappers are no other's, by these."""
    names = [_MODULE.sub("", f"{layer.name}.").rstrip(".") for layer in layers]
    count = Counter(names)
    return {n: x for n, x in zip(names, layers, strict=True) if count[n] == 1}


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
                f"{file.path} {file.checkpoint.disorder}; a .pt, .params or .keras file tells that "
                "order. Or use --match name.",
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


OUT, IN = "OUT", "IN"


class Required(NamedTuple):
    """What the network of one file, `IN` or `OUT`, must have in layers, as the other's tell."""

    network: str
    what: str
    layers: list[str]


def sides(source: Path, target: Path) -> Sides:
    """Return how messages speak of two files."""
    again = "; build the layer there with {}, and save it again"
    return Sides(
        theirs=str(source),
        ours=str(target),
        layer=f"the layer in {target}",
        rebuild=again,
        ignore=f"{again.format('the same')}, or, where something that the files do not tell makes "
        "up for it, use --ignore geometry",
    )


def required_of_target(source: Contents, layers: Sequence[Layer]) -> list[Required]:
    """Return what the network that OUT is for must have, by what IN tells."""
    known = source.metadata
    return _grouped((OUT, text, layer) for layer in layers for text in _texts(known[layer.name]))


def compare_metadata(
    source: Contents,
    target: Contents,
    pairs: Sequence[tuple[Layer, Layer]],
    ignore_geometry: bool,
) -> list[Required]:
    """Return what cannot be compared in the two files, for the network of the other to have.

    Raises Mismatch where both tell and differ; of geometries, unless they are to be ignored.
    """
    words, found = sides(source.path, target.path), []
    for layer, other in pairs:
        theirs, ours = source.metadata[layer.name], target.metadata[other.name]
        check_epsilon(place(layer.name), theirs, ours, words)
        check_groups(place(layer.name), theirs, ours, words)
        if not ignore_geometry:
            check_geometry(place(layer.name), theirs, ours, words)
        left = _without(theirs, ours, keep_geometry=_open_padding(theirs, ours))
        found += [(OUT, text, layer) for text in _texts(left)]
        found += [(IN, text, other) for text in _texts(_without(ours, theirs))]
    return _grouped(found)


def _open_padding(left: Metadata, right: Metadata) -> bool:
    """Return whether paddings differ, but another layer may pad."""
    if left.geometry is None or right.geometry is None or (left.whole and right.whole):
        return False
    return left.geometry.padding != right.geometry.padding


def _without(metadata: Metadata, other: Metadata, keep_geometry: bool = False) -> Metadata:
    """Return what is known here and not there; of activations, which may be layers, also others."""
    return replace(
        metadata,
        epsilon=None if other.epsilon is not None else metadata.epsilon,
        geometry=metadata.geometry if other.geometry is None or keep_geometry else None,
        activation=None if other.activation == metadata.activation else metadata.activation,
        groups=None if other.groups is not None else metadata.groups,
    )


def _texts(metadata: Metadata) -> list[str]:
    """Return what a layer must have, in words, without what layers have unless asked."""
    texts = [] if metadata.epsilon is None else [f"epsilon {metadata.epsilon:g}"]
    texts += [f"{metadata.groups} groups"] * bool(metadata.groups)
    texts += [f"activation {metadata.activation}"] * bool(metadata.activation)
    moves = "" if metadata.geometry is None else _moves(metadata.geometry, metadata.transposed)
    return texts + [moves] * bool(moves)


def _moves(geometry: Geometry, transposed: bool) -> str:
    parts = [
        f"{name} {'x'.join(map(str, values))}"
        for name, values in (("stride", geometry.stride), ("dilation", geometry.dilation))
        if any(value != 1 for value in values)
    ]
    if any(pad != (0, 0) for pad in geometry.padding):
        mode = "" if geometry.padding_mode == "zeros" else f" ({geometry.padding_mode})"
        padding = _cropped(geometry.padding) if transposed else ""
        parts.append(padding or f"padding {'x'.join(map(_pad, geometry.padding))}{mode}")
    return ", ".join(parts)


def _cropped(padding: Sequence[Pad]) -> str:
    """Return the padding of a transposed convolution, as PyTorch and Gluon call it, if they can."""
    pairs = [pad for pad in padding if not isinstance(pad, str)]
    if len(pairs) < len(padding) or not all(before >= max(after, 0) for before, after in pairs):
        return ""
    more = [before - after for before, after in pairs]
    text = f"padding {'x'.join(str(before) for before, _ in pairs)}"
    return f"{text}, output padding {'x'.join(map(str, more))}" if any(more) else text


def _pad(pad: Pad) -> str:
    if isinstance(pad, str):
        return pad
    before, after = pad
    return str(before) if before == after else f"{before}+{after}"


def _grouped(found: Iterable[tuple[str, str, Layer]]) -> list[Required]:
    groups: dict[tuple[str, str], list[str]] = {}
    for network, text, layer in found:
        groups.setdefault((network, text), []).append(layer.name or "(the model itself)")
    return [Required(network, text, names) for (network, text), names in groups.items()]
