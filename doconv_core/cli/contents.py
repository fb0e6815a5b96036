"""What a file holds: its layers in the model's order, and each array in the order of a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import prod

import click

from doconv_core.cli.command import IMPOSSIBLE, Failure
from doconv_core.cli.keras_config import fed_layers, may_pad, metadata_of_node
from doconv_core.cli.options import literal, matches
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.dynamic import parts, shape_of
from doconv_core.files.entries import GLUON
from doconv_core.files.folding import check_finite
from doconv_core.files.layers import (
    BATCH_NORM,
    CONVOLUTION,
    DYNAMIC,
    IDENTITY,
    LINEAR,
    NORM,
    OTHER,
    SLOPES,
    TRANSPOSED,
    D,
    Layer,
    canonical_shape,
)
from doconv_core.kinds.base import ComposedKind
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.numeric import Array
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import place
from doconv_core.state.agreement import Metadata, Values, made_once, metadata_of, over_parameterized
from doconv_core.state.flattening import Fed
from doconv_core.state.layers import LayerForm

OF_W = ("weight", D, IDENTITY)
COUNT = "num_batches_tracked"  # of batches, which takes no part in what a layer computes
NORMS = (BATCH_NORM, NORM)
FOLDED, AGAIN = "folded", "its kernel as W, and D = 0"


def state_names(layer: Layer) -> dict[str, str]:
    """Return the role of each of a layer's entries, by its name in a state.

    Of heads of which each has an entry, that of the first.
    """
    if layer.kind == DYNAMIC:
        return {name: roles[0] for name, roles in parts(layer.entries).items()}
    norm = {"weight": "gamma", "bias": "beta"} if layer.kind in NORMS else {}
    return {norm.get(role, role): role for role in layer.entries}


def weights_of(layer: Layer) -> tuple[str, ...]:
    """Return the roles of what a convolution's kernel is made of."""
    return ("weight", *layer.gone) if layer.over_parameterized else OF_W


def as_prelus(a: Layer, b: Layer) -> tuple[Layer, Layer]:
    """Return two layers, the lone weight of one as slopes where the other is a PReLU."""
    if a.is_prelu == b.is_prelu:
        return a, b
    weights = [layer for layer in (a, b) if layer.kind == OTHER and [*layer.entries] == ["weight"]]
    if len(weights) != 1:
        return a, b
    prelu = replace(weights[0], entries={SLOPES: weights[0].entries["weight"]})
    return (prelu, b) if b.is_prelu else (a, prelu)


def slopes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a PReLU's slopes where Keras does not share them over axes."""
    several = [n for n in shape if n != 1]
    return tuple(shape) if len(several) > 1 else (prod(several),)


