"""Whole Gluon models and BSConv: what the contract does not ask."""

from __future__ import annotations

from threading import Lock

import numpy as np
import pytest
from contract_bsconv import FORMS, in_form
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import BSConvS2D, BSConvU2D, fold, to_bsconv, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from adapters.mx import Doubled  # noqa: E402
from gluon_layers import array  # noqa: E402
from gluon_models import built, chain, square, trained_statistics  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import HybridBlock, Trainer, nn  # noqa: E402
from mxnet.gluon.nn.basic_layers import _BatchNorm  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_core.kinds.bsconv import SHARES  # noqa: E402
from doconv_mx.bsconv import IN_A_SYMBOL  # noqa: E402
from doconv_mx.tree import walk  # noqa: E402

TWO = [mx.cpu(0), mx.cpu(1)]


class Net(HybridBlock):
    """A block with attributes, a container, batch norms, strides, activations and groups."""

    def __init__(self, **options):
        super().__init__(**options)
        with self.name_scope():
            self.stem = nn.Conv2D(8, 3, strides=2, in_channels=4, activation="relu")
            self.body = nn.HybridSequential()
            with self.body.name_scope():
                self.body.add(
                    nn.Conv2D(8, 3, padding=1, use_bias=False, in_channels=8),
                    nn.BatchNorm(in_channels=8),
                    nn.Conv2D(8, 3, padding=1, groups=2, in_channels=8),
                )
            self.head = nn.Conv2D(5, 5, padding=2, in_channels=8)

    def hybrid_forward(self, F, x):
        x = self.stem(x)
        return self.head(x + self.body(x))


def network(dtype="float64", ctx=None, model=None):
    model = model or Net()
    mx.random.seed(0)
    model.cast(dtype)
    model.initialize(mx.init.Normal(0.3), ctx=ctx)
    trained_statistics(model)
    return model


def converted(variant="u", model=None, **options):
    mx.random.seed(4)
    return to_bsconv(model or network(), variant, **options).model


def kinds(model):
    return {path: type(block).__name__ for path, block in walk(model)}


def images(dtype="float64", ctx=None):
    values = np.random.default_rng(1).standard_normal((2, 4, 9, 10)).astype(dtype)
    return array(values) if ctx is None else array(values).as_in_context(ctx)


def test_the_layer_keeps_what_is_not_its_weight(tmp_path):
    model, seen = network(ctx=TWO), []
    model.hybridize()
    model(images())
    conv, bias, names = model.stem, model.stem.bias, set(model.collect_params())
    conv.tag = "mine"
    model.hybridize(False)
    conv.register_forward_hook(lambda *_: seen.append(1))
    conv.weight.grad_req, conv.weight.wd_mult = "null", 0
    to_bsconv(model, inplace=True)
    made = model.stem
    assert (made is conv, made.tag, type(made)) == (True, "mine", BSConvU2D)
    assert made.bias is bias
    assert {p.grad_req for p in made.collect_params(".*weight").values()} == {"null"}
    assert {p.wd_mult for p in made.collect_params(".*weight").values()} == {0}
    assert bias.grad_req == "write"
    assert made.depthwise._kwargs["stride"] == (2, 2)
    assert (made.depthwise.act._act_type, "weight" in vars(made)) == ("relu", False)
    assert conv.prefix + "pointwise_weight" in set(model.collect_params()) - names
    for ctx in TWO:
        assert model(images(ctx=ctx)).asnumpy().shape == (2, 5, 4, 4)
    assert seen == [1, 1]
    conv._forward_hooks.clear()
    expected, file = model(images()).asnumpy(), str(tmp_path / "net.params")
    model.hybridize()
    np.testing.assert_allclose(model(images()).asnumpy(), expected, rtol=1e-12)
    model.save_parameters(file)
    other = to_bsconv(Net(), start="random").model
    other.cast("float64")
    other.load_parameters(file)
    np.testing.assert_array_equal(other(images()).asnumpy(), expected)


