"""BSConv layers and their loss in Gluon: what the contract does not ask."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from contract_bsconv import check_refused, in_form
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
import doconv_mx  # noqa: E402
from doconv_mx import (  # noqa: E402
    BSConvS1D,
    BSConvS2D,
    BSConvU2D,
    BSConvU3D,
    mark_orthonormal,
    orthonormality_loss,
)

# isort: split
import mxnet as mx  # noqa: E402
from adapters.mx import initialized  # noqa: E402
from gluon_layers import array, close, equal  # noqa: E402
from gluon_models import chain  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402

from doconv_core import orthonormality_gradient  # noqa: E402

TWO = [mx.cpu(0), mx.cpu(1)]
BOTH = pytest.mark.parametrize("cls", [BSConvU2D, BSConvS2D])


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
    assert made.bias is None
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
    shapes = last.pointwise.weight.shape, last.depthwise.weight.shape
    assert shapes == ((6, 1, 1, 8), (6, 3, 3, 1))


def test_arguments_that_give_no_layer_are_refused():
    """Those of Gluon alone, and layers without values."""
    layout, channels = "layout must be 'NCHW' or 'NHWC'; received", "channels must be at least 1"
    unknown = "in_channels of a BSConvS2D must be given: the channels between .* in_channels=0"
    empty, needs = BSConvS2D(8, 6, 3), "{} needs the values of .*, which has none".format
    check_refused(
        (lambda: BSConvU2D(8, 6, 3, layout="NCW"), ValueError, layout),
        (lambda: BSConvS2D(0, 6, 3), ValueError, unknown),
        (lambda: BSConvU2D(8, 0, 3), ValueError, channels),
        (BSConvU2D(8, 6, 3).composed_kernel, ValueError, needs("composed_kernel")),
        (empty.composed_kernel, ValueError, needs("composed_kernel")),
        (lambda: empty.fold(**in_form("dense")), ValueError, needs("BSConvS2D.fold")),
        (lambda: BSConvU2D.from_conv(nn.Conv2D(4, 3)), ValueError, needs("BSConvU2D.from_conv")),
        (lambda: orthonormality_loss(empty), ValueError, needs("orthonormality_loss")),
        (lambda: mark_orthonormal(nn.Conv2DTranspose(2, 1)), TypeError, "rec.* Conv2DTransp"),
    )


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
def test_shared_parameters(cls, with_bn):
    made = layer(cls, with_bn=with_bn)
    shared = cls(8, 6, 3, padding=1, with_bn=with_bn, params=made.collect_params())
    assert shared.depthwise.weight is made.depthwise.weight
    assert shared.spec == made.spec
    assert equal(shared(x()), made(x()))


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
def test_channels_last_kernels_are_the_others_transposed(cls):
    first, last = layer(cls), layer(cls, layout="NHWC")
    doconv_mx.load_state(last, doconv_mx.export_state(first))
    for kernels in (
        [each.composed_kernel() for each in (first, last)],
        [each.fold(**in_form("dense")).weight.data() for each in (first, last)],
    ):
        assert close(kernels[1].transpose((0, 3, 1, 2)), kernels[0])


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_folding_keeps_what_is_not_the_function(form):
    made = layer(dtype="float64", ctx=TWO, activation="relu", prefix="a_")
    made.collect_params().setattr("grad_req", "null")
    made.hybridize(static_alloc=True)
    folded = made.fold(**in_form(form))
    parameters = folded.collect_params().values()
    kept = {(p.dtype, p.grad_req, len(p.list_ctx())) for p in parameters}
    assert kept == {("float64", "null", 2)}
    assert all(p.name.startswith("a_") for p in parameters)
    assert (folded._active, dict(folded._flags)["static_alloc"]) == (True, True)
    for ctx in TWO:
        inputs = x("float64").as_in_context(ctx)
        expected = made(inputs).asnumpy()
        assert expected.min() == 0
        np.testing.assert_allclose(folded(inputs).asnumpy(), expected, rtol=1e-12, atol=1e-12)


def test_batch_norms_of_every_kind_merge():
    for options in ({"scale": False}, {"center": False}, {"use_global_stats": True}):
        made = layer(with_bn=True, bn_options=options)
        for norm in (made.batch_norm1, made.batch_norm2):
            norm.running_mean.set_data(mx.nd.random.normal(shape=norm.running_mean.shape))
            norm.gamma.set_data(3 * mx.nd.ones(norm.gamma.shape))  # of no meaning without scale
        assert close(made.fold(**in_form("merge"))(x()), made(x())), options


@pytest.mark.parametrize("with_bn", [False, True])
def test_from_conv_keeps_contexts_names_and_factors(with_bn):
    conv = layer(BSConvU3D, ctx=TWO).fold(**in_form("dense"))
    conv.weight.lr_mult = 3
    options = {"with_bn": with_bn, "bn_options": {"epsilon": 1e-9} if with_bn else {}}
    found = BSConvU3D.from_conv(conv, **options)
    weight = found.pointwise.weight
    assert (weight.lr_mult, weight.list_ctx(), found.prefix) == (3, TWO, conv.prefix)
    for ctx in TWO:
        inputs = mx.nd.random.normal(shape=(1, 8, 4, 4, 4), ctx=ctx)
        assert close(found(inputs), conv(inputs))


# The loss.


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


def test_the_loss_has_the_widest_dtype():
    model = two()
    model[0].cast("float64")
    assert orthonormality_loss(model).dtype == np.float64


def test_each_context_has_a_loss_of_its_own_copies():
    model = two(TWO)
    model[0].pointwise1.weight.data(TWO[1])[:] = 0
    losses = [orthonormality_loss(model, ctx=ctx) for ctx in (None, *TWO)]
    assert [loss.context for loss in losses] == [TWO[0], *TWO]
    assert equal(losses[0], losses[1])
    assert losses[2].asscalar() != losses[1].asscalar()
    with pytest.raises(ValueError, match=r"ctx must be a context that has the values of 'bsconvs2"):
        orthonormality_loss(model, ctx=mx.cpu(3))


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
