"""Whole Gluon models and BSConv: converted, folded, over-parameterized."""

from __future__ import annotations

from threading import Lock

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import (  # noqa: E402
    BSConvS2D,
    BSConvU1D,
    BSConvU2D,
    DOConv2D,
    export_state,
    fold,
    load_state,
    orthonormality_loss,
    over_parameterize,
    to_bsconv,
    verify,
)

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import array  # noqa: E402
from gluon_models import INPLACE, built, chain, trained_statistics  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import HybridBlock, Trainer, nn  # noqa: E402
from mxnet.gluon.nn.basic_layers import _BatchNorm  # noqa: E402

from doconv_core import BSConvReport, Converted, FoldReport, Left, NotFoldable, Report  # noqa: E402
from doconv_core.kinds.bsconv import GROUPED, OVER_PARAMETERIZED, PART, SHARES  # noqa: E402
from doconv_core.models.report import NOT_SELECTED, SUBCLASS  # noqa: E402
from doconv_mx.bsconv_kind import IN_A_SYMBOL  # noqa: E402
from doconv_mx.tree import count, walk  # noqa: E402

FORMS = ["keep", "merge", "dense"]
# What `Net` has that becomes a BSConv.
REPLACED = ["stem", "body.0", "head"]
NOTHING = "the model has no convolution that could be replaced"
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
                    nn.Conv2D(8, (1, 5), padding=(0, 2), in_channels=8),
                )
            self.head = nn.Conv2D(5, 5, padding=2, in_channels=8)

    def hybrid_forward(self, F, x):
        x = self.stem(x)
        return self.head(x + self.body(x))


def images(dtype="float64", ctx=None):
    values = np.random.default_rng(1).standard_normal((2, 4, 9, 10)).astype(dtype)
    return array(values) if ctx is None else array(values).as_in_context(ctx)


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


def at(model, path):
    return dict(walk(model))[path]


def test_the_report_tells_what_was_done():
    original = network()
    result = to_bsconv(original, "s", p=0.5)
    assert type(result) is Converted
    model, report = result
    assert type(report) is BSConvReport
    assert [change.path for change in report.changed] == REPLACED
    assert {change[1:] for change in report.changed} == {("Conv2D", "BSConvS2D")}
    assert [type(at(model, path)) for path in REPLACED] == [BSConvS2D] * 3
    assert (report.parameters_before, report.parameters_after) == (count(original), count(model))
    assert report.parameters_after < report.parameters_before
    assert [path for path, _ in report.explained] == REPLACED
    assert all(0 < share < 1 for _, share in report.explained)
    assert "explained variance of the trained kernels" in str(report)
    assert report.left == (
        Left("body.2", "Conv2D", GROUPED),
        Left("body.3", "Conv2D", "its kernel_size (1, 5) is not among kernel_sizes"),
    )
    assert original.stem.weight.shape == (8, 4, 3, 3)


@pytest.mark.parametrize("variant", ["u", "s"])
@INPLACE
def test_what_is_a_bsconv_already_is_found_again(variant, inplace):
    """A network of dense convolutions that are BSConvs in fact has its outputs unchanged."""
    dense = fold(converted(variant), form="dense").model
    expected, conv = dense(images()).asnumpy(), dense.stem
    model, report = to_bsconv(dense, variant, inplace=inplace)
    assert (model is dense) == inplace
    assert (model.stem is conv) == inplace
    np.testing.assert_allclose(model(images()).asnumpy(), expected, rtol=1e-9, atol=1e-9)
    assert [share for _, share in report.explained] == pytest.approx([1, 1, 1])


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


def test_a_shared_layer_stays_shared():
    conv = nn.Conv2D(4, 3, in_channels=4)
    model, report = to_bsconv(network(model=chain(conv, conv)))
    assert model[0] is model[1]
    assert len(report.changed) == 1


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


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("start", ["weights", "random"])
def test_dtypes_are_kept(dtype, start):
    made, report = to_bsconv(network(dtype), with_bn=True, start=start)
    dtypes = {np.dtype(p.dtype).name for p in made.stem.collect_params(".*weight|.*bias").values()}
    assert dtypes == {dtype}
    norm = "float32" if dtype == "float16" else dtype  # as Gluon casts batch norms
    assert np.dtype(made.stem.batch_norm.gamma.dtype).name == norm
    assert made.stem.batch_norm.gamma.data().asnumpy().min() == 1
    assert bool(report.explained) == (start == "weights")


