"""Folding to Gluon's own layers and taking them over."""

from __future__ import annotations

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
def test_fold_keeps_what_the_layer_was(multiplier):
    layer = trained(multiplier, dtype="float64", activation="tanh")
    layer.hybridize(static_alloc=True)
    layer.weight.wd_mult, layer.bias.lr_mult = 0.5, 2.0
    folded = layer.fold()
    assert type(folded) is nn.Conv2D
    assert (folded.name, folded.weight.name) == (layer.name, layer.weight.name)
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


@pytest.mark.parametrize("multiplier", [None, 19])
@RANKED
def test_from_conv_does_not_change_the_function(do_conv, conv, multiplier):
    rank = int(conv.__name__[-2])
    plain = ordinary(conv, 2, use_bias=False, padding=1, activation="relu")
    plain.hybridize()
    layer = do_conv.from_conv(plain, depth_multiplier=multiplier)
    x = image(2, 4, *[5] * rank)
    assert equal(layer(x), plain(x))
    assert layer.bias is None
    assert layer._active
    assert equal(layer.fold().weight.data(), plain.weight.data())
    layer.weight.set_data(layer.weight.data() * 2)
    assert not equal(layer(x), plain(x))
