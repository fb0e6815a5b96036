"""What is special to MXNet Gluon: everything a user does with `mxnet.gluon.nn.Conv2D`."""

from __future__ import annotations

import copy
import inspect
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from frameworks import need

need("mx")

import doconv_mx  # noqa: E402  before MXNet, which it makes importable

# isort: split
import mxnet as mx  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

from doconv_core import State, StateError, compose, difference  # noqa: E402
from doconv_mx import DOConv1D, DOConv2D, DOConv3D, export_state, load_state  # noqa: E402

PAIRS = [(DOConv1D, nn.Conv1D), (DOConv2D, nn.Conv2D), (DOConv3D, nn.Conv3D)]
RANKED = pytest.mark.parametrize(("do_conv", "conv"), PAIRS, ids=["1d", "2d", "3d"])
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 12, 18, 19])
IN_CHANNELS = pytest.mark.parametrize("in_channels", [4, 0], ids=["given", "deferred"])
LAYOUTS = pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
MODES = {
    "eager": None,
    "hybridized": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}


def array(values):
    return mx.nd.from_numpy(np.array(values, order="C"))  # mx.nd.array has SciPy warn


def image(*shape, dtype="float32"):
    return array(np.random.default_rng(1).standard_normal(shape or (2, 4, 7, 8)).astype(dtype))


def random_d(layer, scale=0.3):
    """Give the layer a D that is not zero, as after training."""
    rng = np.random.default_rng(0)
    layer.depthwise_weight.set_data(scale * rng.standard_normal(layer.depthwise_weight.shape))
    return layer


def trained(multiplier=None, groups=2, dtype="float32", ctx=None, **options):
    options = {"padding": 1, "groups": groups, "depth_multiplier": multiplier, **options}
    layer = DOConv2D(4, 6, 3, **options)
    layer.cast(dtype)
    layer.initialize(mx.init.Normal(0.5), ctx=ctx)
    return random_d(layer)


def ordinary(cls=nn.Conv2D, kernel=3, **options):
    layer = cls(6, kernel, in_channels=4, **{"groups": 2, **options})
    layer.initialize(mx.init.Normal(0.5))
    return layer


def equal(a, b):
    return np.array_equal(a.asnumpy(), b.asnumpy())


def close(a, b):
    return difference(a.asnumpy(), b.asnumpy()).relative <= 1e-5


@RANKED
def test_the_signature_is_in_channels_the_ordinary_one_and_a_keyword(do_conv, conv):
    ours = inspect.signature(do_conv).parameters
    theirs = [name for name in inspect.signature(conv).parameters if name != "kwargs"]
    theirs.remove("in_channels")
    assert list(ours) == ["in_channels", *theirs, "prefix", "params", "depth_multiplier"]
    assert ours["depth_multiplier"].kind == inspect.Parameter.KEYWORD_ONLY
    assert issubclass(do_conv, conv)
    plain, layer = conv(6, 3, in_channels=4), do_conv(4, 6, 3)
    assert layer._kwargs == plain._kwargs
    for name in ("weight", "bias"):
        a, b = getattr(layer, name), getattr(plain, name)
        assert (a.shape, a.init, a.name.split("_")[1]) == (b.shape, b.init, name)


@RANKED
def test_a_fresh_layer_is_the_ordinary_one_of_the_same_seed(do_conv, conv):
    layers = conv(6, 3, in_channels=4, groups=2), do_conv(4, 6, 3, groups=2)
    for layer in layers:
        mx.random.seed(0)
        layer.initialize(mx.init.Xavier())
    x = image(2, 4, *[5] * (layers[0].weight.data().ndim - 2))
    assert equal(layers[0].weight.data(), layers[1].weight.data())
    assert equal(layers[0](x), layers[1](x))


