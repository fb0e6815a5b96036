"""The kinds of layers that Keras has. A new one is one line here."""

from __future__ import annotations

from doconv_core.models.view import LayerKinds
from doconv_tf.bsconv import BSCONVS
from doconv_tf.depthwise_conv import DO_CONVS
from doconv_tf.dgc import DG_CONVS
from doconv_tf.normed import LAYERS
from doconv_tf.rules import BRANCHES, EXPANSIONS

LAYER_KINDS = LayerKinds()
register = LAYER_KINDS.register

register(DO_CONVS)  # first: parts of the others' layers may be these
register(BRANCHES)
register(EXPANSIONS)
register(BSCONVS)
register(DG_CONVS)
for layers in LAYERS.values():
    register(layers)
