"""BSConv in whole models of PyTorch: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.kinds.bsconv import BIAS_COMPUTED, WEIGHT_BOUND, obstacle
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_torch.bsconv import LAYERS, _BSConv
from doconv_torch.bsconv_fold import is_changed
from doconv_torch.ordinary import is_bound, is_replaced, spec_of
from doconv_torch.surgery import become


class BSConvLayers(SeparableLayers):
    """The BSConv layers of PyTorch."""

    layers, base, sequence, batch_norm = LAYERS, _BSConv, nn.Sequential, _BatchNorm

    def is_replaced(self, layer: nn.Module) -> bool:
        """Return whether this one module has a method of its own in its class's forward's place."""
        return is_replaced(layer)

    def parts(self, layer: nn.Module) -> Iterable[nn.Module]:
        """Return the parts of a BSConv."""
        return layer.children()

    def is_changed(self, layer: nn.Module) -> bool:
        """Return whether merging a BSConv makes anything else of it than keeping it."""
        return is_changed(layer)

    def strides(self, layer: Any) -> Sequence[int] | None:
        """Return a BSConv's strides; None where parts were exchanged, for quantized ones, say."""
        found = isinstance(layer._modules.get("depthwise"), _ConvNd)
        return layer.stride if found else None

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason is None and "bias" in vars(layer):
            return BIAS_COMPUTED
        return reason or (WEIGHT_BOUND if is_bound(layer.weight) else None)

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                new.depthwise.bias = site.layer.bias
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            layer = site.layer
            if new is None:
                new = nn.Sequential(OrderedDict(layer.named_children()))
            elif isinstance(new, nn.Sequential):
                new.depthwise = layer.depthwise
            become(layer, new)


BSCONVS = BSConvLayers()
