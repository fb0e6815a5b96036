"""Over-parameterizing and folding the convolutions in symbols, as of feature extractors."""

from __future__ import annotations

import numpy as np
import pytest
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import fold, import_gluoncv, over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import image  # noqa: E402
from gluon_models import (  # noqa: E402
    HYBRIDIZED,
    MULTIPLIERS,
    Residual,
    built,
    chain,
    moved,
    outputs,
    square,
    step,
    trained_statistics,
)
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.report import (  # noqa: E402
    ALREADY,
    COMPUTED,
    NOT_SELECTED,
    ONE_TAP,
    TIED,
    TRANSPOSED,
)

# MXNet says so of every block that is made from symbols.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")

IN_A_SYMBOL = "an operator of a symbol, where convolutions alone are replaced"
NODES = ["conv0", "conv3", "conv1"]


def symbol(model=None):
    """Return a model as a symbol, with the same parameters."""
    model = model or built()
    return SymbolBlock(model(mx.sym.var("data")), mx.sym.var("data"), params=model.collect_params())


def graph(block):
    return block._cached_graph[1].tojson()


@HYBRIDIZED
@pytest.mark.parametrize(
    ("inplace", "multiplier"), [(False, 12), (True, None)], ids=["copy-S=12", "inplace-S=M"]
)
def test_there_and_back(hybridized, inplace, multiplier):
    block, twin = symbol(), symbol()
    names, before = list(block.params.keys()), graph(block)
    for net in (block, twin):
        net.hybridize(hybridized)
        outputs(net)
    target, report = over_parameterize(block, depth_multiplier=multiplier, inplace=inplace)
    assert (target is block) == inplace
    assert [tuple(c) for c in report.changed] == [(path, "Conv2D", "DOConv2D") for path in NODES]
    assert report.left == (("conv2", "Conv2D", ONE_TAP),)
    agree = same if multiplier is None else close
    for training in (False, True):
        assert agree(step(target, training=training), step(twin, training=training))
    moved(target)
    trainer = Trainer(target.collect_params(), "sgd", {"learning_rate": 0.1})
    kept = outputs(target)
    step(target)
    trainer.step(2)
    expected = outputs(target)
    assert not close(expected, kept)
    folded, report = fold(target, inplace=inplace)
    assert [tuple(c) for c in report.changed] == [(path, "DOConv2D", "Conv2D") for path in NODES]
    assert type(folded) is SymbolBlock
    assert list(folded.params.keys()) == names
    assert graph(folded) == before
    assert [n for n in vars(folded) if n not in vars(twin)] == []
    assert not [p for p in folded.params.values() if type(p) is not mx.gluon.Parameter]
    assert close(outputs(folded), expected)


@pytest.mark.parametrize("multiplier", [None, 12])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_imported_symbol_is_whole_before_it_has_run(tmp_path, multiplier, inplace):
    net = built()
    net.hybridize()
    expected = outputs(net)
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    more = SymbolBlock.imports(*files)
    numbers = sum(p.data().size for p in more.collect_params().values())
    model, report = over_parameterize(more, depth_multiplier=multiplier, inplace=inplace)
    assert report.parameters_before == numbers < report.parameters_after
    assert report.uncounted == 0
    assert verify(net, model, image()).relative < 1e-6
    model, _ = over_parameterize(SymbolBlock.imports(*files), depth_multiplier=multiplier)
    model.save_parameters(str(tmp_path / "saved.params"))
    assert verify(SymbolBlock.imports(*files), model, image()).relative < 1e-6
    model, _ = over_parameterize(SymbolBlock.imports(*files), depth_multiplier=multiplier)
    folded, report = fold(model)
    assert report.parameters_after == numbers
    assert close(outputs(folded), expected)


def test_parameters_without_a_shape_are_said_not_to_be_counted():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.Dense(2))
    net.initialize()
    report = over_parameterize(net).report
    assert (report.parameters_before, report.uncounted) == (6, 3)  # the biases; D has none either
    assert ", without 3 whose shapes are known once the model has run" in str(report)
    net(mx.nd.ones((1, 3, 8, 8)))
    assert "without" not in str(over_parameterize(net).report).splitlines()[0]