@pytest.mark.parametrize("variant", ["u", "s"])
def test_it_trains_hybridized(variant):
    model = converted(variant, network("float32"), with_bn=True)
    model.hybridize()
    trainer = Trainer(model.collect_params(), "sgd", {"learning_rate": 0.01})
    losses = []
    for _ in range(5):
        with autograd.record():
            loss = (model(images("float32")) ** 2).mean()
        loss.backward()
        trainer.step(1)
        losses.append(loss.asscalar())
    assert losses[-1] < losses[0]


def test_a_network_without_values_gets_them_later():
    model = Net()
    with pytest.raises(ValueError, match=r"layer 'stem': .*from_conv needs the values of"):
        to_bsconv(model)
    report = to_bsconv(model, "s", start="random", inplace=True).report
    assert report.explained == ()
    model.initialize()
    assert model(images("float32")).asnumpy().shape == (2, 5, 4, 4)
    deferred = chain(nn.Conv2D(6, 3), nn.Conv2D(6, 3))
    deferred.initialize(mx.init.One())
    with pytest.raises(ValueError, match=r"layer '0': in_channels of a BSConvS2D must be given"):
        to_bsconv(deferred, "s", start="random")
    made = to_bsconv(deferred, start="random", with_bn=True).model
    made.hybridize()
    made(images("float32")).wait_to_read()
    assert (made[0].pointwise.weight.data().asnumpy() == 1).all()
    kept, report = fold(to_bsconv(deferred, start="random").model)
    assert [change.after for change in report.changed] == ["HybridSequential"] * 2
    assert kept(images("float32")).asnumpy().shape == (2, 6, 5, 6)


def test_dtypes_are_kept():
    for dtype in ("float64", "float32", "float16"):
        for start in ("weights", "random"):
            made, report = to_bsconv(network(dtype), with_bn=True, start=start)
            found = made.stem.collect_params(".*weight|.*bias").values()
            assert {np.dtype(p.dtype).name for p in found} == {dtype}
            gamma = made.stem.batch_norm.gamma
            norm = "float32" if dtype == "float16" else dtype  # as Gluon casts batch norms
            assert np.dtype(gamma.dtype).name == norm
            assert gamma.data().asnumpy().min() == 1, dtype
            assert bool(report.explained) == (start == "weights"), start


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
def test_what_is_in_a_symbol_or_shared_is_left():
    def left(model):
        return {entry.path: entry.reason for entry in to_bsconv(model).report.left}

    symbol = mx.sym.Convolution(mx.sym.var("data"), name="c", kernel=(3, 3), num_filter=4)
    block = mx.gluon.SymbolBlock(symbol, mx.sym.var("data"))
    with pytest.warns(UserWarning, match="the model has no convolution that could be replaced"):
        assert left(chain(block))["0."] == IN_A_SYMBOL
    first = nn.Conv2D(4, 3, in_channels=4)
    second = nn.Conv2D(4, 3, in_channels=4, params=first.params)
    assert left(network(model=chain(first, second, square()))) == {"0": SHARES, "1": SHARES}
    shared = nn.Conv2D(4, 3, in_channels=4)
    model, report = to_bsconv(network(model=chain(shared, shared)))
    assert (model[0] is model[1], len(report.changed)) == (True, 1)


def test_hybridized_models_fold_and_keep_their_parameters():
    for variant in "us":
        for form in FORMS:
            model = converted(variant)
            model.hybridize()
            expected, parameters = model(images()).asnumpy(), set(model.collect_params())
            for inplace in (False, True):
                folded, _ = fold(model, **in_form(form), inplace=inplace)
                assert form != "keep" or set(folded.collect_params()) == parameters
                for _ in range(2):
                    found = folded(images()).asnumpy()
                    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
                    folded.hybridize(False)


