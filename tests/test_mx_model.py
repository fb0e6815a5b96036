"""Over-parameterizing whole Gluon models."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, over_parameterize  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import PAIRS, equal, image, ordinary  # noqa: E402
from gluon_models import (  # noqa: E402
    CONVOLUTIONS,
    HYBRIDIZED,
    INPLACE,
    MULTIPLIERS,
    Listed,
    Residual,
    alike,
    built,
    chain,
    moved,
    outputs,
    same,
    square,
    step,
)
from mxnet import autograd, gluon  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

from doconv_core import Change  # noqa: E402
from doconv_core.models.report import ONE_TAP  # noqa: E402


def ordinary_names(model):
    """Return the names of a model's parameters, and their paths in its files, without D's."""
    both = model.collect_params().keys(), model._collect_params_with_prefix()
    return [[n for n in names if not n.endswith("depthwise_weight")] for names in both]


@HYBRIDIZED
@INPLACE
def test_the_model_computes_the_same_bits_under_the_same_names(hybridized, inplace):
    model, before = built(hybridized=hybridized), built(hybridized=hybridized)
    names = ordinary_names(model)
    target, report = over_parameterize(model, inplace=inplace)
    assert (target is model) == inplace
    assert [type(b) for b in (target.conv1, target.body[0], target.head)] == [DOConv2D] * 3
    assert type(target.body[1]) is nn.Conv2D
    assert ordinary_names(target) == names
    assert len(target.collect_params().keys()) == len(names[0]) + 3
    for training in (False, True):
        assert same(step(target, training=training), step(before, training=training))
    assert same(outputs(target), outputs(before))
    assert [c.path for c in report.changed] == CONVOLUTIONS
    assert {c[1:] for c in report.changed} == {("Conv2D", "DOConv2D")}
    assert [tuple(left) for left in report.left] == [("body.1", "Conv2D", ONE_TAP)]
    counted = [sum(p.data().size for p in m.collect_params().values()) for m in (before, target)]
    assert [report.parameters_before, report.parameters_after] == counted


@HYBRIDIZED
@INPLACE
def test_a_larger_depth_multiplier_computes_the_same_but_for_rounding(hybridized, inplace):
    model, before = built(hybridized=hybridized), built(hybridized=hybridized)
    target = over_parameterize(model, depth_multiplier=12, inplace=inplace).model
    assert target.conv1.weight.shape == (6, 2, 12)
    assert target.conv1.spec.depth_multiplier == 12
    for training in (False, True):
        assert alike(step(target, training=training), step(before, training=training))
    assert all(p.grad_req == "write" for p in target.collect_params(".*weight").values())


@MULTIPLIERS
@INPLACE
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_weights_that_mxnet_has_rearranged_in_inference(groups, inplace, multiplier):
    """For a depthwise convolution of 8 channels it does so in a way that few operators can read."""
    layer, x = nn.Conv2D(8, 3, groups=groups, in_channels=8), image(2, 8, 16, 16)
    layer.initialize()
    before = outputs(layer, x)
    target = over_parameterize(layer, depth_multiplier=multiplier, inplace=inplace).model
    assert alike(outputs(target, x), before)


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
    assert not alike(outputs(target), before)


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
    assert not alike(outputs(model), expected)
    assert same(step(model)[:1], step(model)[:1])


def test_a_trainer_keeps_the_weights_of_a_model_changed_in_place():
    model = built()
    weight, bias = model.head.weight, model.head.bias
    weight.grad_req = "add"
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 0.1})
    over_parameterize(model, inplace=True)
    assert (model.head.weight, model.head.bias) == (weight, bias)
    before = weight.data().copy()
    step(model)
    trainer.step(2)
    assert not equal(weight.data(), before)


@pytest.mark.parametrize(("do_conv", "conv"), PAIRS, ids=["1d", "2d", "3d"])
@INPLACE
def test_the_model_may_be_a_convolution_itself(do_conv, conv, inplace):
    plain = ordinary(conv, 2, activation="relu")
    x = image(2, 4, *[5] * int(conv.__name__[-2]))
    expected = plain(x)
    layer, report = over_parameterize(plain, inplace=inplace)
    assert type(layer) is do_conv
    assert type(plain) is (do_conv if inplace else conv)
    assert report.changed == (Change("", conv.__name__, do_conv.__name__),)
    assert equal(layer(x), expected)
    assert layer.spec.kernel_size == (2,) * int(conv.__name__[-2])
    assert "depth_multiplier=" in repr(layer)


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
        assert alike(outputs(target, x), outputs(model, x))


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


@HYBRIDIZED
@MULTIPLIERS
@INPLACE
def test_a_layer_in_several_places_stays_one(hybridized, multiplier, inplace):
    layer = square()
    model = built(chain(layer, chain(nn.Activation("relu"), layer)), hybridized)
    before = outputs(model)
    target, report = over_parameterize(model, depth_multiplier=multiplier, inplace=inplace)
    assert target[0] is target[1][1]
    assert [c.path for c in report.changed] == ["0"]
    assert alike(outputs(target), before)
    if inplace:
        assert target[0] is layer


@HYBRIDIZED
@MULTIPLIERS
@INPLACE
def test_tied_weights_stay_tied(hybridized, multiplier, inplace):
    first = square()
    model = built(chain(first, nn.Activation("relu"), square(first.params)), hybridized)
    before = outputs(model)
    target = over_parameterize(model, depth_multiplier=multiplier, inplace=inplace).model
    assert [type(target[i]) for i in (0, 2)] == [DOConv2D] * 2
    for name in ("weight", "bias", "depthwise_weight"):
        assert getattr(target[0], name) is getattr(target[2], name)
    assert alike(outputs(target), before)
    moved(target)
    assert len(target.collect_params().keys()) == 3
    assert equal(target[0].composed_kernel(), target[2].composed_kernel())
    step(target)


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
    assert alike(outputs(target), outputs(plain))


@INPLACE
def test_layers_that_are_called_from_private_containers_are_the_ones_changed(inplace):
    model = built(Listed())
    before = outputs(model)
    target = over_parameterize(model, inplace=inplace).model
    assert same(outputs(target), before)
    moved(target)
    assert not alike(outputs(target), before)
    assert target._named["first"] is target.first


def test_what_is_no_model_or_cannot_be_copied_is_refused():
    with pytest.raises(
        TypeError, match=r"model must be a mxnet\.gluon\.Block; received .*ParameterD"
    ):
        over_parameterize(built().collect_params())
    model = chain(square())
    model.generator = (i for i in range(3))
    with pytest.raises(TypeError, match=r"cannot be copied .*inplace=True the model itself"):
        over_parameterize(model)
    assert over_parameterize(model, inplace=True).report.changed


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
    assert alike(outputs(model), outputs(plain))
    model.load_parameters(str(tmp_path / "own"))
    assert same(outputs(model), expected)


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
        assert alike(outputs(target, x), before)
        for parameter in target.collect_params(".*depthwise_weight").values():
            parameter.set_data(mx.np.ones(parameter.shape))
        assert not alike(outputs(target, x), before)
        with autograd.record():
            total = (target(x) ** 2).sum()
        total.backward()
        assert target[0].depthwise_weight.grad().asnumpy().any()
    finally:
        mx.npx.reset_np()
