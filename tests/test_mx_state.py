"""The canonical state of Gluon networks."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, export_state, load_state  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import MULTIPLIERS, close, equal, image, random_d, trained  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import nn, rnn  # noqa: E402

from doconv_core import State, StateError  # noqa: E402


def network(multiplier=12, bias=True, cls=DOConv2D, layout="NCHW"):
    options = {"groups": 2, "use_bias": bias, "layout": layout, "in_channels": 4}
    if cls is DOConv2D:
        options["depth_multiplier"] = multiplier
    net = nn.HybridSequential()
    net.add(cls(channels=6, kernel_size=3, **options), nn.Conv2D(5, 1, in_channels=6))
    net.add(nn.Dense(3, activation="relu", in_units=150))
    net.initialize(mx.init.Normal(0.2))
    return net


@MULTIPLIERS
def test_a_state_is_the_same_in_every_layout(multiplier):
    first, last = (network(multiplier, layout=layout) for layout in ("NCHW", "NHWC"))
    random_d(first[0])
    state = export_state(first)
    with pytest.raises(StateError, match="layer '2' may have the features of a flattened image"):
        load_state(last, state)
    load_state(last, state, ignore="flattening")
    again = export_state(last)
    assert list(again.layers) == list(state.layers)
    assert equal(again.arrays, state.arrays)
    np.testing.assert_array_equal(
        np.moveaxis(last[0].composed_kernel().asnumpy(), -1, 1),
        first[0].composed_kernel().asnumpy(),
    )


def test_a_network_that_has_run_takes_a_state():
    def network():
        net = nn.HybridSequential()
        net.add(nn.Conv2D(32, 3, in_channels=16), nn.BatchNorm(in_channels=32), nn.Flatten())
        net.initialize(mx.init.Normal(0.2))
        return net

    net, other, x = network(), network(), image(2, 16, 6, 6)
    net.hybridize()
    net(x).wait_to_read()  # which on a CPU may turn the order of the kernel in memory
    state = export_state(net)
    doubled = State(state.layers, {name: 2 * array for name, array in state.arrays.items()})
    load_state(net, doubled)
    assert equal(export_state(net).arrays, doubled.arrays)
    load_state(other, doubled)
    assert close(net(x), other(x))


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


def test_a_batch_norm_that_does_not_scale_has_no_gamma():
    norm, scaling = nn.BatchNorm(scale=False, in_channels=4), nn.BatchNorm(in_channels=4)
    for each in (norm, scaling):
        each.initialize()
    state = export_state(norm)
    assert list(state.arrays) == ["beta", "running_mean", "running_var"]
    scaling.gamma.set_data(mx.nd.array([1, 2, 3, 4]))
    load_state(scaling, state)
    assert equal(scaling.gamma.data(), mx.nd.ones(4))
    load_state(norm, export_state(scaling))


@pytest.mark.parametrize(
    ("layout", "norm", "expected"),
    [
        ("NCHW", lambda: nn.BatchNorm(axis=3, in_channels=5), 1),
        ("NCHW", lambda: nn.InstanceNorm(axis=2, in_channels=5), 1),
        ("NHWC", lambda: nn.BatchNorm(in_channels=5), 3),
        ("NCHW", lambda: nn.BatchNorm(in_channels=5), None),
        ("NHWC", lambda: nn.BatchNorm(axis=-1, in_channels=5), None),
    ],
)
def test_a_norm_is_of_the_channels_before_it(layout, norm, expected):
    inner = nn.HybridSequential()
    inner.add(nn.Conv2D(5, 1, in_channels=4, layout=layout), nn.Activation("relu"), norm())
    net = nn.HybridSequential()
    net.add(inner)
    net.initialize()
    if expected is None:
        assert list(export_state(net).layers) == ["0.0", "0.2"]
        return
    message = f"layer '0.2' is a .*is not that of the channels .*; expected axis={expected}"
    with pytest.raises(TypeError, match=message):
        export_state(net)


def scaled(block, attribute=True):
    """Return `block` with a parameter that a layer of its kind does not have."""
    scale = block.params.get("scale", shape=(1,))
    if attribute:
        block.scale = scale
    return block


UNFIT = [
    (lambda: nn.GroupNorm(1), "'3' is a GroupNorm with 'gamma', 'beta'; it has one gamma for each"),
    (
        lambda: nn.BatchNormReLU(in_channels=3),
        "'3' is a BatchNormReLU with 'gamma', .*; use a BatchNorm and an Activation",
    ),
    (
        lambda: nn.LayerNorm(axis=1, in_channels=3),
        "'3' is a LayerNorm .*; a layer norm over axis 1 has no counterpart; if it is the la",
    ),
    (
        lambda: rnn.LSTM(3, input_size=3),
        "'3' is a LSTM with 'l0_i2h_weight', .*; a canonical state holds convolutions, transp",
    ),
    (nn.BatchNorm, "layer '3' needs the values of .*gamma"),
    (
        lambda: scaled(nn.Conv2D(2, 1, in_channels=5)),
        "layer '3', a Conv2D, has 'weight', 'bias', 'scale'; expected 'weight', 'bias'",
    ),
    (
        lambda: scaled(DOConv2D(5, 2, 3, use_bias=False), attribute=False),
        "'3', a DOConv2D, has 'weight', 'depthwise_weight', 'scale'; expected 'weight', 'dep",
    ),
    (lambda: nn.Dense(2), "layer '3' needs the values of .*run it once"),
]


@pytest.mark.parametrize(("layer", "message"), UNFIT)
@pytest.mark.filterwarnings("ignore:Parameter .* is already initialized:UserWarning")
def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(layer, message):
    state, model = export_state(network()), network()
    model.add(layer())
    model.initialize()
    parameters = [p for block in (model[0], model[1]) for p in block.params.values()]
    before = [p.data().asnumpy() for p in parameters]
    with pytest.raises(ValueError if "needs the values" in message else TypeError, match=message):
        load_state(model, state)
    assert equal([p.data() for p in parameters], before)
