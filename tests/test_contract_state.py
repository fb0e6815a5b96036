"""The contract of canonical states of models: out and in, what fits, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from equal import assert_same, same
from frameworks import BACKENDS
from model_contract import Again, Layer, Net, conv, models_of, norm

from doconv_core import State, StateError

EACH = pytest.mark.parametrize("backend", BACKENDS)


def network(multiplier=12, bias=True, kind="do_conv", **more):
    """Return a model of every kind of layer that matters here, and some that have no weights."""
    multiplier = multiplier if kind != "conv" else None
    first = Layer(kind, 6, 4, groups=2, bias=bias, multiplier=multiplier)
    flat = {"flat": Layer("flatten"), "last": Layer("linear", 3, 5 * 8 * 7)}
    body = {"point": Layer("conv", 5, 6, 1), "drop": Layer("dropout")}
    return Net({"first": first, "relu": Layer("relu"), "body": body, **flat, **more})


@EACH
@pytest.mark.parametrize("multiplier", [None, 12])
def test_state_goes_out_and_in(backend, multiplier):
    models, net = models_of(backend), network(multiplier)
    package, x = models.package, net.input()
    model, other = models.train(models.build(net)), models.build(net)
    state = package.export_state(model)
    assert {path: form.kind for path, form in state.layers.items()} == {
        "first": "convolution", "body.point": "convolution", "last": "linear",
    }  # fmt: skip
    assert list(state.layers) == ["first", "body.point", "last"]
    assert state.origin["framework"] == BACKENDS[backend]
    assert state.arrays["first.weight"].shape == (6, 2, multiplier or 9)
    assert state.arrays["first.depthwise_weight"].shape == (4, 9, multiplier or 9)
    assert state.arrays["last.weight"].shape == (3, 280)
    package.load_state(other, state)
    assert same(models.outputs(other, x), models.outputs(model, x))
    layer = models.layers(model)["first"]
    names = {"weight", "depthwise_weight", "bias"}
    assert {n.rpartition(".")[2] for n in package.export_state(layer).arrays} == names
    before = {name: value.copy() for name, value in state.arrays.items()}
    models.step(model, x)
    assert_same(state.arrays, before, "the arrays are not the model's memory")


@EACH
def test_an_ordinary_state_enters_an_over_parameterized_model(backend):
    models, net = models_of(backend), network()
    plain, model = models.build(network(kind="conv")), models.train(models.build(net))
    models.package.load_state(model, models.package.export_state(plain))
    assert same(models.outputs(model, net.input()), models.outputs(plain, net.input()))


@EACH
def test_a_layer_that_occurs_twice_is_stored_once(backend):
    models = models_of(backend)
    net = Net({"conv": Layer("do_conv"), "relu": Layer("relu"), "again": Again("conv")})
    model = models.train(models.build(net))
    state, expected = models.package.export_state(model), models.outputs(model, net.input())
    assert list(state.layers) == ["conv"]
    models.step(model, net.input())
    models.package.load_state(model, state)
    assert same(models.outputs(model, net.input()), expected)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "tf"])
def test_parameters_that_layers_share_are_stored_with_each_and_must_agree(backend):
    models = models_of(backend)
    model = models.build(Net({"conv": conv, "tied": Layer("conv", tied="conv")}))
    state = models.package.export_state(model)
    np.testing.assert_array_equal(state.arrays["conv.weight"], state.arrays["tied.weight"])
    arrays = {name: array + 1 for name, array in state.arrays.items()}
    models.package.load_state(model, State(state.layers, arrays))
    found = models.package.export_state(model).arrays
    np.testing.assert_array_equal(found["tied.weight"], arrays["conv.weight"])
    arrays["tied.weight"] = arrays["tied.weight"] + 1
    with pytest.raises(StateError, match=r"'conv.weight' and 'tied.weight' are one parameter"):
        models.package.load_state(model, State(state.layers, arrays))
    layers = models.layers(model)
    assert layers["conv"].weight is layers["tied"].weight


new = Layer("linear", 2, 3)
UNFIT = {
    "ordinary": (network(kind="conv"), StateError, "'first.depthwise_weight'.*Fold the model"),
    "multiplier": (network(18), StateError, "'first.weight' is of .*multiplier=12.*multiplier=18"),
    "bias": (network(bias=False), StateError, "'first.bias' is there; expected a layer without"),
    "new": (network(new=new), StateError, "layer 'new' is not in the state, though the model has"),
    "norm": (
        network(norm=replace(norm, to=3, rank=1)),
        StateError,
        "layer 'norm' is not in the st",
    ),
    "subclass": (
        network(kind="doubled"),
        TypeError,
        "'first' is a Doubled with '(weight|kernel)', 'bias', '(dep.*|d_k.*)'; a canonical state",
    ),
}


@EACH
@pytest.mark.parametrize("name", UNFIT)
def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(backend, name):
    models, (net, error, message) = models_of(backend), UNFIT[name]
    state, model = models.package.export_state(models.build(network())), models.build(net)
    before = models.values(model)
    with pytest.raises(error, match=message):
        models.package.load_state(model, state)
    assert_same(models.values(model), before)


@EACH
def test_what_is_no_model_has_no_state(backend):
    models = models_of(backend)
    kind = {"torch": r"torch\.nn\.Module", "tf": r"keras\.Layer", "mx": r"mxnet\.gluon\.Block"}[
        backend
    ]
    state = models.package.export_state(models.build(network()))
    with pytest.raises(TypeError, match=rf"model must be a {kind}; received int"):
        models.package.export_state(3)
    with pytest.raises(TypeError, match=rf"model must be a {kind}; received dict"):
        models.package.load_state({}, state)


@EACH
def test_numbers_that_the_model_cannot_hold_are_refused(backend):
    models, net = models_of(backend), Net({"first": conv, "last": conv})
    package, half = models.package, models.build(net, dtype="float16")
    state, before = package.export_state(models.build(net)), models.values(half)

    def with_bias(*values):
        return State(state.layers, {**state.arrays, "last.bias": np.array(values, np.float32)})

    with pytest.raises(
        StateError, match=r"'last.bias' has 70000, which the model's float16 cannot"
    ):
        package.load_state(half, with_bias(1, -7e4, 0, 0))
    assert_same(models.values(half), before)
    package.load_state(half, with_bias(np.inf, np.nan, 0, 0))
    found = package.export_state(half).arrays["last.bias"]
    np.testing.assert_array_equal(found, np.array([np.inf, np.nan, 0, 0], "float16"))


@pytest.mark.parametrize("backend", ["torch", "tf"])
def test_a_state_of_bfloat16_loses_no_bit(backend):
    models, net = models_of(backend), Net({"conv": Layer("do_conv")})
    package, (model, other) = (
        models.package,
        (models.build(net, dtype="bfloat16") for _ in range(2)),
    )
    state = package.export_state(models.train(model))
    assert {array.dtype for array in state.arrays.values()} == {np.dtype(np.float32)}
    package.load_state(other, state)
    assert_same(package.export_state(other).arrays, state.arrays)
    assert_same(models.outputs(other, net.input()), models.outputs(model, net.input()))
