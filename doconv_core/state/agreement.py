"""Whether two layers can have the same arrays, and what becomes of the arrays on the way.

These rules are all there are, whether a state goes into a model or one file into another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from doconv_core.kinds.base import ComposedKind
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.numeric import Array
from doconv_core.state.file import StateError
from doconv_core.state.layers import LayerForm, Shape

T = TypeVar("T")

# What a norm without the entry computes with; the count of batches takes no part in that.
NEUTRAL = {"gamma": 1.0, "beta": 0.0, "num_batches_tracked": 0.0}
BEFORE, AFTER = 5, 10  # layers that a listing shows around one that differs


class Mismatch(StateError):
    """Layers that cannot have the same arrays, though each side is sound in itself."""


@dataclass(frozen=True)
class Metadata:
    """What is known of a layer beyond its arrays; None where nothing tells.

    epsilon: of a norm. groups: of a group norm; 0 of a layer norm. geometry: of a convolution;
    whole: whether its padding is all that the input gets, as no layer before it pads; transposed:
    whether it is a transposed convolution's. activation: what the layer itself applies; "" for
    none.
    """

    epsilon: float | None = None
    groups: int | None = None
    geometry: Geometry | None = None
    whole: bool = True
    transposed: bool = False
    activation: str | None = None


class Sides(NamedTuple):
    """How messages speak of where arrays come from, and of where they go to.

    layer: a layer there. rebuild: what to do about a norm that differs, a text that takes `{}`,
    what it must have. ignore: what to do about a geometry that differs.
    """

    theirs: str
    ours: str
    layer: str
    rebuild: str
    ignore: str


@dataclass(frozen=True)
class Values:
    """An array of a layer in canonical order, read when it is asked for.

    dtype: as it is stored, by name. sources: the entries that it comes from. how: what was done to
    them, where that is not plain.
    """

    shape: Shape
    dtype: str
    read: Callable[[], Array]
    sources: tuple[str, ...] = ()
    how: str = ""


def metadata_of(form: LayerForm) -> Metadata:
    """Return what a state, or a model, tells of a layer beyond its arrays."""
    groups = {"layer_norm": 0, "group_norm": getattr(form.spec, "groups", 0)}.get(form.kind)
    epsilon = getattr(form.spec, "epsilon", None)
    return Metadata(
        epsilon, groups, form.geometry, transposed=form.kind == "transposed_convolution"
    )


def check_epsilon(label: str, theirs: Metadata, ours: Metadata, sides: Sides) -> None:
    """Raise Mismatch where both sides tell what a norm adds to the variance, and differ."""
    if theirs.epsilon is None or ours.epsilon is None:
        return
    if np.float32(theirs.epsilon) != np.float32(ours.epsilon):  # in which a backend may keep it
        raise Mismatch(
            f"{label} adds epsilon={theirs.epsilon:g} to the variance in {sides.theirs}, "
            f"{ours.epsilon:g} in {sides.ours}{sides.rebuild.format(f'{theirs.epsilon:g}')}."
        )


def check_groups(label: str, theirs: Metadata, ours: Metadata, sides: Sides) -> None:
    """Raise Mismatch where both sides tell how many groups a norm has, and differ."""
    if theirs.groups is None or ours.groups is None or theirs.groups == ours.groups:
        return
    first, second = (
        f"a group norm of {side.groups} groups" if side.groups else "a layer norm"
        for side in (theirs, ours)
    )
    raise Mismatch(
        f"{label} is {first} in {sides.theirs}, {second} in {sides.ours}"
        f"{sides.rebuild.format('the same')}."
    )


def check_geometry(label: str, theirs: Metadata, ours: Metadata, sides: Sides) -> None:
    """Raise Mismatch where both sides tell a convolution's geometry, and differ.

    Paddings are compared where they are whole on both sides.
    """
    if theirs.geometry is None or ours.geometry is None:
        return
    differences = theirs.geometry.differences(ours.geometry)
    if not (theirs.whole and ours.whole):
        differences = {n: d for n, d in differences.items() if not n.startswith("padding")}
    if differences:
        found = "; ".join(
            f"{name} is {first} in {sides.theirs}, {second} in {sides.ours}"
            for name, (first, second) in differences.items()
        )
        raise Mismatch(
            f"{label} would compute something else with the same weights: {found}{sides.ignore}."
        )


def fit_arrays(
    theirs: Mapping[str, Values],
    ours: Mapping[str, Shape],
    sides: Sides,
    kind: ComposedKind | None = None,
    spec: Any = None,
) -> dict[str, Values]:
    """Return a layer's arrays as another layer of its type and sizes takes them.

    theirs: what there is, by the names of a state. ours: the names that are wanted, and the shapes.
    kind, spec: of a layer that composes its kernel. Where weights of the kind are wanted that are
    not there, an ordinary layer's kernel is taken over; a norm's gamma of ones and beta of zeros
    come and go. Whatever else there is stays. Raises Mismatch for a gamma or beta that is not
    wanted, and means something.
    """
    arrays = dict(theirs)
    if kind is not None and (ours.keys() & set(kind.names)) - theirs.keys():
        arrays |= over_parameterized(arrays["weight"], kind, spec)
    for name, value in NEUTRAL.items():
        if name in theirs and name not in ours and (arrays.pop(name).read() != value).any():
            raise Mismatch(
                f"entry {theirs[name].sources[0]!r} is there, and not {value:g} throughout; "
                f"{sides.layer} has no {name}."
            )
        if name in ours and name not in theirs:
            shape, dtype = ours[name], next((each.dtype for each in theirs.values()), "float32")
            read = partial(np.full, shape, value, "float32" if dtype == "bfloat16" else dtype)
            arrays[name] = Values(shape, dtype, read, how=f"{value:g}, as the batch norm has none")
    return arrays


def over_parameterized(
    kernel: Values, kind: ComposedKind, spec: Any, how: str = ""
) -> dict[str, Values]:
    """Return an ordinary convolution's kernel as the weights of a layer that takes its place.

    kernel: of any shape of its size. kind, spec: of the layer. how: what is said of it.
    """

    def started() -> dict[str, Array]:
        return kind.start(kernel.read().reshape(kind.conv(spec).kernel_shape), spec)

    how = how or f"over-parameterized, {'D = 0' if kind is DO_CONV else kind.name}"
    shapes = kind.entries(spec)
    reads = made_once(started, shapes)
    return {n: replace(kernel, shape=s, read=reads[n], how=how) for n, s in shapes.items()}


def made_once(
    make: Callable[[], Mapping[str, Array]], names: Iterable[str]
) -> dict[str, Callable[[], Array]]:
    """Return what reads each of several arrays that are made together, and let go once read."""
    made: dict[str, Array] = {}

    def part(name: str) -> Array:
        if name not in made:
            made.update(make())
        return made.pop(name)

    return {name: partial(part, name) for name in names}


def window(rows: Sequence[T], marked: int) -> tuple[int, Sequence[T], int]:
    """Return the rows around one that differs, and how many there are before and after them."""
    start, stop = max(0, marked - BEFORE), min(len(rows), marked + AFTER + 1)
    return start, rows[start:stop], len(rows) - stop
