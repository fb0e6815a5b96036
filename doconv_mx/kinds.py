"""The kinds of layers that Gluon has. A new one is one line here."""

from __future__ import annotations

from doconv_core.models.view import LayerKind
from doconv_mx.bsconv_kind import BSCONVS
from doconv_mx.do_conv import DO_CONVS

LAYER_KINDS: dict[str, LayerKind] = {}


def register(layers: LayerKind) -> LayerKind:
    """Let the tools know a kind's layers; return them."""
    LAYER_KINDS[layers.kind.name] = layers
    return layers


register(DO_CONVS)  # first: parts of the others' layers may be these
register(BSCONVS)
