"""BSConv layers in whole models: what every framework does with them alike.

How one is folded is said here once; a framework says how its ordinary layers are read and made.
With DO-Conv they compose in one way: the depthwise part may be a DO layer, which
`over_parameterize` makes it, and folds with the rest. The pointwise parts have one tap and nothing
to over-parameterize; a DO layer does not become a BSConv before it is folded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from doconv_core.kinds.bsconv import (
    BSCONV,
    FORMS,
    OVER_PARAMETERIZED,
    PART,
    as_choice,
    form_costs,
)
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.separable import (
    Folded,
    Step,
    fold_dense,
    fold_pointwise,
)
from doconv_core.models.parted import PartedLayers
from doconv_core.models.report import REPLACED, SUBCLASS, Choice
from doconv_core.models.view import Folding, Leave, ModelView, Site


class SeparableLayers(PartedLayers):
    """A framework's BSConv layers. Those of a model that are folded stay the same objects.

    base: what they all are. types: the layers. sequence: the ordinary type that a layer with the
    same parts has. bn_options: what batch norms in networks take whose defaults are not the
    framework's. linear: what a pointwise convolution is beside. padding: names of parts that only
    pad their input.
    """

    kind = BSCONV
    already, part = OVER_PARAMETERIZED, PART
    kept = "keep"
    sequence: type
    bn_options: ClassVar[Mapping[str, Any]] = {}
    linear = "of stride 1"
    padding: tuple[str, ...] = ()

    def __init__(self, base: type, *types: Any) -> None:
        self.base = base
        self.layers = {(cls.variant, cls.ordinary): cls for cls in types}
        self.type_names = frozenset(cls.__name__ for cls in types)

    # How a layer and its parts are read.

    def _names(self, layer: Any) -> tuple[str, ...]:
        """Return the names that the parts of a layer are to have."""
        names: tuple[str, ...] = layer.spec.names
        return names

    @abstractmethod
    def _strides(self, layer: Any) -> Sequence[int] | None:
        """Return a layer's strides; None where parts were exchanged, or sizes are not known."""

    @abstractmethod
    def _passes_on(self, part: Any) -> bool:
        """Return whether a part is what a batch norm has become that was fused."""

    @abstractmethod
    def _is_pointwise(self, conv: Any) -> bool:
        """Return whether a convolution is pointwise, as `linear` says."""

    @abstractmethod
    def _is_depthwise(self, conv: Any) -> bool:
        """Return whether a convolution has one filter for each channel."""

    @abstractmethod
    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        """Return where the taps of a layer's depthwise convolution meet the layer's input."""

    # How ordinary layers are made.

    @abstractmethod
    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any | None = None
    ) -> Any:
        """Return an ordinary convolution, in a layer's place, of these values by context.

        depthwise: the part, folded, that the convolution computes as well; else it is pointwise.
        """

    @abstractmethod
    def _sequenced(self, layer: Any, parts: Mapping[str, Any]) -> Any:
        """Return the parts in sequence, by these names, in a layer's place."""

    # What all frameworks do with them alike.

    def folded(self, layer: Any, form: str) -> Any:
        """Return the new layers that a layer folds to, as its `fold` says."""
        as_choice("form", form, FORMS)
        hint = "" if form == self.kept else f"; form={self.kept!r} leaves it in a model"
        self._check_own(layer, hint)
        if form == self.kept:
            return self._kept_parts(layer)
        self._check_parts(layer)
        parts = self._parts(layer)
        pointwise = {
            context: fold_pointwise(self._steps(parts, context))
            for context in self._contexts(layer)
        }
        depthwise = self._ordinary(parts["depthwise"])
        padding = {name: self._ordinary(parts[name]) for name in parts if name in self.padding}
        if form == "merge":
            merged = self._convolution(layer, pointwise)
            return self._sequenced(layer, {"pointwise": merged, **padding, "depthwise": depthwise})
        self._check_watcher("depthwise", parts["depthwise"])
        geometry = self._geometry(layer, depthwise)
        dense = {
            context: fold_dense(values, *self._matrix(depthwise, context), geometry)
            for context, values in pointwise.items()
        }
        conv = self._convolution(layer, dense, depthwise)
        return self._sequenced(layer, {**padding, "conv": conv}) if padding else conv

    def _kept_parts(self, layer: Any) -> Any:
        """Return copies of a layer's parts, ordinary ones, in sequence."""
        parts = self._parts(layer)
        return self._sequenced(layer, {name: self._ordinary(part) for name, part in parts.items()})

    def _check_parts(self, layer: Any) -> None:
        """Raise NotFoldable where a layer's parts are not what its type makes."""
        parts = self._parts(layer)
        self._check_names(parts, self._names(layer))
        for name, part in parts.items():
            if name == "depthwise":
                self._check_depthwise(layer, part)
            elif name not in self.padding and not self._passes_on(part):
                self._check_watcher(name, part)
                self._check_before(layer, name, part)

    def _check_before(self, layer: Any, name: str, part: Any) -> None:
        """Raise NotFoldable for what can be no part before the depthwise one."""
        if isinstance(part, self.batch_norm):
            self._check(name, self._norm_obstacle(layer, part))
            return
        self._check(name, self._conv_obstacle(layer, name, part))
        if not self._is_pointwise(part):
            raise NotFoldable(f"its {name} is no pointwise convolution {self.linear}: {part}.")

    def _check_depthwise(self, layer: Any, part: Any) -> None:
        if self.is_replaced(part):
            self._check("depthwise", REPLACED)
        if not isinstance(part, self.composed):  # whose own `fold` checks the rest
            self._check("depthwise", self._conv_obstacle(layer, "depthwise", part))
        if not self._is_depthwise(part):
            raise NotFoldable(f"its depthwise is no depthwise convolution: {part}.")

    def _steps(self, parts: Mapping[str, Any], context: Any) -> list[Step]:
        """Return what comes before the depthwise convolution, of parts that have been checked."""
        return [
            self._normalization(part, context)
            if isinstance(part, self.batch_norm)
            else self._matrix(part, context)
            for name, part in parts.items()
            if name not in ("depthwise", *self.padding) and not self._passes_on(part)
        ]

    def _is_changed(self, layer: Any) -> bool:
        """Return whether merging a layer makes anything else of it than keeping it."""
        parts = self._parts(layer).items()
        own = [n for n, part in parts if n not in self.padding and not self._passes_on(part)]
        return len(own) > 2

    def owns(self, layer: Any) -> bool:
        """Return whether a layer is a BSConv."""
        return isinstance(layer, self.base)

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place."""
        return str(self.layers[options["variant"], type(layer)].__name__)

    def realize(self, ordinary: Any, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes more."""
        options: dict[str, Any] = {"with_bn": recipe.with_bn}
        if recipe.with_bn and self.bn_options:
            options["bn_options"] = dict(self.bn_options)
        if recipe.name == "bsconvs":
            options |= {"p": recipe.p, "min_mid_channels": recipe.min_mid_channels}
        return self.layers[recipe.name[-1], ordinary], options

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the new layer, which has the biases' values but not yet themselves."""
        return self.layers[options["variant"], type(layer)].from_conv(layer, **options["layer"])

    def share(self, prepared: Any) -> float | None:
        """Return how much of the trained kernel the new layer has."""
        found: float | None = prepared.explained
        return found

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return what a BSConv folds to; None in place of new layers for its own parts."""
        layer = site.layer
        replaced = self.is_replaced(layer)
        own = type(layer) in self.layers.values() and not replaced
        if form == self.kept and not own:
            raise Leave(REPLACED if replaced else SUBCLASS)
        if form == self.kept or (form == "merge" and own and not self._is_changed(layer)):
            return Folding(self.sequence.__name__, None)
        new = layer.fold(form=form)
        return Folding(view.name_of(new), new)

    def choice(self, view: ModelView, site: Site) -> Choice | None:
        """Return what each form costs; None where that cannot be told."""
        layer = site.layer
        strides = self._strides(layer)
        if strides is None:
            return None
        normed = any(isinstance(part, self.batch_norm) for part in self._parts(layer).values())
        spec = replace(layer.spec, with_bn=normed)
        cost = form_costs(spec, strides, bias=layer.bias is not None)
        return Choice(site.path, view.name_of(layer), spec, cost)

    def orthonormal(self, layer: Any) -> Any | None:
        """Return the first pointwise convolution of a BSConv-S."""
        return layer.pointwise1 if self.owns(layer) and layer.variant == "s" else None
