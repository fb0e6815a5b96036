"""Comparing whole Gluon models."""

from __future__ import annotations

import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import equal, image  # noqa: E402
from gluon_models import Residual, built, chain  # noqa: E402
from mxnet.gluon import nn  # noqa: E402


def test_what_cannot_be_called_is_refused():
    message = r"b must be a mxnet\.gluon\.Block or another callable; received NoneType"
    with pytest.raises(TypeError, match=message):
        verify(nn.Activation("relu"), None, mx.nd.ones(2))


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
    with pytest.raises(
        ValueError,
        match=r"given as 'a' had no values for 'residual\d+_conv0_weight'",
    ):
        verify(model, over_parameterize(model).model, image())