def left(model, path="0", **options):
    return {entry.path: entry.reason for entry in to_bsconv(model, **options).report.left}[path]


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
def test_what_is_left_has_its_reason():
    with pytest.warns(UserWarning, match=NOTHING):
        assert left(chain(DOConv2D(4, 4, 3))) == OVER_PARAMETERIZED
    with pytest.warns(UserWarning, match=NOTHING):
        assert left(chain(type("Own", (nn.Conv2D,), {})(4, 3))) == SUBCLASS
    with pytest.warns(UserWarning, match=NOTHING):
        assert left(chain(BSConvU2D(1, 1, 3)), "0.depthwise") == PART
    symbol = mx.sym.Convolution(mx.sym.var("data"), name="c", kernel=(3, 3), num_filter=4)
    block = mx.gluon.SymbolBlock(symbol, mx.sym.var("data"))
    with pytest.warns(UserWarning, match=NOTHING):
        assert left(chain(block), "0.") == IN_A_SYMBOL
    first = nn.Conv2D(4, 3, in_channels=4)
    second = nn.Conv2D(4, 3, in_channels=4, params=first.params)
    model = network(model=chain(first, second, nn.Conv2D(4, 3, in_channels=4)))
    assert left(model, "1") == SHARES
    assert left(chain(nn.Conv2D(4, 3), model[2]), where="1") == NOT_SELECTED


