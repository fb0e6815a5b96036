"""Over-parameterizing whole Gluon models."""

from __future__ import annotations

import numpy as np
import pytest
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, over_parameterize  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import image, ordinary  # noqa: E402
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

from doconv_core.models.report import NOT_PLAIN  # noqa: E402


@MULTIPLIERS
@INPLACE
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


@HYBRIDIZED
@MULTIPLIERS
def test_a_copy_is_apart_from_the_original(hybridized, multiplier):
    model, before = built(hybridized=hybridized), built(hybridized=hybridized)
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9})
    step(model)
    step(before)
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
    for m in (model, before):
        step(m)
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
    trainer.step(2)
    assert not np.array_equal(weight.data().asnumpy(), before)


@INPLACE
def test_a_converted_convolution_tells_its_depth_multiplier(inplace):
    layer = over_parameterize(ordinary(nn.Conv2D, 2, activation="relu"), inplace=inplace).model
    assert "depth_multiplier=" in repr(layer)


@MULTIPLIERS
@HYBRIDIZED
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
            parameter.set_data(mx.np.ones(parameter.shape))
        assert not close(outputs(target, x), before)
        with autograd.record():
            total = (target(x) ** 2).sum()
        total.backward()
        assert target[0].depthwise_weight.grad().asnumpy().any()
    finally:
        mx.npx.reset_np()


@MULTIPLIERS
def test_what_is_set_on_layers_and_parameters_is_kept(multiplier):
    contexts = [mx.cpu(0), mx.cpu(1)]
    model = built(ctx=contexts, dtype="float64")
    model.conv1.weight.grad_req, model.head.weight.grad_req = "null", "add"
    model.head.weight.lr_mult, model.head.weight.wd_mult = 0.5, 2.0
    model.conv1.note = "kept"
    target = over_parameterize(model, depth_multiplier=multiplier).model
    for layer, request in ((target.conv1, "null"), (target.head, "add")):
        for parameter in (layer.weight, layer.depthwise_weight):
            assert parameter.grad_req == request
            assert np.dtype(parameter.dtype) == np.float64
            assert parameter.list_ctx() == contexts
    d = target.head.depthwise_weight
    assert (d.lr_mult, d.wd_mult) == (0.5, 2.0)
    assert target.conv1.note == "kept"
    for context in contexts:
        x = image(dtype="float64").as_in_context(context)
        assert close(outputs(target, x), outputs(model, x))


@INPLACE
def test_hooks_survive(inplace):
    model, seen = built(), []
    model.head.register_forward_hook(lambda block, inputs, output: seen.append((block, output)))
    handle = model.head.register_forward_pre_hook(lambda block, inputs: seen.append(block))
    model.register_op_hook(lambda name, array: seen.append(name))
    target = over_parameterize(model, inplace=inplace).model
    x = outputs(target)
    assert [block for block in seen if isinstance(block, DOConv2D)] == [target.head] * 2
    assert [out.asnumpy().shape for _, out in (s for s in seen if type(s) is tuple)] == [
        array.shape for array in x
    ]
    if inplace:
        handle.detach()
        del seen[:]
        outputs(target)
        assert len(seen) == 2


@pytest.mark.parametrize("initialized", [False, True], ids=["built", "initialized"])
@HYBRIDIZED
def test_a_model_without_values_gets_those_of_its_seed(initialized, hybridized):
    nets = []
    for changed in (False, True):
        net = Residual()
        mx.random.seed(3)
        if initialized:
            net.initialize(mx.init.Xavier())
        if changed:
            net, report = over_parameterize(net)
            assert len(report.changed) == 3
        if not initialized:
            net.initialize(mx.init.Xavier())
        net.hybridize(hybridized)
        nets.append((net, step(net)))
    assert same(nets[0][1], nets[1][1])
    net = nets[1][0]
    assert net.head.spec.in_channels == 6
    assert not net.head.depthwise_weight.data().asnumpy().any()


@HYBRIDIZED
def test_a_model_without_values_with_a_larger_depth_multiplier(hybridized):
    model = over_parameterize(Residual(), depth_multiplier=12).model
    model.initialize(mx.init.Xavier())
    model.hybridize(hybridized)
    step(model)
    assert model.head.weight.shape == (3, 6, 12)


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


@MULTIPLIERS
@HYBRIDIZED
def test_an_ordinary_models_file_loads_and_a_file_of_its_own(multiplier, hybridized, tmp_path):
    plain, file = built(), str(tmp_path / "file")
    plain.save_parameters(file)
    model = moved(
        over_parameterize(built(hybridized=hybridized), depth_multiplier=multiplier).model
    )
    expected = outputs(model)
    model.save_parameters(str(tmp_path / "own"))
    model.load_parameters(file, allow_missing=True)
    assert close(outputs(model), outputs(plain))
    model.load_parameters(str(tmp_path / "own"))
    assert same(outputs(model), expected)


OTHER = "another operation than an ordinary convolution"


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
