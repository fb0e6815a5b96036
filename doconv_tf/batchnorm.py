"""Fusing the batch norms of a Keras model into the layers beside them, in inference.

Keras has no utility for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.models.report import (
    AXIS,
    NOT_DIRECT,
    NOT_FINITE,
    PADDED,
    REPLACED,
    SEVERAL,
    SUBCLASS,
    behind,
)
from doconv_tf.graph import Seen
from doconv_tf.ordinary import (
    CONVS,
    DEPTHWISE_CONVS,
    ORDINARY,
    SEPARABLE_CONVS,
    TRANSPOSED_CONVS,
    is_replaced,
    like,
    obstacle,
    policy_of,
    put,
    variable_obstacle,
)
from doconv_tf.private import calls_of
from doconv_tf.surgery import become

# Why a batch norm is left, of what Keras alone has.
ACTIVATION = "its convolution has an activation before it"
REGULARIZED = "it or its convolution has an activity regularizer"
READ = "a function holds it or its convolution, such as a Lambda's, and may read anything of it"
TRAINING = "called with training=True, whatever the model does"

_layers, _Norm = keras.layers, keras.layers.BatchNormalization
# What a subclass of a batch norm may have of its own and compute the same; all that it may not.
_HARMLESS = {
    "__init__", "get_config", "from_config", "__module__", "__qualname__", "__doc__", "__dict__",
    "__weakref__", "__annotations__", "__annotate__",
}  # fmt: skip
_OF_NORMS = {*dir(_Norm), *vars(_Norm(name="norm")), "__getattr__"} - _HARMLESS
# What returns its input in inference.
_PASSING = (
    _layers.AlphaDropout, _layers.Dropout, _layers.GaussianDropout, _layers.GaussianNoise,
    _layers.Identity, _layers.SpatialDropout1D, _layers.SpatialDropout2D, _layers.SpatialDropout3D,
)  # fmt: skip


def takes_norm(layer: keras.Layer) -> bool:
    """Return whether a batch norm behind a layer can become a part of it."""
    return isinstance(layer, (*ORDINARY, *TRANSPOSED_CONVS, _layers.Dense))


def passes_on(layer: Any, seen: Seen) -> bool:
    """Return whether a layer returns its input in inference, and nobody watches."""
    linear = type(layer) is _layers.Activation and layer.activation is keras.activations.linear
    if not (linear or type(layer) in _PASSING) or is_replaced(layer):
        return False
    rounds = any(node.outputs[0].dtype != node.input_tensors[0].dtype for node in calls_of(layer))
    return not rounds and layer.activity_regularizer is None and id(layer) not in seen.training


def norm_obstacle(norm: keras.Layer) -> str | None:
    """Return why a batch norm cannot be fused, wherever it stands; None where it can.

    One of a subclass can where the subclass has nothing that a batch norm calls.
    """
    own = [vars(cls).keys() for cls in type(norm).__mro__ if cls not in _Norm.__mro__]
    if not _OF_NORMS.isdisjoint(name for names in own for name in names):
        return SUBCLASS
    return REPLACED if is_replaced(norm) else None


def pair_obstacle(conv: Any, norm: Any, seen: Seen, *, ahead: bool = False) -> str | None:
    """Return why this layer and this batch norm, which follows it, cannot be fused.

    ahead: whether the batch norm comes before the layer instead.
    """
    if seen.times[id(norm)] > 1 or seen.times[id(conv)] > 1:
        return SEVERAL
    if not seen.read.isdisjoint((id(norm), id(conv))):
        return READ
    known = type(conv) in (*TRANSPOSED_CONVS, _layers.Dense) and not ahead
    reason = variable_obstacle(conv) if known else obstacle(conv)
    if reason is not None:
        return behind(reason)
    if id(norm) in seen.training and norm.trainable:  # a frozen one goes by its statistics
        return TRAINING
    if norm.activity_regularizer or (conv.activity_regularizer and not ahead):
        return REGULARIZED
    if not ahead and conv.activation not in (None, keras.activations.linear):
        return ACTIVATION
    return axis_obstacle(conv, norm)


def axis_obstacle(conv: Any, norm: Any) -> str | None:
    """Return that a batch norm's axis is not that of a layer's channels, where it is not."""
    if isinstance(conv, _layers.Dense):
        ndim, axis = norm.input_spec.ndim, -1
    else:
        ndim, axis = conv.rank + 2, -1 if conv.data_format == "channels_last" else 1
    return None if norm.axis % ndim == axis % ndim else AXIS


def fuse(conv: Any, norm: Any) -> str | None:
    """Fuse the norm into the layer before it, in their model; or return why not."""
    name = "pointwise_kernel" if isinstance(conv, SEPARABLE_CONVS) else "kernel"
    values, axis = as_array(getattr(conv, name)), -2 if isinstance(conv, TRANSPOSED_CONVS) else -1
    shape = values.shape
    if isinstance(conv, DEPTHWISE_CONVS):
        values = values.reshape(*shape[:-2], -1)
    with np.errstate(all="ignore"):
        kernel, bias = fuse_batchnorm(
            np.moveaxis(values, axis, 0), as_array(conv.bias), epsilon=norm.epsilon,
            **_statistics(norm),
        )  # fmt: skip
    return _become(conv, norm, {name: np.moveaxis(kernel, 0, axis).reshape(shape)}, bias)


def fuse_ahead(norm: Any, conv: Any) -> str | None:
    """Fuse the norm into the convolution behind it, in their model; or return why not.

    Zeros around a convolution's input are not what the batch norm makes of zeros.
    """
    if conv.padding != "valid":
        return PADDED if type(conv) in ORDINARY else NOT_DIRECT
    channels = norm.moving_mean.shape[0]
    scale, offset = scale_and_offset(norm)
    name = "depthwise_kernel" if isinstance(conv, SEPARABLE_CONVS) else "kernel"
    dense = type(conv) in CONVS
    layout, groups = ("*IO", conv.groups) if dense else ("*CN", channels)
    canonical = to_canonical(as_array(getattr(conv, name)), layout).astype(np.float64)
    parts = canonical.reshape(groups, -1, *canonical.shape[1:])
    by_input = (groups, 1, -1, *(1,) * conv.rank)
    with np.errstate(all="ignore"):
        kernel = (parts * scale.reshape(by_input)).reshape(canonical.shape)
        bias = (parts * offset.reshape(by_input)).reshape(len(canonical), -1).sum(1)
        if isinstance(conv, SEPARABLE_CONVS):
            bias = bias @ as_array(conv.pointwise_kernel).reshape(len(bias), -1)
    bias = bias if conv.bias is None else bias + as_array(conv.bias)
    return _become(conv, norm, {name: from_canonical(kernel, layout, groups)}, bias)


def scale_and_offset(norm: Any) -> tuple[Any, Any]:
    """Return what a batch norm multiplies each channel by in inference, and then adds."""
    ones = np.ones((norm.moving_mean.shape[0], 1))
    with np.errstate(all="ignore"):  # the batch norm as a convolution of one tap a channel
        scale, offset = fuse_batchnorm(ones, None, epsilon=norm.epsilon, **_statistics(norm))
    return scale.reshape(-1), offset


def _statistics(norm: Any) -> dict[str, Any]:
    return {
        "mean": as_array(norm.moving_mean), "variance": as_array(norm.moving_variance),
        "scale": as_array(norm.gamma), "offset": as_array(norm.beta),
    }  # fmt: skip


def _become(conv: Any, norm: Any, kernels: Mapping[str, Any], bias: Any) -> str | None:
    """Give a layer these values, and make the norm an identity, so that the graph stays as it is.

    Returns that they are not finite where they are not, and changes nothing.
    """
    dtypes = [getattr(conv, name).dtype for name in kernels]
    with np.errstate(all="ignore"):
        rounded = [ops.cast(v, dtypes[0]) for v in (*kernels.values(), bias)]
    if not all(bool(ops.all(ops.isfinite(each))) for each in rounded):
        return NOT_FINITE
    new = like(conv, type(conv), {"use_bias": True})
    for name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
        if hasattr(conv, name):
            variable = getattr(new, name)
            if name in kernels:
                variable.assign(kernels[name])
            else:
                put(variable, getattr(conv, name))
            variable.trainable = getattr(conv, name).trainable
    new.bias.assign(bias)
    become(conv, new)
    policy = keras.dtype_policies.serialize(policy_of(norm))  # Identity's arguments are stored
    identity = keras.layers.Identity(name=norm.name, dtype=policy)
    become(norm, identity, frozenset(vars(norm)))
    return None


def as_array(variable: Any) -> Any:
    """Return a variable as an array, None as None; half types as float32, which NumPy all has."""
    if variable is None:
        return None
    array = ops.convert_to_numpy(variable)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
