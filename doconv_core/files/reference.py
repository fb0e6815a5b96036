"""The reference implementation's layers, by the names and shapes of their entries.

Its three layouts, all of two dimensions; D is a residual around the identity in each:

    PyTorch     `W` (O, I/g, S), `D` (I, M, S), and the identity as `D_diag` or `d_diag`
    TensorFlow  `W` or `kernel` (S, I/g, O), `D` (M, S, I)
    Gluon       `weight` (O, I/g, height, width), `D` (M, S, I) with S = M

A layer of one tap has no D. Each reshapes W so that some D meets every kernel slice; which one,
in grouped layers, differs from framework to framework, and from what the convolution then reads.
Source: the reference implementation (yangyanli/DO-Conv).

`g`, `o`, `i`, `m`, `s` as everywhere; `p` is an output channel in its group, `q` a group. The
reference composes as an ungrouped layer of `O/g` outputs and `I` inputs would: it reshapes W until
one D meets each of the `I` slices, and the product back. PyTorch's reshape of `(O, I/g, S)` lets
output `o` meet channel block `o % g`, where the convolution reads block `o // (O/g)`: no canonical
pair composes so, unless `g` is 1 or O, or all blocks have the same D. TensorFlow's and Gluon's
reshape of `(S, I/g, O)` lets channel `i` of group `q` meet the D at `i·g + q`: the canonical ones,
in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

from doconv_core.files.entries import (
    BLOCK,
    FLOATS,
    GLUON,
    PYTORCH,
    TENSORFLOW,
    Array,
    Entry,
    compose_blocks,
    computing_dtype,
    from_storage,
    groups_of,
)
from doconv_core.kinds.do_conv import DO_CONV, identity
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec

D = DO_CONV.names[1]  # the role of D
FRAMEWORKS = (PYTORCH, TENSORFLOW, GLUON)
ORIGIN = "reference "
IDENTITIES = ("D_diag", "d_diag")
WEIGHTS = {PYTORCH: ("W",), TENSORFLOW: ("W", "kernel"), GLUON: ("weight",)}
LAYOUTS = {PYTORCH: "OI*", TENSORFLOW: "*IO", GLUON: "OI*"}


class Found(NamedTuple):
    """A layer of the reference implementation, by the names and shapes of its entries.

    prefix: what stands before the entries' own names. roles: their names by role. framework: whose
    layout it has. channels: `I`, `O` and the groups. multiplier: `S`. kernel_size: None where it is
    not told. note: an assumption made. Of a layer of one tap, which has no D, `taps` is 1.
    """

    prefix: str
    roles: dict[str, str]
    framework: str
    channels: tuple[int, int, int]
    taps: int
    multiplier: int
    kernel_size: tuple[int, ...] | None
    note: str = ""


def find_reference(shapes: Mapping[str, Entry], separators: str, framework: str) -> list[Found]:
    """Return the layers of the reference implementation among entries of these names.

    framework: "" where the entries are to tell; layers that fit several are of the framework that
    the others are of, and else of the first in `FRAMEWORKS`.
    """
    allowed = (framework,) if framework else FRAMEWORKS
    places = {key: number for number, key in enumerate(shapes)}
    fitting = [
        [told for f in allowed if (told := _told(f, prefix, roles, shapes))]
        for prefix, roles in _candidates(shapes, separators, places)
    ]
    settled = [options[0].framework for options in fitting if len(options) == 1]
    found = []
    for options in filter(None, fitting):
        agreeing = [each for each in options if settled and each.framework == settled[0]]
        chosen = (agreeing or options)[0]
        if len(options) > 1 and chosen.framework not in settled:
            other = options[1].framework
            guess = f"taken to be {chosen.framework}'s, though {other}'s layout fits as well"
            chosen = chosen._replace(note=guess)
        found.append(chosen)
    if found:
        known = {each.prefix.rstrip("./_") for each in found}
        found += _one_tap(shapes, separators, found[0].framework, known, places)
    return found


def _candidates(
    shapes: Mapping[str, Entry], separators: str, places: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what stands before the entry's own name, and the entries by role, of each D."""
    for key in shapes:
        prefix = key[:-1]
        if key.endswith("D") and _ends(prefix, separators):
            names = {"weight": "weight", "kernel": "weight", "W": "weight", "D": D}
            names |= {"bias": "bias"} | dict.fromkeys(IDENTITIES, "identity")
            roles = {role: prefix + name for name, role in names.items() if prefix + name in shapes}
            if "weight" in roles:
                yield prefix, _in_order(roles, places)


def _ends(prefix: str, separators: str) -> bool:
    return not prefix or prefix[-1] in separators


def _in_order(roles: dict[str, str], places: Mapping[str, int]) -> dict[str, str]:
    return dict(sorted(roles.items(), key=lambda item: places[item[1]]))


def _told(
    framework: str, prefix: str, roles: dict[str, str], shapes: Mapping[str, Entry]
) -> Found | None:
    """Return what the shapes of a layer tell, None if it is not of `framework`."""
    weight, depthwise = shapes[roles["weight"]], shapes[roles[D]]
    identity = shapes.get(roles.get("identity", ""))
    w, d = weight.shape, depthwise.shape
    if len(d) != 3 or not {weight.dtype, depthwise.dtype} <= {*FLOATS}:
        return None
    if roles["weight"].removeprefix(prefix) not in WEIGHTS[framework]:
        return None
    if len(w) != (4 if framework == GLUON else 3):
        return None
    if identity is not None and (framework != PYTORCH or identity.shape != d):
        return None
    out_channels, per_group, *body = w[::-1] if framework == TENSORFLOW else w
    in_channels, taps, multiplier = d if framework == PYTORCH else (d[2], d[0], d[1])
    groups = groups_of(in_channels, out_channels, per_group)
    if not groups or taps < 2 or prod(body) != multiplier:
        return None
    if framework == GLUON and taps != multiplier:
        return None
    kernel_size = tuple(body) if framework == GLUON else None
    channels = (in_channels, out_channels, groups)
    return Found(prefix, roles, framework, channels, taps, multiplier, kernel_size)