@RANKED
@IN_CHANNELS
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("multiplier", [None, 9, 12, 13])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_execution(do_conv, conv, in_channels, groups, multiplier, mode):
    """Alone in eager mode; else within a network, which infers all shapes from its one graph."""
    rank = int(conv.__name__[-2])
    kernel = {1: 6, 2: (3, 2), 3: (1, 3, 2)}[rank]
    layer = do_conv(in_channels, 8, kernel, groups=groups, depth_multiplier=multiplier)
    net = layer
    if MODES[mode] is not None:
        net = nn.HybridSequential()
        net.add(nn.Activation("relu"), layer)
        net.hybridize(**MODES[mode])
    net.initialize(mx.init.Normal(0.5))
    x = mx.nd.abs(image(2, 4, *[7] * rank))  # which the activation leaves as it is
    fresh = net(x)
    random_d(layer)
    for _ in range(2):  # static memory is used again
        x.attach_grad()
        with autograd.record():
            output = net(x)
        output.backward()
    gradients = [p.grad().copy() for p in (layer.weight, layer.depthwise_weight)]
    folded, dx = layer.fold(), x.grad
    x.attach_grad()
    with autograd.record():
        expected, kernel = folded(x), layer.composed_kernel()
    expected.backward()
    kernel.backward(folded.weight.grad())
    assert close(output, expected)
    assert not close(output, fresh)
    assert close(dx, x.grad)
    assert close(gradients[0], layer.weight.grad())
    assert close(gradients[1], layer.depthwise_weight.grad())
    assert layer.spec.in_channels == 4


@MULTIPLIERS
@LAYOUTS
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_composition_is_the_cores_in_every_layout(multiplier, groups, layout):
    layer = DOConv2D(4, 8, 3, groups=groups, depth_multiplier=multiplier, layout=layout)
    layer.cast("float64")
    layer.initialize(mx.init.Normal(0.5))
    random_d(layer)
    state = export_state(layer)
    expected = compose(state.arrays["weight"], state.arrays["depthwise_weight"], layer.spec)
    kernel, folded = layer.composed_kernel(), layer.fold()
    assert equal(folded.weight.data(), kernel)
    assert repr(folded) == repr(nn.Conv2D(8, 3, in_channels=4, groups=groups, layout=layout))
    found = kernel.asnumpy()
    found = np.moveaxis(found, -1, 1) if layout == "NHWC" else found
    assert difference(found, expected).relative < 1e-14
    again = DOConv2D.from_conv(folded, depth_multiplier=multiplier)
    assert equal(again.composed_kernel(), kernel)


@MULTIPLIERS
def test_half_precision_is_composed_in_float32_and_rounded_once(multiplier):
    """On the CPU, where MXNet has no half-precision convolution, composition and folding work."""
    layer = trained(multiplier, dtype="float16")
    wide = trained(multiplier)
    for name in ("weight", "depthwise_weight"):
        getattr(wide, name).set_data(getattr(layer, name).data().asnumpy())
    kernel = layer.composed_kernel()
    assert kernel.dtype == layer.fold().weight.data().dtype == np.float16
    assert equal(kernel, wide.composed_kernel().astype("float16"))


@MULTIPLIERS
@IN_CHANNELS
def test_half_precision_graphs_infer_shapes_and_types(multiplier, in_channels):
    """Of the layer within a network, which MXNet's CPU cannot run."""
    layer = DOConv2D(in_channels, 6, 3, groups=2, depth_multiplier=multiplier)
    net = nn.HybridSequential()
    net.add(layer)
    net.cast("float16")
    net.initialize()
    symbol = net(mx.sym.var("data", dtype="float16"))
    arguments, outputs, _ = symbol.infer_type()
    assert set(arguments) == set(outputs) == {np.float16}
    internals = symbol.get_internals()
    names = internals.list_outputs()
    types = dict(zip(names, internals.infer_type()[1], strict=True))
    assert [types[n] for n in names if "batch_dot" in n] == [np.float32]
    shapes, outputs, _ = symbol.infer_shape(data=(2, 4, 7, 8))
    found = dict(zip(symbol.list_arguments(), shapes, strict=True))
    assert outputs == [(2, 6, 5, 6)]
    given = trained(multiplier)
    for name in ("weight", "depthwise_weight", "bias"):
        assert found[getattr(layer, name).name] == getattr(given, name).shape
    net.infer_shape(image(dtype="float16"))
    assert layer.spec == given.spec


def test_cast_reaches_a_hybridized_network():
    net = nn.HybridSequential()
    net.add(DOConv2D(0, 6, 3, depth_multiplier=12))
    net.initialize()
    net.hybridize()
    assert net(image()).dtype == np.float32
    net.cast("float64")
    assert net(image(dtype="float64")).dtype == np.float64


