"""BSConv layers and their loss in Gluon: what the contract does not ask."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
import doconv_mx  # noqa: E402
from doconv_mx import (  # noqa: E402
    BSConvS,
    BSConvS1D,
    BSConvS2D,
    BSConvU,
    BSConvU2D,
    BSConvU3D,
    DOConv2D,
    get_model,
    mark_orthonormal,
    orthonormality_loss,
    over_parameterize,
)

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import array, close, equal  # noqa: E402
from gluon_models import chain  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402

from doconv_core import NotFoldable, orthonormality, orthonormality_gradient  # noqa: E402
from doconv_mx.surgery import copied  # noqa: E402

BOTH = pytest.mark.parametrize("cls", [BSConvU2D, BSConvS2D])
TWO = [mx.cpu(0), mx.cpu(1)]


def initialized(block, dtype="float32", ctx=None):
    mx.random.seed(0)
    block.cast(dtype)
    block.initialize(mx.init.Normal(0.5), ctx=ctx)
    return block


def layer(cls=BSConvS2D, dtype="float32", ctx=None, **options):
    return initialized(cls(8, 6, 3, padding=1, **options), dtype, ctx)


def x(dtype="float32"):
    return array(np.random.default_rng(1).standard_normal((2, 8, 7, 7)).astype(dtype))


def two(ctx=None):
    pair = BSConvS2D(8, 8, 3, padding=1), BSConvS2D(8, 4, 3)
    return initialized(chain(pair[0], nn.Activation("relu"), pair[1]), ctx=ctx)


def matrix(parameter):
    values = parameter.data(parameter.list_ctx()[0]).asnumpy()
    return values.reshape(len(values), -1)


def expected_loss(*layers):
    return sum(orthonormality(matrix(each.pointwise1.weight)) for each in layers)


def convolved(inputs, kernel, bias, **options):
    size, channels = kernel.shape[2:], kernel.shape[0]
    return mx.nd.Convolution(inputs, kernel, bias, kernel=size, num_filter=channels, **options)


def test_the_layer_takes_the_place_of_the_ordinary_one():
    arguments = ((3, 5), (2, 1), (1, 2), (1, 1), 1, "NCHW", "relu", False)
    made, plain = BSConvU2D(8, 6, *arguments), nn.Conv2D(6, *arguments, in_channels=8)
    names = list(inspect.signature(nn.Conv2D).parameters)
    names = ["in_channels", *(n for n in names if n not in ("in_channels", "kwargs"))]
    keywords = ["prefix", "params", "with_bn", "bn_options"]
    assert list(inspect.signature(BSConvU2D).parameters) == [*names, *keywords]
    assert made.depthwise._kwargs | {"num_group": 1} == plain._kwargs
    for block in (made, plain):
        initialized(block)
    assert made(x()).shape == plain(x()).shape
    assert made(x()).asnumpy().min() == 0  # activated
    assert (made.bias, BSConvU, BSConvS) == (None, BSConvU2D, BSConvS2D)
    assert isinstance(made[0], nn.Conv2D)
    assert list(made[:1]._children) == ["pointwise"]
    assert type(made[:1]) is nn.HybridSequential


def test_parts_have_the_options_of_their_layer():
    options = {"epsilon": 0.1, "momentum": 0.3, "use_global_stats": True}
    made = layer(with_bn=True, p=0.5, bn_options=options, prefix="a_", dtype="float64")
    names = ["pointwise1", "batch_norm1", "pointwise2", "batch_norm2", "depthwise"]
    assert list(made._children) == names
    norm = made.batch_norm2._kwargs
    assert (norm["eps"], norm["momentum"], norm["use_global_stats"]) == (0.1, 0.3, True)
    assert made.pointwise1.weight.shape[0] == 4
    parameters = made.collect_params()
    assert {p.dtype for p in parameters.values()} == {"float64"}
    assert {"a_pointwise1_weight", "a_depthwise_bias"} < set(parameters)
    last = BSConvU2D(8, 6, 3, layout="NHWC", with_bn=True)
    assert last.batch_norm._kwargs["axis"] == 3
    assert (last.pointwise.weight.shape, last.depthwise.weight.shape) == (
        (6, 1, 1, 8),
        (6, 3, 3, 1),
    )


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (BSConvU2D, {"groups": 2}, ValueError, "BSConvU2D takes groups=1 alone.*groups=2"),
        (BSConvS2D, {"p": 0}, ValueError, "p must be above 0 and at most 1; received p=0"),
        (BSConvS2D, {"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        (BSConvU2D, {"strides": 0}, ValueError, "strides must be at least 1"),
        (BSConvU2D, {"padding": -1}, ValueError, "padding must be at least 0"),
        (BSConvU2D, {"layout": "NCW"}, ValueError, "layout must be 'NCHW' or 'NHWC'; received"),
        (BSConvU2D, {"with_bn": None}, TypeError, "with_bn must be True or False"),
        (BSConvU2D, {"bn_options": {"scale": 0}}, ValueError, "give with_bn=True as well"),
        (
            BSConvU2D,
            {"with_bn": True, "bn_options": {"eps": 1}},
            TypeError,
            "bn_options may have momentum, epsilon.*received 'eps'",
        ),
        (
            BSConvS2D,
            {"in_channels": 0},
            ValueError,
            "in_channels of a BSConvS2D must be given: the channels between .* in_channels=0",
        ),
        (BSConvU2D, {"channels": 0}, ValueError, "channels must be at least 1"),
    ],
)
def test_arguments_that_give_no_layer_are_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(**{"in_channels": 8, "channels": 6, "kernel_size": 3, **options})


@pytest.mark.parametrize("hybridized", [False, True])
def test_input_channels_are_inferred(hybridized):
    made = initialized(BSConvU2D(0, 6, 3, padding=1, with_bn=True))
    with pytest.raises(ValueError, match=r"in_channels of layer .* is not known yet; pass it, or"):
        _ = made.spec
    made.hybridize(hybridized)
    assert made(x()).asnumpy().shape == (2, 6, 7, 7)
    assert made.spec == BSConvU2D(8, 6, 3, with_bn=True).spec


@BOTH
@pytest.mark.parametrize("with_bn", [False, True])
def test_files_copies_and_shared_parameters(cls, with_bn, tmp_path):
    made, file = layer(cls, with_bn=with_bn), str(tmp_path / "layer.params")
    made.save_parameters(file)
    loaded = cls(8, 6, 3, padding=1, with_bn=with_bn)
    loaded.load_parameters(file)
    shared = cls(8, 6, 3, padding=1, with_bn=with_bn, params=made.collect_params())
    assert shared.depthwise.weight is made.depthwise.weight
    for other in (copied(made), loaded, shared):
        assert type(other) is cls
        assert other.spec == made.spec
        assert equal(other(x()), made(x()))


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
@pytest.mark.parametrize("flags", [{}, {"static_alloc": True, "static_shape": True}])
def test_hybridized_and_exported(flags, tmp_path):
    made = layer(with_bn=True)
    expected, file = made(x()), str(tmp_path / "net")
    made.hybridize(**flags)
    assert close(made(x()), expected)
    made.export(file)
    block = SymbolBlock.imports(f"{file}-symbol.json", ["data"], f"{file}-0000.params")
    assert close(block(x()), expected)


@BOTH
def test_the_composed_kernel_is_that_of_the_layer_and_has_its_gradients(cls):
    made = layer(cls)
    made(x())  # MXNet may keep weights in an order of its own from now on
    weights = [p for p in made.collect_params().values() if p.name.endswith("weight")]
    found = []
    for by_kernel in (True, False):
        with autograd.record():
            if by_kernel:
                y = convolved(x(), made.composed_kernel(), made.bias.data(), pad=(1, 1))
            else:
                y = made(x())
            loss = (y**2).sum()
        loss.backward()
        found.append([y.asnumpy(), *(weight.grad().asnumpy() for weight in weights)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    with pytest.raises(NotFoldable, match="with batch norms is no mere kernel; fold"):
        layer(cls, with_bn=True).composed_kernel()
    with pytest.raises(ValueError, match=r"composed_kernel needs the values of .*, which has none"):
        cls(8, 6, 3).composed_kernel()


@BOTH
def test_half_is_composed_and_folded_with_one_rounding(cls):
    made = layer(cls, "float16")
    exact = copied(made)
    exact.cast("float64")
    expected = exact.composed_kernel().asnumpy()
    kernel = made.fold(form="dense").weight.data()
    assert kernel.dtype == made.composed_kernel().dtype == np.float16
    np.testing.assert_array_equal(kernel.asnumpy(), expected.astype(np.float16))
    np.testing.assert_allclose(made.composed_kernel().asnumpy(), expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_channels_last_kernels_are_the_others_transposed(cls):
    first, last = layer(cls), layer(cls, layout="NHWC")
    values = doconv_mx.export_state(first)
    doconv_mx.load_state(last, values)
    for kernels in (
        [each.composed_kernel() for each in (first, last)],
        [each.fold(form="dense").weight.data() for each in (first, last)],
    ):
        assert close(kernels[1].transpose((0, 3, 1, 2)), kernels[0])


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_folding_keeps_what_is_not_the_function(form):
    made = layer(dtype="float64", ctx=TWO, activation="relu", prefix="a_")
    made.collect_params().setattr("grad_req", "null")
    made.hybridize(static_alloc=True)
    folded = made.fold(form=form)
    parameters = folded.collect_params().values()
    assert {(p.dtype, p.grad_req, len(p.list_ctx())) for p in parameters} == {
        ("float64", "null", 2)
    }
    assert all(p.name.startswith("a_") for p in parameters)
    assert (folded._active, dict(folded._flags)["static_alloc"]) == (True, True)
    for ctx in TWO:
        inputs = x("float64").as_in_context(ctx)
        expected = made(inputs).asnumpy()
        assert expected.min() == 0
        np.testing.assert_allclose(folded(inputs).asnumpy(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"BSConvS2D.fold needs the values of .*, which has none"):
        BSConvS2D(8, 6, 3).fold(form="dense")


def test_batch_norms_of_every_kind_merge():
    for options in ({"scale": False}, {"center": False}, {"use_global_stats": True}):
        made = layer(with_bn=True, bn_options=options)
        for norm in (made.batch_norm1, made.batch_norm2):
            norm.running_mean.set_data(mx.nd.random.normal(shape=norm.running_mean.shape))
            norm.gamma.set_data(3 * mx.nd.ones(norm.gamma.shape))  # of no meaning without scale
        assert close(made.fold(form="merge")(x()), made(x()))


def hooked(made):
    made.pointwise1.register_forward_hook(lambda *_: None)


def subclassed(made):
    made.register_child(type("Own", (nn.Conv2D,), {})(6, 3, groups=6, in_channels=6), "depthwise")
    vars(made)["depthwise"] = made._children["depthwise"]


def renamed(made):
    made.add(nn.Activation("relu"))


def exchanged(name, *arguments, **options):
    def change(made):
        conv = nn.Conv2D(*arguments, in_channels=8 if name == "pointwise1" else 6, **options)
        setattr(made, name, initialized(conv))

    return change


def own_forward(made):
    made.forward = made.forward


def other_axis(made):
    made.batch_norm1 = nn.BatchNorm(axis=2, in_channels=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "its pointwise1 has hooks, which would see other values; remove them first"),
        (subclassed, "its depthwise cannot be folded: it is a Own; expected a mxnet.gluon.nn.Conv"),
        (renamed, "its parts are pointwise1, batch_norm1, .*; expected pointwise1"),
        (exchanged("pointwise1", 4, 1, 2), "its pointwise1 is no pointwise convolution of stride"),
        (exchanged("pointwise1", 4, 3), "its pointwise1 is no pointwise convolution of stride 1"),
        (
            exchanged("pointwise1", 4, 1, activation="relu"),
            "its pointwise1 is no pointwise convolution",
        ),
        (
            exchanged("pointwise1", 4, 1, layout="NHWC"),
            "its pointwise1 cannot be folded: its layout is NHWC; expected .* of layout NCHW",
        ),
        (exchanged("depthwise", 6, 3), "its depthwise is no depthwise convolution"),
        (own_forward, "has a forward of its own"),
        (other_axis, "its batch_norm1 cannot be folded: normalizes another axis"),
        (lambda made: made.depthwise.register_forward_hook(print), "its depthwise has hooks"),
    ],
)
def test_what_may_compute_something_else_is_not_folded(change, message):
    made = layer(with_bn=True)
    change(made)
    with pytest.raises(NotFoldable, match=message):
        made.fold(form="dense")


def test_folding_says_which_forms_there_are():
    with pytest.raises(ValueError, match="form must be one of 'keep', 'merge', 'dense'"):
        layer().fold(form="deploy")
    with pytest.raises(NotFoldable, match=r"meets zero padding .* use form='merge'"):
        layer(with_bn=True).fold(form="dense")


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_the_depthwise_part_may_be_a_do_layer(form):
    made = over_parameterize(layer()).model
    assert type(made.depthwise) is DOConv2D
    d = made.depthwise.depthwise_weight
    d.set_data(0.1 * mx.nd.random.normal(shape=d.shape))
    expected = made(x())
    assert close(convolved(x(), made.composed_kernel(), made.bias.data(), pad=(1, 1)), expected)
    folded, found = made.fold(form=form), []
    folded.apply(lambda block: found.append(type(block)))
    assert not any("doconv" in cls.__module__ for cls in found)
    assert close(folded(x()), expected)


def test_from_conv_says_what_it_takes():
    with pytest.raises(TypeError, match=r"BSConvU2D.from_conv takes over a mxnet.gluon.nn.Conv2D"):
        BSConvU2D.from_conv(nn.Conv1D(4, 3))
    with pytest.raises(ValueError, match=r"takes groups=1 alone.*received groups=2"):
        BSConvU2D.from_conv(initialized(nn.Conv2D(4, 3, groups=2, in_channels=4)))
    with pytest.raises(ValueError, match="start must be one of 'weights', 'random'"):
        BSConvU2D.from_conv(nn.Conv2D(4, 3), start="zeros")
    with pytest.raises(
        ValueError, match=r"BSConvU2D.from_conv needs the values of .* has none yet"
    ):
        BSConvU2D.from_conv(nn.Conv2D(4, 3))


@pytest.mark.parametrize("with_bn", [False, True])
def test_from_conv_starts_from_the_weights(with_bn):
    conv = layer(BSConvU3D, ctx=TWO).fold(form="dense")
    conv.weight.lr_mult = 3
    options = {"with_bn": with_bn, "bn_options": {"epsilon": 1e-9} if with_bn else {}}
    found = BSConvU3D.from_conv(conv, **options)
    assert found.explained == pytest.approx(1)
    weight = found.pointwise.weight
    assert (weight.lr_mult, weight.list_ctx(), found.prefix) == (3, TWO, conv.prefix)
    for ctx in TWO:
        inputs = mx.nd.random.normal(shape=(1, 8, 4, 4, 4), ctx=ctx)
        assert close(found(inputs), conv(inputs))
    assert BSConvU3D.from_conv(conv, start="random").explained is None


def test_the_loss_and_its_gradient_are_the_cores():
    model = two()
    with autograd.record():
        loss = orthonormality_loss(model, alpha=0.5)
    assert loss.asscalar() == pytest.approx(0.5 * expected_loss(model[0], model[2]), rel=1e-6)
    loss.backward()
    weight = model[0].pointwise1.weight
    gradient = 0.5 * orthonormality_gradient(matrix(weight))
    found = weight.grad().asnumpy().reshape(gradient.shape)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-6)
    assert not model[0].pointwise2.weight.grad().asnumpy().any()


def test_the_gradient_of_orthonormal_rows_is_zero():
    made = layer()
    made.pointwise1.weight.set_data(mx.nd.eye(4, 8).reshape((4, 8, 1, 1)))
    with autograd.record():
        loss = orthonormality_loss(made)
    loss.backward()
    assert loss.asscalar() == 0
    np.testing.assert_array_equal(made.pointwise1.weight.grad().asnumpy(), 0)


@pytest.mark.parametrize("hybridized", [False, True])
@pytest.mark.parametrize("contexts", [TWO[:1], TWO])
def test_the_loss_counts_once_beside_that_of_the_outputs(hybridized, contexts):
    """However many samples and contexts there are, a step of the trainer has its gradient once."""
    steps = []
    for alpha in (0, 1):
        model = two(contexts)
        model.hybridize(hybridized)
        before = matrix(model[0].pointwise1.weight)
        trainer = Trainer(model.collect_params(), "sgd", {"learning_rate": 1})
        losses = []
        with autograd.record():
            for ctx in contexts:
                each = model(x().as_in_context(ctx)).mean(axis=(1, 2, 3))  # one for each sample
                losses.append(each + orthonormality_loss(model, alpha, ctx=ctx))
        autograd.backward(losses)
        trainer.step(2 * len(contexts))
        steps.append(before - matrix(model[0].pointwise1.weight))
    difference = steps[1] - steps[0]
    np.testing.assert_allclose(difference, orthonormality_gradient(before), rtol=1e-4, atol=1e-5)


def test_each_context_has_a_loss_of_its_own_copies():
    model = two(TWO)
    model[0].pointwise1.weight.data(TWO[1])[:] = 0
    losses = [orthonormality_loss(model, ctx=ctx) for ctx in (None, *TWO)]
    assert [loss.context for loss in losses] == [TWO[0], *TWO]
    assert equal(losses[0], losses[1])
    assert losses[2].asscalar() != losses[1].asscalar()
    with pytest.raises(ValueError, match=r"ctx must be a context that has the values of 'bsconvs2"):
        orthonormality_loss(model, ctx=mx.cpu(3))


def test_the_loss_is_computed_in_float32_at_least():
    half = two()
    half.cast("float16")
    found = orthonormality_loss(half)
    half.cast("float32")
    assert found.dtype == np.float32
    assert equal(found, orthonormality_loss(half))
    half[0].cast("float64")
    assert orthonormality_loss(half).dtype == np.float64


def test_marked_convolutions_count_once_wherever_they_are():
    linear = mark_orthonormal(initialized(nn.Conv2D(4, 1, use_bias=False, in_channels=6)))
    model = chain(linear, linear, initialized(nn.Conv2D(4, 1, in_channels=4)))
    expected = orthonormality(matrix(linear.weight))
    assert orthonormality_loss(model, 1).asscalar() == pytest.approx(expected, rel=1e-6)
    assert equal(orthonormality_loss(copied(model)), orthonormality_loss(model))
    pair = two()
    both = chain(pair, linear)
    mark_orthonormal(pair[0].pointwise1)  # which counts already
    assert close(orthonormality_loss(both), orthonormality_loss(pair) + orthonormality_loss(linear))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: orthonormality_loss(nn.Conv2D(4, 1)), ValueError, "the Conv2D has no weight"),
        (lambda: orthonormality_loss(layer(BSConvU2D)), ValueError, "neither a BSConvS1D, BSC"),
        (lambda: orthonormality_loss([]), TypeError, "must be a mxnet.gluon.Block; received"),
        (lambda: orthonormality_loss(two(), "1"), TypeError, "alpha must be a number; received"),
        (lambda: orthonormality_loss(two(), float("inf")), ValueError, "alpha must be finite"),
        (
            lambda: orthonormality_loss(BSConvS2D(8, 6, 3)),
            ValueError,
            "orthonormality_loss needs the values of .*, which has none yet",
        ),
        (lambda: mark_orthonormal(nn.Dense(2)), TypeError, "takes a convolution; received Dense"),
        (lambda: mark_orthonormal(nn.Conv2DTranspose(2, 1)), TypeError, "received Conv2DTransp"),
        (lambda: mark_orthonormal(nn.Conv2D(4, 3)), ValueError, r"kernel_size=\(3, 3\)"),
        (lambda: mark_orthonormal(nn.Conv1D(4, 1, groups=2)), ValueError, "received .*groups=2"),
    ],
)
def test_what_has_no_loss_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("alpha", [0.1, 0])
def test_training_with_the_loss_makes_the_rows_orthonormal(alpha):
    model = initialized(chain(BSConvS1D(8, 6, 3, p=0.5, with_bn=True), BSConvS1D(6, 4, 3, p=0.5)))
    model.hybridize()
    rng = np.random.default_rng(0)
    inputs, target = (
        array(rng.standard_normal(shape).astype("float32")) for shape in ((16, 8, 9), (16, 4, 5))
    )
    trainer = Trainer(model.collect_params(), "sgd", {"learning_rate": 0.2})
    for step in range(240):
        trainer.set_learning_rate(0.1 * (1 + np.cos(np.pi * step / 240)))
        with autograd.record():
            loss = ((model(inputs) - target) ** 2).mean() + orthonormality_loss(model, alpha)
        loss.backward()
        trainer.step(1)
    for trained in model:
        w = matrix(trained.pointwise1.weight)
        off = np.abs(w @ w.T - np.eye(len(w))).max()
        assert off <= 1e-5 if alpha else off > 0.5


@pytest.mark.parametrize("cls", [BSConvS1D, BSConvU3D])
@pytest.mark.parametrize("hybridized", [False, True])
def test_batch_norms_of_other_ranks_train(cls, hybridized):
    """As ordinary ones behind convolutions of 8 channels do not, on the CPU."""
    model = initialized(cls(8, 8, 3, padding=1, with_bn=True))
    model.hybridize(hybridized)
    with autograd.record():
        loss = (model(mx.nd.random.normal(shape=(2, 8, *[5] * cls.rank))) ** 2).sum()
    loss.backward()
    for parameter in model.collect_params(".*(weight|gamma)").values():
        assert parameter.grad().asnumpy().any()


def test_a_network_by_name_has_the_loss_of_its_linear_convolutions():
    model = get_model("cifar_mobilenetv2_w1d4_bsconvs_p1d6", num_classes=5)
    found = []
    model.apply(lambda block: found.append(block) if getattr(block, "orthonormal", 0) else None)
    assert len(found) == 17
    expected = sum(orthonormality(matrix(conv.weight)) for conv in found)
    assert orthonormality_loss(model, 1).asscalar() == pytest.approx(expected, rel=1e-5)


def test_the_package_has_every_name():
    assert {"BSConvU", "BSConvS", "to_bsconv", "mark_orthonormal"} <= set(doconv_mx.__all__)
