"""A Keras model for tests of its files, with numbers by formula."""

from __future__ import annotations

import keras
from checkpoint_files import numbers

from doconv_tf import DOConv2D, DODepthwiseConv2D

IMAGE = (8, 8, 3)


def randomized(model):
    """Give every weight numbers, D's and the statistics of batch norms too."""
    for seed, weight in enumerate(model.weights):
        values = numbers(*weight.shape, seed=seed)
        weight.assign(values + 1.5 if "variance" in weight.path else values)
    return model


def functional(conv=DOConv2D, depthwise=DODepthwiseConv2D, **options):
    """A model with ordinary and over-parameterized layers in turn, nested, shared and grouped."""
    inputs = keras.Input(IMAGE)
    x = conv(4, 3, padding="same", name="first")(inputs)
    x = keras.layers.Conv2D(4, 1)(x)
    x = conv(4, 3, padding="same", groups=2, **options)(x)
    x = keras.layers.BatchNormalization()(x)
    shared = conv(4, 3, padding="same", activation="relu")
    x = shared(shared(x))
    x = depthwise(3, depth_multiplier=2, name="spread")(x)
    inner = [conv(2, 1), keras.layers.Conv2D(2, 3), conv(2, 2, use_bias=False)]
    x = keras.Sequential(inner, name="inner")(x)
    x = keras.layers.Dense(3)(keras.layers.Flatten()(x))
    return randomized(keras.Model(inputs, x))


def images(count=2):
    return numbers(count, *IMAGE)