@MULTIPLIERS
@IN_CHANNELS
def test_several_contexts(multiplier, in_channels):
    contexts = [mx.cpu(0), mx.cpu(1)]
    layer = DOConv2D(in_channels, 6, 3, depth_multiplier=multiplier)
    layer.initialize(ctx=contexts)
    layer.hybridize()
    trainer = mx.gluon.Trainer(layer.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(2):
        with autograd.record():
            losses = [(layer(image().as_in_context(c)) ** 2).sum() for c in contexts]
        autograd.backward(losses)
        trainer.step(4)
    assert layer.depthwise_weight.data(contexts[0]).asnumpy().any()
    folded = layer.fold()
    assert folded.weight.list_ctx() == contexts
    again = DOConv2D.from_conv(folded, depth_multiplier=multiplier)
    for c in contexts:
        x = image().as_in_context(c)
        assert layer.composed_kernel(c).context == c
        assert equal(folded(x), layer(x))
        assert equal(again(x), folded(x))


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
    with pytest.raises(RuntimeError, match=r"_weight' is being loaded by .*refused_and_changes_no"):
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


@RANKED
@IN_CHANNELS
def test_one_tap_is_the_ordinary_layer(do_conv, conv, in_channels):
    layer = do_conv(in_channels, 6, 1, groups=2, depth_multiplier=5, activation="relu")
    assert layer.depthwise_weight is None
    assert list(layer._collect_params_with_prefix()) == ["weight", "bias"]
    layer.initialize()
    x = image(2, 4, *[3] * int(conv.__name__[-2]))
    output = layer(x)
    assert equal(layer.composed_kernel(), layer.weight.data())
    assert equal(layer.fold()(x), output)
    assert "depth_multiplier" not in repr(layer)


def test_repr_names_the_channels_and_the_depth_multiplier():
    assert repr(DOConv2D(0, 6, 3, groups=2, depth_multiplier=12, activation="relu")) == (
        "DOConv2D(None -> 6, kernel_size=(3, 3), stride=(1, 1), groups=2, Activation(relu), "
        "depth_multiplier=12)"
    )
    assert repr(DOConv2D(4, 6, (3, 1), layout="NHWC", use_bias=False)) == (
        "DOConv2D(4 -> 6, kernel_size=(3, 1), stride=(1, 1), bias=False, depth_multiplier=3)"
    )


@MULTIPLIERS
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "depthwise_weight"), ("bias",)])
def test_fold_keeps_what_the_layer_was(multiplier, frozen):
    layer = trained(multiplier, dtype="float64", activation="tanh")
    layer.hybridize(static_alloc=True)
    for name in frozen:
        getattr(layer, name).grad_req = "null"
    layer.weight.wd_mult, layer.bias.lr_mult = 0.5, 2.0
    mx.random.seed(0)
    following = mx.nd.random.uniform(shape=3)
    mx.random.seed(0)
    folded = layer.fold()
    assert equal(mx.nd.random.uniform(shape=3), following)
    assert type(folded) is nn.Conv2D
    assert (folded.name, folded.weight.name) == (layer.name, layer.weight.name)
    assert np.dtype(folded.weight.dtype) == np.float64
    assert (folded.weight.grad_req == "write") == (len(frozen) < 2)
    assert (folded.bias.grad_req == "write") == ("bias" not in frozen)
    assert (folded.weight.wd_mult, folded.bias.lr_mult) == (0.5, 2.0)
    assert folded._active
    assert folded._flags == layer._flags
    x = image(dtype="float64")
    assert equal(folded(x), layer(x))
    with autograd.record():
        assert equal(layer.fold()(x), folded(x))


@pytest.mark.parametrize("multiplier", [None, 12])
def test_fold_and_back_keep_initializers_grad_req_and_backend(multiplier):
    options = {"weight_initializer": mx.init.Uniform(0.3), "bias_initializer": "ones"}
    layer = trained(multiplier, **options)
    layer.collect_params().setattr("grad_req", "add")
    layer.hybridize(backend="MKLDNN")
    folded = layer.fold()
    again = DOConv2D.from_conv(folded, depth_multiplier=multiplier)
    for new in (folded, again):
        assert new.weight.init is options["weight_initializer"]
        assert new.bias.init == "ones"
        assert {p.grad_req for p in new.collect_params().values()} == {"add"}
        assert new._backend == "MKLDNN"
    assert equal(again(image()), folded(image()))


