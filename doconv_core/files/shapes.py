"""What the shapes of a layer's entries tell: its sizes, and whether they agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import isqrt, prod

from doconv_core.files.entries import CONVOLUTION, FLOATS, D, Entry, KernelSizes, Layer, shown
from doconv_core.maths.spec import MAX_RANK, ConvSpec, as_integer, is_sequence

Shape = tuple[int, ...]
MAX_TOLD = 6  # entries in a note


class Sizes:
    """Kernel sizes by glob pattern on a layer's names; the first pattern that matches counts.

    Raises TypeError or ValueError for what is no kernel size.
    """

    def __init__(self, sizes: KernelSizes) -> None:
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._unused = set(sizes)
        self._asked: list[str] = []
        for pattern, size in sizes.items():
            if not is_sequence(size) or not 1 <= len(size) <= MAX_RANK:
                raise ValueError(
                    f"kernel_sizes must give 1 to {MAX_RANK} integers for each pattern; received "
                    f"{size!r} for {pattern!r}."
                )
            self._sizes[pattern] = tuple(
                as_integer(f"kernel_sizes[{pattern!r}]", entry) for entry in size
            )

    def given(self, names: Iterable[str], taps: int) -> tuple[int, ...] | None:
        """Return the kernel size given for the layer that bears one of these names, if any is.

        Raises ValueError where its product is not `taps`.
        """
        names = list(dict.fromkeys(names))
        self._asked += names
        matching = [
            pattern for pattern in self._sizes if any(fnmatchcase(name, pattern) for name in names)
        ]
        self._unused.difference_update(matching)
        if not matching:
            return None
        size = self._sizes[matching[0]]
        if prod(size) != taps:
            raise ValueError(
                f"layer {names[0]!r} has {taps} kernel taps; received the kernel size {size}, "
                f"which has {prod(size)}."
            )
        return size

    def check_used(self) -> None:
        """Raise ValueError for a pattern that no over-parameterized layer has matched."""
        if self._unused:
            there = ", ".join(map(repr, self._asked[:3])) or "no over-parameterized layer"
            raise ValueError(
                f"kernel_sizes: {', '.join(map(repr, sorted(self._unused)))} matches no "
                f"over-parameterized layer; the file has {there}."
            )


def canonical_shape(shape: Shape, layout: str) -> Shape:
    """Return the canonical shape, `(O, I/g, taps…)`, of a weight kept in `layout`."""
    if layout == "O*I":
        return (shape[0], shape[-1], *shape[1:-1])
    if layout == "*IO":
        return (shape[-1], shape[-2], *shape[:-2])
    if layout == "*CN":
        return (shape[-1] * shape[-2], 1, *shape[:-2])
    return shape


def kept_shape(shape: Shape, layout: str, groups: int) -> Shape:
    """Return the shape in `layout` of a weight of canonical shape `(O, I/g, taps…)`."""
    if layout == "O*I":
        return (shape[0], *shape[2:], shape[1])
    if layout == "*IO":
        return (*shape[2:], shape[1], shape[0])
    if layout == "*CN":
        return (*shape[2:], groups, shape[0] // groups)
    return shape


def over_parameterized(
    path: str,
    part: str,
    roles: Mapping[str, str],
    shapes: Mapping[str, Entry],
    layout: str,
    sizes: Sizes,
    kernel_size: Shape | None = None,
) -> Layer | None:
    """Return the over-parameterized layer of this package that these entries are, or None.

    roles: the entries' names by role. layout: of the weight. kernel_size: where the file tells it
    otherwise. None where the shapes do not agree: the names may be another's than this package's.
    """
    weight, depthwise = shapes[roles["weight"]], shapes[roles[D]]
    if weight.dtype not in FLOATS or depthwise.dtype not in FLOATS:
        return None
    out_channels, per_group, *body = canonical_shape(weight.shape, layout)
    in_channels, taps, multiplier = depthwise.shape
    groups = groups_of(in_channels, out_channels, per_group)
    if not groups or not 1 < taps <= multiplier or prod(body) != multiplier:
        return None
    bias = shapes.get(roles.get("bias", ""))
    if len(body) > MAX_RANK or (bias is not None and bias.shape != (out_channels,)):
        return None
    if len(body) > 1 or taps == multiplier:
        if taps != multiplier:
            return None
        kernel_size = tuple(body)
    layer = Layer(path, CONVOLUTION, roles, "doconv", part, over_parameterized=True, layout=layout)
    return sized(layer, (in_channels, out_channels, groups), taps, multiplier, kernel_size, sizes)


def unlike(entries: Mapping[str, Entry]) -> str:
    """Return the note on entries, by role, that one would take for an over-parameterized layer's.

    It is no such layer that is known here.
    """
    told = [f"{shown(role)} {e.shape} of {e.dtype}" for role, e in entries.items()]
    more = f" and {len(told) - MAX_TOLD} more" if len(told) > MAX_TOLD else ""
    return (
        "named like an over-parameterized layer, but its entries make none: "
        f"{', '.join(told[:MAX_TOLD])}{more}"
    )


def groups_of(in_channels: int, out_channels: int, per_group: int) -> int:
    """Return the groups of a layer with `I`, `O` and `I/g` channels; 0 where there is no such."""
    if min(in_channels, out_channels, per_group) < 1 or in_channels % per_group:
        return 0
    groups = in_channels // per_group
    return 0 if out_channels % groups else groups


def sized(
    layer: Layer,
    channels: tuple[int, int, int],
    taps: int,
    multiplier: int,
    kernel_size: Shape | None,
    sizes: Sizes,
) -> Layer:
    """Return `layer` with its sizes, as far as they are in the file or given.

    channels: `I`, `O` and the groups. kernel_size: what the file tells, or None. A layer of the
    reference implementation, which is of two dimensions, is taken to be square where it can be.
    """
    in_channels, out_channels, groups = channels
    given = sizes.given((layer.name, layer.path), taps)
    note = layer.note
    if kernel_size is not None and given not in (None, kernel_size):
        raise ValueError(
            f"layer {layer.name!r} has the kernel size {kernel_size} in the file; received {given}."
        )
    kernel_size = kernel_size or given
    side = isqrt(taps)
    if kernel_size is None and layer.origin.startswith("reference") and side * side == taps:
        kernel_size, note = (side, side), f"{taps} taps, taken to be {side}×{side}"
    if kernel_size is None:
        return dataclasses.replace(layer, note=_unknown(layer, taps, side))
    kernel_shape = (out_channels, in_channels // groups, *kernel_size)
    spec = None
    if multiplier >= taps:  # the reference implementation has others
        spec = ConvSpec(in_channels, out_channels, kernel_size, groups, multiplier)
    return dataclasses.replace(layer, note=note, spec=spec, kernel_shape=kernel_shape)


def _unknown(layer: Layer, taps: int, side: int) -> str:
    example = (side, side) if side * side == taps else (taps,)
    return (
        f"its kernel size is not in the file, which tells {taps} taps; give it, with "
        f"kernel_sizes={{{layer.name!r}: {example}}} or the like"
    )
