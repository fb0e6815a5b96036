"""The depthwise DO-Conv layers of Keras, and those whose depthwise part is one."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import keras

from doconv_core.maths.spec import ConvSpec, as_depth_multiplier
from doconv_tf.composed import ComposedConv, ComposedLayers, Ordinary
from doconv_tf.do_conv import DOConv1D, DOConv2D, DOConv3D
from doconv_tf.over_parameterized import OverParameterized


class _Depthwise(OverParameterized[Ordinary]):
    """What all of them share: the names of their arguments, and groups of one channel each."""

    layout = "*CN"
    option_names = MappingProxyType({"depth_multiplier": "d_multiplier"})
    prefixes = MappingProxyType({"weight": "depthwise", "depthwise_weight": "d"})

    @classmethod
    def _taken(
        cls, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments, S by the name that it has here."""
        given, own = super()._taken(args, options)
        size = given["kernel_size"]
        own["d_multiplier"] = as_depth_multiplier(own["d_multiplier"], size, name="d_multiplier")
        return given, own


@keras.saving.register_keras_serializable(package="doconv")
class DODepthwiseConv1D(_Depthwise[keras.layers.DepthwiseConv1D], keras.layers.DepthwiseConv1D):
    """A depthwise over-parameterized `keras.layers.DepthwiseConv1D`, to be folded into one.

    Takes `keras.layers.DepthwiseConv1D`'s arguments, and by keyword only those of D as in
    `DODepthwiseConv2D`: d_multiplier, d_initializer, d_regularizer, d_constraint.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".

    >>> layer = DODepthwiseConv1D(3)
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 8, 4)
    >>> type(layer.fold()).__name__
    'DepthwiseConv1D'
    """

    ordinary, rank = keras.layers.DepthwiseConv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class DODepthwiseConv2D(_Depthwise[keras.layers.DepthwiseConv2D], keras.layers.DepthwiseConv2D):
    """A depthwise over-parameterized `keras.layers.DepthwiseConv2D`, to be folded into one.

    Takes `keras.layers.DepthwiseConv2D`'s arguments. There `depth_multiplier` already is the number
    of output channels of each input channel, and `depthwise_initializer` and
    `depthwise_regularizer` are those of the layer's kernel, so here of W; `depthwise_constraint` is
    refused, as the kernel's is in `DOConv1D`. Hence D's have their own names, by keyword only:
    d_multiplier, S, an integer of at least the number of kernel taps M, which is its default;
    d_initializer; d_regularizer, where None means W's; d_constraint. Their meaning is that of D's
    arguments in `DOConv1D`.

    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)` becomes
    `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".

    >>> layer = DODepthwiseConv2D(3)
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 8, 8, 4)
    >>> type(layer.fold()).__name__
    'DepthwiseConv2D'
    """

    ordinary, rank = keras.layers.DepthwiseConv2D, 2


class _DOSeparableConv(_Depthwise[Ordinary]):
    """What `DOSeparableConv1D` and `DOSeparableConv2D` share.

    The depthwise kernel is composed; the pointwise kernel has one tap, and is a plain variable.
    """

    kernel_name = "depthwise_kernel"
    attributes = MappingProxyType({"depthwise_weight": "d_kernel"})
    d_kernel: Any = None  # an attribute here, as `depthwise_kernel` is the composed kernel

    depthwise_kernel = ComposedConv.kernel

    def _add_ordinary(self, conv: ConvSpec) -> None:
        shape = (*(1,) * self.rank, conv.out_channels, self.filters)
        self.pointwise_kernel = self._add("pointwise_kernel", shape, "pointwise", True)
        self.bias = self._add("bias", (self.filters,), "bias", True) if self.use_bias else None

    def _behind_the_kernel(self) -> list[Any]:
        return [self.pointwise_kernel, self.bias]


@keras.saving.register_keras_serializable(package="doconv")
class DOSeparableConv1D(
    _DOSeparableConv[keras.layers.SeparableConv1D], keras.layers.SeparableConv1D
):
    """A `keras.layers.SeparableConv1D` with an over-parameterized depthwise part, to be folded.

    Takes `keras.layers.SeparableConv1D`'s arguments, and by keyword only those of D as in
    `DODepthwiseConv2D`: d_multiplier, d_initializer, d_regularizer, d_constraint.
    Variables: `_kernel`, W of the depthwise part; `d_kernel`, D; `pointwise_kernel`; `bias`.
    `depthwise_kernel` is the composed one.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".

    >>> layer = DOSeparableConv1D(8, 3)
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 8, 8)
    >>> type(layer.fold()).__name__
    'SeparableConv1D'
    """

    ordinary, rank = keras.layers.SeparableConv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class DOSeparableConv2D(
    _DOSeparableConv[keras.layers.SeparableConv2D], keras.layers.SeparableConv2D
):
    """A `keras.layers.SeparableConv2D` with an over-parameterized depthwise part, to be folded.

    Takes `keras.layers.SeparableConv2D`'s arguments, and by keyword only those of D as in
    `DODepthwiseConv2D`: d_multiplier, d_initializer, d_regularizer, d_constraint.
    Variables: `_kernel`, W of the depthwise part; `d_kernel`, D; `pointwise_kernel`; `bias`.
    `depthwise_kernel` is the composed one.

    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)` becomes
    `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".

    >>> layer = DOSeparableConv2D(8, 3)
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 8, 8, 8)
    >>> type(layer.fold()).__name__
    'SeparableConv2D'
    """

    ordinary, rank = keras.layers.SeparableConv2D, 2


DO_CONVS = ComposedLayers(
    DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D, DOSeparableConv1D,
    DOSeparableConv2D,
)  # fmt: skip
