"""The kinds of layers that Gluon has. A new one is one line here."""

from __future__ import annotations

from doconv_core.models.view import LayerKinds
from doconv_mx.bsconv import BSCONVS
from doconv_mx.dgc import DG_CONVS
from doconv_mx.do_conv import DO_CONVS
from doconv_mx.normed import LAYERS
from doconv_mx.rules import BRANCHES, EXPANSIONS

LAYER_KINDS = LayerKinds()
register = LAYER_KINDS.register

register(DO_CONVS)  # first: parts of the others' layers may be these
register(BRANCHES)
register(EXPANSIONS)
register(BSCONVS)
register(DG_CONVS)
for layers in LAYERS.values():
    register(layers)
