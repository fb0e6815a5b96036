"""Folding one BSConv layer to ordinary ones: what its parts are, and what they become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.kinds.bsconv import FORMS, as_choice
from doconv_core.kinds.bsconv_fold import (
    Folded,
    Normalization,
    Pointwise,
    Step,
    fold_dense,
    fold_pointwise,
)
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.models.report import REPLACED
from doconv_tf.batchnorm import axis_obstacle, norm_obstacle
from doconv_tf.bsconv_parts import DEPTHWISE, PADDING, ZERO_PADDING, pointwise
from doconv_tf.composed import ComposedConv
from doconv_tf.copying import copied
from doconv_tf.ordinary import is_replaced, like, name_scopes, obstacle, pads, policy_of
from doconv_tf.orthonormal import unmark

_LINEAR = (None, keras.activations.linear)


def folded(layer: Any, form: str) -> keras.Layer:
    """Return the new layers that a BSConv layer folds to, as its `fold` says."""
    as_choice("form", form, FORMS)
    if form == "keep":
        return _sequence(layer, [_ordinary(part) for part in layer.layers])
    check_layer(layer)
    before = fold_pointwise(_steps(layer))
    depthwise = _depthwise(layer)
    padding = [_ordinary(part) for part in layer.layers if part.name == PADDING]
    if form == "merge":
        return _sequence(layer, [_merged(layer, before), *padding, _ordinary(depthwise)])
    dense = _dense(layer, before, depthwise)
    if not padding:
        return dense
    dense.name = "conv"
    return _sequence(layer, [*padding, dense], activity=False)


def check_layer(layer: Any) -> None:
    """Raise NotFoldable where a BSConv layer may compute something else than its type does."""
    cls = type(layer)
    if cls.call is not keras.Sequential.call or is_replaced(layer):
        raise NotFoldable(
            f"{cls.__module__}.{cls.__qualname__} has a call of its own, so the convolution it "
            "would be folded to might compute something else; form='keep' leaves it."
        )
    found, expected = [part.name for part in layer.layers], list(layer.spec.names)
    if any(layer.around):
        expected.insert(-1, PADDING)
    if found != expected:
        raise NotFoldable(
            f"its parts are {', '.join(found) or 'none'}; expected {', '.join(expected)}."
        )


def is_changed(layer: Any) -> bool:
    """Return whether merging a BSConv layer makes anything else of it than keeping it."""
    same = (keras.layers.Identity, *ZERO_PADDING.values())
    return len([part for part in layer.layers if type(part) not in same]) > 2


def _ordinary(part: keras.Layer) -> keras.Layer:
    new = part.fold() if isinstance(part, ComposedConv) else copied(part)
    unmark(new)
    return new


def _sequence(layer: Any, parts: Iterable[keras.Layer], *, activity: bool = True) -> keras.Layer:
    """Return the parts in sequence, built, in the layer's place.

    activity: whether the layer's activity regularizer is to be the last part's.
    """
    parts = list(parts)
    if activity and layer.activity_regularizer is not None:
        parts[-1].activity_regularizer = layer.activity_regularizer
    new = keras.Sequential(parts, trainable=layer.trainable, name=layer.name)
    new.dtype_policy = policy_of(layer)
    with name_scopes(layer):
        new.build(layer.get_build_config()["input_shape"])
    return new


def _steps(layer: Any) -> list[Step]:
    """Return what comes before the depthwise convolution; NotFoldable names what is unknown."""
    steps: list[Step] = []
    for part in layer.layers:
        if part.name in ("depthwise", PADDING) or type(part) is keras.layers.Identity:
            continue  # an identity is left of a batch norm that was fused
        _check_activity(part)
        if isinstance(part, keras.layers.BatchNormalization):
            steps.append(_normalization(part, layer))
        else:
            _check_convolution(part, (layer.ordinary,))
            _check_pointwise(part)
            kernel = as_array(part.kernel, "*IO")
            steps.append(Pointwise(kernel.reshape(kernel.shape[:2]), as_array(part.bias)))
    return steps


def _normalization(norm: Any, layer: Any) -> Normalization:
    reason = norm_obstacle(norm) or axis_obstacle(layer, norm)
    if reason is not None:
        raise NotFoldable(f"its {norm.name} cannot be folded: {reason}.")
    variables = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
    mean, variance, scale, offset = map(as_array, variables)
    return Normalization(mean, variance, norm.epsilon, scale, offset)


def _depthwise(layer: Any) -> Any:
    part = layer.depthwise
    if isinstance(part, ComposedConv):
        if is_replaced(part):
            raise NotFoldable(f"its depthwise cannot be folded: {REPLACED}.")
        part.check_foldable()
    else:
        known = (layer.ordinary, DEPTHWISE.get(layer.rank, layer.ordinary))
        _check_convolution(part, known)
    multiplier = getattr(part, "depth_multiplier", 1)
    if hasattr(part, "groups"):
        multiplier = part.filters // part.groups
    if multiplier != 1:
        raise NotFoldable(f"its depthwise is no depthwise convolution: {part}.")
    return part


def _check_convolution(part: keras.Layer, known: tuple[type, ...]) -> None:
    reason = obstacle(part) if type(part) in known else f"it is a {type(part).__name__}"
    if reason is not None:
        names = " or a ".join(f"keras.layers.{cls.__name__}" for cls in dict.fromkeys(known))
        raise NotFoldable(f"its {part.name} cannot be folded: {reason}; expected a {names}.")


def _check_pointwise(part: Any) -> None:
    sizes = {*part.kernel_size, *part.strides, part.groups}
    if sizes != {1} or part.activation not in _LINEAR:
        raise NotFoldable(
            f"its {part.name} is no pointwise convolution of stride 1 without activation: {part}."
        )


def _check_activity(part: keras.Layer) -> None:
    if part.activity_regularizer is not None:
        raise NotFoldable(
            f"its {part.name} has an activity regularizer, which would see other values; remove it "
            "first."
        )


def _merged(layer: Any, values: Folded) -> keras.Layer:
    """Return the one pointwise convolution that comes before the depthwise one."""
    bias = values.bias is not None
    conv = pointwise(layer, "pointwise", len(values.kernel), use_bias=bias)
    with name_scopes(layer), keras.name_scope(layer.name):
        conv.build(layer.get_build_config()["input_shape"])
    return _filled(layer, conv, values)


def _dense(layer: Any, before: Folded, depthwise: Any) -> keras.Layer:
    if isinstance(depthwise, ComposedConv):
        depthwise = depthwise.fold()
    kernel = as_array(depthwise.kernel, _layout(depthwise)).reshape(layer.filters, -1)
    dense = fold_dense(before, kernel, as_array(depthwise.bias), _geometry(layer, depthwise))
    conv = like(layer, layer.ordinary, {"use_bias": dense.bias is not None})
    return _filled(layer, conv, dense)


def _geometry(layer: Any, depthwise: Any) -> Geometry:
    """Return where the convolution's taps meet the layer's input."""
    around = symmetric(layer.around) if any(layer.around) else pads(depthwise)
    return Geometry(depthwise.strides, depthwise.dilation_rate, around)


def _filled(layer: Any, conv: Any, values: Folded) -> keras.Layer:
    """Return the convolution with these values, trainable where anything of the layer's is."""
    trainable = any(variable.trainable for variable in layer.weights)
    put_kernel(conv, values.kernel)
    conv.kernel.trainable = trainable
    if values.bias is not None:
        conv.bias.assign(ops.cast(values.bias, keras.backend.standardize_dtype(conv.bias.dtype)))
        conv.bias.trainable = trainable
    return conv


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
