"""Gluon's parameters: saved, loaded, exported, imported and shared."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, export_state, load_state  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import IN_CHANNELS, MULTIPLIERS, equal, image, ordinary, random_d, trained  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

from doconv_core import State, difference  # noqa: E402


@MULTIPLIERS
@IN_CHANNELS
def test_export_and_import_as_symbols(multiplier, in_channels, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 1), DOConv2D(in_channels, 6, 3, groups=2, depth_multiplier=multiplier))
    net.initialize()
    net.hybridize()
    net(image()).wait_to_read()
    random_d(net[1])
    expected = net(image())
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    with pytest.warns(UserWarning, match="Cannot decide type"):  # as for every network
        loaded = mx.gluon.SymbolBlock.imports(*files)
    assert equal(loaded(image()), expected)
    random_d(net[1], scale=1.0)
    net.collect_params().load(files[2])
    assert equal(net(image()), expected)


def small_network(layer):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 1), layer)
    return net


@MULTIPLIERS
@IN_CHANNELS
@pytest.mark.parametrize("initialized", [False, True])
def test_an_ordinary_networks_parameters_load_and_reset_d(
    multiplier, in_channels, initialized, tmp_path
):
    plain, file = small_network(nn.Conv2D(6, 3, groups=2)), str(tmp_path / "plain.params")
    plain.initialize()
    expected = plain(image())
    plain.save_parameters(file)
    layer = DOConv2D(in_channels, 6, 3, groups=2, depth_multiplier=multiplier)
    net = small_network(layer)
    net.hybridize()
    if initialized:
        net.initialize()
        net(image()).wait_to_read()
        random_d(layer)
    net.load_parameters(file, allow_missing=True)
    assert equal(net(image()), expected)
    assert layer.depthwise_weight.grad_req == "write"
    random_d(layer)
    net.collect_params().load_dict(plain_names(plain, net), allow_missing=True)
    assert equal(net(image()), expected)
    with pytest.raises(AssertionError, match="depthwise_weight' is missing"):
        net.load_parameters(file)


def plain_names(plain, net):
    """Return the values of `plain` under the names of the parameters of `net`."""
    paths, values = net._collect_params_with_prefix(), plain._collect_params_with_prefix()
    return {paths[path].name: value.data() for path, value in values.items()}


@pytest.mark.parametrize("source", ["current", "saved"])
def test_an_ordinary_layer_loads_in_another_dtype_and_on_several_contexts(source, tmp_path):
    contexts, file = [mx.cpu(0), mx.cpu(1)], str(tmp_path / "plain.params")
    plain = small_network(nn.Conv2D(6, 3, groups=2))
    plain.cast("float64")
    plain.initialize()
    expected = plain(image(dtype="float64"))
    plain.save_parameters(file)
    net = small_network(DOConv2D(0, 6, 3, groups=2, depth_multiplier=12))
    options = {"allow_missing": True, "cast_dtype": True, "dtype_source": source}
    net.load_parameters(file, contexts, **options)
    dtype = {"current": "float32", "saved": "float64"}[source]
    assert np.dtype(net[1].depthwise_weight.dtype) == dtype
    for context in contexts:
        output = net(image(dtype=dtype).as_in_context(context))
        assert difference(output.asnumpy(), expected.asnumpy()).relative <= 1e-5


@MULTIPLIERS
def test_own_parameters_load_in_any_order_after_any_others(multiplier, tmp_path):
    net = small_network(DOConv2D(4, 6, 3, groups=2, depth_multiplier=multiplier))
    net.initialize()
    net(image()).wait_to_read()
    random_d(net[1])
    expected = net(image())
    files = {name: str(tmp_path / name) for name in ("saved", "reversed", "plain", "only_d")}
    net.save_parameters(files["saved"])
    stored = mx.nd.load(files["saved"])
    mx.nd.save(files["reversed"], dict(reversed(stored.items())))
    mx.nd.save(files["only_d"], {"1.depthwise_weight": stored.pop("1.depthwise_weight")})
    mx.nd.save(files["plain"], stored)
    for name in ("saved", "reversed", "reversed", "saved", "only_d", "plain", "reversed"):
        net.load_parameters(files[name], allow_missing=name in ("plain", "only_d"))
        assert equal(net(image()), expected) == (name != "plain")
        assert net[1].depthwise_weight.data().asnumpy().any() == (name != "plain")


def load_parameters(net, values, folder):
    """Load `values`, by parameter, from a file in which they bear the names of their paths."""
    paths = {p: path for path, p in net._collect_params_with_prefix().items()}
    mx.nd.save(str(folder / "file"), {paths[p]: value for p, value in values.items()})
    net.load_parameters(str(folder / "file"), allow_missing=len(values) < len(paths))


def load_collected(net, values, folder):
    """The same by the names of the parameters themselves."""
    mx.nd.save(str(folder / "file"), {p.name: value for p, value in values.items()})
    parameters = net.collect_params()
    parameters.load(str(folder / "file"), allow_missing=len(values) < len(parameters.keys()))


def load_dict(net, values, folder):
    """The same without a file, by the names in a file that `export` has written."""
    named, parameters = {f"arg:{p.name}": v for p, v in values.items()}, net.collect_params()
    parameters.load_dict(named, allow_missing=len(values) < len(parameters.keys()))


LOADING = pytest.mark.parametrize("load", [load_parameters, load_collected, load_dict])


@LOADING
@MULTIPLIERS
@pytest.mark.parametrize("alone", [False, True])
def test_no_load_depends_on_the_one_before(load, multiplier, alone, tmp_path):
    """Each kind of file after each other: whole in any order, an ordinary layer's, D alone."""
    layer, plain = DOConv2D(4, 6, 3, groups=2, depth_multiplier=multiplier), ordinary()
    net = layer
    if not alone:
        net = nn.HybridSequential()
        net.add(layer)
    net.initialize()
    random_d(layer)
    w, d, b = layer.weight, layer.depthwise_weight, layer.bias
    whole = {p: p.data().copy() for p in (w, b, d)}
    zero, expected, of_plain = 0 * d.data(), layer(image()), plain(image())
    kinds = {
        "as saved": whole,
        "D first": {d: whole[d], w: whole[w], b: whole[b]},
        "D last": {b: whole[b], w: whole[w], d: whole[d]},
        "ordinary": {w: plain.weight.data(), b: plain.bias.data()},
        "ordinary, bias first": {b: plain.bias.data(), w: plain.weight.data()},
        "only D": {d: whole[d]},
    }
    for first in kinds:
        for second in kinds:
            for kind in (first, second):
                load(net, kinds[kind], tmp_path)
                is_plain = "ordinary" in kind
                assert equal(d.data(), zero if is_plain else whole[d]), (first, second)
                if kind != "only D":
                    assert equal(layer(image()), of_plain if is_plain else expected)


