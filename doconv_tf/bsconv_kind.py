"""What BSConv layers are made of in Keras: how their parts are read, folded and put in models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from doconv_core.kinds.bsconv import GROUPED, obstacle
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.maths.separable import Folded, Normalization, Pointwise
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_core.networks.nodes import BatchNorm
from doconv_tf import ordinary
from doconv_tf.batchnorm import axis_obstacle, norm_obstacle
from doconv_tf.bsconv_parts import DEPTHWISE, PADDING, pointwise
from doconv_tf.composed import ComposedConv
from doconv_tf.copying import copied
from doconv_tf.ordinary import (
    CONVS,
    SEPARABLE_CONVS,
    like,
    name_scopes,
    pads,
    policy_of,
    spec_of,
)
from doconv_tf.orthonormal import unmark
from doconv_tf.surgery import become, keep_parts

NORM = BatchNorm()  # of networks; its defaults are not Keras'
_LINEAR = (None, keras.activations.linear)

# What Keras has as a layer of its own.
SEPARABLE = "it is separable already; a BSConv takes the place of an ordinary convolution"


class BSConvLayers(SeparableLayers):
    """The BSConv layers of Keras."""

    composed, sequence = ComposedConv, keras.Sequential
    batch_norm = keras.layers.BatchNormalization
    bn_options: ClassVar[Mapping[str, Any]] = {
        "momentum": 1 - NORM.momentum,
        "epsilon": NORM.epsilon,
    }
    methods, linear = ("call",), "of stride 1 without activation"
    padding = (PADDING,)
    is_replaced = staticmethod(ordinary.is_replaced)

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason in (None, GROUPED) and type(layer) not in CONVS:
            return SEPARABLE if isinstance(layer, SEPARABLE_CONVS) else GROUPED
        return reason

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs."""
        for site, new in chosen:
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs, where they stand."""
        for site, (_, new) in planned:
            if new is None:
                keep_parts(site.layer)
            else:
                become(site.layer, new)

    def _parts(self, layer: Any) -> dict[str, keras.Layer]:
        return {part.name: part for part in layer.layers}

    def _names(self, layer: Any) -> tuple[str, ...]:
        *before, depthwise = layer.spec.names
        return (*before, *(self.padding if any(layer.around) else ()), depthwise)

    def _strides(self, layer: Any) -> Sequence[int]:
        found: Sequence[int] = layer.strides
        return found

    def _passes_on(self, part: keras.Layer) -> bool:
        return type(part) is keras.layers.Identity

    def _watcher(self, part: keras.Layer) -> str | None:
        if part.activity_regularizer is None or part.name == "depthwise":
            return None
        return "an activity regularizer, which would see other values; remove it first"

    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        return norm_obstacle(norm) or axis_obstacle(layer, norm)

    def _conv_obstacle(self, layer: Any, name: str, part: keras.Layer) -> str | None:
        known = [layer.ordinary]
        if name == "depthwise" and layer.rank in DEPTHWISE:
            known.append(DEPTHWISE[layer.rank])
        if type(part) in known:
            reason = ordinary.obstacle(part)
        else:
            reason = f"it is a {type(part).__name__}"
        names = " or a ".join(f"keras.layers.{cls.__name__}" for cls in known)
        return reason and f"{reason}; expected a {names}"

    def _is_pointwise(self, conv: Any) -> bool:
        sizes = {*conv.kernel_size, *conv.strides, conv.groups}
        return sizes == {1} and conv.activation in _LINEAR

    def _is_depthwise(self, conv: Any) -> bool:
        if hasattr(conv, "groups"):
            return bool(conv.filters == conv.groups)
        return bool(conv.depth_multiplier == 1)

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        kernel = as_array(conv.kernel, _layout(conv))
        return Pointwise(kernel.reshape(len(kernel), -1), as_array(conv.bias))

    def _normalization(self, norm: Any, context: Any) -> Normalization:
        variables = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
        mean, variance, scale, offset = map(as_array, variables)
        return Normalization(mean, variance, norm.epsilon, scale, offset)

    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        around = symmetric(layer.around) if any(layer.around) else pads(depthwise)
        return Geometry(depthwise.strides, depthwise.dilation_rate, around)

    def _ordinary(self, part: keras.Layer) -> keras.Layer:
        new = part.fold() if isinstance(part, ComposedConv) else copied(part)
        unmark(new)
        return new

    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any = None
    ) -> keras.Layer:
        kernel, bias = values[None]
        use_bias = bias is not None
        if depthwise is not None:
            conv = like(layer, layer.ordinary, {"use_bias": use_bias})
        else:
            conv = pointwise(layer, "pointwise", len(kernel), use_bias=use_bias)
            with name_scopes(layer), keras.name_scope(layer.name):
                conv.build(layer.get_build_config()["input_shape"])
        trainable = any(variable.trainable for variable in layer.weights)
        put_kernel(conv, kernel)
        conv.kernel.trainable = trainable
        if use_bias:
            conv.bias.assign(ops.cast(bias, keras.backend.standardize_dtype(conv.bias.dtype)))
            conv.bias.trainable = trainable
        return conv

    def _sequenced(self, layer: Any, parts: Mapping[str, keras.Layer]) -> keras.Layer:
        for name, part in parts.items():
            part.name = name  # a dense convolution behind padding has the layer's
        if layer.activity_regularizer is not None:
            part.activity_regularizer = layer.activity_regularizer
        new = keras.Sequential([*parts.values()], trainable=layer.trainable, name=layer.name)
        new.dtype_policy = policy_of(layer)
        with name_scopes(layer):
            new.build(layer.get_build_config()["input_shape"])
        return new


def put_kernel(conv: Any, values: Any) -> None:
    """Give a convolution a kernel: `(O, I)` of a pointwise, `(O, M)`, or `(O, I, M)`."""
    canonical = values.reshape(len(values), -1, *conv.kernel_size)
    kernel = from_canonical(canonical, _layout(conv), len(values))
    conv.kernel.assign(ops.cast(kernel, keras.backend.standardize_dtype(conv.kernel.dtype)))


def as_array(variable: Any, layout: str = "") -> Any:
    """Return a variable's values in float64, in canonical order of `layout`; None as None."""
    if variable is None:
        return None
    if keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
        variable = ops.cast(variable, "float32")
    array = ops.convert_to_numpy(variable).astype(np.float64)
    return to_canonical(array, layout) if layout else array


def _layout(conv: keras.Layer) -> str:
    return "*CN" if isinstance(conv, tuple(DEPTHWISE.values())) else "*IO"
