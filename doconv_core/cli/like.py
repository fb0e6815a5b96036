"""A file's arrays in the form of another file, which was saved from the target network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.flattening import Flattenings, takes_image
from doconv_core.cli.naming import COUNT, OF_W
from doconv_core.cli.pairing import Paired, family
from doconv_core.cli.planning import Plan, Planned, Weights, weights_of
from doconv_core.cli.recognised import TRANSPOSED, weight_of
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import BATCH_NORM, CONVOLUTION, LINEAR, Layer
from doconv_core.kinds.do_conv import from_kernel
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import place

Array = NDArray[Any]

# The types that hold every number of a type.
HOLD = {
    "float16": {"float16", "float32", "float64"},
    "bfloat16": {"bfloat16", "float32", "float64"},
    "float32": {"float32", "float64"},
}
DEFAULTS = {"weight": 1.0, "bias": 0.0, COUNT: 0.0}  # of a batch norm that lacks them


@dataclass(frozen=True)
class Template:
    """The file whose form is taken. fold: whether the source's layers are folded on the way.

    flattenings: of the source's linear layers, where axes are ordered otherwise; last: whether the
    template's order is channels-last.
    """

    source: Checkpoint
    file: Checkpoint
    fold: bool = False
    flattenings: Flattenings | None = None
    last: bool = False

    def plan(self, paired: Paired) -> Plan:
        """Return what to write: every entry of the template's layers, with the source's values.

        Raises Failure for a layer that only one of the two has, or that differs.
        """
        for checkpoint, alone in ((self.source, paired.first), (self.file, paired.second)):
            for layer in alone:
                other = self.file if checkpoint is self.source else self.source
                raise Failure(
                    f"{place(layer.name)} is in {checkpoint.path}, but not in {other.path}; "
                    "--match order pairs layers of other names, --drop leaves out those of IN.",
                    IMPOSSIBLE,
                )
        plan = Plan()
        for source, target in paired.both:
            plan.entries.extend(self._layer(source, target))
            if COUNT in source.entries and COUNT not in target.entries:
                plan.dropped.append(source.entries[COUNT])
        order = {name: place for place, name in enumerate(self.file.entries)}
        plan.entries.sort(key=lambda entry: order[entry.name])
        return plan

    def _layer(self, source: Layer, target: Layer) -> Iterator[Planned]:
        if family(source) != family(target) or not _same_shape(source, target):
            raise self._differs(source, target)
        if target.origin.startswith("reference"):
            raise Failure(
                f"{self.file.path} has the reference implementation's layers, which are read here, "
                "not written; save it from a network of this package's layers.",
                IMPOSSIBLE,
            )
        convolutions = source.kind == target.kind == CONVOLUTION
        handled = OF_W if convolutions else ()
        if convolutions:
            yield from self._weights(source, target)
        rest = [role for role in target.entries if role not in handled]
        there = {role for role in source.entries if role not in handled} - {COUNT}
        missing = {role for role in rest if role not in source.entries}
        can_default = target.kind == BATCH_NORM and missing <= DEFAULTS.keys()
        if there - set(rest) or (missing and not can_default):
            raise self._differs(source, target)
        for role in rest:
            yield self._entry(source, target, role)

    def _entry(self, source: Layer, target: Layer, role: str) -> Planned:
        entry = self.file.entries[target.entries[role]]
        if role not in source.entries:
            value = DEFAULTS[role]

            def default() -> Array:
                return np.full(entry.shape, value, np.float32)

            how = f"{value:g}, as the batch norm has none"
            return Planned(entry.name, entry.shape, entry.dtype, default, (), how)
        name = source.entries[role]
        if role == "weight" and source.kind in (LINEAR, TRANSPOSED, CONVOLUTION):
            values = self._linear(source, target, entry.shape)
            return self._planned(entry.name, (name,), values, self._how(source, role))
        if self.source.entries[name].shape != entry.shape:
            raise self._differs(source, target)
        read = self._ordered(source, role, lambda: self.source.read(name))
        return self._planned(entry.name, (name,), read, self._how(source, role))

    def _linear(self, source: Layer, target: Layer, shape: tuple[int, ...]) -> Callable[[], Array]:
        weight = self._ordered(
            source,
            "weight",
            lambda: weight_of(self.source, source).reshape(source.kernel_shape or ()),
        )
        return lambda: from_canonical(weight(), target.layout).reshape(shape)

    def _ordered(
        self, source: Layer, role: str, values: Callable[[], Array]
    ) -> Callable[[], Array]:
        """Return what gives the same values, those of a flattened image in the target's order."""
        if self.flattenings is None or not takes_image(source, role):
            return values
        ordered = self.flattenings.last if self.last else self.flattenings.first
        return lambda: ordered(source, values())

    def _how(self, source: Layer, role: str) -> str:
        images = self.flattenings if takes_image(source, role) else None
        return "" if images is None else images.how(source)

    def _weights(self, source: Layer, target: Layer) -> Iterator[Planned]:
        if source.over_parameterized and not (target.over_parameterized or self.fold):
            raise Failure(
                f"{place(source.name)} is over-parameterized in {self.source.path}, and ordinary "
                f"in {self.file.path}; --fold folds it.",
                IMPOSSIBLE,
            )
        weights, spec = weights_of(self.source, source, self.fold), target.spec
        groups = spec.groups if isinstance(spec, ConvSpec) else 1
        if target.over_parameterized:
            if weights.depthwise is None:
                if not isinstance(spec, ConvSpec):
                    raise self._differs(source, target)
                weights = _over_parameterized(weights, spec)
            depthwise = self.file.entries[target.entries["depthwise_weight"]]
            if depthwise.shape != weights.depthwise_shape:
                raise self._differs(source, target)
        entry = self.file.entries[target.entries["weight"]]
        sources = tuple(name for role, name in source.entries.items() if role in OF_W)

        def values() -> Array:
            return from_canonical(weights.weight(), target.layout, groups).reshape(entry.shape)

        yield self._planned(entry.name, sources, values, weights.how)
        if weights.depthwise is not None:
            name = target.entries["depthwise_weight"]
            yield self._planned(name, sources, weights.depthwise, weights.how)

    def _planned(
        self, name: str, sources: tuple[str, ...], values: Callable[[], Array], how: str = ""
    ) -> Planned:
        entry = self.file.entries[name]
        for source in sources:
            dtype = self.source.entries[source].dtype
            if entry.dtype not in HOLD.get(dtype, {dtype}):
                raise Failure(
                    f"the entry {source!r} is {dtype}, and would lose digits as {entry.dtype}, "
                    f"which {self.file.path} has.",
                    IMPOSSIBLE,
                )
        return Planned(name, entry.shape, entry.dtype, values, sources, how)

    def _differs(self, source: Layer, target: Layer) -> Failure:
        return Failure(
            f"{place(source.name)} in {self.source.path}, {_told(source)}, is another than "
            f"{target.name!r} in {self.file.path}, {_told(target)}.",
            IMPOSSIBLE,
        )


