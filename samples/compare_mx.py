"""The comparison's problem in MXNet Gluon."""

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

from doconv_mx import DOConv2D, export_state, load_state

# isort: split
import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn


class Network(gluon.HybridBlock):
    """The problem's network: `(B, 1, 28, 28)` images to `(B, 10)` logits.

    convolutions: by name. Another set of them, the folded ones, makes the folded network.
    """

    def __init__(self, convolutions: dict[str, nn.HybridBlock], linear: nn.Dense) -> None:
        super().__init__()
        for name, layer in convolutions.items():
            setattr(self, name, layer)
        self.linear = linear

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the logits."""
        for name, *_ in CONVOLUTIONS:
            x = getattr(self, name)(x)
        return self.linear(x)


def network() -> Network:
    """Return the over-parameterized network, initialised to zero."""
    convolutions = {
        name: DOConv2D(
            spec.in_channels, spec.out_channels, spec.kernel_size, stride, padding,
            groups=spec.groups, activation="tanh", depth_multiplier=spec.depth_multiplier,
        )
        for name, spec, stride, padding in CONVOLUTIONS
    }  # fmt: skip
    model = Network(convolutions, nn.Dense(LINEAR.out_features, in_units=LINEAR.in_features))
    model.initialize(mx.init.Zero())
    return model


def fold(model: Network) -> Network:
    """Return the network with ordinary convolutions."""
    return Network({name: getattr(model, name).fold() for name, *_ in CONVOLUTIONS}, model.linear)


def run(problem: Problem, ticks: Any = None) -> Answer:
    """Return MXNet's answer. `ticks` is iterated over, one step of training for each."""
    model = network()
    load_state(model, problem.state)
    images, labels = mx.nd.array(problem.images), mx.nd.array(problem.labels)
    test_images = mx.nd.array(problem.test_images)
    output, folded_output = model(test_images).asnumpy(), fold(model)(test_images).asnumpy()
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    x = images[0]
    x.attach_grad()
    with autograd.record():
        loss = cross_entropy(model(x), labels[0]).mean()
    loss.backward()
    # As the weights of a network of the same kind, the gradients are put in canonical order.
    gradients = network()
    named = gradients._collect_params_with_prefix()
    for name, parameter in model._collect_params_with_prefix().items():
        named[name].set_data(parameter.grad())
    options = {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "wd": WEIGHT_DECAY}
    trainer = gluon.Trainer(model.collect_params(), "sgd", options)
    model.hybridize()
    losses = []
    for step in ticks or range(len(labels)):
        with autograd.record():
            loss = cross_entropy(model(images[step]), labels[step]).mean()
        loss.backward()
        trainer.step(1)
        losses.append(float(loss.asnumpy()[0]))
    return Answer(
        output,
        folded_output,
        x.grad.asnumpy(),
        dict(export_state(gradients).arrays),
        np.array(losses),
        dict(export_state(fold(model)).arrays),
        dict(export_state(model).arrays),
    )
