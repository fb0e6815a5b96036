"""Fusing the batch norms of a Keras model into the convolutions that they directly follow.

Keras has no utility for it.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.models.report import AXIS, NOT_FINITE, REPLACED, SEVERAL, SUBCLASS, behind
from doconv_tf.graph import Seen
from doconv_tf.ordinary import (
    DEPTHWISE_CONVS,
    SEPARABLE_CONVS,
    is_replaced,
    like,
    obstacle,
    policy_of,
    put,
)
from doconv_tf.surgery import become

# Why a batch norm is left, of what Keras alone has.
ACTIVATION = "its convolution has an activation before it"
REGULARIZED = "it or its convolution has an activity regularizer"
READ = "a function holds it or its convolution, such as a Lambda's, and may read anything of it"
TRAINING = "called with training=True, whatever the model does"


def norm_obstacle(norm: keras.Layer) -> str | None:
    """Return why a batch norm cannot be fused, wherever it stands; None where it can."""
    if type(norm) is not keras.layers.BatchNormalization:
        return SUBCLASS
    return REPLACED if is_replaced(norm) else None


def pair_obstacle(conv: Any, norm: Any, seen: Seen) -> str | None:
    """Return why this convolution and this batch norm, which follows it, cannot be fused."""
    if seen.times[id(norm)] > 1 or seen.times[id(conv)] > 1:
        return SEVERAL
    if not seen.read.isdisjoint((id(norm), id(conv))):
        return READ
    reason = obstacle(conv)
    if reason is not None:
        return behind(reason)
    if id(norm) in seen.training:
        return TRAINING
    if conv.activation not in (None, keras.activations.linear):
        return ACTIVATION
    if conv.activity_regularizer or norm.activity_regularizer:
        return REGULARIZED
    return axis_obstacle(conv, norm)


def axis_obstacle(conv: Any, norm: Any) -> str | None:
    """Return that a batch norm's axis is not that of a layer's channels, where it is not."""
    ndim, axis = conv.rank + 2, -1 if conv.data_format == "channels_last" else 1
    return None if norm.axis % ndim == axis % ndim else AXIS


def fuse(conv: Any, norm: Any) -> str | None:
    """Fuse the norm into the convolution, in their model; or return why not.

    A `keras.layers.Identity` of the same name takes the norm's place, so that the graph stays as it
    is.
    """
    name, layout, groups = _last_kernel(conv)
    last = getattr(conv, name)
    statistics = {
        "mean": norm.moving_mean, "variance": norm.moving_variance, "scale": norm.gamma,
        "offset": norm.beta,
    }  # fmt: skip
    with np.errstate(all="ignore"):
        kernel, bias = fuse_batchnorm(
            to_canonical(_array(last), layout), _array(conv.bias), epsilon=norm.epsilon,
            **{key: _array(variable) for key, variable in statistics.items()},
        )  # fmt: skip
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        return NOT_FINITE
    new = like(conv, type(conv), {"use_bias": True})
    for each in ("kernel", "depthwise_kernel"):
        if hasattr(conv, each):
            put(getattr(new, each), getattr(conv, each))
            getattr(new, each).trainable = getattr(conv, each).trainable
    getattr(new, name).assign(from_canonical(kernel, layout, groups))
    new.bias.assign(bias)
    become(conv, new)
    policy = keras.dtype_policies.serialize(policy_of(norm))  # Identity's arguments are stored
    identity = keras.layers.Identity(name=norm.name, dtype=policy)
    become(norm, identity, frozenset(vars(norm)))
    return None


def _last_kernel(conv: keras.Layer) -> tuple[str, str, int]:
    """Return which of the convolution's kernels gives its output, its layout, and the groups."""
    if isinstance(conv, SEPARABLE_CONVS):
        return "pointwise_kernel", "*IO", 1
    if isinstance(conv, DEPTHWISE_CONVS):
        return "kernel", "*CN", conv.kernel.shape[-2]
    return "kernel", "*IO", conv.groups


def _array(variable: Any) -> Any:
    """Return a variable as an array, None as None; half types as float32, which NumPy all has."""
    if variable is None:
        return None
    array = ops.convert_to_numpy(variable)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
