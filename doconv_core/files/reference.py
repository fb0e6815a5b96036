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
from dataclasses import replace
from math import prod

import numpy as np

from doconv_core.files.entries import (
    BFLOAT16,
    BITS,
    COMPUTED_AT_ONCE,
    CONVOLUTION,
    FLOATS,
    Array,
    D,
    Entry,
    Layer,
    computing_dtype,
    from_storage,
    to_storage,
)
from doconv_core.files.shapes import Shape, Sizes, canonical_shape, groups_of, sized
from doconv_core.kinds.do_conv import compose, identity
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.numeric import widened
from doconv_core.maths.spec import ConvSpec

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
            names = {"weight": "weight", "kernel": "weight", "W": "weight", "D": D}
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


BLOCK = COMPUTED_AT_ONCE  # of W, so that a large layer needs little more memory


def compose_blocks(weight: Array, depthwise: Array, *, as_stored: bool = False) -> Array:
    """Return the kernel of `(W, D)` as `compose` does, `(O, I/g, M)`, a block of W at a time.

    weight: `(O, I/g, S)`. depthwise: `(I, M, S)`. `S` may be less than `M`, where the identity is
    zero. Both may be as they are stored, bfloat16 too. Where D's type is the larger one, computed
    in that. as_stored: whether a kernel of bfloat16 is rounded to that, once; else it is float32.
    In weight's dtype otherwise, and with its order of axes in memory.
    """
    (outputs, channels, multiplier), (inputs, taps, _) = weight.shape, depthwise.shape
    groups = inputs // channels
    each = outputs // groups
    dtype = weight.dtype if as_stored else computing_dtype(weight.dtype)
    kernel = np.empty_like(weight, dtype, shape=(outputs, channels, taps))
    w = weight.reshape(groups, each, channels, multiplier)
    d = depthwise.reshape(groups, channels, taps, multiplier)
    k = kernel.reshape(groups, each, channels, taps)
    row = channels * max(multiplier, taps)
    outputs_at_once = max(1, min(each, BLOCK // row))
    groups_at_once = max(1, BLOCK // (row * max(taps, outputs_at_once)))
    for q in range(0, groups, groups_at_once):
        for o in range(0, each, outputs_at_once):
            part = np.s_[q : q + groups_at_once, o : o + outputs_at_once]
            block = _compose_block(from_storage(w[part]), from_storage(d[q : q + groups_at_once]))
            k[part] = to_storage(block, BFLOAT16) if dtype == BITS else block
    return kernel


def _compose_block(w: Array, d: Array) -> Array:
    """Return `gois,gims -> goim` of this block, with the identity."""
    (groups, each, channels, multiplier), taps = w.shape, d.shape[2]
    dtype = np.result_type(w, d)
    if multiplier < taps:
        composed: Array = np.einsum(
            "gois,gims->goim", widened(w.astype(dtype)), widened(d.astype(dtype))
        )
        return composed
    spec = ConvSpec(groups * channels, groups * each, (taps,), groups, multiplier)
    weight, depthwise = w.reshape(spec.weight_shape), d.reshape(groups * channels, taps, multiplier)
    kernel = compose(weight.astype(dtype), depthwise.astype(dtype), spec)
    return kernel.reshape(groups, each, channels, taps)


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