def test_ranks_are_chosen_by_kernel_size():
    model = network(model=chain(nn.Conv1D(4, 3, in_channels=4), nn.Conv1D(4, 5, in_channels=4)))
    made = to_bsconv(model, kernel_sizes=(3,)).model
    assert isinstance(made[0], BSConvU1D)
    assert kinds(made)["1"] == "Conv1D"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "x"}, ValueError, "variant must be one of 'u', 's'; received variant='x'"),
        ({"start": "zeros"}, ValueError, "start must be one of 'weights', 'random'"),
        ({"kernel_sizes": 3}, TypeError, "kernel_sizes must be a sequence of kernel sizes"),
        ({"variant": "s", "p": 0}, ValueError, "p must be above 0 and at most 1"),
        ({"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        ({"bn_options": {"epsilon": 1}}, ValueError, "give with_bn=True as well"),
        ({"where": 3}, TypeError, "where must be None, a glob pattern or several"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    model = network()
    before = kinds(model)
    with pytest.raises(error, match=message):
        to_bsconv(model, **options, inplace=True)
    assert kinds(model) == before


def test_a_kernel_that_is_not_finite_is_named_before_anything_is_changed():
    model = network()
    model.head.weight.set_data(mx.nd.full(model.head.weight.shape, np.nan))
    before = kinds(model)
    with pytest.raises(ValueError, match=r"layer 'head': kernel must be finite"):
        to_bsconv(model, inplace=True)
    assert kinds(model) == before
    assert len(to_bsconv(model, start="random").report.changed) == 3


@INPLACE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["u", "s"])
def test_models_fold_in_every_form(variant, form, inplace):
    original = converted(variant)
    original.hybridize()
    expected, stem = original(images()).asnumpy(), original.stem
    parameters = set(original.collect_params())
    model, report = fold(original, form=form, inplace=inplace)
    assert (model.stem is stem) == inplace
    np.testing.assert_allclose(model(images()).asnumpy(), expected, rtol=1e-10, atol=1e-10)
    assert type(report) is FoldReport
    assert [change.path for change in report.changed] == REPLACED
    after = "Conv2D" if form == "dense" else "HybridSequential"
    assert {change[1:] for change in report.changed} == {(f"BSConv{variant.upper()}2D", after)}
    assert not any(type(b).__module__.startswith("doconv") for _, b in walk(model))
    assert form != "keep" or set(model.collect_params()) == parameters
    assert len(report.choices) == 3
    forms = dict(zip(FORMS, report.choices[1].cost, strict=True))
    assert count(model.body[0]) == forms[form].parameters
    assert f"form={form!r}; each form's parameters" in str(report)
    model.hybridize(False)
    np.testing.assert_allclose(model(images()).asnumpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_folding_twice_is_folding_once(form):
    once = fold(converted(), form=form).model
    again, report = fold(once, form=form)
    assert (type(report), report.changed) == (Report, ())
    assert verify(again, once, images()).absolute == 0


def test_merging_folds_batch_norms_that_a_dense_kernel_cannot():
    model = converted("s", network(ctx=TWO), with_bn=True)
    trained_statistics(model)
    for _, block in walk(model):  # in each context its own statistics
        if isinstance(block, _BatchNorm):
            block.running_mean.data(TWO[1])[:] = 0.25
    before = kinds(model)
    with pytest.raises(NotFoldable, match=r"layer 'body.0': .* meets zero padding"):
        fold(model, form="dense", inplace=True)
    assert kinds(model) == before
    merged = fold(model, form="merge").model
    assert list(merged.stem._children) == ["pointwise", "depthwise"]
    fused, report = fold(model, fuse_batchnorm=True)
    assert type(fused.stem.batch_norm1) is nn.Dropout
    assert "stem.batch_norm1" in [change.path for change in report.changed]
    both = fold(model, fuse_batchnorm=True, form="merge").model
    assert "BatchNorm" not in kinds(both).values()
    for ctx in TWO:
        for found in (merged, fused, both):
            assert verify(found, model, images(ctx=ctx)).relative <= 1e-12


def test_a_batch_norm_behind_a_dense_one_is_fused():
    model, report = fold(converted("u"), fuse_batchnorm=True, form="dense")
    assert report.left == ()
    assert kinds(model)["body.1"] == "Dropout"
    assert verify(model, converted("u"), images()).relative <= 1e-12


def test_a_layer_of_ones_own_is_kept_and_not_folded():
    class Own(BSConvU2D):
        def hybrid_forward(self, F, x):
            return 2 * super().hybrid_forward(F, x)

    model = network(model=chain(Own(4, 4, 3)))
    kept, report = fold(model)
    assert type(kept[0]) is Own
    assert report.left == (Left("0", "Own", SUBCLASS),)
    with pytest.raises(NotFoldable, match=r"layer '0': .*Own has a forward of its own"):
        fold(model, form="merge")
    with pytest.raises(NotFoldable, match=r"Own has a forward of its own"):
        model[0].fold()
    with pytest.raises(ValueError, match="form must be one of 'keep', 'merge', 'dense'"):
        fold(model, form="deploy")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("multiplier", [None, 25])
def test_over_parameterized_depthwise_parts_fold(form, multiplier):
    model, report = over_parameterize(
        converted("s"), where="*.depthwise", depth_multiplier=multiplier
    )
    parts = [f"{path}.depthwise" for path in REPLACED]
    assert [change.path for change in report.changed] == parts
    for path in parts:
        d = at(model, path).depthwise_weight
        d.set_data(0.1 * mx.nd.random.normal(shape=d.shape))
    folded, report = fold(model, form=form)
    assert verify(folded, model, images()).relative <= 1e-12
    assert not any(type(b).__module__.startswith("doconv") for _, b in walk(folded))
    found = [change.path for change in report.changed if change.before == "DOConv2D"]
    assert found == ([] if form == "dense" else parts)


def test_exchanged_parts_are_kept_and_not_folded():
    model = network("float32", model=chain(BSConvU2D(4, 4, 3)))
    model[0].depthwise = nn.Conv2D(4, 3, in_channels=4)
    vars(model[0])["depthwise"] = model[0]._children["depthwise"] = nn.AvgPool2D(3)
    x = images("float32")
    kept, report = fold(model)
    assert verify(kept, model, x).absolute == 0
    assert [change.after for change in report.changed] == ["HybridSequential"]
    with pytest.raises(NotFoldable, match="its depthwise cannot be folded: it is a AvgPool2D"):
        fold(model, form="dense")


@pytest.mark.parametrize("form", FORMS)
def test_tied_weights_fold(form):
    first = BSConvS2D(4, 4, 3)
    model = network(model=chain(first, BSConvS2D(4, 4, 3, params=first.collect_params())))
    model.hybridize()
    folded = fold(model, form=form).model
    assert verify(folded, model, images()).relative <= 1e-12
    if form == "keep":
        assert folded[0].pointwise1.weight is folded[1].pointwise1.weight


def test_the_model_itself_may_be_the_layer():
    model = network(model=BSConvS2D(4, 4, 3))
    for form in FORMS:
        assert verify(fold(model, form=form).model, model, images()).relative <= 1e-12
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


def test_states_go_between_models():
    model = converted("s", with_bn=True)
    state = export_state(model)
    assert state.arrays["stem.pointwise1.weight"].shape == (4, 4, 1)
    other = converted("s", start="random", with_bn=True)
    load_state(other, state)
    assert verify(other, model, images()).absolute == 0


def test_the_loss_of_a_converted_model_is_zero_at_first():
    model = converted("s")
    assert orthonormality_loss(model).asscalar() <= 1e-12
    folded = fold(model).model
    with pytest.raises(ValueError, match="the Net has no weight to make orthonormal"):
        orthonormality_loss(folded)


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
        folded = fold(made, form=form, fuse_batchnorm=form != "keep").model
        assert verify(folded, made, x).relative <= 1e-4
