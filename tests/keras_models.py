"""Keras models of every kind that the whole-model tests convert; to import after `need("tf")`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_layers import array

from doconv_tf import over_parameterize, verify
from doconv_tf.ordinary import first_occurrences, walk
from doconv_tf.over_parameterized import OverParameterized

SHAPE = (2, 9, 9, 3)


def filled(model, seed=0):
    """Give every variable random values, positive where it is a variance; return the model."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        values = rng.uniform(0.5, 1.5, variable.shape)
        if variable.path.endswith("kernel"):
            values = 0.3 * rng.standard_normal(variable.shape)
        if "int" not in variable.dtype:
            variable.assign(values)
    return model


def depthwise(model):
    """Return D of each over-parameterized layer."""
    layers_ = [layer for _, layer in first_occurrences(model)]
    return [getattr(x, x.d_name) for x in layers_ if isinstance(x, OverParameterized)]


def as_trained(model):
    """Give D of each over-parameterized layer values as after training; return the model."""
    rng = np.random.default_rng(7)
    for variable in depthwise(model):
        variable.assign(0.1 * rng.standard_normal(variable.shape))
    return model


def images(shape=SHAPE, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def functional():
    """Return a functional model with branches, operations, two inputs and nested outputs."""
    a, b = keras.Input(SHAPE[1:], name="a"), keras.Input(SHAPE[1:], name="b")
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    x = layers.BatchNormalization(name="norm")(shared(a))
    y = ops.relu(shared(b)) * 2.0 + x
    z = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depthwise")(y)
    w = layers.SeparableConv2D(4, (3, 1), name="separable", use_bias=False)(y)
    w = layers.Lambda(lambda t: t * 0.5, name="half")(w)
    pooled = layers.GlobalAveragePooling2D(name="pool")(z)
    outputs = {"scores": layers.Dense(3, name="head")(pooled), "maps": [w, x]}
    return keras.Model([a, b], outputs, name="two_inputs")


def sequential():
    return keras.Sequential(
        [
            keras.Input(SHAPE[1:]),
            layers.ZeroPadding2D(1, name="pad"),
            layers.Conv2D(4, 3, name="first", use_bias=False),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Conv2D(6, 1, name="pointwise", activation="relu"),
            layers.Conv2D(6, 3, groups=2, name="grouped"),
            layers.Dropout(0.5, name="drop"),
            layers.Flatten(name="flat"),
            layers.Dense(2, name="head"),
        ],
        name="stack",
    )


class Block(layers.Layer):
    """Holds convolutions in every way, and passes no configuration on."""

    def __init__(self, channels, **options):
        super().__init__(**options)
        self.listed = [layers.Conv2D(channels, 3, padding="same", name=f"c{n}") for n in range(2)]
        self.named = {"x": layers.Conv2D(channels, (1, 3), padding="same", name="named")}
        self.pair = (layers.Conv2D(channels, 3, padding="same", name="pair"), "text")
        self.inner = keras.Sequential(
            [
                layers.Conv2D(channels, 3, padding="same", name="conv"),
                layers.BatchNormalization(name="norm"),
            ],
            name="inner",
        )
        self.norm = layers.BatchNormalization(name="norm")
        self.again = self.listed[0]

    def call(self, x, training=None):
        for conv in self.listed:
            x = conv(x)
        x = self.again(x) + self.named["x"](x) + self.pair[0](x)
        return self.norm(self.inner(x, training=training), training=training)


class Net(keras.Model):
    """A subclassed model around blocks, a functional model and wrappers."""

    def __init__(self):
        super().__init__(name="net")
        self.stem = layers.Conv2D(4, 3, padding="same", name="stem")
        self.blocks = [Block(4, name="block")]
        inputs = keras.Input((9, 9, 4))
        x = layers.Conv2D(5, 3, name="conv")(inputs)
        self.features = keras.Model(
            inputs, layers.BatchNormalization(name="bn")(x), name="features"
        )
        self.rows = layers.TimeDistributed(layers.Conv1D(3, 3, name="row"), name="rows")
        self.drop = layers.Dropout(0.5, name="drop")
        self.head = layers.Dense(2, name="head")

    def call(self, x, training=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, training=training)
        x = self.rows(self.features(x, training=training))
        return self.head(ops.mean(self.drop(x, training=training), axis=(1, 2)))


def subclassed():
    model = Net()
    model(images())
    return model


def nested():
    """Return a functional model around functional, sequential and subclassed ones, one shared."""
    inputs = keras.Input(SHAPE[1:])
    inner_inputs = keras.Input(SHAPE[1:], name="inner_inputs")
    siamese = keras.Model(
        inner_inputs, layers.Conv2D(3, 3, padding="same", name="conv")(inner_inputs), name="siamese"
    )
    x = siamese(siamese(inputs)) + inputs
    x = keras.Sequential([layers.Conv2D(4, 3, name="conv", padding="same")], name="stack")(x)
    x = Block(4, name="block")(x)
    x = layers.Reshape((9, 4), name="flat")(layers.AveragePooling2D(3, name="pool")(x))
    x = layers.Bidirectional(layers.SimpleRNN(2, name="rnn"), name="both")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="nested")


KINDS = {
    "functional": functional, "sequential": sequential, "subclassed": subclassed, "nested": nested,
}  # fmt: skip


EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def inputs_of(kind):
    return [images(seed=1), images(seed=2)] if kind == "functional" else images()


def over_parameterized(kind):
    model, _ = over_parameterize(filled(KINDS[kind]()), depth_multiplier=10)
    return as_trained(model)


def traces(model):
    """Return what of this package the attributes of the model's layers hold, by type or name."""
    found = []
    for _, layer in walk(model):
        for name, value in vars(layer).items():
            if "doconv" in repr(type(value)) + type(layer).__module__ + name:
                found.append((layer, name))
    return found


def assert_equal_outputs(a, b, inputs):
    """Assert that called, in training and by predict, the models give the same bits."""
    assert verify(a, b, inputs).absolute == 0
    results = []
    for model in (a, b):
        before = [array(v).copy() for v in model.weights]
        keras.utils.set_random_seed(0)
        results.append(keras.tree.map_structure(array, model(inputs, training=True)))
        for variable, value in zip(model.weights, before, strict=True):
            variable.assign(value)
    keras.tree.map_structure(np.testing.assert_array_equal, *results)
    keras.tree.map_structure(
        np.testing.assert_array_equal, *(m.predict(inputs, verbose=0) for m in (a, b))
    )
