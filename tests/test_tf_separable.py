"""Depthwise layers of one dimension, and separable layers, whose depthwise part is composed.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import numpy as np
import pytest
from cases import one_test
from equal import assert_same
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import array, image, random_values  # noqa: E402

from doconv_core import NotFoldable, compose, difference, to_canonical  # noqa: E402
from doconv_tf import (  # noqa: E402
    DODepthwiseConv1D,
    DODepthwiseConv2D,
    DOSeparableConv1D,
    DOSeparableConv2D,
)

SHAPES = {1: (2, 8, 4), 2: (2, 7, 8, 4)}
CLASSES = [DODepthwiseConv1D, DOSeparableConv1D, DOSeparableConv2D]
EACH = pytest.mark.parametrize("do_conv", CLASSES)
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 10, 19])


def options(do_conv, **more):
    filters = {"filters": 5} if do_conv in CLASSES[1:] else {}
    return {**filters, "kernel_size": 3, "depth_multiplier": 2, "name": "layer", **more}


def data(do_conv):
    return image(SHAPES[do_conv.rank])


def trained(do_conv, **more):
    layer = do_conv(**options(do_conv, **more))
    layer.build(SHAPES[do_conv.rank])
    return random_values(layer)


def depthwise(layer):
    return getattr(layer, layer.d_name)


@one_test
@EACH
@pytest.mark.parametrize(
    ("multiplier", "more"),
    [(None, {}), (10, {"padding": "same", "activation": "relu"}), (19, {"strides": 2})],
)
def test_takes_over_and_folds_the_same_function(do_conv, multiplier, more):
    plain = do_conv.ordinary(**options(do_conv, **more))
    x = data(do_conv)
    expected = array(plain(x))
    random_values(plain)
    expected = array(plain(x))
    layer = do_conv.from_conv(plain, d_multiplier=multiplier)
    assert_same(layer(x), expected)
    assert not array(depthwise(layer)).any()
    random_values(layer, seed=4)
    folded = layer.fold()
    assert type(folded) is do_conv.ordinary
    assert_same(folded(x), layer(x))
    assert (array(folded(x)) != expected).any()
    theirs = layer.get_config()
    assert {name: theirs[name] for name in folded.get_config()} == folded.get_config()


@one_test
@EACH
@MULTIPLIERS
def test_composes_as_the_core_does(do_conv, multiplier):
    layer = trained(do_conv, d_multiplier=multiplier)
    spec = layer.spec
    weight = to_canonical(array(layer._kernel), layer.layout).reshape(spec.weight_shape)
    expected = compose(weight.astype("float64"), array(depthwise(layer)).astype("float64"), spec)
    found = to_canonical(array(layer.composed_kernel()), layer.layout)
    assert difference(found, expected).relative < 1e-6


@pytest.mark.parametrize("rank", [1, 2])
def test_a_separable_layer_is_a_depthwise_and_a_pointwise_one(rank):
    x = image(SHAPES[rank])
    separable = trained([DOSeparableConv1D, DOSeparableConv2D][rank - 1], padding="same")
    first = [DODepthwiseConv1D, DODepthwiseConv2D][rank - 1](
        3, padding="same", depth_multiplier=2, use_bias=False
    )
    second = [layers.Conv1D, layers.Conv2D][rank - 1](5, 1)
    for layer, shape in ((first, SHAPES[rank]), (second, (*SHAPES[rank][:-1], 8))):
        layer.build(shape)
    first._kernel.assign(separable._kernel)
    first.d_kernel.assign(separable.d_kernel)
    second.kernel.assign(separable.pointwise_kernel)
    second.bias.assign(separable.bias)
    assert difference(array(separable(x)), array(second(first(x)))).relative < 1e-6


@pytest.mark.parametrize(("do_conv", "multiplier"), [*zip(CLASSES, (None, 10, None), strict=True)])
def test_is_stored_loaded_and_trained(do_conv, multiplier, tmp_path):
    layer = trained(do_conv, d_multiplier=multiplier)
    x = data(do_conv)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile("sgd", "mse", run_eagerly=do_conv.rank == 1)
    before = [array(v).copy() for v in model.weights]
    model.fit(x, np.ones_like(array(model(x))), verbose=0)
    assert all((array(v) != b).any() for v, b in zip(model.weights, before, strict=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is do_conv
    assert_same(loaded(x), model(x))


@one_test
@EACH
@pytest.mark.parametrize("multiplier", [None, 10])
def test_loads_what_the_ordinary_layer_stored(do_conv, multiplier):
    plain = random_values(do_conv.ordinary(**options(do_conv)))
    plain.build(SHAPES[do_conv.rank])
    random_values(plain)
    store = {}
    plain.save_own_variables(store)
    layer = trained(do_conv, d_multiplier=multiplier)
    layer.load_own_variables({name: array(value) for name, value in store.items()})
    assert_same(layer(data(do_conv)), plain(data(do_conv)))
    ours = {}
    layer.save_own_variables(ours)
    assert ours.keys() == {*store, "depthwise_kernel"}


@EACH
def test_mixed_precision_casts_the_composed_kernel_once(do_conv):
    layer = trained(do_conv, dtype="mixed_bfloat16")
    assert {v.dtype for v in layer.weights} == {"float32"}
    kernel = getattr(layer, layer.kernel_name)
    assert keras.backend.standardize_dtype(kernel.dtype) == "bfloat16"
    composed = ops.cast(layer.composed_kernel(), "bfloat16")
    assert_same(ops.cast(kernel, "float32"), ops.cast(composed, "float32"))
    x = data(do_conv)
    assert_same(ops.cast(layer.fold()(x), "float32"), ops.cast(layer(x), "float32"))


@EACH
def test_refuses_what_gives_no_layer(do_conv):
    with pytest.raises(ValueError, match="d_multiplier must be at least"):
        do_conv(**options(do_conv, d_multiplier=2))
    with pytest.raises(TypeError, match="kernel_size must be"):
        do_conv(**options(do_conv, kernel_size="3"))
    with pytest.raises(TypeError, match="takes over a keras"):
        do_conv.from_conv(layers.Dense(3))
    with pytest.raises(NotImplementedError, match="cannot be quantized"):
        trained(do_conv).quantize("int8")


class Centred(DOSeparableConv2D):
    """Convolves with another kernel."""

    @property
    def depthwise_kernel(self):
        return self.kernel - ops.mean(self.kernel)


def test_a_subclass_with_another_kernel_is_not_folded():
    with pytest.raises(NotFoldable, match="Centred has a depthwise_kernel of its own"):
        trained(Centred, filters=5).fold()
