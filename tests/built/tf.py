"""Networks of Keras, on TensorFlow."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from keras import ops

import doconv_tf as package

__all__ = ["inference", "made", "package", "training"]


def made(network, **options):
    return package.build(network, **options)


def inference(model, x):
    return _first(ops.convert_to_numpy(model(_last(x), training=False)))


def training(model, x, dy):
    """Return the output in training, and the gradients of `sum(output · dy)`, as a state's."""
    with tf.GradientTape() as tape:
        output = model(_last(x), training=True)
        total = tf.reduce_sum(output * _last(dy))
    gradients = tape.gradient(total, [each.value for each in model.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        variable.assign(gradient)
    return _first(ops.convert_to_numpy(output)), package.export_state(model).arrays


def _last(array):
    return np.moveaxis(array, 1, -1).copy()


def _first(array):
    return np.moveaxis(array, -1, 1)
