"""What the tests of the Gluon layers share; to import after `need("mx")`."""

from __future__ import annotations

import numpy as np
import pytest
from equal import close
from equal import same as equal

# Before MXNet, which it makes importable.
from doconv_mx import DOConv1D, DOConv2D, DOConv3D

# isort: split
import mxnet as mx
from mxnet.gluon import nn

__all__ = ["close", "equal"]  # as other tests take them from here

PAIRS = [(DOConv1D, nn.Conv1D), (DOConv2D, nn.Conv2D), (DOConv3D, nn.Conv3D)]
RANKED = pytest.mark.parametrize(("do_conv", "conv"), PAIRS, ids=["1d", "2d", "3d"])
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 12, 18, 19])
IN_CHANNELS = pytest.mark.parametrize("in_channels", [4, 0], ids=["given", "deferred"])


def array(values):
    return mx.nd.from_numpy(np.array(values, order="C"))  # mx.nd.array has SciPy warn


def image(*shape, dtype="float32"):
    return array(np.random.default_rng(1).standard_normal(shape or (2, 4, 7, 8)).astype(dtype))


def random_d(layer, scale=0.3):
    """Give the layer a D that is not zero, as after training."""
    rng = np.random.default_rng(0)
    layer.depthwise_weight.set_data(scale * rng.standard_normal(layer.depthwise_weight.shape))
    return layer


def trained(multiplier=None, groups=2, dtype="float32", ctx=None, **options):
    options = {"padding": 1, "groups": groups, "depth_multiplier": multiplier, **options}
    layer = DOConv2D(4, 6, 3, **options)
    layer.cast(dtype)
    layer.initialize(mx.init.Normal(0.5), ctx=ctx)
    return random_d(layer)


def ordinary(cls=nn.Conv2D, kernel=3, **options):
    layer = cls(6, kernel, in_channels=4, **{"groups": 2, **options})
    layer.initialize(mx.init.Normal(0.5))
    return layer
