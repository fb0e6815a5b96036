"""The DO-Conv layers of Keras, written in `keras.ops`, so for every backend of Keras."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import keras

from doconv_core.maths.spec import as_integer, as_tuple
from doconv_tf.over_parameterized import OverParameterized


class _DOConv(OverParameterized):
    """What `DOConv1D`, `DOConv2D` and `DOConv3D` share."""

    prefixes = MappingProxyType({"weight": "kernel", "depthwise_weight": "depthwise"})

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
        depth_multiplier: int | None = None,
        depthwise_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        depthwise_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        rank = self.rank
        super().__init__(
            as_integer("filters", filters), as_tuple("kernel_size", kernel_size, rank),
            as_tuple("strides", strides, rank), padding, data_format,
            as_tuple("dilation_rate", dilation_rate, rank), as_integer("groups", groups),
            activation, use_bias, kernel_initializer, bias_initializer, kernel_regularizer,
            bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint,
            depth_multiplier=depth_multiplier, depthwise_initializer=depthwise_initializer,
            depthwise_regularizer=depthwise_regularizer,
            depthwise_constraint=depthwise_constraint, **kwargs,
        )  # fmt: skip

    @classmethod
    def from_conv(cls, conv: Any, *, depth_multiplier: int | None = None) -> Any:
        """Return a new layer, built, with the function of a trained ordinary layer.

        conv: an `ordinary` layer of Keras' own, exactly, and built; its variables are copied, and
        those of an activation that is a layer. Name, dtype policy and configuration are kept. D is
        zero.
        Raises TypeError for any other layer: a subclass, or one with LoRA, may compute something
        else. Raises ValueError if it is not built.
        """
        return super().from_conv(conv, depth_multiplier=depth_multiplier)


@keras.saving.register_keras_serializable(package="doconv")
class DOConv1D(_DOConv, keras.layers.Conv1D):
    """A depthwise over-parameterized `keras.layers.Conv1D`, to be folded into one after training.

    Takes `keras.layers.Conv1D`'s arguments, of which the initializer, regularizer and constraint of
    the kernel are W's, and these, by keyword only:
    depth_multiplier: S, an integer of at least the number of kernel taps M, which is its default.
    depthwise_initializer: of D, the residual around the identity; zeros give the ordinary layer.
    depthwise_regularizer: of D. None means the kernel's: a penalty on W alone could be evaded by
    growing D. `keras.regularizers.L2(0.0)` turns it off.
    depthwise_constraint: of D. The kernel's is not taken over: what it asks of W, such as a norm or
    a sign, has no meaning for a residual.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class DOConv2D(_DOConv, keras.layers.Conv2D):
    """A depthwise over-parameterized `keras.layers.Conv2D`, to be folded into one after training.

    Takes `keras.layers.Conv2D`'s arguments, and by keyword only those of D as in `DOConv1D`:
    depth_multiplier, depthwise_initializer, depthwise_regularizer, depthwise_constraint.

    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)` becomes
    `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class DOConv3D(_DOConv, keras.layers.Conv3D):
    """A depthwise over-parameterized `keras.layers.Conv3D`, to be folded into one after training.

    Takes `keras.layers.Conv3D`'s arguments, and by keyword only those of D as in `DOConv1D`:
    depth_multiplier, depthwise_initializer, depthwise_regularizer, depthwise_constraint.

    `(B, D, H, W, I)` becomes `(B, D', H', W', O)`, or with channels first `(B, I, D, H, W)` becomes
    `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = keras.layers.Conv3D, 3
