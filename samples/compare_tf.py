"""The comparison's problem in Keras on TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
from compare_problem import (
    CONVOLUTIONS,
    LEARNING_RATE,
    LINEAR,
    MOMENTUM,
    WEIGHT_DECAY,
    Answer,
    Problem,
)

from doconv_tf import DOConv2D, export_state, load_state

# isort: split
import keras
import tensorflow as tf


def network() -> keras.Sequential:
    """Return the problem's network: `(B, 28, 28, 1)` images to `(B, 10)` logits."""
    layers = [keras.Input((28, 28, 1))]
    for name, spec, stride, padding in CONVOLUTIONS:
        layer = DOConv2D(
            spec.out_channels, spec.kernel_size, stride, "same" if padding else "valid",
            groups=spec.groups, activation="tanh", name=name,
            depth_multiplier=spec.depth_multiplier,
        )  # fmt: skip
        layers.append(layer)
    layers += [keras.layers.Flatten(), keras.layers.Dense(LINEAR.out_features, name="linear")]
    return keras.Sequential(layers)


def fold(model: keras.Sequential) -> keras.Sequential:
    """Return the network with ordinary convolutions."""
    return keras.Sequential(
        [keras.Input((28, 28, 1))]
        + [layer.fold() if isinstance(layer, DOConv2D) else layer for layer in model.layers]
    )


def run(problem: Problem, ticks: Any = None) -> Answer:
    """Return TensorFlow's answer. `ticks` is iterated over, one step of training for each."""
    model = network()
    load_state(model, problem.state)
    images, labels = tf.constant(np.moveaxis(problem.images, 2, -1)), tf.constant(problem.labels)
    test_images = tf.constant(np.moveaxis(problem.test_images, 1, -1))
    output = model.predict_on_batch(test_images)
    folded_output = fold(model).predict_on_batch(test_images)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    variables = model.trainable_variables

    @tf.function
    def loss_and_gradients(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = cross_entropy(y, model(x, training=True))
        return loss, tape.gradient(loss, [x, *variables])

    _, (dx, *slopes) = loss_and_gradients(images[0], labels[0])
    # As the weights of a network of the same kind, the gradients are put in canonical order.
    gradients = network()
    for variable, slope in zip(gradients.trainable_variables, slopes, strict=True):
        variable.assign(slope)
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    losses = []
    for step in ticks or range(len(labels)):
        loss, (_, *slopes) = loss_and_gradients(images[step], labels[step])
        # An L2 penalty, as the others have it: the optimizer's own weight_decay is another thing,
        # which does not pass through the momentum.
        decayed = [g + WEIGHT_DECAY * v for g, v in zip(slopes, variables, strict=True)]
        optimizer.apply(decayed, variables)
        losses.append(float(loss))
    return Answer(
        output,
        folded_output,
        np.moveaxis(dx.numpy(), -1, 1),
        dict(export_state(gradients).arrays),
        np.array(losses),
        dict(export_state(fold(model)).arrays),
        dict(export_state(model).arrays),
    )
