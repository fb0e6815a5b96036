"""The DO-Conv layers of Keras, written in `keras.ops`, so for every backend of Keras."""

from __future__ import annotations

from types import MappingProxyType

import keras

from doconv_tf.composed import Ordinary
from doconv_tf.over_parameterized import OverParameterized


class _DOConv(OverParameterized[Ordinary]):
    """What `DOConv1D`, `DOConv2D` and `DOConv3D` share: the names of D's arguments."""

    prefixes = MappingProxyType({"weight": "kernel", "depthwise_weight": "depthwise"})


@keras.saving.register_keras_serializable(package="doconv")
class DOConv1D(_DOConv[keras.layers.Conv1D], keras.layers.Conv1D):
    """A depthwise over-parameterized `keras.layers.Conv1D`, to be folded into one after training.

    Takes `keras.layers.Conv1D`'s arguments, of which the initializer and regularizer of the kernel
    are W's, and these, by keyword only:
    depth_multiplier: S, an integer of at least the number of kernel taps M, which is its default.
    depthwise_initializer: of D, the residual around the identity; zeros give the ordinary layer.
    depthwise_regularizer: of D. None means the kernel's: a penalty on W alone could be evaded by
    growing D. `keras.regularizers.L2(0.0)` turns it off.
    depthwise_constraint: of D. The kernel's is refused, but for one tap: what it asks of W, such as
    a norm or a sign, the kernel that is composed of W and D would not have.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv1D(8, 3)
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 8, 8)
    >>> type(layer.fold()).__name__
    'Conv1D'
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class DOConv2D(_DOConv[keras.layers.Conv2D], keras.layers.Conv2D):
    """A depthwise over-parameterized `keras.layers.Conv2D`, to be folded into one after training.

    Takes `keras.layers.Conv2D`'s arguments, and by keyword only those of D as in `DOConv1D`:
    depth_multiplier, depthwise_initializer, depthwise_regularizer, depthwise_constraint.

    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)` becomes
    `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv2D(8, 3)
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 8, 8, 8)
    >>> type(layer.fold()).__name__
    'Conv2D'
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class DOConv3D(_DOConv[keras.layers.Conv3D], keras.layers.Conv3D):
    """A depthwise over-parameterized `keras.layers.Conv3D`, to be folded into one after training.

    Takes `keras.layers.Conv3D`'s arguments, and by keyword only those of D as in `DOConv1D`:
    depth_multiplier, depthwise_initializer, depthwise_regularizer, depthwise_constraint.

    `(B, D, H, W, I)` becomes `(B, D', H', W', O)`, or with channels first `(B, I, D, H, W)` becomes
    `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv3D(8, 3)
    >>> tuple(layer(keras.ops.ones((1, 6, 6, 6, 4))).shape)
    (1, 4, 4, 4, 8)
    >>> type(layer.fold()).__name__
    'Conv3D'
    """

    ordinary, rank = keras.layers.Conv3D, 3
