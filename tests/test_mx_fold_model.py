"""Folding whole Gluon models."""

from __future__ import annotations

import pytest
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, fold, over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import equal, image, trained  # noqa: E402
from gluon_models import (  # noqa: E402
    HYBRIDIZED,
    INPLACE,
    MULTIPLIERS,
    Listed,
    Residual,
    built,
    chain,
    moved,
    outputs,
    square,
)
from mxnet import gluon  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402


def over_parameterized(model=None, multiplier=None, **options):
    """Return a model that has been over-parameterized and trained, so to speak."""
    model = built(model, **options)
    return moved(over_parameterize(model, depth_multiplier=multiplier, inplace=True).model)


def traces(model):
    """Return what is left of this package in a model: in its blocks, parameters and names."""
    found = []
    for block in blocks(model):
        own = [type(block), *map(type, block._reg_params.values())]
        found += [cls for cls in own if "doconv" in cls.__module__]
        found += [name for name in vars(block) if name in ("_outline", "_composed")]
    names = [*model.collect_params().keys(), *model._collect_params_with_prefix()]
    return found + [name for name in names if "depthwise" in name]


def blocks(model):
    found = []
    model.apply(found.append)
    return found


def test_layers_given_as_do_conv_are_folded_wherever_they_stand():
    net = nn.Sequential()
    net.add(DOConv2D(4, 6, 3), Listed(), nn.Activation("relu"))
    net[1].first = DOConv2D(6, 4, 3, padding=1)
    net[1]._named = {"first": net[1].first}
    model = built(net)
    moved(model)
    folded, report = fold(model)
    assert [c.path for c in report.changed] == ["0", "1.first"]
    assert folded[1]._named["first"] is folded[1].first
    assert same(outputs(folded), outputs(model))
    layer = trained()
    root = fold(layer).model
    assert type(root) is nn.Conv2D
    assert equal(root(image()), layer(image()))


def test_a_layer_of_one_tap_is_folded_too():
    layer = DOConv2D(4, 4, 1)
    model = built(chain(layer, nn.Conv2D(4, 1, in_channels=4, params=layer.params), square()))
    before = outputs(model)
    folded = fold(model).model
    assert [type(block) for block in folded] == [nn.Conv2D] * 3
    assert folded[0].weight is folded[1].weight
    assert not traces(folded)
    assert same(outputs(folded), before)


def test_weights_in_use_outside_of_the_model_are_not_touched():
    layer = trained()
    other = DOConv2D(4, 6, 3, padding=1, groups=2, params=layer.params)
    before = outputs(other)
    fold(chain(layer), inplace=True)
    assert same(outputs(other), before)


@INPLACE
def test_hooks_and_settings_survive(inplace):
    contexts, seen = [mx.cpu(0), mx.cpu(1)], []
    model = over_parameterized(ctx=contexts, dtype="float64")
    model.conv1.register_forward_hook(lambda block, inputs, output: seen.append(block))
    model.conv1.weight.grad_req = model.conv1.depthwise_weight.grad_req = "null"
    model.head.weight.grad_req, model.head.weight.wd_mult = "null", 2.0
    expected = [outputs(model, image(dtype="float64").as_in_context(c)) for c in contexts]
    folded = fold(model, inplace=inplace).model
    requests = [layer.weight.grad_req for layer in (folded.conv1, folded.head, folded.body[0])]
    assert requests == ["null", "write", "write"]
    assert folded.head.weight.wd_mult == 2.0
    del seen[:]
    for context, output in zip(contexts, expected, strict=True):
        assert same(outputs(folded, image(dtype="float64").as_in_context(context)), output)
    assert seen == [folded.conv1] * 2


@pytest.mark.parametrize("initialized", [False, True], ids=["built", "initialized"])
@MULTIPLIERS
def test_a_model_without_values_is_folded_to_one_without_values(initialized, multiplier):
    model = over_parameterize(Residual(), depth_multiplier=multiplier).model
    if initialized:
        model.initialize(mx.init.Normal(0.3))
    folded = fold(model).model
    assert not traces(folded)
    if not initialized:
        folded.initialize(mx.init.Normal(0.3))
    plain = Residual()
    plain.initialize(mx.init.Normal(0.3))
    found = []
    for net in (folded, plain):
        mx.random.seed(0)
        found.append(outputs(net))
    assert same(*found)


def test_a_weight_shared_without_d_is_refused():
    first = DOConv2D(4, 4, 3, padding=1)
    params = gluon.ParameterDict(first.params.prefix)
    params.update({first.weight.name: first.weight})
    model = built(chain(first, nn.Conv2D(4, 3, in_channels=4, use_bias=False, params=params)))
    with pytest.raises(NotFoldable, match=r"layer '0': it shares W, 'conv\d+_weight', with a "):
        fold(model)


def test_values_that_are_there_in_part_are_refused():
    model = chain(DOConv2D(0, 4, 3))
    model.initialize()
    model[0].depthwise_weight.set_data(mx.nd.ones((4, 9, 9)))
    with pytest.raises(
        ValueError, match=r"'0': DOConv2D.fold needs the values of 'conv\d+_weight'"
    ):
        fold(model)
    with pytest.raises(ValueError, match=r"the model itself: DOConv2D.fold needs the values of '"):
        fold(model[0])
    with pytest.raises(TypeError, match=r"model must be a mxnet\.gluon\.Block; received builtins"):
        fold("model")


@MULTIPLIERS
@HYBRIDIZED
def test_numpy_arrays_of_mxnet(multiplier, hybridized):
    mx.npx.set_np()
    try:
        model = chain(nn.Conv2D(6, 3), nn.BatchNorm(), nn.Conv2D(3, 3))
        model.initialize()
        model.hybridize(hybridized)
        x = mx.np.ones((2, 4, 7, 8))
        model(x).wait_to_read()
        target = over_parameterize(model, depth_multiplier=multiplier).model
        for parameter in target.collect_params(".*depthwise_weight").values():
            parameter.set_data(0.1 * mx.np.ones(parameter.shape))
        folded = fold(target).model
        assert same(outputs(folded, x), outputs(target, x))
        fused, report = fold(target, fuse_batchnorm=True)
        assert report.left == ()
        assert close(outputs(fused, x), outputs(target, x))
        assert verify(fused, target, x).relative <= 1e-5
    finally:
        mx.npx.reset_np()