def test_fold_and_back_keep_names_within_any_name_scope():
    layer, net = trained(prefix="layer_", activation="relu"), nn.HybridSequential(prefix="net_")
    with net.name_scope():
        folded = layer.fold()
        again = DOConv2D.from_conv(folded)
        following = nn.Dense(2)
    for new in (folded, again):
        assert (new.prefix, new.name, new.act.prefix) == ("layer_", "layer", "layer_relu_")
        assert new.weight.name == "layer_weight"
        assert new.params.prefix == "layer_"
    assert following.prefix == "net_dense0_"
    assert nn.Dense(2, prefix="alone_").prefix == "alone_"


class Doubled(DOConv2D):
    def hybrid_forward(self, F, x, *args, **kwargs):
        return 2 * super().hybrid_forward(F, x, *args, **kwargs)


class DoubledEagerly(DOConv2D):
    def forward(self, x, *args):
        return 2 * super().forward(x, *args)


class Named(DOConv2D):
    """A subclass that computes the same."""


def test_fold_refuses_what_computes_something_else():
    for cls in (Doubled, DoubledEagerly):
        layer = cls(4, 6, 3)
        layer.initialize()
        with pytest.raises(TypeError, match=rf"{cls.__name__} has a forward of its own, so the co"):
            layer.fold()
    layer = Named(4, 6, 3)
    layer.initialize()
    assert type(layer.fold()) is nn.Conv2D


@RANKED
@MULTIPLIERS
def test_from_conv_does_not_change_the_function(do_conv, conv, multiplier):
    rank = int(conv.__name__[-2])
    plain = ordinary(conv, 2, use_bias=False, padding=1, activation="relu")
    plain.collect_params().setattr("grad_req", "null")
    plain.hybridize()
    layer = do_conv.from_conv(plain, depth_multiplier=multiplier)
    x = image(2, 4, *[5] * rank)
    assert equal(layer(x), plain(x))
    assert layer.bias is None
    assert layer._active
    assert layer.weight.grad_req == layer.depthwise_weight.grad_req == "null"
    assert equal(layer.fold().weight.data(), plain.weight.data())
    layer.weight.set_data(layer.weight.data() * 2)
    assert not equal(layer(x), plain(x))


class Standardised(nn.Conv2D):
    """A convolution that computes something else."""


def test_from_conv_refuses_what_computes_something_else():
    message = r"takes over a mxnet\.gluon\.nn\.Conv2D, exactly; received .*Standardised"
    with pytest.raises(TypeError, match=message):
        DOConv2D.from_conv(Standardised(6, 3))
    with pytest.raises(TypeError, match=r"received doconv_mx\.do_conv\.DOConv2D"):
        DOConv2D.from_conv(trained())
    with pytest.raises(TypeError, match=r"received mxnet\.gluon\.nn\.conv_layers\.Conv1D"):
        DOConv2D.from_conv(ordinary(nn.Conv1D))
    with pytest.raises(ValueError, match="depth_multiplier must be at least"):
        DOConv2D.from_conv(ordinary(), depth_multiplier=8)


@pytest.mark.parametrize("initialized", [False, True])
def test_a_layer_without_values_is_refused(initialized):
    plain, layer = nn.Conv2D(6, 3), DOConv2D(0, 6, 3)
    if initialized:  # which is then deferred
        plain.initialize()
        layer.initialize()
    message = "needs the values of .*weight', which has none yet: initialize the model, and"
    for action in (lambda: DOConv2D.from_conv(plain), layer.fold, lambda: export_state(layer)):
        with pytest.raises(ValueError, match=message):
            action()
    with pytest.raises(ValueError, match=r"in_channels of layer .* is not known yet; pass it, or"):
        _ = layer.spec


