"""The BSConv layers of Keras: blueprint separable convolutions.

With DO-Conv they compose in one way: the depthwise part may be a DO layer, which
`over_parameterize` makes it, and folds with the rest. The pointwise parts have one tap and nothing
to over-parameterize; a DO layer does not become a BSConv before it is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from doconv_core.kinds.bsconv import MIN_MID_CHANNELS, BSConvSpec, P, as_number
from doconv_tf.bsconv_layer import _BSConv, part
from doconv_tf.convolutions import is_replaced
from doconv_tf.orthonormal import Orthonormality


class _BSConvU(_BSConv):
    """BSConv-U: `pointwise`, [`batch_norm`], `depthwise`."""

    variant = "u"
    pointwise, batch_norm = part("pointwise"), part("batch_norm")

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | tuple[int, ...] = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        around: int | tuple[int, ...] = 0,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._make(
            filters, kernel_size, strides, padding, data_format, dilation_rate, groups, activation,
            use_bias, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint,
            sizes={"with_bn": with_bn}, bn_options=bn_options, around=around, options=kwargs,
        )  # fmt: skip


class _BSConvS(_BSConv):
    """BSConv-S: `pointwise1`, [`batch_norm1`], `pointwise2`, [`batch_norm2`], `depthwise`."""

    variant = "s"
    pointwise1, batch_norm1 = part("pointwise1"), part("batch_norm1")
    pointwise2, batch_norm2 = part("pointwise2"), part("batch_norm2")

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | tuple[int, ...] = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        p: float = P,
        min_mid_channels: int = MIN_MID_CHANNELS,
        orthonormality: float = 0.0,
        around: int | tuple[int, ...] = 0,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {"p": p, "min_mid_channels": min_mid_channels, "with_bn": with_bn}
        penalty = Orthonormality(as_number("orthonormality", orthonormality))
        self._make(
            filters, kernel_size, strides, padding, data_format, dilation_rate, groups, activation,
            use_bias, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint,
            sizes=sizes, bn_options=bn_options, around=around, options=kwargs,
        )  # fmt: skip
        self.p, self.min_mid_channels = p, min_mid_channels
        penalty.other = self.kernel_regularizer
        self._penalty = penalty

    @property
    def orthonormality(self) -> float:
        """The weight of the orthonormality loss in the model's losses."""
        return self._penalty.alpha

    def _spec(self, in_channels: int) -> BSConvSpec:
        sizes = (in_channels, self.filters, self.kernel_size, self.variant)
        return BSConvSpec(*sizes, self.p, self.min_mid_channels, self.with_bn)

    def regularizer_of(self, name: str) -> Any:
        """Return the kernel regularizer of a pointwise part."""
        return self._penalty if name == "pointwise1" else self.kernel_regularizer

    def get_config(self) -> dict[str, Any]:
        """Return the ordinary layer's configuration, and the layer's own arguments."""
        names = ("p", "min_mid_channels", "orthonormality")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="doconv")
class BSConvU1D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `keras.layers.Conv1D`.

    Takes `keras.layers.Conv1D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `with_bn`, a batch norm behind the
    pointwise convolution; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that
    are added on every side between the two, with padding="valid".
    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class BSConvU2D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `keras.layers.Conv2D`.

    Takes `keras.layers.Conv2D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `with_bn`, a batch norm behind the
    pointwise convolution; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that
    are added on every side between the two, with padding="valid".
    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)`
    becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class BSConvU3D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `keras.layers.Conv3D`.

    Takes `keras.layers.Conv3D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `with_bn`, a batch norm behind the
    pointwise convolution; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that
    are added on every side between the two, with padding="valid".
    `(B, D, H, W, I)` becomes `(B, D', H', W', O)`, or with channels first
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = keras.layers.Conv3D, 3


@keras.saving.register_keras_serializable(package="doconv")
class BSConvS1D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `keras.layers.Conv1D`.

    Takes `keras.layers.Conv1D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `p` and `min_mid_channels`, which
    give the channels between its pointwise convolutions; `with_bn`, a batch norm behind each of
    these; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that are added on
    every side before the depthwise part, with padding="valid"; `orthonormality`, the weight with
    which the model's losses have its orthonormality loss.
    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class BSConvS2D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `keras.layers.Conv2D`.

    Takes `keras.layers.Conv2D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `p` and `min_mid_channels`, which
    give the channels between its pointwise convolutions; `with_bn`, a batch norm behind each of
    these; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that are added on
    every side before the depthwise part, with padding="valid"; `orthonormality`, the weight with
    which the model's losses have its orthonormality loss.
    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)`
    becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class BSConvS3D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `keras.layers.Conv3D`.

    Takes `keras.layers.Conv3D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `p` and `min_mid_channels`, which
    give the channels between its pointwise convolutions; `with_bn`, a batch norm behind each of
    these; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that are added on
    every side before the depthwise part, with padding="valid"; `orthonormality`, the weight with
    which the model's losses have its orthonormality loss.
    `(B, D, H, W, I)` becomes `(B, D', H', W', O)`, or with channels first
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = keras.layers.Conv3D, 3


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2D, BSConvS2D
LAYERS = {
    (cls.variant, cls.ordinary): cls
    for cls in (BSConvU1D, BSConvU2D, BSConvU3D, BSConvS1D, BSConvS2D, BSConvS3D)
}


def is_own(layer: keras.Layer) -> bool:
    """Return whether a layer is one of these, exactly, with the call of its type."""
    return type(layer) in LAYERS.values() and not is_replaced(layer)