def test_a_copy_is_apart_from_the_original():
    block = symbol()
    before, kept = graph(block), dict(block.params.items())
    expected = outputs(block)
    target = moved(over_parameterize(block).model)
    assert type(block) is SymbolBlock
    assert graph(block) == before
    assert dict(block.params.items()) == kept
    assert same(outputs(block), expected)
    assert not close(outputs(target), expected)
    again = fold(target).model
    assert not fold(again).report.changed
    assert "DOSymbolBlock" in type(target).__name__


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("*3", NODES[1:2]),
        ((nn.Conv2D, nn.Dense), NODES),
        (lambda path, layer: layer._kwargs["dilate"] == (2, 2), NODES[1:2]),
        (lambda path, layer: layer.weight.shape[1] == 2, NODES[:1]),
    ],
)
def test_where_selects(where, expected):
    block = symbol()
    target, report = over_parameterize(block, where=where)
    assert [c.path for c in report.changed] == expected
    left = {left.path for left in report.left if left.reason == NOT_SELECTED}
    assert left == set(NODES) - set(expected)
    assert same(outputs(target), outputs(block))


def test_the_rest_in_a_second_call():
    block = symbol()
    target = over_parameterize(block, where="conv3").model
    rest, report = over_parameterize(target)
    assert [c.path for c in report.changed] == ["conv0", "conv1"]
    assert [left.path for left in report.left if left.reason == ALREADY] == ["conv3"]
    assert same(outputs(rest), outputs(block))
    assert same(outputs(fold(moved(rest)).model), outputs(rest))


@HYBRIDIZED
def test_within_a_network(hybridized):
    net = chain(square(), symbol())
    net[0].initialize()
    net.hybridize(hybridized)
    target, report = over_parameterize(net)
    assert [c.path for c in report.changed] == ["0", *(f"1.{path}" for path in NODES)]
    assert same(outputs(target), outputs(net))
    moved(target)
    folded, report = fold(target, fuse_batchnorm=True)
    assert [c.path for c in report.changed] == ["0", *(f"1.{path}" for path in NODES)]
    assert [tuple(left) for left in report.left] == [
        ("1.batchnorm0", "BatchNorm", IN_A_SYMBOL),
        ("1.batchnorm1", "BatchNorm", IN_A_SYMBOL),
    ]
    assert same(outputs(folded), outputs(target))


def test_a_symbol_without_values_is_run_first_or_infers():
    model = Residual()
    block = symbol(model)
    target = over_parameterize(block).model
    target.initialize(mx.init.Normal(0.3))
    step(target)
    assert close(outputs(fold(moved(target)).model), outputs(target))
    with pytest.raises(ValueError, match=r"layer 'conv0': in a symbol whose shapes are not known"):
        over_parameterize(block, depth_multiplier=12)
    assert type(block) is SymbolBlock
    assert type(fold(over_parameterize(block).model).model) is SymbolBlock


@MULTIPLIERS
def test_files_and_casts(multiplier, tmp_path):
    block = symbol()
    target = moved(over_parameterize(block, depth_multiplier=multiplier).model)
    own, plain, expected = str(tmp_path / "own"), str(tmp_path / "plain"), outputs(target)
    target.collect_params().save(own)
    block.collect_params().save(plain)
    target.collect_params().load(plain, allow_missing=True)
    assert close(outputs(target), outputs(block))
    target.collect_params().load(own)
    assert same(outputs(target), expected)
    target.cast("float64")
    found = outputs(target, image(dtype="float64"))
    assert found[0].dtype == np.float64
    assert close(found, expected)
    block.cast("float16")
    half = over_parameterize(block, depth_multiplier=multiplier).model
    for net in (block, half):  # in float16 MXNet convolves on GPUs only
        net.cast("float32")
    assert close(outputs(half), outputs(block))