@pytest.mark.parametrize("missing", ["weight", "depthwise_weight", "bias"])
def test_a_layer_without_some_values_is_refused_as_it_was(missing):
    layer, names = DOConv2D(4, 6, 3, groups=2), ["weight", "depthwise_weight", "bias"]
    there = [getattr(layer, name) for name in names if name != missing]
    for parameter in there:
        parameter.initialize(mx.init.One())
    before = [parameter.data().copy() for parameter in there]
    state = export_state(trained())
    actions = (
        layer.composed_kernel,
        layer.fold,
        lambda: export_state(layer),
        lambda: load_state(layer, state),
    )
    for action in actions:
        with pytest.raises(
            ValueError, match=rf"needs the values of 'conv\d+_{missing}', which has"
        ):
            action()
    assert all(equal(p.data(), values) for p, values in zip(there, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": -1}, ValueError, "in_channels must be at least 0; received in_channels=-"),
        ({"channels": 0}, ValueError, "^channels must be at least 1; received channels=0"),
        ({"channels": 2.5}, TypeError, "^channels must be an integer; received channels=2.5"),
        ({"groups": 3}, ValueError, "in_channels must be divisible by groups.*groups=3"),
        ({"in_channels": 0, "groups": 5}, ValueError, "^channels must be divisible.* channels=6"),
        ({"groups": 4}, ValueError, "^channels must be divisible by groups; received channels=6"),
        ({"in_channels": 0, "groups": 0}, ValueError, "groups must be at least 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size must be one integer or 2 of them"),
        ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer"),
        ({"strides": 0}, ValueError, "strides must be at least 1; received strides=0"),
        ({"dilation": (1, 0)}, ValueError, r"dilation\[1\] must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0; received padding=-1"),
        ({"layout": "NCW"}, ValueError, "layout must be 'NCHW' or 'NHWC'; received layout='NCW'"),
        ({"depth_multiplier": 8}, ValueError, "depth_multiplier must be at least the number"),
        ({"in_channels": 0, "depth_multiplier": 8}, ValueError, "must be at least the number"),
        ({"depth_multiplier": 9.5}, TypeError, "depth_multiplier must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    usual = {"in_channels": 4, "channels": 6, "kernel_size": 3}
    with pytest.raises(error, match=message):
        DOConv2D(**{**usual, **arguments})


def test_inferred_channels_are_validated():
    layer = DOConv2D(0, 6, 3, groups=3)
    layer.initialize()
    with pytest.raises(ValueError, match="must be divisible by groups; received in_channels=4"):
        layer(image())


@MULTIPLIERS
def test_channels_last_shapes_are_inferred_within_a_network(multiplier):
    layer = DOConv2D(0, 8, 3, groups=2, layout="NHWC", depth_multiplier=multiplier)
    net = nn.HybridSequential()
    net.add(layer)
    net.infer_shape(mx.nd.zeros((1, 5, 5, 4)))
    given = DOConv2D(4, 8, 3, groups=2, layout="NHWC", depth_multiplier=multiplier)
    assert layer.weight.shape == given.weight.shape
    assert layer.depthwise_weight.shape == given.depthwise_weight.shape
    assert layer.spec == given.spec


def network(multiplier=12, bias=True, cls=DOConv2D, layout="NCHW"):
    options = {"groups": 2, "use_bias": bias, "layout": layout, "in_channels": 4}
    if cls is DOConv2D:
        options["depth_multiplier"] = multiplier
    net = nn.HybridSequential()
    net.add(cls(channels=6, kernel_size=3, **options), nn.Conv2D(5, 1, in_channels=6))
    net.add(nn.Dense(3, activation="relu", in_units=150))
    net.initialize(mx.init.Normal(0.2))
    return net


def test_state_goes_out_and_in():
    model, other = network(), network()
    random_d(model[0])
    state = export_state(model)
    assert {path: type(form.spec).__name__ for path, form in state.layers.items()} == {
        "0": "ConvSpec",
        "1": "ConvSpec",
        "2": "LinearSpec",
    }
    load_state(other, state)
    x = image(2, 4, 7, 8)
    assert equal(other(x), model(x))
    assert export_state(trained()).arrays.keys() == {"weight", "depthwise_weight", "bias"}


def test_an_ordinary_state_enters_an_over_parameterized_model():
    plain, model = network(cls=nn.Conv2D), network()
    random_d(model[0])
    load_state(model, export_state(plain))
    assert equal(model(image()), plain(image()))


@MULTIPLIERS
def test_a_state_is_the_same_in_every_layout(multiplier):
    first, last = (network(multiplier, layout=layout) for layout in ("NCHW", "NHWC"))
    random_d(first[0])
    state = export_state(first)
    load_state(last, state)
    again = export_state(last)
    assert again.layers == state.layers
    for name, values in state.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values)
    np.testing.assert_array_equal(
        np.moveaxis(last[0].composed_kernel().asnumpy(), -1, 1),
        first[0].composed_kernel().asnumpy(),
    )


@pytest.mark.parametrize("numpy_arrays", [False, True])
def test_a_state_is_loaded_while_autograd_records(numpy_arrays):
    state, ctx = export_state(trained()), [mx.cpu(0), mx.cpu(1)]
    if numpy_arrays:
        mx.npx.set_np()
    try:
        layer = trained(ctx=ctx, weight_initializer="ones")
        with autograd.record():
            load_state(layer, state)
        for c in ctx:
            for name, values in state.arrays.items():
                found = getattr(layer, name).data(c).asnumpy()
                assert np.array_equal(found.reshape(values.shape), values)
    finally:
        mx.npx.reset_np()


def test_a_layer_that_occurs_twice_is_in_the_state_once():
    net, layer = nn.HybridSequential(), trained()
    net.add(layer, nn.Activation("relu"), layer)
    state = export_state(net)
    assert list(state.layers) == ["0"]
    random_d(layer, scale=1.0)
    load_state(net, state)
    assert np.array_equal(
        layer.depthwise_weight.data().asnumpy(), state.arrays["0.depthwise_weight"]
    )


def scaled(block, attribute=True):
    """Return `block` with a parameter that a layer of its kind does not have."""
    scale = block.params.get("scale", shape=(1,))
    if attribute:
        block.scale = scale
    return block


def extended(*blocks):
    net = network()
    net.add(*blocks)
    net.initialize()
    return net


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: network(cls=nn.Conv2D), StateError, "'0.depthwise_weight'.*Fold the model"),
        (lambda: network(18), StateError, "'0.weight' is of .*multiplier=12.*multiplier=18"),
        (lambda: network(bias=False), StateError, "'0.bias' is there; expected a layer without"),
        (lambda: extended(nn.Dense(2, in_units=3)), StateError, "'3' is not in the state"),
        (
            lambda: extended(nn.BatchNorm(in_channels=3)),
            TypeError,
            "'3' is a BatchNorm with 'gamma', 'beta', .*; a canonical state holds",
        ),
        (
            lambda: extended(scaled(nn.Conv2D(2, 1, in_channels=5))),
            TypeError,
            "layer '3', a Conv2D, has 'weight', 'bias', 'scale'; expected 'weight', 'bias'",
        ),
        (
            lambda: extended(scaled(DOConv2D(5, 2, 3, use_bias=False), attribute=False)),
            TypeError,
            "'3', a DOConv2D, has 'weight', 'depthwise_weight', 'scale'; expected 'weight', 'dep",
        ),
        (lambda: extended(nn.Dense(2)), ValueError, "layer '3' needs the values of .*run it once"),
    ],
)
@pytest.mark.filterwarnings("ignore:Parameter .* is already initialized:UserWarning")
def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(model, error, message):
    state, model = export_state(network()), model()
    parameters = [p for block in (model[0], model[1]) for p in block.params.values()]
    before = [p.data().asnumpy() for p in parameters]
    with pytest.raises(error, match=message):
        load_state(model, state)
    for parameter, values in zip(parameters, before, strict=True):
        np.testing.assert_array_equal(parameter.data().asnumpy(), values)


