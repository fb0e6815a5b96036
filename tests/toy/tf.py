"""The toy kind in Keras."""

from __future__ import annotations

import keras

from doconv_tf.composed import ComposedConv, ComposedLayers
from doconv_tf.kinds import register
from toy.core import SCALED


class _ScaledConv(ComposedConv):
    kind = SCALED

    def compose(self, entries):
        return entries["weight"] * entries["scale"]


@keras.saving.register_keras_serializable(package="toy")
class ScaledConv1D(_ScaledConv, keras.layers.Conv1D):
    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="toy")
class ScaledConv2D(_ScaledConv, keras.layers.Conv2D):
    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="toy")
class ScaledConv3D(_ScaledConv, keras.layers.Conv3D):
    ordinary, rank = keras.layers.Conv3D, 3


register(ComposedLayers(ScaledConv1D, ScaledConv2D, ScaledConv3D))
