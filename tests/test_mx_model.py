"""Over-parameterizing and folding whole Gluon models."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, fold, over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import image, ordinary, trained  # noqa: E402
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
    step,
)
from mxnet import autograd, gluon  # noqa: E402
from mxnet.gluon import nn  # noqa: E402
from mxnet.gluon.contrib.cnn import DeformableConvolution  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.report import NOT_PLAIN  # noqa: E402

BOTH = pytest.mark.parametrize(
    ("hybridized", "multiplier"), [(False, None), (True, 12)], ids=["eager-S=M", "hybridized-S=12"]
)
WAYS = pytest.mark.parametrize(
    ("inplace", "multiplier"), [(False, 12), (True, None)], ids=["copy-S=12", "inplace-S=M"]
)


@WAYS
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_weights_that_mxnet_has_rearranged_in_inference(groups, inplace, multiplier):
    """For a depthwise convolution of 8 channels it does so in a way that few operators can read."""
    layer, x = nn.Conv2D(8, 3, groups=groups, in_channels=8), image(2, 8, 16, 16)
    layer.initialize()
    before = outputs(layer, x)
    target = over_parameterize(layer, depth_multiplier=multiplier, inplace=inplace).model
    assert close(outputs(target, x), before)


@pytest.mark.parametrize("flags", [{}, {"static_alloc": True, "static_shape": True}])
def test_a_network_that_has_run_compiled_is_compiled_anew(flags):
    model = built(hybridized=True)
    model.hybridize(**flags)
    before = outputs(model)
    target = over_parameterize(model, inplace=True).model
    assert target._active
    assert target.conv1._flags == target._flags
    assert dict(target._flags).get("static_alloc", False) == bool(flags)
    assert same(outputs(target), before)
    moved(target)
    assert not close(outputs(target), before)


@BOTH
def test_a_copy_is_apart_from_the_original(hybridized, multiplier):
    model, before = built(hybridized=hybridized), built(hybridized=hybridized)
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9})
    for each in (model, before):
        step(each)
    kept = {name: parameter for name, parameter in model.collect_params().items()}
    target = over_parameterize(model, depth_multiplier=multiplier).model
    assert [type(b) for b in (model.conv1, model.body[0], model.head)] == [nn.Conv2D] * 3
    assert all(p._trainer is None for p in target.collect_params().values())
    new = gluon.Trainer(target.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9})
    expected = outputs(model)
    for _ in range(2):
        step(target)
        new.step(2)
    assert all(p.data().asnumpy().any() for p in target.collect_params(".*depthwise_.*").values())
    assert model.collect_params()._params == kept
    assert same(outputs(model), expected)
    for each in (model, before):
        step(each)
    trainer.step(2)
    assert not close(outputs(model), expected)
    assert same(step(model)[:1], step(model)[:1])


def test_a_trainer_keeps_the_weights_of_a_model_changed_in_place():
    model = built()
    weight, bias = model.head.weight, model.head.bias
    weight.grad_req = "add"
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 0.1})
    over_parameterize(model, inplace=True)
    assert (model.head.weight, model.head.bias) == (weight, bias)
    before = weight.data().asnumpy()
    step(model)
    with pytest.warns(UserWarning, match="a Trainer takes steps that was made before") as warned:
        trainer.step(2)
    assert len(warned) == 1, "not of every layer"
    assert not np.array_equal(weight.data().asnumpy(), before)


def test_a_converted_convolution_tells_its_depth_multiplier():
    for inplace in (False, True):
        layer = over_parameterize(ordinary(nn.Conv2D, 2, activation="relu"), inplace=inplace).model
        assert "depth_multiplier=" in repr(layer)


@BOTH
def test_numpy_arrays_of_mxnet(multiplier, hybridized):
    mx.npx.set_np()
    try:
        model = chain(nn.Conv2D(6, 3), nn.BatchNorm(), nn.Conv2D(3, 3))
        model.initialize()
        model.hybridize(hybridized)
        x = mx.np.ones((2, 4, 7, 8))
        before = outputs(model, x)
        target = over_parameterize(model, depth_multiplier=multiplier).model
        assert close(outputs(target, x), before)
        for parameter in target.collect_params(".*depthwise_weight").values():
            parameter.set_data(0.5 * mx.np.ones(parameter.shape))
        assert not close(outputs(target, x), before)
        assert same(outputs(fold(target).model, x), outputs(target, x))
        fused, report = fold(target, fuse_batchnorm=True)
        assert report.left == ()
        assert close(outputs(fused, x), outputs(target, x))
        assert verify(fused, target, x).relative <= 1e-5
        with autograd.record():
            total = (target(x) ** 2).sum()
        total.backward()
        assert target[0].depthwise_weight.grad().asnumpy().any()
    finally:
        mx.npx.reset_np()


@WAYS
def test_hooks_and_what_is_set_on_layers_and_parameters_are_kept(inplace, multiplier):
    contexts, seen = [mx.cpu(0), mx.cpu(1)], []
    model = built(ctx=contexts, dtype="float64")
    xs = [image(dtype="float64").as_in_context(context) for context in contexts]
    before = [outputs(model, x) for x in xs]
    model.conv1.weight.grad_req, model.head.weight.grad_req = "null", "add"
    model.head.weight.lr_mult, model.head.weight.wd_mult = 0.5, 2.0
    model.conv1.note = "kept"
    model.head.register_forward_hook(lambda block, inputs, output: seen.append((block, output)))
    handle = model.head.register_forward_pre_hook(lambda block, inputs: seen.append(block))
    model.register_op_hook(lambda name, array: seen.append(name))
    target = over_parameterize(model, depth_multiplier=multiplier, inplace=inplace).model
    for layer, request in ((target.conv1, "null"), (target.head, "add")):
        for parameter in (layer.weight, layer.depthwise_weight):
            assert parameter.grad_req == request
            assert np.dtype(parameter.dtype) == np.float64
            assert parameter.list_ctx() == contexts
    d = target.head.depthwise_weight
    assert (d.lr_mult, d.wd_mult) == (0.5, 2.0)
    assert target.conv1.note == "kept"
    for x, expected in zip(xs, before, strict=True):
        del seen[:]
        found = outputs(target, x)
        assert close(found, expected)
        assert [block for block in seen if isinstance(block, DOConv2D)] == [target.head] * 2
        shapes = [output.shape for _, output in (each for each in seen if type(each) is tuple)]
        assert shapes == [each.shape for each in found]
    moved(target)
    expected = [outputs(target, x) for x in xs]
    target.head.weight.grad_req = "null"
    folded = fold(target, inplace=inplace).model
    requests = [layer.weight.grad_req for layer in (folded.conv1, folded.head, folded.body[0])]
    assert requests == ["null", "add", "write"]  # the head's D is trained
    assert folded.head.weight.wd_mult == 2.0
    del seen[:]
    assert all(same(outputs(folded, x), each) for x, each in zip(xs, expected, strict=True))
    assert [block for block in seen if isinstance(block, nn.Conv2D)] == [folded.head] * 4
    if inplace:
        handle.detach()
        del seen[:]
        outputs(folded, xs[0])
        assert len(seen) == 2


@pytest.mark.parametrize("initialized", [False, True], ids=["built", "initialized"])
@HYBRIDIZED
def test_a_model_without_values_gets_those_of_its_seed(initialized, hybridized):
    ways = {
        "plain": lambda net: net,
        "more": lambda net: over_parameterize(net).model,
        "folded": lambda net: fold(over_parameterize(net).model).model,
        "folded-12": lambda net: fold(over_parameterize(net, depth_multiplier=12).model).model,
    }
    nets, found = {}, {}
    for way, changed in ways.items():
        net = Residual()
        mx.random.seed(3)
        if initialized:
            net.initialize(mx.init.Xavier())
        net = nets[way] = changed(net)
        if not initialized:
            net.initialize(mx.init.Xavier())
        net.hybridize(hybridized)
        found[way] = step(net)
        assert same(found[way], found["plain"]), way
        if "folded" in way:
            assert not traces(net)
    net = nets["more"]
    assert len(over_parameterize(Residual()).report.changed) == 3
    assert net.head.spec.in_channels == 6
    assert not net.head.depthwise_weight.data().asnumpy().any()
    larger = over_parameterize(Residual(), depth_multiplier=12).model
    larger.initialize(mx.init.Xavier())
    larger.hybridize(hybridized)
    step(larger)
    assert larger.head.weight.shape == (3, 6, 12)


@MULTIPLIERS
def test_data_that_a_layer_was_given_before_its_first_run_is_kept(multiplier):
    model, plain = chain(nn.Conv2D(6, 3)), ordinary(groups=1)
    model.initialize()
    for name in ("weight", "bias"):
        getattr(model[0], name).set_data(getattr(plain, name).data())
    target = over_parameterize(model, depth_multiplier=multiplier).model
    assert close(outputs(target), outputs(plain))


@INPLACE
def test_layers_that_are_called_from_private_containers_are_the_ones_changed(inplace):
    model = built(Listed())
    before = outputs(model)
    target = over_parameterize(model, inplace=inplace).model
    assert same(outputs(target), before)
    moved(target)
    assert not close(outputs(target), before)
    assert target._named["first"] is target.first


@BOTH
def test_an_ordinary_models_file_loads_and_a_file_of_its_own(multiplier, hybridized, tmp_path):
    plain, file = built(), str(tmp_path / "file")
    plain.save_parameters(file)
    model = over_parameterize(built(hybridized=hybridized), depth_multiplier=multiplier).model
    expected = outputs(moved(model))
    model.save_parameters(str(tmp_path / "own"))
    model.load_parameters(file, allow_missing=True)
    assert close(outputs(model), outputs(plain))
    model.load_parameters(str(tmp_path / "own"))
    assert same(outputs(model), expected)


class Gamma(gluon.Parameter):
    """A parameter of another kind."""


def with_own_parameter():
    layer = nn.Conv2D(4, 3, in_channels=4, prefix="own_")
    layer.weight.__class__ = Gamma
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda: DeformableConvolution(4, 3, in_channels=4),
            "another operation than an ordinary convolution",
        ),
        (with_own_parameter, NOT_PLAIN),
    ],
    ids=["deformable", "parameter"],
)
def test_what_is_no_ordinary_convolution_is_left_and_reported(layer, reason):
    model = built(chain(square(), layer()))
    before = outputs(model)
    kind = type(model[1])
    target, report = over_parameterize(model)
    assert type(target[1]) is kind
    assert report.left == (("1", kind.__name__, reason),)
    assert [c.path for c in report.changed] == ["0"]
    assert same(outputs(target), before)


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
    assert same(root(image()), layer(image()))


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
    with pytest.raises(TypeError, match=r"model must be a mxnet\.gluon\.Block; received str"):
        fold("model")


@pytest.mark.parametrize("made", ["before", "after", "for both"])
def test_a_trainer_that_does_not_know_the_new_parameters_is_warned_of(made):
    model = built(square())

    def trainer(parameters):
        return mx.gluon.Trainer(parameters, "sgd", {"learning_rate": 0.1}, kvstore=None)

    trained = trainer(model.collect_params())
    over_parameterize(model, inplace=True)
    if made == "after":
        trained = trainer(model.collect_params())
    elif made == "for both":
        other = trainer([model.depthwise_weight])
    warned = pytest.warns(UserWarning, match="made before .* does not have '.*depthwise_weight'")
    for expected in (warned if made == "before" else nullcontext(), nullcontext()):  # once
        with autograd.record():
            loss = (model(image()) ** 2).sum()
        loss.backward()
        with expected:
            trained.step(1)
    assert (model.depthwise_weight.data().asnumpy() != 0).any() == (made == "after")
    if made == "for both":
        other.step(1)