def run(code, *options):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_imports_raise_no_warning():
    done = run("import doconv_mx; print(doconv_mx.import_gluoncv().__name__)", "-W", "error")
    assert done.stdout.split() == ["gluoncv"], done.stderr


STEPS = {
    "torch": "import torch, torch.nn; torch.zeros(1)",
    "tensorflow": "import tensorflow; tensorflow.zeros(1)",
    "gluoncv": "import sys, doconv_mx; before = sys.modules.get('torch', 0); "
    "assert doconv_mx.import_gluoncv() is doconv_mx.import_gluoncv(); "
    "assert sys.modules.get('torch', 0) is before; import gluoncv.model_zoo",
}


@pytest.mark.parametrize(
    "order",
    [
        ("gluoncv", "torch", "tensorflow"),
        ("torch", "gluoncv", "tensorflow"),
        ("tensorflow", "torch", "gluoncv"),
    ],
    ids="-".join,
)
def test_gluoncv_beside_the_other_frameworks(order):
    need("torch")
    need("tf")
    done = run("\n".join([*(STEPS[name] for name in order), "print('done')"]))
    assert done.stdout.split() == ["done"], done.stderr


def test_numpy_has_the_name_that_mxnet_takes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.bool is np.bool_
    assert doconv_mx.frameworks.import_mxnet() is mx
