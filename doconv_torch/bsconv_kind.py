"""BSConv in whole models of PyTorch: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.kinds.bsconv import (
    BIAS_COMPUTED,
    BSCONV,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    WEIGHT_BOUND,
    form_costs,
    obstacle,
)
from doconv_core.models.report import REPLACED, SUBCLASS, Choice
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site
from doconv_torch.bsconv import LAYERS, _BSConv, _BSConvS
from doconv_torch.bsconv_fold import folded, is_changed
from doconv_torch.ordinary import is_bound, kind_of, spec_of
from doconv_torch.surgery import become


class BSConvLayers(LayerKind):
    """The BSConv layers. Those of a model that are folded stay the same objects."""

    kind = BSCONV
    already, part, shared = OVER_PARAMETERIZED, PART, SHARES
    kept = "keep"
    type_names = frozenset(cls.__name__ for cls in LAYERS.values())

    def owns(self, layer: nn.Module) -> bool:
        """Return whether a module is a BSConv."""
        return isinstance(layer, _BSConv)

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place."""
        return LAYERS[options["variant"], type(layer)].__name__

    def realize(self, ordinary: Any, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes more."""
        options: dict[str, Any] = {"with_bn": recipe.with_bn}
        if recipe.name == "bsconvs":
            options |= {"p": recipe.p, "min_mid_channels": recipe.min_mid_channels}
        return LAYERS[recipe.name[-1], ordinary], options

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason is None and "bias" in vars(layer):
            return BIAS_COMPUTED
        return reason or (WEIGHT_BOUND if is_bound(layer.weight) else None)

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the new layer, which has the biases' values but not yet themselves."""
        cls = LAYERS[options["variant"], type(layer)]
        return cls.from_conv(layer, **options["layer"])

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                new.depthwise.bias = site.layer.bias
            become(site.layer, new)

    def share(self, prepared: Any) -> float | None:
        """Return how much of the trained kernel the new layer has."""
        found: float | None = prepared.explained
        return found

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return what a BSConv folds to; None in place of new layers for its own parts."""
        layer = site.layer
        own = is_own(layer)
        if form == "keep" and not own:
            raise Leave(REPLACED if "forward" in vars(layer) else SUBCLASS)
        if form == "keep" or (form == "merge" and own and not is_changed(layer)):
            return Folding(nn.Sequential.__name__, None)
        new = folded(layer, form)
        return Folding(kind_of(new), new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            layer = site.layer
            if new is None:
                new = nn.Sequential(OrderedDict(layer.named_children()))
            elif isinstance(new, nn.Sequential):
                new.depthwise = layer.depthwise
            become(layer, new)

    def orthonormal(self, layer: Any) -> Any | None:
        """Return the first pointwise convolution of a BSConv-S."""
        return layer.pointwise1 if isinstance(layer, _BSConvS) else None

    def choice(self, view: ModelView, site: Site) -> Choice | None:
        """Return what each form costs; None where parts were exchanged, for quantized ones, say."""
        layer = site.layer
        if not isinstance(layer._modules.get("depthwise"), _ConvNd):
            return None
        normed = any(isinstance(part, _BatchNorm) for part in layer.children())
        spec = replace(layer.spec, with_bn=normed)
        cost = form_costs(spec, layer.stride, bias=layer.bias is not None)
        return Choice(site.path, kind_of(layer), spec, cost)


def is_own(layer: nn.Module) -> bool:
    """Return whether a layer is a BSConv, exactly, with the forward of its type."""
    return type(layer) in LAYERS.values() and "forward" not in vars(layer)


BSCONVS = BSConvLayers()