def _same_shape(source: Layer, target: Layer) -> bool:
    groups = _groups(source), _groups(target)
    if None not in groups and groups[0] != groups[1]:
        return False
    shapes = source.kernel_shape, target.kernel_shape
    return None in shapes or shapes[0] == shapes[1]


def _groups(layer: Layer) -> int | None:
    return layer.spec.groups if isinstance(layer.spec, ConvSpec) else None


def _told(layer: Layer) -> str:
    shape = "" if layer.kernel_shape is None else f" {layer.kernel_shape}"
    shape += f" in {groups} groups" if (groups := _groups(layer) or 1) > 1 else ""
    return f"{layer.kind}{shape} with {', '.join(layer.entries)}"


def _over_parameterized(weights: Weights, spec: ConvSpec) -> Weights:
    """Return an ordinary layer's weights as W and D = 0."""

    def part(number: int) -> Array:
        found = from_kernel(weights.kernel(), spec)[number]
        assert found is not None  # as the spec has more than one tap
        return found

    return Weights(
        shape=spec.parameter_shape,
        weight=lambda: part(0).reshape(spec.parameter_shape),
        kernel=weights.kernel,
        depthwise_shape=spec.depthwise_shape or (),
        depthwise=lambda: part(1),
        how="over-parameterized, D = 0",
    )
