"""The canonical state of Keras models.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402
from keras_layers import (  # noqa: E402
    SHAPE,
    Subclassed,
    array,
    assert_same,
    image,
    random_values,
    shifted_relu,
    trained,
)

from doconv_tf import DOConv2D, DODepthwiseConv2D, export_state, load_state  # noqa: E402


def network(multiplier=12, use_bias=True, cls=DOConv2D, end=()):
    """Return a model with a nested one, every kind of layer that a state holds, and others."""
    options = {"depth_multiplier": multiplier} if cls is DOConv2D else {}
    depthwise = DODepthwiseConv2D if cls is DOConv2D else layers.DepthwiseConv2D
    inner = [
        keras.Input((5, 6, 6)), depthwise(2, depth_multiplier=2, name="depthwise"),
        layers.Conv2D(5, 1, name="point"),
    ]  # fmt: skip
    parts = [
        keras.Input(SHAPE[1:]), cls(6, 3, groups=2, use_bias=use_bias, name="first", **options),
        layers.ReLU(), keras.Sequential(inner, name="inner"), layers.Dropout(0.5),
        layers.Flatten(), layers.Dense(3, name="last"),
    ]  # fmt: skip
    return keras.Sequential([*parts, *end])


class Twins(keras.Layer):
    """A layer that gives two of its own layers one name."""

    def __init__(self):
        super().__init__(name="twins")
        self.left, self.right = layers.Dense(3, name="one"), layers.Dense(3, name="one")

    def build(self, input_shape):
        self.left.build(input_shape)
        self.right.build(input_shape)

    def call(self, x):
        return self.left(x) + self.right(x)


def with_lora(model, name):
    model.get_layer(name).enable_lora(2)
    return model


def with_scale(model, name):
    """Add a variable that no canonical state has a place for."""
    layer = model.get_layer(name)
    layer._tracker.unlock()
    layer.scale = layer.add_weight(name="scale", shape=(), initializer="ones")
    return model


def ended(shape, *end):
    return network(end=[layers.Reshape(shape), *end])


QUANTIZED = partial(layers.Conv2D, dtype="int8_from_float32")
NO_LORA = ".*LoRA and quantized layers have no counterpart"
POSITIONS = "'prelu' is a PReLU .*a slope for each position has no counterpart; name the spatial"
UNFIT = [
    (lambda: with_lora(network(), "last"), f"'last' is a Dense with {NO_LORA}"),
    (lambda: with_lora(network(cls=layers.Conv2D), "first"), f"'first' is a Conv2D with {NO_LORA}"),
    (lambda: network(cls=QUANTIZED), f"'first' is a Conv2D with {NO_LORA}"),
    (
        lambda: ended((3, 1), layers.LSTM(2, name="lstm")),
        "'lstm.lstm_cell' is a LSTMCell with 'kernel', .*; a canonical state holds convoluti",
    ),
    (
        lambda: network(end=[layers.BatchNormalization(name="norm", renorm=True)]),
        "'norm', a BatchNormalization, has .*'moving_stddev'.*; expected ",
    ),
    (
        lambda: ended((3, 1), layers.LayerNormalization([1, 2], name="norm")),
        "'norm' is a LayerNormalization .*a layer norm over several axes has no counterpart",
    ),
    (lambda: ended((3, 1), layers.PReLU(name="prelu")), POSITIONS),
    (lambda: ended((1, 3, 1), layers.ZeroPadding2D(1), layers.PReLU(name="prelu")), POSITIONS),
    (
        lambda: with_scale(network(), "first"),
        "'first', a DOConv2D, has 'kernel', 'bias', 'd_kernel', 'scale'; expected 'k",
    ),
    (
        lambda: ended((3, 1), layers.LayerNormalization(1, name="norm")),
        "'norm' is a LayerNorm.*; a layer norm over axis 1 of 3, which is not the last, has",
    ),
    (lambda: network(end=[Twins()]), "two layers have the path 'twins.one'"),
]


@pytest.mark.parametrize(("model", "message"), UNFIT)
def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(model, message):
    state, model = export_state(network()), random_values(model(), seed=4)
    before = [array(v).copy() for v in model.weights]
    error = ValueError if "two layers" in message else TypeError
    with pytest.raises(error, match=message):
        load_state(model, state)
    assert_same(model.weights, before)


@pytest.mark.parametrize(
    ("convolution", "norm", "message"),
    [
        ({}, layers.BatchNormalization(axis=1), "axis 1 is not that of the channels, 3, in the ch"),
        ({}, layers.GroupNormalization(2, axis=2), "axis 2 is not that of the channels, 3, in "),
        (
            {"data_format": "channels_first"},
            layers.BatchNormalization(),
            "axis -1 is not that of the channels, 1, in the channels_first image",
        ),
        ({}, layers.BatchNormalization(axis=3), None),
        ({"data_format": "channels_first"}, layers.BatchNormalization(axis=1), None),
    ],
)
def test_a_norm_is_of_the_channels(convolution, norm, message):
    layer = layers.Conv2D(6, 1, name="conv", **convolution)
    model = keras.Sequential([keras.Input((4, 4, 4)), layer, layers.ReLU(), norm])
    if message is None:
        assert len(export_state(model).layers) == 2
        return
    with pytest.raises(TypeError, match=message):
        export_state(model)


def test_a_model_that_is_not_built_has_no_state():
    with pytest.raises(ValueError, match="layer 'raw' is not built"):
        export_state(DOConv2D(6, 3, name="raw"))
    with pytest.raises(ValueError, match="is not built; call the model"):
        export_state(keras.Sequential([DOConv2D(6, 3)]))
    model = Subclassed(trained())
    model.built = True
    with pytest.raises(ValueError, match=r"layer 'dense.*' is not built"):
        export_state(model)


def test_a_compiled_and_trained_model_has_the_state_of_its_layers():
    model = keras.Sequential(
        [keras.Input((4, 4, 3)), layers.RandomFlip(), layers.Conv2D(2, 3), layers.Flatten()]
    )
    before = export_state(model)
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.ones((2, 4, 4, 3)), np.ones((2, 8)), verbose=0)
    assert export_state(model).layers == before.layers


def test_layers_without_weights_need_not_be_built():
    model = Subclassed(trained())
    model.flip, model.same = layers.RandomFlip(), layers.Lambda(shifted_relu)
    model(image())
    assert not model.flip.built
    assert not model.same.built
    state = export_state(model)
    assert len(state.layers) == 2
    load_state(model, state)
