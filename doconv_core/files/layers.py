"""Which layers a file holds, as far as the names and shapes of its entries tell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from math import isqrt, prod
from typing import Any

import numpy as np

from doconv_core.files.dynamic import find_heads, is_of_source, kernel_of, unlike_heads
from doconv_core.files.entries import (
    FLOATS,
    PYTORCH,
    Array,
    Entry,
    KernelSizes,
    groups_of,
    shown,
)
from doconv_core.files.reference import LAYOUTS, ORIGIN, find_reference
from doconv_core.files.reference import D as D
from doconv_core.kinds.base import ComposedKind, kinds
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.maths.spec import MAX_RANK, ConvSpec, as_integer, is_sequence
from doconv_core.state.layers import LinearSpec

SLOPES = "alpha"  # the role of a PReLU's
IDENTITY = "identity"  # the role of the one that the reference implementation stores
Shape = tuple[int, ...]
CANONICAL = "OI*"  # the order of axes that a weight has in a state
CONVOLUTION, TRANSPOSED, LINEAR = "convolution", "transposed convolution", "linear"
BATCH_NORM, NORM, OTHER = "batch norm", "norm", "other"
DYNAMIC = "dynamic heads"  # of a dynamic group convolution


@dataclass(frozen=True)
class Layer:
    """A layer, as far as the names and shapes of a file's entries tell.

    path: where it is in the model, dots between names where the format has them; without a
    `module.` that a wrapper put before all names, and without the part.
    kind: "convolution" (of most files, a transposed one looks the same), "transposed convolution",
    "linear" (or an embedding), "batch norm", "norm" (a layer, group or instance norm), "dynamic
    heads" (of a dynamic group convolution), "other".
    entries: the names of the entries by role, in the file's order. Roles: weight, the others of the
    kind that composes it, identity (the reference implementation's), bias; of a batch norm also
    running_mean, running_var, num_batches_tracked. The entries of dynamic heads bear those of their
    framework or source, those of an "other" their own.
    origin: "doconv", of an "other" with a note too if it seems to be a layer of this package, and
    cannot be folded; "reference PyTorch", "reference TensorFlow" or "reference Gluon" for a layer
    of the reference implementation; "" where nothing tells.
    part: of a file with several copies of a model, such as "ema", which one; "" for the only one.
    composed: the kind that composes its kernel, of an over-parameterized layer; else None.
    spec: the sizes, where the file tells them all: of an ordinary convolution most files do not
    tell the groups. kernel_shape: of a convolution, `(O, I/g, *kernel_size)`, of a linear layer
    `(out, in)`; None where the kernel size is not in the file.
    layout: `doconv_core.maths.layout`'s word for the axes of a convolution's weight in the file.
    note: what a reader should know: an assumption made, or why the layer cannot be folded.
    d_shape: of one with a D, `(I, M, S)`, in whatever order the file keeps it.
    """

    path: str
    kind: str
    entries: Mapping[str, str]
    origin: str = ""
    part: str = ""
    composed: ComposedKind | None = None
    spec: ConvSpec | LinearSpec | None = None
    kernel_shape: tuple[int, ...] | None = None
    layout: str = CANONICAL
    note: str = ""
    d_shape: tuple[int, int, int] | None = None

    @property
    def over_parameterized(self) -> bool:
        """Whether its kernel is composed of several weights."""
        return self.composed is not None

    @property
    def gone(self) -> tuple[str, ...]:
        """The roles of the entries that a folded layer has no more."""
        beside = () if self.composed is None else (*self.composed.names[1:], IDENTITY)
        return tuple(role for role in beside if role in self.entries)

    @property
    def is_prelu(self) -> bool:
        """Whether it is known to be a PReLU; in PyTorch its slopes are a weight, as others are."""
        return [*self.entries] == [SLOPES]

    def canonical(self, weight: Array) -> Array:
        """Return the layer's weight, as its file has it, in canonical order."""
        return weight if self.layout == CANONICAL else to_canonical(weight, self.layout)

    def stored(self, weight: Array) -> Array:
        """Return a canonical weight in the order of the file's own."""
        groups = getattr(self.spec, "groups", 1)
        return weight if self.layout == CANONICAL else from_canonical(weight, self.layout, groups)

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape of a canonical weight in the order of the file's own."""
        return self.stored(np.broadcast_to(0, shape)).shape  # a view, whatever the shape

    @property
    def needs_size(self) -> bool:
        """Whether its kernel can't be composed, as the kernel size is not in the file."""
        return self.over_parameterized and self.kernel_shape is None

    @property
    def name(self) -> str:
        """The path, with the part before it where there are several."""
        return f"{self.part}/{self.path}" if self.part else self.path


# What ends an entry's name, and the role that it has. Those of batch norms, by framework.
ROLES = {
    "weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias",
    "running_mean": "running_mean", "moving_mean": "running_mean",
    "running_var": "running_var", "moving_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}  # fmt: skip
_ENDINGS = tuple(ROLES)


def find_layers(
    entries: Mapping[str, Entry],
    keys: Mapping[str, str],
    sizes: Sizes,
    *,
    part: str = "",
    separators: str = "./",
    framework: str = "",
    layouts: tuple[str, ...] = (CANONICAL,),
    norm: tuple[str, str] = ("weight", "bias"),
) -> tuple[Layer, ...]:
    """Return the layers of one copy of a model, in the order of their first entries.

    keys: the entries' names by their names within the copy. separators: what may stand before a
    role's name. framework: of the reference implementation, where it is known. layouts: which a
    weight may have; where several fit, the first, unless the file has a layer that only the other
    fits. norm: the names of the two entries of a norm that is no batch norm.
    """
    shapes = {key: entries[name] for key, name in keys.items()}
    search = _Search(shapes, sizes, part, separators, framework, layouts, norm)
    ordered = {key: place for place, key in enumerate(shapes)}
    found = sorted(search.layers(), key=lambda layer: ordered[next(iter(layer.entries.values()))])
    if all(key == name for key, name in keys.items()):
        return tuple(found)
    return tuple(
        dataclasses.replace(x, entries={role: keys[key] for role, key in x.entries.items()})
        for x in found
    )


@dataclass(frozen=True)
class _Search:
    """The search of `find_layers`, in entries by their names within one copy of a model."""

    shapes: Mapping[str, Entry]
    sizes: Sizes
    part: str
    separators: str
    framework: str
    layouts: tuple[str, ...]
    norm: tuple[str, str]

    def layers(self) -> list[Layer]:
        """Return all layers: what one of them has taken is no other's."""
        found: list[Layer] = []
        taken: set[str] = set()
        own = self._reference(), self._over_parameterized(), self._composed(), self._dynamic()
        for layer in chain.from_iterable(own):
            if taken.isdisjoint(layer.entries.values()):
                found.append(layer)
                taken.update(layer.entries.values())
        first = self.layouts[0]
        layout = next((x.layout for x in found if x.layout != first), first)
        groups: dict[str, dict[str, str]] = {}
        for key in (key for key in self.shapes if key not in taken):
            prefix, role = self._split(key)
            roles = groups.setdefault(prefix, {})
            # Another entry may have the role already, such as gamma's; then this has its own name.
            roles[key[len(prefix) :] if role in roles else role] = key
        return found + [self._ordinary(prefix, roles, layout) for prefix, roles in groups.items()]

    def _layer(
        self, prefix: str, kind: str, roles: Mapping[str, str], origin: str = "", **more: Any
    ) -> Layer:
        return Layer(prefix.rstrip("./_"), kind, roles, origin, self.part, **more)

    def _reference(self) -> Iterator[Layer]:
        """Yield the layers of the reference implementation."""
        if not any(key.endswith("D") for key in self.shapes):
            return
        for found in find_reference(self.shapes, self.separators, self.framework):
            layer = self._layer(
                found.prefix, CONVOLUTION, found.roles, ORIGIN + found.framework,
                composed=DO_CONV if D in found.roles else None, layout=LAYOUTS[found.framework],
            )  # fmt: skip
            inputs, outputs, _ = found.channels
            if layer.over_parameterized:
                sizes = found.channels, found.taps, found.multiplier, found.kernel_size
                layer = sized(layer, *sizes, self.sizes)
            else:
                layer = dataclasses.replace(layer, kernel_shape=(outputs, inputs, 1, 1))
            note = "; ".join(filter(None, (layer.note, found.note)))
            yield dataclasses.replace(layer, note=note)

    def _over_parameterized(self) -> Iterator[Layer]:
        """Yield this package's layers with a D.

        What stands before D's name need not end in a separator: an averaged copy of a model
        may have the dots taken out of its names.
        """
        shapes, ambiguous, settled = self.shapes, [], ""
        place = {key: number for number, key in enumerate(shapes)}
        for key in (key for key in shapes if key.endswith(D)):
            prefix = key[: -len(D)]
            weight = shapes.get(f"{prefix}weight")
            if weight is None or len(shapes[key].shape) != 3 or len(weight.shape) < 3:
                continue
            roles = {r: prefix + r for r in ("weight", "bias", D) if prefix + r in shapes}
            roles = dict(sorted(roles.items(), key=lambda item: place[item[1]]))
            layer = self._layer(prefix, CONVOLUTION, roles, "doconv", composed=DO_CONV)
            all_ = (over_parameterized(layer, shapes, at, self.sizes) for at in self.layouts)
            fitting = [found for found in all_ if found is not None]
            if len(fitting) > 1:
                ambiguous.append(fitting)
            elif fitting:
                settled = settled or fitting[0].layout
                yield fitting[0]
        for fitting in ambiguous:
            agreeing = [found for found in fitting if found.layout == settled]
            layer = (agreeing or fitting)[0]
            guess = f"taken to be channels first: {layer.kernel_shape} fits both layouts"
            yield dataclasses.replace(layer, note=layer.note or ("" if agreeing else guess))

    def _composed(self) -> Iterator[Layer]:
        """Yield the layers of other kinds that compose a kernel, by the names of their entries."""
        if {key[_start(key) :] for key in self.shapes} <= {*ROLES, D}:
            return  # what only ordinary layers and DO-Conv ones have
        for kind in other_kinds():
            for key in (key for key in self.shapes if key.endswith(kind.names[1])):
                prefix = key.removesuffix(kind.names[1])
                roles = {r: prefix + r for r in (*kind.names, "bias") if prefix + r in self.shapes}
                if prefix and prefix[-1] not in "./":
                    continue
                layer = self._layer(prefix, CONVOLUTION, roles, "doconv", layout=self.layouts[0])
                found = composed_by(kind, layer, self.shapes)
                if found is not None:
                    yield found

    def _dynamic(self) -> Iterator[Layer]:
        """Yield the heads of dynamic group convolutions, this package's and their source's."""
        for prefix, roles in find_heads(self.shapes):
            entries = {role: self.shapes[key] for role, key in roles.items()}
            kernel, path, origin = kernel_of(entries), prefix, "doconv"
            if is_of_source(roles):
                path, origin = f"{prefix}heads", ORIGIN + PYTORCH
            if kernel is not None:
                yield self._layer(path, DYNAMIC, roles, origin, kernel_shape=kernel)
            elif path != prefix:
                yield self._layer(path, OTHER, roles, note=unlike_heads(entries))

    def _ordinary(self, prefix: str, roles: dict[str, str], layout: str) -> Layer:
        """Return an ordinary layer, or what has an entry named as a D is and is none of ours."""
        by_role = {role: self.shapes[key] for role, key in roles.items()}
        weight = by_role["weight"].shape if "weight" in roles else ()
        named = next((key for key in roles.values() if key.endswith(D)), None)
        if named is not None and not self._is_depthwise(named, roles, layout):
            # A D has three axes. So four are a depthwise kernel's; anything else is not known.
            origin = "" if len(self.shapes[named].shape) > 3 else "doconv"
            rest = {role: by_role[role] for role, key in roles.items() if key != named}
            note = unlike({named[len(prefix) :]: self.shapes[named], **rest})
            return self._layer(prefix, OTHER, roles, origin, note=note)
        if "running_mean" in roles:
            return self._layer(prefix, BATCH_NORM, roles)
        if 3 <= len(weight) <= 5 and by_role["weight"].dtype in FLOATS:
            kernel = canonical_shape(weight, layout)
            return self._layer(prefix, CONVOLUTION, roles, kernel_shape=kernel, layout=layout)
        if len(weight) == 2:
            return self._layer(prefix, LINEAR, roles, kernel_shape=weight)
        is_norm = (
            {*roles} == {"weight", "bias"}
            and weight == by_role["bias"].shape
            and all(
                roles[r].endswith(n) for r, n in zip(("weight", "bias"), self.norm, strict=True)
            )
        )
        return self._layer(prefix, NORM if is_norm else OTHER, roles)

    def _is_depthwise(self, named: str, roles: Mapping[str, str], layout: str) -> bool:
        """Return whether an entry named as a D is a weight of a convolution named `…_depthwise`.

        So it is in the flat names of Gluon, where a convolution of one channel a group is named so,
        and no layer by the name before it has a weight.
        """
        shape = self.shapes[named].shape
        beside = f"{named[: -len(D)]}weight"
        if roles.get("weight") != named or beside in self.shapes or len(shape) < 3:
            return False
        return canonical_shape(shape, layout)[1] == 1

    def _split(self, key: str) -> tuple[str, str]:
        """Return what stands before an entry's own name, with the separator, and its role."""
        start = _start(key)
        role = ROLES.get(key[start:])
        if role is not None:
            return key[:start], role
        for ending, role in ROLES.items() if key.endswith(_ENDINGS) else ():
            prefix = key[: -len(ending)]
            if key.endswith(ending) and (not prefix or prefix[-1] in self.separators):
                return prefix, role
        return key[:start], key[start:]


def _start(key: str) -> int:
    """Return where an entry's own name begins."""
    return max(key.rfind("."), key.rfind("/")) + 1


MAX_TOLD = 6  # entries in a note


class KernelSizeError(ValueError):
    """A kernel size that was given, and is that of no layer that it is for."""


_ESCAPED = re.compile(r"\[([*?[])\]")


def literal_of(pattern: str) -> str | None:
    """Return the one name that a glob pattern matches; None where it may match others.

    >>> literal_of("conv[*]1"), literal_of("conv*")
    ('conv*1', None)
    """
    if set("*?[").isdisjoint(_ESCAPED.sub("", pattern)):
        return _ESCAPED.sub(r"\1", pattern)
    return None


class Sizes:
    """Kernel sizes by glob pattern on a layer's names; the first pattern that matches counts.

    Raises TypeError or KernelSizeError for what is no kernel size.
    """

    def __init__(self, sizes: KernelSizes) -> None:
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._place = {pattern: number for number, pattern in enumerate(sizes)}
        # Names that are written out are looked up: there may be one for each layer.
        self._exact = {name: p for p in sizes if (name := literal_of(p)) is not None}
        self._globs = [p for p in sizes if literal_of(p) is None]
        self._unused = set(sizes)
        self._asked: list[str] = []
        for pattern, size in sizes.items():
            if not is_sequence(size) or not 1 <= len(size) <= MAX_RANK:
                raise KernelSizeError(
                    f"kernel_sizes must give 1 to {MAX_RANK} integers for each pattern; received "
                    f"{size!r} for {pattern!r}."
                )
            self._sizes[pattern] = tuple(
                as_integer(f"kernel_sizes[{pattern!r}]", entry) for entry in size
            )

    def given(self, names: Iterable[str], taps: int) -> tuple[int, ...] | None:
        """Return the kernel size given for the layer that bears one of these names, if any is.

        Raises KernelSizeError where its product is not `taps`.
        """
        names = list(dict.fromkeys(names))
        self._asked += names
        matching = [p for p in self._globs if any(fnmatchcase(name, p) for name in names)]
        matching += {self._exact[name]: None for name in names if name in self._exact}
        matching.sort(key=self._place.__getitem__)
        self._unused.difference_update(matching)
        if not matching:
            return None
        size = self._sizes[matching[0]]
        if prod(size) != taps:
            raise KernelSizeError(
                f"layer {names[0]!r} has {taps} kernel taps; received the kernel size {size}, "
                f"which has {prod(size)}."
            )
        return size

    def check_used(self) -> None:
        """Raise KernelSizeError for a pattern that no over-parameterized layer has matched."""
        if self._unused:
            there = ", ".join(map(repr, self._asked[:3])) or "no over-parameterized layer"
            raise KernelSizeError(
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


def over_parameterized(
    layer: Layer,
    shapes: Mapping[str, Entry],
    layout: str,
    sizes: Sizes,
    kernel_size: Shape | None = None,
) -> Layer | None:
    """Return a layer of W, D and perhaps a bias with its sizes, or None where they do not agree.

    The names may be another's than this package's. layout: of the weight. kernel_size: where the
    file tells it otherwise.
    """
    weight, depthwise = shapes[layer.entries["weight"]], shapes[layer.entries[D]]
    if weight.dtype not in FLOATS or depthwise.dtype not in FLOATS:
        return None
    out_channels, per_group, *body = canonical_shape(weight.shape, layout)
    in_channels, taps, multiplier = depthwise.shape
    groups = groups_of(in_channels, out_channels, per_group)
    if not groups or not 1 < taps <= multiplier or prod(body) != multiplier:
        return None
    bias = shapes.get(layer.entries.get("bias", ""))
    if len(body) > MAX_RANK or (bias is not None and bias.shape != (out_channels,)):
        return None
    if len(body) > 1 or taps == multiplier:
        if taps != multiplier:
            return None
        kernel_size = tuple(body)
    layer = dataclasses.replace(layer, layout=layout)
    return sized(layer, (in_channels, out_channels, groups), taps, multiplier, kernel_size, sizes)


def other_kinds() -> list[ComposedKind]:
    """Return the kinds beside DO-Conv that compose a kernel."""
    return [x for x in kinds().values() if isinstance(x, ComposedKind) and x is not DO_CONV]


def composed_by(kind: ComposedKind, layer: Layer, shapes: Mapping[str, Entry]) -> Layer | None:
    """Return a convolution as one whose kernel a kind composes, or None where it is none such."""
    own = {role: shapes[name].shape for role, name in layer.entries.items() if role != "bias"}
    if not {"weight"} < {*own} <= {*kind.names} or not 3 <= len(own["weight"]) <= MAX_RANK + 2:
        return None
    if not all(shapes[name].dtype in FLOATS for name in layer.entries.values()):
        return None
    spec = kind.recognised(own | {"weight": canonical_shape(own["weight"], layer.layout)})
    if spec is not None and layer.layout == "*CN":  # which tells the groups where no entry does
        conv, channels = kind.conv(spec), own["weight"][-2]
        told = {name: getattr(spec, name) for name in kind.options}
        spec = kind.spec(ConvSpec(channels, conv.out_channels, conv.kernel_size, channels), **told)
        shaped = kind.entries(spec)
        spec = spec if all(own[n] == shaped.get(n) for n in own if n != "weight") else None
    if spec is None:
        return None
    shape = kind.conv(spec).kernel_shape
    return dataclasses.replace(layer, composed=kind, spec=spec, kernel_shape=shape)


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
    layer = dataclasses.replace(layer, d_shape=(in_channels, taps, multiplier))
    given, side = sizes.given((layer.name, layer.path), taps), isqrt(taps)
    if kernel_size is not None and given not in (None, kernel_size):
        raise KernelSizeError(
            f"layer {layer.name!r} has the kernel size {kernel_size} in the file; received {given}."
        )
    kernel_size, note = kernel_size or given, layer.note
    if kernel_size is None and layer.origin.startswith(ORIGIN) and side * side == taps:
        kernel_size, note = (side, side), f"{taps} taps, taken to be {side}×{side}"
    if kernel_size is None:
        example = (side, side) if side * side == taps else (taps,)
        note = (
            f"its kernel size is not in the file, which tells {taps} taps; give it, with "
            f"kernel_sizes={{{layer.name!r}: {example}}} or the like"
        )
        return dataclasses.replace(layer, note=note)
    kernel_shape = (out_channels, in_channels // groups, *kernel_size)
    spec = None
    if multiplier >= taps:  # the reference implementation has others
        spec = ConvSpec(in_channels, out_channels, kernel_size, groups, multiplier)
    return dataclasses.replace(layer, note=note, spec=spec, kernel_shape=kernel_shape)
