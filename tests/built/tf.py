"""Networks of Keras, on TensorFlow."""

from __future__ import annotations

from math import prod

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import doconv_tf as package

__all__ = ["empty", "gradients", "inference", "made", "package", "trainable", "training"]


def made(network, **options):
    return package.build(network, **options)


def empty(network):
    """Return the network without values: Keras leaves them until the scope is left, or for good."""
    with keras.StatelessScope(initialize_variables=False):
        return package.build(network)


def trainable(model):
    """Return the number of what is trained."""
    return sum(prod(variable.shape) for variable in model.trainable_variables)


def inference(model, x):
    return _first(ops.convert_to_numpy(model(_last(x), training=False)))


def training(model, x, dy):
    return gradients(model, x, dy, training=True)


def gradients(model, x, dy, *, training):
    """Return the output, and the gradients of `sum(output · dy)`, as a state's."""
    with tf.GradientTape() as tape:
        output = model(_last(x), training=training)
        total = tf.reduce_sum(output * _last(dy))
    found = tape.gradient(total, [each.value for each in model.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, found, strict=True):
        variable.assign(gradient)
    return _first(ops.convert_to_numpy(output)), package.export_state(model).arrays


def _last(array):
    return np.moveaxis(array, 1, -1).copy()


def _first(array):
    return np.moveaxis(array, -1, 1)
