"""Comparing whole Gluon models."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import equal, image  # noqa: E402
from gluon_models import Residual, built, chain  # noqa: E402
from mxnet import gluon  # noqa: E402
from mxnet.gluon import nn  # noqa: E402


class Nested(gluon.Block):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, y=None):
        y = x if y is None else y
        return {"sum": x + y, "parts": [(x * self.factor,), None]}


def test_verify_compares_every_array_of_nested_outputs():
    x, y = mx.nd.array([1.0, 2.0]), mx.nd.ones(2)
    assert verify(Nested(2), Nested(2), (x, y)) == (0.0, 0.0)
    found = verify(Nested(2), Nested(2.5), (x, y))
    np.testing.assert_allclose(found, (1.0, 0.25))
    with pytest.raises(ValueError, match="the outputs have different structures"):
        verify(Nested(2), nn.Activation("relu"), x)
    with pytest.raises(ValueError, match=r"'sum', 'parts\.0\.0'"):
        verify(nn.Activation("relu"), Nested(2), x)
    with pytest.raises(TypeError, match=r"output 'parts\.1' is a str; expected arrays, nu"):
        verify(Nested(2), lambda x: {"parts": [x, "3"]}, x)
    with pytest.raises(
        TypeError, match=r"b must be a mxnet\.gluon\.Block or another callable; received builtins"
    ):
        verify(Nested(2), None, x)


def test_verify_takes_other_callables_and_numbers():
    x = mx.nd.array([1.0, 2.0])
    assert verify(Nested(2), lambda x: {"sum": 2 * x, "parts": ((2 * x,),)}, x) == (0.0, 0.0)
    assert verify(nn.Activation("relu"), lambda x: x.asnumpy(), x) == (0.0, 0.0)
    pair = [x, mx.nd.ones(2)]  # one argument, unlike a tuple
    assert verify(lambda pair: pair[0] + pair[1], sum, pair) == (0.0, 0.0)
    numbers = lambda x: (3, 2.5, True, np.float32(4))  # noqa: E731
    assert verify(numbers, numbers, x) == (0.0, 0.0)
    assert verify(lambda x: [4.0], lambda x: [mx.nd.array([5.0])[0].asscalar()], x) == (1.0, 0.25)


def test_verify_gives_each_model_inputs_of_its_own():
    def forward(x, states):
        x += 1
        states[0] *= 2
        return x + states[0]

    x, states = mx.nd.ones(2), [mx.nd.ones(2)]
    assert verify(forward, forward, (x, states)) == (0.0, 0.0)
    assert equal(x, mx.nd.ones(2))
    assert equal(states[0], mx.nd.ones(2))


def test_verify_is_in_inference_and_records_nothing():
    model = built(chain(nn.BatchNorm(), nn.Dropout(0.5)))
    with mx.autograd.record():
        assert verify(model, model, image()) == (0.0, 0.0)
        assert mx.autograd.is_training()
    statistics = model[0].running_mean.data().copy()
    verify(model, model, image())
    assert equal(model[0].running_mean.data(), statistics)


def test_verify_refuses_values_that_it_draws_itself():
    model = Residual()
    model.initialize()
    with pytest.raises(ValueError, match=r"a had no values for 'residual\d+_conv0_weight' before"):
        verify(model, over_parameterize(model).model, image())
