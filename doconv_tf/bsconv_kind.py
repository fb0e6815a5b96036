"""BSConv in whole models of Keras: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import keras

from doconv_core.kinds.bsconv import GROUPED, obstacle
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_core.networks.nodes import BatchNorm
from doconv_tf.bsconv import LAYERS, _BSConv
from doconv_tf.bsconv_fold import is_changed
from doconv_tf.ordinary import CONVS, SEPARABLE_CONVS, is_replaced, spec_of
from doconv_tf.surgery import become, keep_parts

NORM = BatchNorm()  # of networks; its defaults are not Keras'

# What Keras has as a layer of its own.
SEPARABLE = "it is separable already; a BSConv takes the place of an ordinary convolution"


class BSConvLayers(SeparableLayers):
    """The BSConv layers of Keras."""

    layers, base = LAYERS, _BSConv
    sequence, batch_norm = keras.Sequential, keras.layers.BatchNormalization
    bn_options: ClassVar[Mapping[str, Any]] = {
        "momentum": 1 - NORM.momentum,
        "epsilon": NORM.epsilon,
    }

    def is_replaced(self, layer: Any) -> bool:
        """Return whether this one layer has a method of its own in its class's call's place."""
        return is_replaced(layer)

    def parts(self, layer: Any) -> Iterable[Any]:
        """Return the parts of a BSConv."""
        found: Iterable[Any] = layer.layers
        return found

    def is_changed(self, layer: Any) -> bool:
        """Return whether merging a BSConv makes anything else of it than keeping it."""
        return is_changed(layer)

    def strides(self, layer: Any) -> Sequence[int]:
        """Return a BSConv's strides."""
        found: Sequence[int] = layer.strides
        return found

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason in (None, GROUPED) and type(layer) not in CONVS:
            return SEPARABLE if isinstance(layer, SEPARABLE_CONVS) else GROUPED
        return reason

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs."""
        for site, new in chosen:
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs, where they stand."""
        for site, (_, new) in planned:
            if new is None:
                keep_parts(site.layer)
            else:
                become(site.layer, new)


BSCONVS = BSConvLayers()
