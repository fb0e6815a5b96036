"""BSConv in whole models of Keras: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from doconv_core.kinds.bsconv import (
    BSCONV,
    GROUPED,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    form_costs,
    obstacle,
)
from doconv_core.models.report import REPLACED, SUBCLASS, Choice
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site
from doconv_core.networks.nodes import BatchNorm
from doconv_tf.bsconv import LAYERS, _BSConv
from doconv_tf.bsconv_fold import folded, is_changed
from doconv_tf.ordinary import CONVS, SEPARABLE_CONVS, is_replaced, spec_of
from doconv_tf.surgery import become, keep_parts

# What Keras has as a layer of its own.
SEPARABLE = "it is separable already; a BSConv takes the place of an ordinary convolution"


class BSConvLayers(LayerKind):
    """The BSConv layers. Those of a model that are folded stay the same objects."""

    kind = BSCONV
    already, part, shared = OVER_PARAMETERIZED, PART, SHARES
    kept = "keep"
    type_names = frozenset(cls.__name__ for cls in LAYERS.values())

    def owns(self, layer: Any) -> bool:
        """Return whether a layer is a BSConv."""
        return isinstance(layer, _BSConv)

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place."""
        return str(LAYERS[options["variant"], type(layer)].__name__)

    def realize(self, ordinary: Any, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes more."""
        options: dict[str, Any] = {"with_bn": recipe.with_bn}
        if recipe.with_bn:  # whose defaults are not Keras'
            norm = BatchNorm()
            options["bn_options"] = {"momentum": 1 - norm.momentum, "epsilon": norm.epsilon}
        if recipe.name == "bsconvs":
            options |= {"p": recipe.p, "min_mid_channels": recipe.min_mid_channels}
        return LAYERS[recipe.name[-1], ordinary], options

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason in (None, GROUPED) and type(layer) not in CONVS:
            return SEPARABLE if isinstance(layer, SEPARABLE_CONVS) else GROUPED
        return reason

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the new layer."""
        return LAYERS[options["variant"], type(layer)].from_conv(layer, **options["layer"])

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs."""
        for site, new in chosen:
            become(site.layer, new)

    def share(self, prepared: Any) -> float | None:
        """Return how much of the trained kernel the new layer has."""
        found: float | None = prepared.explained
        return found

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return what a BSConv folds to; None in place of new layers for its own parts."""
        layer = site.layer
        own = type(layer) in LAYERS.values() and not is_replaced(layer)
        if form == "keep" and not own:
            raise Leave(REPLACED if is_replaced(layer) else SUBCLASS)
        if form == "keep" or (form == "merge" and own and not is_changed(layer)):
            return Folding(keras.Sequential.__name__, None)
        new = folded(layer, form)
        return Folding(type(new).__name__, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs, where they stand."""
        for site, (_, new) in planned:
            if new is None:
                keep_parts(site.layer)
            else:
                become(site.layer, new)

    def choice(self, view: ModelView, site: Site) -> Choice | None:
        """Return what each form costs."""
        layer = site.layer
        normed = any(isinstance(part, keras.layers.BatchNormalization) for part in layer.layers)
        spec = replace(layer.spec, with_bn=normed)
        cost = form_costs(spec, layer.strides, bias=layer.bias is not None)
        return Choice(site.path, type(layer).__name__, spec, cost)


BSCONVS = BSConvLayers()
