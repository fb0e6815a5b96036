"""The depthwise DO-Conv layers of Keras, and those whose depthwise part is one."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import keras

from doconv_core.maths.spec import ConvSpec, as_depth_multiplier, as_integer, as_tuple
from doconv_tf.composed import ComposedConv, ComposedLayers
from doconv_tf.do_conv import DOConv1D, DOConv2D, DOConv3D
from doconv_tf.over_parameterized import OverParameterized


class _Depthwise(OverParameterized):
    """What all of them share: the names of their arguments, and groups of one channel each."""

    layout = "*CN"
    option_names = MappingProxyType({"depth_multiplier": "d_multiplier"})
    prefixes = MappingProxyType({"weight": "depthwise", "depthwise_weight": "d"})

    def _standardized(self, **options: Any) -> dict[str, Any]:
        """Return the sizes, validated by the names that they have here."""
        for name in ("kernel_size", "strides", "dilation_rate"):
            options[name] = as_tuple(name, options[name], self.rank)
        options["depth_multiplier"] = as_integer("depth_multiplier", options["depth_multiplier"])
        given, size = options["d_multiplier"], options["kernel_size"]
        options["d_multiplier"] = as_depth_multiplier(given, size, name="d_multiplier")
        return options

    @classmethod
    def from_conv(cls, conv: Any, *, d_multiplier: int | None = None) -> Any:
        """Return a new layer, built, with the function of a trained ordinary layer.

        As `DOConv2D.from_conv`, for the layer that this one stands in for. d_multiplier: S.
        """
        return super().from_conv(conv, d_multiplier=d_multiplier)


class _DODepthwiseConv(_Depthwise):
    """What `DODepthwiseConv1D` and `DODepthwiseConv2D` share."""

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: str = "valid",
        depth_multiplier: int = 1,
        data_format: str | None = None,
        dilation_rate: int | tuple[int, ...] = 1,
        activation: Any = None,
        use_bias: bool = True,
        depthwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        d_multiplier: int | None = None,
        d_initializer: Any = "zeros",
        d_regularizer: Any = None,
        d_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        sizes = self._standardized(
            kernel_size=kernel_size, strides=strides, dilation_rate=dilation_rate,
            depth_multiplier=depth_multiplier, d_multiplier=d_multiplier,
        )  # fmt: skip
        super().__init__(
            **sizes, padding=padding, data_format=data_format, activation=activation,
            use_bias=use_bias, depthwise_initializer=depthwise_initializer,
            bias_initializer=bias_initializer, depthwise_regularizer=depthwise_regularizer,
            bias_regularizer=bias_regularizer, activity_regularizer=activity_regularizer,
            depthwise_constraint=depthwise_constraint, bias_constraint=bias_constraint,
            d_initializer=d_initializer, d_regularizer=d_regularizer, d_constraint=d_constraint,
            **kwargs,
        )  # fmt: skip


@keras.saving.register_keras_serializable(package="doconv")
class DODepthwiseConv1D(_DODepthwiseConv, keras.layers.DepthwiseConv1D):
    """A depthwise over-parameterized `keras.layers.DepthwiseConv1D`, to be folded into one.

    Takes `keras.layers.DepthwiseConv1D`'s arguments, and by keyword only those of D as in
    `DODepthwiseConv2D`: d_multiplier, d_initializer, d_regularizer, d_constraint.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".
    """

    ordinary, rank = keras.layers.DepthwiseConv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class DODepthwiseConv2D(_DODepthwiseConv, keras.layers.DepthwiseConv2D):
    """A depthwise over-parameterized `keras.layers.DepthwiseConv2D`, to be folded into one.

    Takes `keras.layers.DepthwiseConv2D`'s arguments. There `depth_multiplier` already is the number
    of output channels of each input channel, and `depthwise_initializer`, `depthwise_regularizer`
    and `depthwise_constraint` are those of the layer's kernel, so here of W. Hence D's have their
    own names, by keyword only: d_multiplier, S, an integer of at least the number of kernel taps M,
    which is its default; d_initializer; d_regularizer, where None means W's; d_constraint. Their
    meaning is that of D's arguments in `DOConv1D`.

    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)` becomes
    `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".
    """

    ordinary, rank = keras.layers.DepthwiseConv2D, 2


class _DOSeparableConv(_Depthwise):
    """What `DOSeparableConv1D` and `DOSeparableConv2D` share.

    The depthwise kernel is composed; the pointwise kernel has one tap, and is a plain variable.
    """

    kernel_name = "depthwise_kernel"
    attributes = MappingProxyType({"depthwise_weight": "d_kernel"})

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | tuple[int, ...] = 1,
        depth_multiplier: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        depthwise_initializer: Any = "glorot_uniform",
        pointwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        pointwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        pointwise_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        d_multiplier: int | None = None,
        d_initializer: Any = "zeros",
        d_regularizer: Any = None,
        d_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        sizes = self._standardized(
            kernel_size=kernel_size, strides=strides, dilation_rate=dilation_rate,
            depth_multiplier=depth_multiplier, d_multiplier=d_multiplier,
        )  # fmt: skip
        super().__init__(
            as_integer("filters", filters), **sizes, padding=padding, data_format=data_format,
            activation=activation, use_bias=use_bias, depthwise_initializer=depthwise_initializer,
            pointwise_initializer=pointwise_initializer, bias_initializer=bias_initializer,
            depthwise_regularizer=depthwise_regularizer,
            pointwise_regularizer=pointwise_regularizer, bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer, depthwise_constraint=depthwise_constraint,
            pointwise_constraint=pointwise_constraint, bias_constraint=bias_constraint,
            d_initializer=d_initializer, d_regularizer=d_regularizer, d_constraint=d_constraint,
            **kwargs,
        )  # fmt: skip

    depthwise_kernel = ComposedConv.kernel

    def _add_ordinary(self, conv: ConvSpec) -> None:
        shape = (*(1,) * self.rank, conv.out_channels, self.filters)
        self.pointwise_kernel = self._add("pointwise_kernel", shape, "pointwise", True)
        self.bias = self._add("bias", (self.filters,), "bias", True) if self.use_bias else None

    def _behind_the_kernel(self) -> list[Any]:
        return [self.pointwise_kernel, self.bias]


@keras.saving.register_keras_serializable(package="doconv")
class DOSeparableConv1D(_DOSeparableConv, keras.layers.SeparableConv1D):
    """A `keras.layers.SeparableConv1D` with an over-parameterized depthwise part, to be folded.

    Takes `keras.layers.SeparableConv1D`'s arguments, and by keyword only those of D as in
    `DODepthwiseConv2D`: d_multiplier, d_initializer, d_regularizer, d_constraint.
    Variables: `_kernel`, W of the depthwise part; `d_kernel`, D; `pointwise_kernel`; `bias`.
    `depthwise_kernel` is the composed one.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".
    """

    ordinary, rank = keras.layers.SeparableConv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class DOSeparableConv2D(_DOSeparableConv, keras.layers.SeparableConv2D):
    """A `keras.layers.SeparableConv2D` with an over-parameterized depthwise part, to be folded.

    Takes `keras.layers.SeparableConv2D`'s arguments, and by keyword only those of D as in
    `DODepthwiseConv2D`: d_multiplier, d_initializer, d_regularizer, d_constraint.
    Variables: `_kernel`, W of the depthwise part; `d_kernel`, D; `pointwise_kernel`; `bias`.
    `depthwise_kernel` is the composed one.

    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)` becomes
    `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030, "DO-DConv".
    """

    ordinary, rank = keras.layers.SeparableConv2D, 2


DO_CONVS = ComposedLayers(
    DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D, DOSeparableConv1D,
    DOSeparableConv2D,
)  # fmt: skip
