"""BSConv layers in whole models: what every framework does with them alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from doconv_core.kinds.bsconv import BSCONV, OVER_PARAMETERIZED, PART, SHARES, form_costs
from doconv_core.models.report import REPLACED, SUBCLASS, Choice
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site


class SeparableLayers(LayerKind):
    """A framework's BSConv layers. Those of a model that are folded stay the same objects.

    layers: by variant and the ordinary type in whose place they are. base: what they all are.
    sequence: the ordinary type that a layer with the same parts has. batch_norm: the framework's.
    bn_options: what batch norms in networks take whose defaults are not the framework's.
    """

    kind = BSCONV
    already, part, shared = OVER_PARAMETERIZED, PART, SHARES
    kept = "keep"
    layers: Mapping[tuple[str, Any], Any]
    base: type
    sequence: type
    batch_norm: type
    bn_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self) -> None:
        self.type_names = frozenset(cls.__name__ for cls in self.layers.values())

    @abstractmethod
    def is_replaced(self, layer: Any) -> bool:
        """Return whether this one layer has a method of its own in its class's forward's place."""

    @abstractmethod
    def parts(self, layer: Any) -> Iterable[Any]:
        """Return the parts of a layer."""

    @abstractmethod
    def is_changed(self, layer: Any) -> bool:
        """Return whether merging a layer makes anything else of it than keeping it."""

    @abstractmethod
    def strides(self, layer: Any) -> Sequence[int] | None:
        """Return a layer's strides; None where parts were exchanged, or sizes are not known."""

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
        if form == self.kept or (form == "merge" and own and not self.is_changed(layer)):
            return Folding(self.sequence.__name__, None)
        new = layer.fold(form=form)
        return Folding(view.name_of(new), new)

    def choice(self, view: ModelView, site: Site) -> Choice | None:
        """Return what each form costs; None where that cannot be told."""
        layer = site.layer
        strides = self.strides(layer)
        if strides is None:
            return None
        normed = any(isinstance(part, self.batch_norm) for part in self.parts(layer))
        spec = replace(layer.spec, with_bn=normed)
        cost = form_costs(spec, strides, bias=layer.bias is not None)
        return Choice(site.path, view.name_of(layer), spec, cost)

    def orthonormal(self, layer: Any) -> Any | None:
        """Return the first pointwise convolution of a BSConv-S."""
        return layer.pointwise1 if self.owns(layer) and layer.variant == "s" else None