def _one_tap(
    shapes: Mapping[str, Entry],
    separators: str,
    framework: str,
    known: set[str],
    places: Mapping[str, int],
) -> Iterator[Found]:
    """Yield the layers without a D; in Gluon they are ordinary ones already."""
    for key, entry in shapes.items():
        for name in WEIGHTS[framework] if framework != GLUON else ():
            prefix = key.removesuffix(name)
            if prefix == key or not _ends(prefix, separators) or prefix.rstrip("./_") in known:
                continue
            if len(entry.shape) != 3 or entry.dtype not in FLOATS:
                continue
            out_channels, per_group, taps = entry.shape[:: -1 if framework == TENSORFLOW else 1]
            if taps == 1:
                names = {"weight": key, "bias": f"{prefix}bias"}
                roles = {role: name for role, name in names.items() if name in shapes}
                channels = (per_group, out_channels, 1)
                yield Found(prefix, _in_order(roles, places), framework, channels, 1, 1, (1, 1))


def compose_upstream(
    framework: str,
    weight: Array,
    depthwise: Array,
    stored: Array | None = None,
    *,
    as_stored: bool = False,
) -> Array:
    """Return the kernel that a reference layer convolves with, `(O, I/g, M)`, by its arithmetic.

    weight: `(O, I/g, S)` or, of Gluon, `(O, I/g, *kernel_size)`, in canonical order. depthwise: D
    as it is stored, `(I, M, S)` in PyTorch and `(M, S, I)` in the others. stored: the identity that
    PyTorch stores, of D's shape. as_stored: as in `compose_blocks`.
    """
    weight = weight.reshape(*weight.shape[:2], -1)
    outputs, channels, multiplier = weight.shape
    depthwise = _residual(_channels_first(framework, depthwise), stored)
    inputs, taps = depthwise.shape[:2]
    groups = inputs // channels
    if framework == PYTORCH or groups == 1:
        rows = weight.reshape(-1, inputs, multiplier)  # (p, I, S)
        kernel = compose_blocks(rows, depthwise, as_stored=as_stored)
        return kernel.reshape(outputs, channels, taps)
    # (O, I/g, S) -> (I/g, O, S) -> (I, p, S), and back
    rows = weight.swapaxes(0, 1).reshape(inputs, -1, multiplier).swapaxes(0, 1)
    kernel = compose_blocks(rows, depthwise, as_stored=as_stored)
    return kernel.swapaxes(0, 1).reshape(channels, outputs, taps).swapaxes(0, 1)


def canonical_upstream(
    framework: str, weight: Array, depthwise: Array, stored: Array | None = None
) -> tuple[Array, Array]:
    """Return the canonical `(W, D)` that composes as a reference layer does, to the last bit.

    Takes what `compose_upstream` does. Raises NotFoldable where there is none: fold it instead.
    """
    weight = weight.reshape(*weight.shape[:2], -1)
    outputs, channels, multiplier = weight.shape
    d = _channels_first(framework, depthwise)
    inputs, taps = d.shape[:2]
    groups = inputs // channels
    if multiplier < taps:
        raise NotFoldable(
            f"its depth multiplier, {multiplier}, is less than its {taps} taps, which no layer "
            "here may have; its kernel can be carried over."
        )
    if stored is not None and (stored != _identity(taps, multiplier)).any():
        raise NotFoldable(
            "the identity stored beside D is another than the tiled unit matrix; its kernel can be "
            "carried over."
        )
    blocks = d.reshape(groups, channels, taps, multiplier)
    if framework != PYTORCH:
        d = d.reshape(channels, groups, taps, multiplier).swapaxes(0, 1).reshape(d.shape)
    elif groups not in (1, outputs) and (blocks != blocks[0]).any():
        raise NotFoldable(
            f"in its PyTorch layout, {groups} groups of {outputs} output channels compose with "
            "another group's D; its kernel can be carried over."
        )
    return weight, np.ascontiguousarray(d)


def _channels_first(framework: str, depthwise: Array) -> Array:
    return depthwise if framework == PYTORCH else np.moveaxis(depthwise, -1, 0)


def _residual(depthwise: Array, stored: Array | None) -> Array:
    """Return D around the identity that this package composes with, whatever is stored."""
    if stored is None:
        return depthwise
    inputs, taps, multiplier = depthwise.shape
    expected = _identity(taps, multiplier)
    at_once = max(1, BLOCK // (taps * multiplier))
    parts = [np.s_[i : i + at_once] for i in range(0, inputs, at_once)]
    if all((from_storage(stored[part]) == expected).all() for part in parts):
        return depthwise
    residual = np.empty(depthwise.shape, computing_dtype(depthwise.dtype))
    for part in parts:
        exact = from_storage(depthwise[part]).astype(np.float64)
        residual[part] = exact + from_storage(stored[part]) - expected
    return residual


def _identity(taps: int, multiplier: int) -> Array:
    if multiplier < taps:
        return np.zeros((taps, multiplier))
    return identity(ConvSpec(1, 1, (taps,), 1, multiplier))
