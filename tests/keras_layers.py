"""What the tests of the Keras layers share; to import after `need("tf")`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from equal import assert_same
from keras import layers, ops

from doconv_tf import DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv2D

__all__ = ["assert_same"]  # as other tests take it from here

BACKEND = keras.backend.backend()
PAIRS = [
    (DOConv1D, layers.Conv1D),
    (DOConv2D, layers.Conv2D),
    (DOConv3D, layers.Conv3D),
    (DODepthwiseConv2D, layers.DepthwiseConv2D),
]
EACH = pytest.mark.parametrize(("do_conv", "conv"), PAIRS, ids=["1d", "2d", "3d", "depthwise"])
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 12, 18, 19])
SHAPE = (2, 7, 8, 4)


def arguments(do_conv, **options):
    """Return arguments that a layer of any of the classes takes, for 4 channels of input."""
    if do_conv in (DODepthwiseConv2D, layers.DepthwiseConv2D):
        return {"depth_multiplier": 2, **options}
    return {"filters": 6, "groups": 2, **options}


def with_multiplier(do_conv, multiplier):
    name = "d_multiplier" if do_conv is DODepthwiseConv2D else "depth_multiplier"
    return {name: multiplier}


def random_values(layer, seed=0):
    """Give every variable of the layer random values, as after training; return the layer."""
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(0.3 * rng.standard_normal(variable.shape))
    return layer


def trained(multiplier=None, **options):
    layer = DOConv2D(6, 3, padding="same", groups=2, depth_multiplier=multiplier, **options)
    layer.build(SHAPE)
    return random_values(layer)


def image(shape=SHAPE, dtype="float32"):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def shape_for(do_conv):
    return (2, *[5] * {DOConv1D: 1, DOConv3D: 3}.get(do_conv, 2), 4)


def array(values):
    return ops.convert_to_numpy(values)


@keras.saving.register_keras_serializable(package="doconv_tests")
class Subclassed(keras.Model):
    """A model whose layers Keras finds by attribute, where their class does not matter."""

    def __init__(self, convolution):
        super().__init__()
        self.first, self.pool, self.last = convolution, layers.Flatten(), layers.Dense(3)

    def build(self, input_shape):
        if not self.first.built:
            self.first.build(input_shape)
        self.last.build((None, 6 * 7 * 8))

    def call(self, x):
        return self.last(self.pool(self.first(x)))

    def get_config(self):
        return {"convolution": keras.saving.serialize_keras_object(self.first)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["convolution"]))


def model_of(kind, first):
    """Return a built model of the kind around a convolution that keeps the image's size."""
    if kind == "subclassed":
        model = Subclassed(first)
        model.build(SHAPE)
        return model
    rest = [layers.Flatten(name="flat"), layers.Dense(3, name="last")]
    inputs = keras.Input(SHAPE[1:])
    if kind == "sequential":
        return keras.Sequential([inputs, first, *rest])
    return keras.Model(inputs, rest[1](rest[0](first(inputs))))


def stored(layer, **changes):
    store = {}
    layer.save_own_variables(store)
    store = {**{name: array(value) for name, value in store.items()}, **changes}
    return {name: value for name, value in store.items() if value is not None}


def shifted_relu(x):
    """An activation that Keras cannot find again by name."""
    return ops.relu(x) + 1
