"""What is special to MXNet Gluon: everything a user does with `mxnet.gluon.nn.Conv2D`.

Files, the canonical state and the imports are in `test_mx_*.py`.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from cases import one_test, refuses
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, export_state, load_state  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import (  # noqa: E402
    IN_CHANNELS,
    MULTIPLIERS,
    RANKED,
    image,
    ordinary,
    random_d,
    trained,
)
from mxnet import autograd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

from doconv_core import compose, difference  # noqa: E402

LAYOUTS = pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
MODES = {
    "eager": None,
    "hybridized": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}


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
    assert same(layers[0].weight.data(), layers[1].weight.data())
    assert same(layers[0](x), layers[1](x))


@RANKED
@IN_CHANNELS
@pytest.mark.parametrize("mode", MODES)
@one_test
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("multiplier", [None, 13])
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


@one_test
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
    assert same(folded.weight.data(), kernel)
    assert repr(folded) == repr(nn.Conv2D(8, 3, in_channels=4, groups=groups, layout=layout))
    found = kernel.asnumpy()
    found = np.moveaxis(found, -1, 1) if layout == "NHWC" else found
    assert difference(found, expected).relative < 1e-14
    again = DOConv2D.from_conv(folded, depth_multiplier=multiplier)
    assert same(again.composed_kernel(), kernel)


@MULTIPLIERS
def test_half_precision_is_composed_in_float32_and_rounded_once(multiplier):
    """On the CPU, where MXNet has no half-precision convolution, composition and folding work."""
    layer = trained(multiplier, dtype="float16")
    wide = trained(multiplier)
    for name in ("weight", "depthwise_weight"):
        getattr(wide, name).set_data(getattr(layer, name).data().asnumpy())
    kernel = layer.composed_kernel()
    assert kernel.dtype == layer.fold().weight.data().dtype == np.float16
    assert same(kernel, wide.composed_kernel().astype("float16"))


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
        assert same(folded(x), layer(x))
        assert same(again(x), folded(x))


@RANKED
@IN_CHANNELS
def test_one_tap_is_the_ordinary_layer(do_conv, conv, in_channels):
    layer = do_conv(in_channels, 6, 1, groups=2, depth_multiplier=5, activation="relu")
    assert layer.depthwise_weight is None
    assert list(layer._collect_params_with_prefix()) == ["weight", "bias"]
    layer.initialize()
    x = image(2, 4, *[3] * int(conv.__name__[-2]))
    output = layer(x)
    assert same(layer.composed_kernel(), layer.weight.data())
    assert same(layer.fold()(x), output)
    assert "depth_multiplier" not in repr(layer)


def test_repr_names_the_channels_and_the_depth_multiplier():
    assert repr(DOConv2D(0, 6, 3, groups=2, depth_multiplier=12, activation="relu")) == (
        "DOConv2D(None -> 6, kernel_size=(3, 3), stride=(1, 1), groups=2, Activation(relu), "
        "depth_multiplier=12)"
    )
    assert repr(DOConv2D(4, 6, (3, 1), layout="NHWC", use_bias=False)) == (
        "DOConv2D(4 -> 6, kernel_size=(3, 1), stride=(1, 1), bias=False, depth_multiplier=3)"
    )


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
    assert all(same(p.data(), values) for p, values in zip(there, before, strict=True))


test_wrong_arguments_are_refused = refuses(
    lambda given: DOConv2D(**{"in_channels": 4, "channels": 6, "kernel_size": 3, **given}),
    ({"in_channels": -1}, ValueError, "in_channels must be at least 0; received in_channels=-"),
    ({"channels": 0}, ValueError, "^channels must be at least 1; received channels=0"),
    ({"channels": 2.5}, TypeError, "^channels must be an integer; received channels=2.5"),
    ({"groups": 3}, ValueError, "in_channels must be divisible by groups.*groups=3"),
    ({"in_channels": 0, "groups": 5}, ValueError, "^channels must be divisible.* channels=6"),
    ({"groups": 4}, ValueError, "^channels must be divisible by groups; received channels=6"),
    ({"in_channels": 0, "groups": 0}, ValueError, "groups must be at least 1"),
    ({"padding": -1}, ValueError, "padding must be at least 0; received padding=-1"),
    ({"layout": "NCW"}, ValueError, "layout must be 'NCHW' or 'NHWC'; received layout='NCW'"),
    ({"in_channels": 0, "depth_multiplier": 8}, ValueError, "must be at least the number"),
)


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


@MULTIPLIERS
def test_fold_keeps_what_the_layer_was(multiplier):
    layer = trained(multiplier, dtype="float64", activation="tanh")
    layer.hybridize(static_alloc=True)
    layer.weight.wd_mult, layer.bias.lr_mult = 0.5, 2.0
    folded = layer.fold()
    assert type(folded) is nn.Conv2D
    assert (folded.name, folded.weight.name) == (layer.name, layer.weight.name)
    assert (folded.weight.wd_mult, folded.bias.lr_mult) == (0.5, 2.0)
    assert folded._active
    assert folded._flags == layer._flags
    x = image(dtype="float64")
    assert same(folded(x), layer(x))
    with autograd.record():
        assert same(layer.fold()(x), folded(x))


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
    assert same(again(image()), folded(image()))


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


@pytest.mark.parametrize("multiplier", [None, 19])
@RANKED
def test_from_conv_does_not_change_the_function(do_conv, conv, multiplier):
    rank = int(conv.__name__[-2])
    plain = ordinary(conv, 2, use_bias=False, padding=1, activation="relu")
    plain.hybridize()
    layer = do_conv.from_conv(plain, depth_multiplier=multiplier)
    x = image(2, 4, *[5] * rank)
    assert same(layer(x), plain(x))
    assert layer.bias is None
    assert layer._active
    assert same(layer.fold().weight.data(), plain.weight.data())
    layer.weight.set_data(layer.weight.data() * 2)
    assert not same(layer(x), plain(x))
