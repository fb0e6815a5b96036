"""The Gluon models that the tests of whole models share; to import after `need("mx")`."""

from __future__ import annotations

import numpy as np
import pytest
from gluon_layers import array, image

# isort: split
import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, nn

HYBRIDIZED = pytest.mark.parametrize("hybridized", [False, True], ids=["eager", "hybridized"])
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 12], ids=["S=M", "S=12"])


class Residual(HybridBlock):
    """A block with attributes, children in a container, a shared head and an activation."""

    def __init__(self, channels=6, head=None, **options):
        super().__init__(**options)
        with self.name_scope():
            self.conv1 = nn.Conv2D(channels, 3, padding=1, groups=2, use_bias=False)
            self.norm = nn.BatchNorm()
            self.body = nn.HybridSequential()
            self.body.add(
                nn.Conv2D(channels, (3, 2), padding=1, activation="relu"),
                nn.Conv2D(channels, 1),
                nn.BatchNorm(),
            )
            self.head = head or nn.Conv2D(3, 3, strides=2, dilation=2, padding=2)

    def hybrid_forward(self, F, x):
        y = self.norm(self.conv1(x))
        return self.head(y), self.head(F.slice_axis(self.body(y), axis=3, begin=1, end=None))


def built(model=None, hybridized=False, ctx=None, dtype="float32", run=True):
    """Return a model with values that are not trivial, the same in every call, after one run."""
    model = model or Residual()
    mx.random.seed(0)
    model.cast(dtype)
    model.initialize(mx.init.Normal(0.3), ctx=ctx)
    model.hybridize(hybridized)
    if run:
        for context in ctx or [mx.cpu()]:
            outputs(model, image(dtype=dtype).as_in_context(context))
        trained_statistics(model)
    return model


def trained_statistics(model):
    """Give a model's batch norms statistics as after training."""
    rng = np.random.default_rng(5)
    for name, parameter in model.collect_params().items():
        if name.endswith(("gamma", "running_var")):
            parameter.set_data(array(rng.uniform(0.5, 1.5, parameter.shape)))
        elif name.endswith(("beta", "running_mean")):
            parameter.set_data(array(rng.normal(0, 0.5, parameter.shape)))


def moved(model, scale=0.2):
    """Give every D of a model values that are not zero, as after training; return the model."""
    rng = np.random.default_rng(7)
    found = model.collect_params(".*depthwise_weight").values()
    assert found
    for parameter in found:
        parameter.set_data(array(scale * rng.standard_normal(parameter.shape)))
    return model


def parts(output):
    """Return the arrays of a nested output."""
    if isinstance(output, (tuple, list)):
        return [array for part in output for array in parts(part)]
    return [output]


def outputs(model, x=None):
    """Return the arrays of a model's output in inference, as NumPy's."""
    return [part.asnumpy() for part in parts(model(image() if x is None else x))]


def step(model, x=None, training=True):
    """Return the outputs of a model and the gradient of their squares in x."""
    x = image() if x is None else x.copy()
    x.attach_grad()
    with autograd.record(train_mode=training):
        found = parts(model(x))
        total = sum((part**2).sum() for part in found)
    total.backward()
    return [part.asnumpy() for part in (*found, x.grad)]


class Listed(Block):
    """A plain block whose forward takes its layers from private containers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2D(4, 3, padding=1), nn.Conv2D(4, 3, padding=1)
        self._named = {"first": self.first}
        self._calls = (self.second.__call__, [lambda x: self._named["first"](x)])

    def forward(self, x):
        return self._calls[0](self._calls[1][0](x))


def chain(*layers):
    net = nn.HybridSequential()
    net.add(*layers)
    return net


def square(params=None, cls=nn.Conv2D, **options):
    """Return a convolution whose output is like its input."""
    return cls(4, 3, padding=1, in_channels=4, params=params, **options)
