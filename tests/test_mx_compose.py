"""Composition in MXNet's operators: both of its forms against the core, and which is chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import one_test
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, fold, over_parameterize  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import array, image, random_d  # noqa: E402
from gluon_models import chain, moved, outputs, step  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import HybridBlock, SymbolBlock, nn  # noqa: E402

from doconv_core import ConvSpec, NotFoldable, compose_gradient, difference  # noqa: E402
from doconv_core import compose as by_the_core  # noqa: E402
from doconv_mx.compose import LARGE, compose, grouped  # noqa: E402

SPECS = [
    ConvSpec(1, 1, (3, 3)),
    ConvSpec(1, 5, (3, 3), depth_multiplier=10),
    ConvSpec(7, 5, (3, 3)),
    ConvSpec(5, 11, (2, 3), depth_multiplier=13),
    ConvSpec(6, 9, (3,), groups=3, depth_multiplier=5),
    ConvSpec(5, 3, (5,)),
    ConvSpec(13, 13, (3, 3), groups=13),
    ConvSpec(4, 8, (3, 3), groups=4, depth_multiplier=18),
    ConvSpec(4, 6, (3, 3), groups=2, depth_multiplier=11),
    ConvSpec(4, 6, (3, 3, 3), groups=2),
    ConvSpec(3, 4, (3, 1, 3), depth_multiplier=9 + 5),
    ConvSpec(3, 16, (7, 7)),
]
LARGE_LAYER = (61, 67, 3)  # in and out channels, kernel size
assert np.prod(LARGE_LAYER) * 3 >= LARGE


class Composed(HybridBlock):
    """`compose` as a block."""

    def __init__(self, *options):
        super().__init__()
        self._options = options

    def hybrid_forward(self, F, weight, depthwise):
        return compose(F, weight, depthwise, *self._options)


@one_test
@pytest.mark.parametrize("convolved", [False, True], ids=["batches", "convolution"])
@pytest.mark.parametrize("hybridized", [False, True], ids=["arrays", "symbols"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernel_and_gradients_are_those_of_the_core(spec, last, hybridized, convolved):
    rng = np.random.default_rng(0)
    shapes = spec.weight_shape, spec.depthwise_shape, spec.kernel_shape
    weight, depthwise, gradient = (rng.standard_normal(shape) for shape in shapes)
    by_weight, by_depthwise = compose_gradient(weight, depthwise, gradient, spec)
    expected = by_the_core(weight, depthwise, spec), by_weight, by_depthwise

    def kept(a):  # W as a layer keeps it
        a = a.reshape(spec.parameter_shape) if a.shape == spec.weight_shape else a
        return np.moveaxis(a, 1, -1) if last else a

    for dtype, bound in (("float32", 1e-5), ("float64", 1e-12)):
        w, d, g = (array(a.astype(dtype)) for a in (kept(weight), depthwise, kept(gradient)))
        w.attach_grad()
        d.attach_grad()
        block = Composed(spec, last, dtype, spec.in_channels if convolved else 0)
        block.hybridize(hybridized)
        with autograd.record():
            kernel = block(w, d)
        kernel.backward(g)
        found = kernel, w.grad, d.grad
        wanted = kept(expected[0]), kept(expected[1]), expected[2]
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == np.dtype(dtype)
            assert difference(a.asnumpy(), b).relative <= bound


@one_test
@pytest.mark.parametrize("convolved", [False, True], ids=["batches", "convolution"])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.depth_multiplier == s.taps], ids=str)
def test_without_d_the_kernel_is_w(spec, convolved):
    weight = image(*spec.parameter_shape)
    options = spec, False, "float32", spec.in_channels if convolved else 0
    assert same(compose(mx.nd, weight, mx.nd.zeros(spec.depthwise_shape), *options), weight)


def choice(in_channels, channels, kernel, groups=1, dtype="float32", initialized=True, **options):
    layer = DOConv2D(in_channels, channels, kernel, groups=groups, **options)
    layer.cast(dtype)
    if initialized:
        layer.initialize()
    return grouped(layer.weight, layer._outline, layer.inferred_in_channels())


def test_a_large_w_is_composed_by_a_convolution():
    assert choice(*LARGE_LAYER) == choice(*LARGE_LAYER, dtype="float16") == 61
    assert choice(*LARGE_LAYER, layout="NHWC") == choice(*LARGE_LAYER, depth_multiplier=18) == 61
    assert choice(122, 134, 3, groups=2) == 122


def test_everything_else_is_composed_by_batches():
    assert choice(61, 59, 3) == 0  # small
    assert choice(61, 67, 3, groups=1, depth_multiplier=12) == 0  # multiples of four
    assert choice(128, 128, 2) == 0
    assert choice(256, 256, 3, groups=32) == 0  # small again: the matrices get shorter
    assert choice(*LARGE_LAYER, dtype="float64") == 0
    assert choice(0, 67, 3) == 0  # yet unknown
    assert choice(*LARGE_LAYER, initialized=False) == 0  # and with it the device


def test_on_other_devices_a_large_w_is_composed_by_batches(monkeypatch):
    layer = DOConv2D(*LARGE_LAYER)
    layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    assert grouped(layer.weight, layer._outline, 61) == 61
    monkeypatch.setattr(layer.weight, "list_ctx", lambda: [mx.cpu(0), mx.gpu(0)])
    assert grouped(layer.weight, layer._outline, 61) == 0


@pytest.mark.parametrize("multiplier", [None, 11])
def test_a_layer_hybridized_before_its_channels_are_known_folds_exactly(multiplier):
    net, x = chain(DOConv2D(0, 67, 3, depth_multiplier=multiplier)), image(2, 61, 5, 5)
    net.initialize(mx.init.Normal(0.1))
    net.hybridize()
    outputs(net, x)
    layer = moved(net)[0]
    for in_batches in (True, False):
        assert ("batch_dot" in net._cached_graph[1].tojson()) is in_batches
        assert same(outputs(fold(net).model, x), outputs(net, x))
        assert same(layer.fold().weight.data(), layer.composed_kernel())
        net.hybridize()  # when the graph is made anew, the channels are known
        outputs(net, x)


@pytest.mark.parametrize("multiplier", [None, 16, 18])
def test_sizes_that_a_grouped_convolution_of_mxnet_fails_at(multiplier):
    """It converts no filters of 4·a channels in groups of 4·b; as batches they train."""
    layer = DOConv2D(64, 64, 3 if multiplier else (2, 4), depth_multiplier=multiplier)
    layer.initialize(mx.init.Normal(0.1))
    random_d(layer)
    layer.hybridize()
    assert all(np.isfinite(part).all() for part in step(layer, image(2, 64, 5, 5)))


def large(in_channels=61):
    """Return a network with a layer whose W is composed by a convolution, where it is known."""
    net = chain(DOConv2D(in_channels, *LARGE_LAYER[1:]), nn.Dense(2))
    net.initialize(mx.init.Normal(0.1))
    return net


def test_a_layer_that_knows_its_channels_agrees_with_one_that_infers_them():
    """In hybridized networks, whose graphs differ."""
    x, nets = image(2, 61, 5, 5), (large(), large(0))
    nets[1].hybridize()
    nets[1](x)
    for name in ("weight", "depthwise_weight", "bias"):
        value = getattr(nets[1][0], name).data()
        getattr(nets[0][0], name).set_data(value)
    nets[0](x)
    for name in ("weight", "bias"):
        getattr(nets[0][1], name).set_data(getattr(nets[1][1], name).data())
    nets[0].hybridize()
    for net in nets:
        moved(net)
    assert close(step(nets[0], x), step(nets[1], x))
    graphs = [net._cached_graph[1].tojson() for net in nets]
    assert ["batch_dot" in graph for graph in graphs] == [False, True]
    assert close([nets[0][0].weight.grad().asnumpy()], [nets[1][0].weight.grad().asnumpy()])
    grads = [net[0].depthwise_weight.grad() for net in nets]
    assert close(*grads)


@pytest.mark.parametrize("multiplier", [None, 13])
def test_a_large_layer_in_half_precision_is_composed_in_float32(multiplier):
    kernels = []
    for dtype in ("float16", "float32"):
        layer = DOConv2D(*LARGE_LAYER, depth_multiplier=multiplier)
        layer.cast(dtype)
        layer.initialize()
        for parameter in (layer.weight, layer.depthwise_weight):
            parameter.set_data(image(*parameter.shape, dtype="float16"))
        kernels.append(layer.composed_kernel())
    assert kernels[0].dtype == np.float16
    assert same(kernels[0], kernels[1].astype("float16"))


@pytest.mark.parametrize("multiplier", [None, 11])
@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
def test_a_large_layer_exported_folded_and_read_again(tmp_path, multiplier):
    plain, x = chain(nn.Conv2D(67, 3, in_channels=61), nn.Dense(2)), image(2, 61, 5, 5)
    plain.initialize(mx.init.Normal(0.1))
    expected = outputs(plain, x)
    net = over_parameterize(plain, depth_multiplier=multiplier).model
    assert multiplier or same(outputs(net, x), expected)
    moved(net)
    net.hybridize()
    assert same(outputs(fold(net).model, x), outputs(net, x))
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    again = SymbolBlock.imports(*files)
    assert same(outputs(again, x), outputs(net, x))
    operators = [node["op"] for node in json.loads(again._cached_graph[1].tojson())["nodes"]]
    assert operators.count("Convolution") == 2
    with pytest.raises(NotFoldable, match="the model itself is a symbol that composes kernels"):
        fold(again)


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
def test_a_large_node_of_a_symbol_is_composed_by_a_convolution():
    plain, x = chain(nn.Conv2D(67, 3, in_channels=61)), image(2, 61, 5, 5)
    plain.initialize(mx.init.Normal(0.1))
    data = mx.sym.var("data")
    block = SymbolBlock(plain(data), data, params=plain.collect_params())
    model = over_parameterize(block).model
    assert same(outputs(model, x), outputs(plain, x))
    moved(model)
    assert "batch_dot" not in model._cached_graph[1].tojson()
    assert same(outputs(fold(model).model, x), outputs(model, x))
