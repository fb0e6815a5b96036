"""The reference implementation's layers, by the names and shapes of their entries.

Its three layouts, all of two dimensions; D is a residual around the identity in each:

    PyTorch     `W` (O, I/g, S), `D` (I, M, S), and the identity as `D_diag` or `d_diag`
    TensorFlow  `W` or `kernel` (S, I/g, O), `D` (M, S, I)
    Gluon       `weight` (O, I/g, height, width), `D` (M, S, I) with S = M

A layer of one tap has no D. Each reshapes W so that some D meets every kernel slice; which one,
in grouped layers, differs from framework to framework, and from what the convolution then reads.
Source: the reference implementation (yangyanli/DO-Conv).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from doconv_core.files.arrays import FLOATS
from doconv_core.files.checkpoint import CONVOLUTION, Entry, Layer
from doconv_core.files.shapes import Shape, canonical_shape, groups_of, sized
from doconv_core.files.sizes import Sizes

PYTORCH, TENSORFLOW, GLUON = "PyTorch", "TensorFlow", "Gluon"
FRAMEWORKS = (PYTORCH, TENSORFLOW, GLUON)
ORIGIN = "reference "
IDENTITIES = ("D_diag", "d_diag")
WEIGHTS = {PYTORCH: ("W",), TENSORFLOW: ("W", "kernel"), GLUON: ("weight",)}
LAYOUTS = {PYTORCH: "OI*", TENSORFLOW: "*IO", GLUON: "OI*"}


def find_reference(
    shapes: Mapping[str, Entry], separators: str, sizes: Sizes, framework: str, part: str
) -> list[Layer]:
    """Return the layers of the reference implementation among entries of these names.

    framework: "" where the entries are to tell; layers that fit several are of the framework that
    the others are of, and else of the first in `FRAMEWORKS`.
    """
    candidates = list(_candidates(shapes, separators))
    allowed = (framework,) if framework else FRAMEWORKS
    fitting = {
        prefix: [f for f in allowed if _told(f, prefix, roles, shapes)]
        for prefix, roles in candidates
    }
    settled = [options[0] for options in fitting.values() if len(options) == 1]
    found = []
    for prefix, roles in candidates:
        options = fitting[prefix]
        if options:
            chosen = settled[0] if settled and settled[0] in options else options[0]
            layer = _layer(prefix, roles, shapes, chosen, sizes, part)
            if len(options) > 1 and chosen not in settled:
                guess = f"taken to be {chosen}'s, though {options[1]}'s layout fits as well"
                layer = replace(layer, note="; ".join(filter(None, (layer.note, guess))))
            found.append(layer)
    if found:
        framework = found[0].origin.removeprefix(ORIGIN)
        found += _one_tap(shapes, separators, framework, part, {layer.path for layer in found})
    return found


def _candidates(
    shapes: Mapping[str, Entry], separators: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what stands before the entry's own name, and the entries by role, of each D."""
    for key in shapes:
        prefix = key[:-1]
        if key.endswith("D") and _ends(prefix, separators):
            names = {"weight": "weight", "kernel": "weight", "W": "weight", "D": "depthwise_weight"}
            names |= {"bias": "bias"} | dict.fromkeys(IDENTITIES, "identity")
            roles = {role: prefix + name for name, role in names.items() if prefix + name in shapes}
            if "weight" in roles:
                yield prefix, _in_order(roles, shapes)


def _ends(prefix: str, separators: str) -> bool:
    return not prefix or prefix[-1] in separators


def _in_order(roles: dict[str, str], shapes: Mapping[str, Entry]) -> dict[str, str]:
    names = {key: role for role, key in roles.items()}
    return {names[key]: key for key in shapes if key in names}


def _told(
    framework: str, prefix: str, roles: Mapping[str, str], shapes: Mapping[str, Entry]
) -> tuple[tuple[int, int, int], int, int, Shape | None] | None:
    """Return `(I, O, g)`, M, S and the kernel size of a layer, None if it is not of `framework`."""
    weight, depthwise = shapes[roles["weight"]], shapes[roles["depthwise_weight"]]
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
    return (in_channels, out_channels, groups), taps, multiplier, kernel_size


def _layer(
    prefix: str, roles: dict[str, str], shapes: Mapping[str, Entry], framework: str,
    sizes: Sizes, part: str,
) -> Layer:  # fmt: skip
    told = _told(framework, prefix, roles, shapes)
    assert told is not None  # as the framework was chosen by it
    channels, taps, multiplier, kernel_size = told
    layer = Layer(
        prefix.rstrip("./_"), CONVOLUTION, roles, ORIGIN + framework, part, True,
        layout=LAYOUTS[framework],
    )  # fmt: skip
    return sized(layer, channels, taps, multiplier, kernel_size, sizes)


def _one_tap(
    shapes: Mapping[str, Entry], separators: str, framework: str, part: str, found: set[str]
) -> Iterator[Layer]:
    """Yield the layers without a D; in Gluon they are ordinary ones already."""
    layout = LAYOUTS[framework]
    for key, entry in shapes.items():
        for name in WEIGHTS[framework] if framework != GLUON else ():
            prefix = key.removesuffix(name)
            path = prefix.rstrip("./_")
            if prefix == key or not _ends(prefix, separators) or path in found:
                continue
            if len(entry.shape) != 3 or entry.dtype not in FLOATS:
                continue
            out_channels, per_group, tap = canonical_shape(entry.shape, layout)
            if tap == 1:
                roles = {"weight": key}
                if f"{prefix}bias" in shapes:
                    roles["bias"] = f"{prefix}bias"
                yield Layer(
                    path, CONVOLUTION, _in_order(roles, shapes), ORIGIN + framework, part,
                    kernel_shape=(out_channels, per_group, 1, 1), layout=layout,
                )  # fmt: skip