def test_an_imported_network(tmp_path):
    model = built(hybridized=True)
    model.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    block = SymbolBlock.imports(*files)
    target = over_parameterize(block).model
    assert same(outputs(target), outputs(model))
    target.hybridize()
    moved(target)
    assert same(outputs(fold(target).model), outputs(target))


def test_a_symbol_that_composes_kernels_cannot_be_folded():
    for multiplier, dtype in ((None, "float32"), (12, "float32"), (None, "float16")):
        model = over_parameterize(built(), depth_multiplier=multiplier).model
        model.cast(dtype)
        block = SymbolBlock(model(mx.sym.var("data")), mx.sym.var("data"))
        with pytest.raises(NotFoldable, match=r"layer '0' is a symbol that composes kernels, with"):
            fold(chain(block))
        with pytest.raises(NotFoldable, match="the model itself is a symbol that composes kernels"):
            fold(block)
        with pytest.warns(UserWarning, match="no convolution that could be replaced"):
            report = over_parameterize(block).report
        assert {left.reason for left in report.left} == {COMPUTED, ONE_TAP}


def block_of(make):
    """Return a block of a symbol that `make` makes of the data, with random values."""
    data = mx.sym.var("data")
    block = SymbolBlock(make(mx.sym, data), data)
    block.initialize(mx.init.Normal(0.3))
    outputs(block)
    return block


def convolution(F, x, weight, **options):
    options = {"num_filter": 4, "kernel": (3, 3), "pad": (1, 1), "no_bias": True, **options}
    return F.Convolution(x, weight, **options)


def unlike(F, x):
    w = F.var("w_weight")
    return F.broadcast_mul(convolution(F, x, w), F.sum(w))


def twice(F, x):
    w = F.var("w_weight")
    return convolution(F, convolution(F, x, w), w, dilate=(2, 2), pad=(2, 2))


def computed(F, x):
    return convolution(F, x, F.var("w_weight", shape=(4, 4, 3, 3)) * 2, name="here")


def test_nodes_that_are_left():
    _, report = over_parameterize(block_of(twice))
    assert [c.path for c in report.changed] == [""]
    for make, path, reason in ((unlike, "", TIED), (computed, "here", COMPUTED)):
        block = block_of(make)
        with pytest.warns(UserWarning, match="no convolution that could be replaced"):
            target, report = over_parameterize(block)
        assert report.left == ((path, "Conv2D", reason),)
        assert same(outputs(target), outputs(block))


def test_weights_that_a_symbol_shares_with_layers_are_left():
    model = built(chain(square(), nn.Conv2DTranspose(4, 3)))
    net = chain(model, symbol(model))
    target, report = over_parameterize(net)
    assert not report.changed
    assert {left.reason for left in report.left} == {TIED, TRANSPOSED}
    assert same(outputs(target), outputs(net))


@HYBRIDIZED
@pytest.mark.parametrize(
    ("kind", "arguments", "count"),
    [("FeatureExtractor", [], 11), ("FeatureExpander", [[8, 8], True, True, 1.0, 4], 13)],
)
def test_gluoncvs_feature_extractors(kind, arguments, count, hybridized):
    import_gluoncv()
    from gluoncv.model_zoo import get_model
    from gluoncv.nn import feature

    net = get_model("cifar_resnet20_v1", pretrained=False)
    outputs_of = ["stage1_activation1", "stage2_activation1"]
    block = getattr(feature, kind)(net, outputs_of, *arguments)
    block.initialize()
    block.hybridize(hybridized)
    x = mx.nd.random.uniform(shape=(2, 3, 32, 32))
    outputs(block, x)
    trained_statistics(block)
    target, report = over_parameterize(block)
    assert len(report.changed) == count
    assert verify(target, block, x) == (0.0, 0.0)
    folded = fold(moved(target)).model
    assert type(folded) is type(block)
    assert verify(folded, target, x).relative <= 1e-6