def test_each_context_keeps_its_own_statistics():
    model = converted("s", network(ctx=TWO), with_bn=True)
    trained_statistics(model)
    for _, block in walk(model):
        if isinstance(block, _BatchNorm):
            block.running_mean.data(TWO[1])[:] = 0.25
    merged = fold(model, **in_form("merge")).model
    fused = fold(model, fuse_batchnorm=True).model
    both = fold(model, fuse_batchnorm=True, **in_form("merge")).model
    assert "BatchNorm" not in kinds(both).values()
    for ctx in TWO:
        for found in (merged, fused, both):
            assert verify(found, model, images(ctx=ctx)).relative <= 1e-12
    model, report = fold(converted("u"), fuse_batchnorm=True, **in_form("dense"))
    assert report.left == ()  # a batch norm behind a dense one is fused
    assert kinds(model)["body.1"] == "Dropout"
    assert verify(model, converted("u"), images()).relative <= 1e-12


def test_exchanged_parts_are_kept_and_not_folded():
    model = network("float32", model=chain(BSConvU2D(4, 4, 3)))
    model[0].depthwise = nn.Conv2D(4, 3, in_channels=4)
    vars(model[0])["depthwise"] = model[0]._children["depthwise"] = nn.AvgPool2D(3)
    kept, report = fold(model)
    assert verify(kept, model, images("float32")).absolute == 0
    assert [change.after for change in report.changed] == ["HybridSequential"]
    with pytest.raises(NotFoldable, match="its depthwise cannot be folded: it is a AvgPool2D"):
        fold(model, **in_form("dense"))
    with pytest.raises(NotFoldable, match=r"Doubled has a forward of its own"):
        Doubled(4, 4, 3).fold()


def test_tied_weights_and_a_model_that_is_the_layer_fold():
    first = BSConvS2D(4, 4, 3)
    model = network(model=chain(first, BSConvS2D(4, 4, 3, params=first.collect_params())))
    model.hybridize()
    sole = network(model=BSConvS2D(4, 4, 3))
    for form in FORMS:
        folded = fold(model, **in_form(form)).model
        assert verify(folded, model, images()).relative <= 1e-12, form
        tied = form == "keep" and folded[0].pointwise1.weight is folded[1].pointwise1.weight
        assert tied == (form == "keep")
        alone = fold(sole, **in_form(form)).model
        assert verify(alone, sole, images()).relative <= 1e-12, form
    conv = network(model=nn.Conv2D(4, 3, in_channels=4))
    assert type(to_bsconv(conv, inplace=True).model) is type(conv) is BSConvU2D


def test_a_layer_folds_apart_from_the_network_that_it_was_made_in():
    class Locked(nn.HybridSequential):
        lock = None

    model = Locked()
    model.lock = Lock()  # which cannot be copied
    with model.name_scope():
        model.add(BSConvU2D(4, 4, 3))
    network(model=model)
    folded = model[0].fold()
    assert folded._scope._old_scope is None
    assert verify(folded, model[0], images()).absolute == 0
    assert model[0]._scope._old_scope._block is model


@pytest.mark.parametrize("variant", ["u", "s"])
def test_a_residual_network_of_a_zoo(variant):
    zoo = mx.gluon.model_zoo.vision
    widths = [16, 16, 24, 32, 64]
    model = zoo.ResNetV1(zoo.BasicBlockV1, [2, 2, 2, 2], widths, classes=10, thumbnail=True)
    model = built(model, run=False)
    x = mx.nd.random.normal(shape=(2, 3, 32, 32))
    model(x).wait_to_read()
    made, report = to_bsconv(model, variant, inplace=True)
    assert len(report.changed) == 17
    assert report.parameters_after < 0.25 * report.parameters_before
    for form in FORMS:
        folded = fold(made, fuse_batchnorm=form != "keep", **in_form(form)).model
        assert verify(folded, made, x).relative <= 1e-4, form
