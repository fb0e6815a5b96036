"""BSConv in whole models of Gluon: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mxnet.gluon import Block, nn

from doconv_core.kinds.bsconv import obstacle
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_mx.bsconv import LAYERS, _BSConv
from doconv_mx.bsconv_fold import as_sequence, is_changed
from doconv_mx.ordinary import outline
from doconv_mx.private import BatchNorm, Conv, children, settings
from doconv_mx.surgery import become, remove_parameter, set_parameter
from doconv_mx.symbols import node_of
from doconv_mx.tree import is_replaced

# Why a convolution does not become a BSConv, of what Gluon alone has.
IN_A_SYMBOL = "an operator of a symbol, not a layer"


class BSConvLayers(SeparableLayers):
    """The BSConv layers of Gluon."""

    layers, base, sequence, batch_norm = LAYERS, _BSConv, nn.HybridSequential, BatchNorm

    def is_replaced(self, layer: Block) -> bool:
        """Return whether this one block has a method of its own in its class's forward's place."""
        return is_replaced(layer)

    def parts(self, layer: Block) -> Iterable[Block]:
        """Return the parts of a BSConv."""
        return children(layer).values()

    def is_changed(self, layer: Block) -> bool:
        """Return whether merging a BSConv makes anything else of it than keeping it."""
        return is_changed(layer)

    def strides(self, layer: Any) -> Sequence[int] | None:
        """Return a BSConv's strides; None where parts were exchanged, or sizes are not known."""
        known = isinstance(children(layer).get("depthwise"), Conv)
        if not known or not layer.inferred_in_channels():
            return None
        found: Sequence[int] = settings(layer.depthwise)["stride"]
        return found

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        if node_of(layer) is not None:
            return IN_A_SYMBOL
        return obstacle(outline(layer), options["kernel_sizes"])

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                remove_parameter(new.depthwise, "bias")
                set_parameter(new.depthwise, "bias", site.layer.bias)  # by the bias's own name
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            if new is None:
                as_sequence(site.layer)
                continue
            if isinstance(new, nn.HybridSequential):
                new.depthwise = site.layer.depthwise
            become(site.layer, new)


BSCONVS = BSConvLayers()