def test_an_unknown_way_of_loading_is_refused_and_changes_nothing():
    layer = trained()
    w, d = layer.weight.data().copy(), layer.depthwise_weight.data().copy()
    with pytest.raises(RuntimeError, match=r"_weight' is being loaded by itself, so .*dept"):
        layer.weight._load_init(2 * w, None)
    assert equal(layer.weight.data(), w)
    layer.depthwise_weight._load_init(2 * d, None)
    layer.bias._load_init(layer.bias.data() + 1, None)
    one_tap = DOConv2D(4, 6, 1)
    one_tap.initialize()
    one_tap.weight._load_init(2 * one_tap.weight.data(), None)


@pytest.mark.parametrize("in_file", [(6, 2, 5, 5), (6, 4, 3, 3), (5, 2, 3, 3), (6, 2, 3)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@IN_CHANNELS
def test_what_does_not_load_is_reported_as_it_is_in_the_file(
    in_file, layout, in_channels, tmp_path
):
    if layout == "NHWC":
        in_file = (in_file[0], *in_file[2:], in_file[1])
    if in_file[1 if layout == "NCHW" else -1] == 4 and not in_channels:
        return  # the kernel fits, for 8 input channels
    layer = DOConv2D(in_channels, 6, 3, groups=2, depth_multiplier=12, layout=layout)
    file = str(tmp_path / "parameters")
    mx.nd.save(file, {"weight": mx.nd.ones(in_file)})
    # A layer alone has no dots in its names, which MXNet takes for an older format.
    message = (
        f"Failed loading Parameter .*weight'.*shape incompat.* vs saved {re.escape(str(in_file))}"
    )
    with pytest.raises(AssertionError, match=message):
        layer.load_parameters(file, allow_missing=True)


@MULTIPLIERS
def test_parameters_can_be_shared(multiplier):
    layer = trained(multiplier)
    options = {"padding": 1, "groups": 2, "depth_multiplier": multiplier}
    other = DOConv2D(4, 6, 3, params=layer.params, **options)
    assert other.depthwise_weight is layer.depthwise_weight
    assert equal(other(image()), layer(image()))
    assert equal(copy.deepcopy(layer)(image()), layer(image()))


@pytest.mark.parametrize("multiplier", [None, 12])
def test_an_ordinary_layers_parameters_are_copied_not_shared(multiplier):
    plain, layer = ordinary(), trained()
    before = list(plain.params.keys())
    with pytest.raises(
        TypeError, match=r"received 'conv\d+_weight' of an ord.*DOConv2D\.from_conv"
    ):
        DOConv2D(4, 6, 3, groups=2, depth_multiplier=multiplier, params=plain.params)
    assert list(plain.params.keys()) == before
    one_tap = ordinary(kernel=1)
    assert equal(DOConv2D(4, 6, 1, groups=2, params=one_tap.params)(image()), one_tap(image()))
    assert equal(DOConv2D.from_conv(layer.fold())(image()), layer(image()))


@MULTIPLIERS
@IN_CHANNELS
@pytest.mark.parametrize("hybridized", [False, True])
def test_numpy_arrays_of_mxnet(multiplier, in_channels, hybridized, tmp_path):
    reference = trained(multiplier, groups=1)
    state, expected = export_state(reference), reference(image()).asnumpy()
    mx.npx.set_np()
    try:
        layer = DOConv2D(in_channels, 6, 3, padding=1, depth_multiplier=multiplier)
        net = nn.HybridSequential()
        net.add(layer)
        net.initialize()
        net.hybridize(hybridized)
        x = mx.np.zeros((2, 4, 7, 8))
        x[:] = image().asnumpy()
        net(x).wait_to_read()
        load_state(net, State({"0": state.layers[""]}, renamed(state)))
        with autograd.record():
            output = net(x)
        output.backward()
        assert difference(output.asnumpy(), expected).relative <= 1e-6
        assert isinstance(layer.composed_kernel(), mx.np.ndarray)
        assert layer.depthwise_weight.grad().asnumpy().any()
        assert equal(layer.fold()(x), output)
        again = nn.HybridSequential()  # MXNet loads no file of a layer alone in this mode
        again.add(DOConv2D.from_conv(layer.fold(), depth_multiplier=multiplier))
        assert equal(again(x), output)
        net.save_parameters(str(tmp_path / "net"))
        again.load_parameters(str(tmp_path / "net"))
        assert equal(again(x), output)
    finally:
        mx.npx.reset_np()


def renamed(state):
    return {f"0.{name}": values for name, values in state.arrays.items()}