class Contents:
    """An open file, of which each thing is looked at once.

    framework: whose names and layouts it has. ordered: whether its layers are in the model's order.
    forms: of a state's layers, by path. layers: of all copies of the model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.entries = checkpoint.entries
        self.forms: Mapping[str, LayerForm] = checkpoint.forms or {}
        self.framework, self.ordered = checkpoint.framework, checkpoint.ordered
        self.layers: tuple[Layer, ...] = checkpoint.in_order

    @cached_property
    def metadata(self) -> dict[str, Metadata]:
        """What the file tells of each layer beyond its arrays, by name."""
        nodes, group = self.checkpoint.nodes or {}, self.checkpoint.group
        whole = not any(map(may_pad, nodes.values()))
        found = {}
        for layer in self.layers:
            form, node = self.forms.get(layer.path), nodes and nodes.get(group(layer))
            if form is not None:
                found[layer.name] = metadata_of(form)
            elif node:
                found[layer.name] = metadata_of_node(self.checkpoint, layer, node, whole)
            else:
                found[layer.name] = Metadata()
        return found

    @cached_property
    def fed(self) -> dict[str, Fed]:
        """What the config of a `.keras` file tells of what layers are given, by name."""
        config = self.checkpoint.config
        fed = {} if config is None else fed_layers(config)
        told = ((x.name, self.checkpoint.group(x)) for x in self.layers) if fed else ()
        return {name: fed[group] for name, group in told if group in fed}

    def copy_of_model(self, part: str | None) -> list[Layer]:
        """Return the layers of one copy of the model, the first unless another is asked for."""
        parts = self.checkpoint.parts
        if part is not None and part not in parts:
            raise click.UsageError(
                f"{self.path} has no part {part!r}; it has {', '.join(map(repr, parts))}."
            )
        chosen = parts[0] if part is None and parts else part
        layers = [layer for layer in self.layers if layer.part == chosen]
        for layer in layers:
            if self.framework == GLUON and _seems_channels_last(layer):
                raise Failure(
                    f"{self.path}: the kernel {layer.kernel_shape} of {place(layer.name)} looks "
                    "like one of a channels-last network, which the file does not tell; load it in "
                    "Gluon, and carry it over with export_state.",
                    IMPOSSIBLE,
                )
        return layers

    def check_plain(self, layers: Sequence[Layer], drop: Sequence[str]) -> None:
        """Raise Failure for an entry that is no plain array and is not to be left out."""
        for name in (name for layer in layers for name in layer.entries.values()):
            entry = self.entries[name]
            if not entry.is_plain and not matches(name, drop):
                raise Failure(
                    f"{self.path}: the entry {name!r} is {entry.dtype}, no plain array, and is "
                    f"not converted; --drop '{literal(name)}' leaves it out.",
                    IMPOSSIBLE,
                )

    def needs_kernel_size(self, layer: Layer, fold: bool) -> bool:
        """Return whether the kernel size of an over-parameterized layer must be known.

        Where S is M, a layer keeps W in the kernel's shape; where it is more, as `(O, I/g, S)`.
        """
        if D not in layer.entries:
            return False
        return fold or layer.d_shape is None or layer.d_shape[2] <= layer.d_shape[1]

    def values(self, layer: Layer, fold: bool) -> dict[str, Values]:
        """Return a layer's arrays by their names in a state, those of a convolution composed if so.

        fold: whether they are to be an ordinary layer's. A layer of the reference implementation
        that composes as no pair does becomes its kernel, over-parameterized again. Raises Failure
        where that cannot be, for want of a depth multiplier of M.
        """
        found: dict[str, Values] = {}
        if layer.kind == DYNAMIC:
            return self._heads(layer)
        for name, role in state_names(layer).items():
            if layer.kind != CONVOLUTION or role not in weights_of(layer):
                found[name] = self._as_stored(layer, role)
            elif role == "weight":
                found |= self._weights(layer, fold)
        return found

    def _as_stored(self, layer: Layer, role: str) -> Values:
        entry = self.entries[layer.entries[role]]
        shape = entry.shape
        if role == "weight" and layer.kind in (LINEAR, TRANSPOSED):
            shape = layer.kernel_shape or shape
        if role == SLOPES and layer.is_prelu:
            shape = slopes_of(shape)

        def read() -> Array:
            found = self.checkpoint.read(entry.name)
            return (layer.canonical(found) if role == "weight" else found).reshape(shape)

        return Values(shape, entry.dtype, read, (entry.name,))

    def _heads(self, layer: Layer) -> dict[str, Values]:
        entries = {role: self.entries[name] for role, name in layer.entries.items()}
        found: dict[str, Values] = {}
        for name, roles in parts(entries).items():
            shape = layer.kernel_shape or () if name == "weight" else shape_of(name, entries)
            sources = tuple(entries[role].name for role in roles)
            read = partial(self.checkpoint.heads, layer, name)
            found[name] = Values(shape, entries[roles[0]].dtype, read, sources)
        return found

    def _weights(self, layer: Layer, fold: bool) -> dict[str, Values]:
        sources = tuple(name for role, name in layer.entries.items() if role in weights_of(layer))
        dtype = self.entries[layer.entries["weight"]].dtype
        kernel = partial(self.checkpoint.kernel, layer)
        stored = Values(layer.kernel_shape or (), dtype, kernel, sources)
        if not layer.over_parameterized:
            return {"weight": stored}
        if fold:
            folded = replace(stored, read=lambda: check_finite(layer, kernel()), how=FOLDED)
            return {"weight": folded}
        if layer.composed not in (None, DO_CONV):
            return self._composed(layer.composed, layer, sources)
        assert layer.d_shape is not None  # as DO-Conv layers have one
        pair = self._pair(layer)
        if pair is None:
            assert isinstance(layer.spec, ConvSpec)  # as `_pair` has checked
            return over_parameterized(stored, DO_CONV, layer.spec, AGAIN)
        reads = made_once(pair, DO_CONV.names)
        entry = self.entries[layer.entries["weight"]]
        channels = canonical_shape(entry.shape, layer.layout)[:2]
        shapes = (*channels, layer.d_shape[-1]), layer.d_shape
        return {
            name: Values(shape, dtype, reads[name], sources)
            for name, shape in zip(DO_CONV.names, shapes, strict=True)
        }

    def _composed(
        self, kind: ComposedKind, layer: Layer, sources: tuple[str, ...]
    ) -> dict[str, Values]:
        """Return what a kernel of another kind is composed of, each as a state has it."""
        shapes = kind.entries(layer.spec)

        def read(role: str) -> Array:
            array = self.checkpoint.read(layer.entries[role])
            array = layer.canonical(array) if role == "weight" else array
            return array.reshape(shapes[role])

        dtype = self.entries[layer.entries["weight"]].dtype
        return {
            role: Values(shape, dtype, partial(read, role), sources)
            for role, shape in shapes.items()
        }

    def _pair(self, layer: Layer) -> Callable[[], dict[str, Array]] | None:
        """Return what reads W and D; None for a layer that composes as no pair does."""

        def pair() -> dict[str, Array]:
            found = zip(DO_CONV.names, self.checkpoint.pair(layer), strict=True)
            return {name: array for name, array in found if array is not None}

        if not layer.origin.startswith("reference"):
            return pair
        if layer.kernel_shape is not None and not isinstance(layer.spec, ConvSpec):
            raise Failure(
                f"{place(layer.name)} has a depth multiplier below its "
                f"{prod(layer.kernel_shape[2:])} taps, which no layer here may have; --fold "
                "carries its kernel over.",
                IMPOSSIBLE,
            )
        try:
            made = pair()  # which alone tells whether there is one
        except NotFoldable:
            if isinstance(layer.spec, ConvSpec):
                return None
            raise
        return lambda: made


def _seems_channels_last(layer: Layer) -> bool:
    """Return whether a kernel taken to be channels-first looks like one of the other layout.

    Gluon keeps such kernels as `(O, *kernel, I/g)`, and of ordinary layers the file tells no more.
    Taken as `(O, I/g, *kernel)`, a 3×3 kernel of 64 channels would be a 3×64 one of 3 channels.
    """
    shape = layer.kernel_shape or ()
    if layer.kind != CONVOLUTION or layer.over_parameterized or len(shape) < 4:
        return False
    first, *between, last = shape[1:]
    if all(n == 1 for n in (first, *between)):
        return False  # channels-last, it would be one tap, whose numbers lie in the same order
    return all(n == first for n in between) and last > 2 * first and last >= 8
