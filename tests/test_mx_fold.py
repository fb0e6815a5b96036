"""Folding to Gluon's own layers and taking them over."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import MULTIPLIERS, RANKED, equal, image, ordinary, trained  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402


@MULTIPLIERS
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "depthwise_weight"), ("bias",)])
def test_fold_keeps_what_the_layer_was(multiplier, frozen):
    layer = trained(multiplier, dtype="float64", activation="tanh")
    layer.hybridize(static_alloc=True)
    for name in frozen:
        getattr(layer, name).grad_req = "null"
    layer.weight.wd_mult, layer.bias.lr_mult = 0.5, 2.0
    mx.random.seed(0)
    following = mx.nd.random.uniform(shape=3)
    mx.random.seed(0)
    folded = layer.fold()
    assert equal(mx.nd.random.uniform(shape=3), following)
    assert type(folded) is nn.Conv2D
    assert (folded.name, folded.weight.name) == (layer.name, layer.weight.name)
    assert np.dtype(folded.weight.dtype) == np.float64
    assert (folded.weight.grad_req == "write") == (len(frozen) < 2)
    assert (folded.bias.grad_req == "write") == ("bias" not in frozen)
    assert (folded.weight.wd_mult, folded.bias.lr_mult) == (0.5, 2.0)
    assert folded._active
    assert folded._flags == layer._flags
    x = image(dtype="float64")
    assert equal(folded(x), layer(x))
    with autograd.record():
        assert equal(layer.fold()(x), folded(x))


@pytest.mark.parametrize("multiplier", [None, 12])
def test_fold_and_back_keep_initializers_grad_req_and_backend(multiplier):
    options = {"weight_initializer": mx.init.Uniform(0.3), "bias_initializer": "ones"}
    layer = trained(multiplier, **options)
    layer.collect_params().setattr("grad_req", "add")
    layer.hybridize(backend="MKLDNN")
    folded = layer.fold()
    again = DOConv2D.from_conv(folded, depth_multiplier=multiplier)
    for new in (folded, again):
        assert new.weight.init is options["weight_initializer"]
        assert new.bias.init == "ones"
        assert {p.grad_req for p in new.collect_params().values()} == {"add"}
        assert new._backend == "MKLDNN"
    assert equal(again(image()), folded(image()))


def test_fold_and_back_keep_names_within_any_name_scope():
    layer, net = trained(prefix="layer_", activation="relu"), nn.HybridSequential(prefix="net_")
    with net.name_scope():
        folded = layer.fold()
        again = DOConv2D.from_conv(folded)
        following = nn.Dense(2)
    for new in (folded, again):
        assert (new.prefix, new.name, new.act.prefix) == ("layer_", "layer", "layer_relu_")
        assert new.weight.name == "layer_weight"
        assert new.params.prefix == "layer_"
    assert following.prefix == "net_dense0_"
    assert nn.Dense(2, prefix="alone_").prefix == "alone_"


class Doubled(DOConv2D):
    def hybrid_forward(self, F, x, *args, **kwargs):
        return 2 * super().hybrid_forward(F, x, *args, **kwargs)


class DoubledEagerly(DOConv2D):
    def forward(self, x, *args):
        return 2 * super().forward(x, *args)


class Named(DOConv2D):
    """A subclass that computes the same."""


def test_fold_refuses_what_computes_something_else():
    for cls in (Doubled, DoubledEagerly):
        layer = cls(4, 6, 3)
        layer.initialize()
        with pytest.raises(TypeError, match=rf"{cls.__name__} has a forward of its own, so the co"):
            layer.fold()
    layer = Named(4, 6, 3)
    layer.initialize()
    assert type(layer.fold()) is nn.Conv2D


@RANKED
@MULTIPLIERS
def test_from_conv_does_not_change_the_function(do_conv, conv, multiplier):
    rank = int(conv.__name__[-2])
    plain = ordinary(conv, 2, use_bias=False, padding=1, activation="relu")
    plain.collect_params().setattr("grad_req", "null")
    plain.hybridize()
    layer = do_conv.from_conv(plain, depth_multiplier=multiplier)
    x = image(2, 4, *[5] * rank)
    assert equal(layer(x), plain(x))
    assert layer.bias is None
    assert layer._active
    assert layer.weight.grad_req == layer.depthwise_weight.grad_req == "null"
    assert equal(layer.fold().weight.data(), plain.weight.data())
    layer.weight.set_data(layer.weight.data() * 2)
    assert not equal(layer(x), plain(x))


class Standardised(nn.Conv2D):
    """A convolution that computes something else."""


def test_from_conv_refuses_what_computes_something_else():
    message = r"takes over a mxnet\.gluon\.nn\.Conv2D, exactly; received .*Standardised"
    with pytest.raises(TypeError, match=message):
        DOConv2D.from_conv(Standardised(6, 3))
    with pytest.raises(TypeError, match=r"received doconv_mx\.do_conv\.DOConv2D"):
        DOConv2D.from_conv(trained())
    with pytest.raises(TypeError, match=r"received mxnet\.gluon\.nn\.conv_layers\.Conv1D"):
        DOConv2D.from_conv(ordinary(nn.Conv1D))
    with pytest.raises(ValueError, match="depth_multiplier must be at least"):
        DOConv2D.from_conv(ordinary(), depth_multiplier=8)
