"""The parts that a BSConv layer of Keras is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

_layers = keras.layers
DEPTHWISE = {1: _layers.DepthwiseConv1D, 2: _layers.DepthwiseConv2D}
ZERO_PADDING = {1: _layers.ZeroPadding1D, 2: _layers.ZeroPadding2D, 3: _layers.ZeroPadding3D}
PADDING = "zero_padding"  # the name of the part that `around` makes


def make_parts(layer: Any) -> Iterator[keras.Layer]:
    """Yield new parts, in the order of their use, of the sizes of the layer's `spec`."""
    shapes = iter(layer.spec.pointwise_shapes)
    for name in layer.spec.names:
        if name == "depthwise":
            if any(layer.around):
                around = layer.around if layer.rank > 1 else layer.around[0]
                options = {"data_format": layer.data_format, **_options(layer)}
                yield ZERO_PADDING[layer.rank](around, name=PADDING, **options)
            yield _depthwise(layer)
        elif name.startswith("pointwise"):
            yield pointwise(layer, name, next(shapes)[0])
        else:
            axis = -1 if layer.data_format == "channels_last" else 1
            norms = {**layer.bn_options, **_options(layer)}
            yield _layers.BatchNormalization(axis, name=name, **norms)


def pointwise(layer: Any, name: str, channels: int, *, use_bias: bool = False) -> keras.Layer:
    """Return a new pointwise convolution for this layer, to so many channels."""
    options = {**_of_kernel(layer, "kernel"), **_options(layer)}
    options["kernel_regularizer"] = layer.regularizer_of(name)
    return layer.ordinary(
        channels, 1, data_format=layer.data_format, use_bias=use_bias, name=name, **options
    )


def _depthwise(layer: Any) -> keras.Layer:
    sizes = {
        name: getattr(layer, name)
        for name in (
            "strides", "padding", "data_format", "dilation_rate", "activation", "use_bias",
            "bias_initializer", "bias_regularizer", "bias_constraint",
        )
    }  # fmt: skip
    options = {"name": "depthwise", **sizes, **_options(layer)}
    # What Keras' depthwise convolutions have not: three dimensions, "causal", unequal strides.
    if layer.rank == 3 or layer.padding == "causal" or len(set(layer.strides)) > 1:
        return layer.ordinary(
            layer.filters, layer.kernel_size, groups=layer.filters, **_of_kernel(layer, "kernel"),
            **options,
        )  # fmt: skip
    return DEPTHWISE[layer.rank](layer.kernel_size, **_of_kernel(layer, "depthwise"), **options)


def _of_kernel(layer: Any, prefix: str) -> dict[str, Any]:
    """Return the arguments about the kernel, by the names that begin with `prefix`."""
    initializer = layer.kernel_initializer
    # A clone draws other numbers, unless its seed was given.
    clone = initializer.clone() if hasattr(initializer, "clone") else initializer
    return {
        f"{prefix}_initializer": clone,
        f"{prefix}_regularizer": layer.kernel_regularizer,
        f"{prefix}_constraint": layer.kernel_constraint,
    }


def _options(layer: Any) -> dict[str, Any]:
    return {
        "dtype": layer.dtype_policy, "trainable": layer.trainable, "autocast": layer.autocast,
    }  # fmt: skip
