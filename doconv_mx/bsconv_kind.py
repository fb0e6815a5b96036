"""BSConv in whole models of Gluon: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mxnet.gluon import Block, nn

from doconv_core.kinds.bsconv import (
    BSCONV,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    form_costs,
    obstacle,
)
from doconv_core.models.report import REPLACED, SUBCLASS, Choice
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site
from doconv_mx.bsconv import LAYERS, _BSConv
from doconv_mx.bsconv_fold import as_sequence, is_changed
from doconv_mx.ordinary import outline
from doconv_mx.private import BatchNorm, Conv, children, settings
from doconv_mx.surgery import become, remove_parameter, set_parameter
from doconv_mx.symbols import node_of
from doconv_mx.tree import is_replaced

# Why a convolution does not become a BSConv, of what Gluon alone has.
IN_A_SYMBOL = "an operator of a symbol, not a layer"


class BSConvLayers(LayerKind):
    """The BSConv layers. Those of a model that are folded stay the same objects."""

    kind = BSCONV
    already, part, shared = OVER_PARAMETERIZED, PART, SHARES
    kept = "keep"
    type_names = frozenset(cls.__name__ for cls in LAYERS.values())

    def owns(self, layer: Block) -> bool:
        """Return whether a block is a BSConv."""
        return isinstance(layer, _BSConv)

    def replacement(self, layer: Block, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place."""
        return str(LAYERS[options["variant"], type(layer)].__name__)

    def realize(self, ordinary: Any, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes more."""
        options = {"with_bn": recipe.with_bn}
        if recipe.name == "bsconvs":
            options |= {"p": recipe.p, "min_mid_channels": recipe.min_mid_channels}
        return LAYERS[recipe.name[-1], ordinary], options

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        if node_of(layer) is not None:
            return IN_A_SYMBOL
        return obstacle(outline(layer), options["kernel_sizes"])

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the new layer, which has the biases' values but not yet themselves."""
        return LAYERS[options["variant"], type(layer)].from_conv(layer, **options["layer"])

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                remove_parameter(new.depthwise, "bias")
                set_parameter(new.depthwise, "bias", site.layer.bias)  # by the bias's own name
            become(site.layer, new)

    def share(self, prepared: Any) -> float | None:
        """Return how much of the trained kernel the new layer has."""
        found: float | None = prepared.explained
        return found

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return what a BSConv folds to; None in place of new layers for its own parts."""
        layer = site.layer
        if form == "keep" and not is_own(layer):
            raise Leave(REPLACED if is_replaced(layer) else SUBCLASS)
        if form == "keep" or (form == "merge" and is_own(layer) and not is_changed(layer)):
            return Folding(nn.HybridSequential.__name__, None)
        new = layer.fold(form=form)
        return Folding(type(new).__name__, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            if new is None:
                as_sequence(site.layer)
                continue
            if isinstance(new, nn.HybridSequential):
                new.depthwise = site.layer.depthwise
            become(site.layer, new)

    def choice(self, view: ModelView, site: Site) -> Choice | None:
        """Return what each form costs; None where parts were exchanged, or sizes are not known."""
        layer = site.layer
        known = isinstance(children(layer).get("depthwise"), Conv)
        if not known or not layer.inferred_in_channels():
            return None
        normed = any(isinstance(part, BatchNorm) for part in children(layer).values())
        spec, stride = replace(layer.spec, with_bn=normed), settings(layer.depthwise)["stride"]
        cost = form_costs(spec, stride, bias=layer.bias is not None)
        return Choice(site.path, type(layer).__name__, spec, cost)


def is_own(layer: Block) -> bool:
    """Return whether a layer is a BSConv, exactly, with the forward of its type."""
    return type(layer) in LAYERS.values() and not is_replaced(layer)


BSCONVS = BSConvLayers()
