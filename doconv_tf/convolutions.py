"""Which layers of a Keras model are convolutions, and why one of them is left as it is."""

from __future__ import annotations

import math

import keras
from keras import layers

from doconv_core.models.report import ALREADY, ONE_TAP, QUANTIZED, REPLACED, SUBCLASS, TRANSPOSED
from doconv_tf.depthwise_conv import (
    DODepthwiseConv1D,
    DODepthwiseConv2D,
    DOSeparableConv1D,
    DOSeparableConv2D,
)
from doconv_tf.do_conv import DOConv1D, DOConv2D, DOConv3D
from doconv_tf.over_parameterized import OverParameterized

DO_CONVS = (
    DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D, DOSeparableConv1D,
    DOSeparableConv2D,
)  # fmt: skip
REPLACEMENTS = {cls.ordinary: cls for cls in DO_CONVS}
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_RECURRENT = (layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)
CONVOLUTIONS = (*REPLACEMENTS, *_TRANSPOSED, *_RECURRENT)


def obstacle(layer: keras.Layer) -> str | None:
    """Return why a convolution cannot be over-parameterized; None where it can."""
    if isinstance(layer, OverParameterized):
        return ALREADY
    if type(layer) in _TRANSPOSED:
        return TRANSPOSED
    if type(layer) in _RECURRENT:
        return "recurrent"
    if type(layer) not in REPLACEMENTS:
        return SUBCLASS
    if layer.quantization_mode is not None:
        return QUANTIZED
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled"
    if is_replaced(layer):
        return REPLACED
    return ONE_TAP if math.prod(layer.kernel_size) == 1 else None


def is_replaced(layer: keras.Layer) -> bool:
    """Return whether this one layer has a method of its own in the place of its class's call."""
    return not vars(layer).keys().isdisjoint(("call", "convolution_op"))
