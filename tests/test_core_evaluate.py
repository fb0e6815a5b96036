import math
from itertools import groupby

import numpy as np
import pytest
from cases import one_test, refuses
from described import KINDS, NETWORKS, alone, input_of, state_of, whole

from doconv_core import State, StateError, compose, difference
from doconv_core.networks.evaluate import evaluate, gradients
from doconv_core.networks.initialize import initialize
from doconv_core.networks.nodes import (
    ACTIVATIONS,
    Activation,
    BatchNorm,
    Conv,
    Dropout,
    Network,
    Pool,
    sequence,
)
from doconv_core.networks.shapes import infer
from doconv_core.state.layers import LayerForm

both_modes = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
every_network = pytest.mark.parametrize("name", NETWORKS)
STEP = 1e-6
TRAINED = ("weight", "depthwise_weight", "bias", "gamma", "beta")


def weights_like(output):
    return np.random.default_rng(7).normal(size=output.shape)


@one_test
@every_network
@both_modes
def test_gradients_are_the_slopes_of_the_output(name, training):
    network = NETWORKS[name]
    state, x = state_of(network), input_of(network)
    dy = weights_like(evaluate(network, state, x, training=training))
    found = gradients(network, state, x, dy, training=training)

    def loss(arrays, x):
        output = evaluate(network, State(state.layers, arrays), x, training=training)
        return (output * dy).sum()

    random = np.random.default_rng(9)
    size = abs(loss(state.arrays, x)) + 1
    for layer, entries in groupby(found.parameters, key=lambda entry: entry.rpartition(".")[0]):
        towards = {n: random.normal(size=found.parameters[n].shape) for n in entries}
        up, down = (
            state.arrays | {n: state.arrays[n] + s * STEP * t for n, t in towards.items()}
            for s in (1, -1)
        )
        slope = (loss(up, x) - loss(down, x)) / (2 * STEP)
        expected = sum((found.parameters[n] * t).sum() for n, t in towards.items())
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-7 * size), layer
    towards = random.normal(size=x.shape)
    slope = loss(state.arrays, x + STEP * towards) - loss(state.arrays, x - STEP * towards)
    expected = (found.x * towards).sum()
    assert slope / (2 * STEP) == pytest.approx(expected, rel=1e-5, abs=1e-7 * size)


@one_test
@every_network
def test_every_trained_entry_has_a_gradient_in_the_order_of_the_state(name):
    network = NETWORKS[name]
    state, x = state_of(network), input_of(network)
    output = evaluate(network, state, x)
    found = gradients(network, state, x, np.ones_like(output))
    trained = {n: a.shape for n, a in state.arrays.items() if n.rsplit(".")[-1] in TRAINED}
    assert {n: gradient.shape for n, gradient in found.parameters.items()} == trained
    assert list(found.parameters) == list(trained)
    assert found.x.shape == x.shape
    assert output.shape[1:] == infer(network)[""].after


@one_test
@every_network
@both_modes
def test_float32_stays_float32_and_is_close_to_float64(name, training):
    network = NETWORKS[name]
    state, x = state_of(network), input_of(network)
    expected = evaluate(network, state, x, training=training)
    output = evaluate(network, state, x.astype(np.float32), training=training)
    dy = weights_like(output)
    exact = gradients(network, state, x, dy, training=training)
    found = gradients(network, state, x.astype(np.float32), dy, training=training)
    for a in (output, found.x, *found.parameters.values()):
        assert a.dtype == np.float32
    assert difference(output, expected).relative < 1e-5
    assert difference(found.x, exact.x).relative < 1e-4


def test_an_ordinary_state_computes_the_same_in_a_doconv_network():
    ordinary, over = whole(KINDS["conv"]), whole(KINDS["doconv"])
    state, x = state_of(ordinary), input_of(ordinary)
    expected = evaluate(ordinary, state, x)
    assert np.array_equal(evaluate(over, state, x), expected)
    found = gradients(over, state, x, np.ones_like(expected)).parameters
    assert found["stem.depthwise_weight"].any()


def test_a_doconv_network_computes_with_the_composed_kernel():
    over, folded = whole(KINDS["doconv"]), whole(KINDS["conv"])
    state, x = state_of(over), input_of(over)
    arrays, layers = dict(state.arrays), dict(state.layers)
    for path, form in state.layers.items():
        if form.over_parameterized:
            w, d = arrays[f"{path}.weight"], arrays.pop(f"{path}.depthwise_weight")
            arrays[f"{path}.weight"] = compose(w, d, form.spec).reshape(w.shape)
            layers[path] = LayerForm(form.spec, bias=form.bias, geometry=form.geometry)
    expected = evaluate(folded, State(layers, arrays), x)
    assert difference(evaluate(over, state, x), expected).relative < 1e-12


FORMULAS = {
    "relu": lambda x: x * (x > 0),
    "relu6": lambda x: x * (0 < x <= 6) + 6 * (x > 6),
    "hard_sigmoid": lambda x: (x + 3) / 6 * (-3 < x <= 3) + (x > 3),
    "hard_swish": lambda x: x * ((x + 3) / 6 * (-3 < x <= 3) + (x > 3)),
    "tanh": lambda x: 1 - 2 / (math.exp(2 * x) + 1),
}


@one_test
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_its_formula(name):
    network = Network("net", sequence(("act", Activation(name))), (1, 1, 161))
    x = np.linspace(-8, 8, 161).reshape(1, 1, 1, 161)
    expected = [FORMULAS[name](value) for value in x.ravel()]
    found = evaluate(network, initialize(network), x)
    assert difference(found.ravel(), expected).relative < 1e-12


def test_the_first_of_equal_entries_has_a_max_pools_gradient():
    network = alone("ties", Pool("max", 2, 2))
    state, x = initialize(network), np.zeros((1, 3, 6, 6))
    arrays = {name: np.zeros_like(a) for name, a in state.arrays.items()}
    arrays["1.weight"][:3, :, 4] = np.eye(3)  # the middle tap: the input as it is
    found = gradients(network, State(state.layers, arrays), x, np.ones((1, 6, 3, 3)))
    expected = np.zeros((6, 6))
    expected[::2, ::2] = 1
    assert np.array_equal(found.x[0, 0], expected)


def test_arguments_are_left_as_they_were():
    network = whole(KINDS["bsconvs_bn"])
    state, x = state_of(network), input_of(network)
    before = {name: array.copy() for name, array in state.arrays.items()}
    kept = x.copy()
    output = evaluate(network, state, x, training=True)
    gradients(network, state, x, output, training=True)
    assert np.array_equal(x, kept)
    assert all(np.array_equal(before[name], a) for name, a in state.arrays.items())


def test_dropout_is_nothing_in_inference_and_refused_in_training():
    network, without = alone("dropout", Dropout(0.5)), alone("without")
    state, x = state_of(network), input_of(network)
    assert np.array_equal(evaluate(network, state, x), evaluate(without, state, x))
    with pytest.raises(ValueError, match=r"random in training.*received rate=0\.5"):
        evaluate(network, state, x, training=True)


def test_a_state_of_another_network_is_refused_by_name():
    network, other = whole(KINDS["conv"]), whole(KINDS["bsconvu"])
    x = input_of(network)
    with pytest.raises(StateError, match=r"not one of 'whole_conv': layer 'stem' is not in"):
        evaluate(network, state_of(other), x)
    with pytest.raises(StateError, match=r"'stem\.depthwise_weight' is for an over-para"):
        gradients(network, state_of(whole(KINDS["doconv"])), x, np.zeros((3, 5)))
    with pytest.raises(StateError, match=r"stride is \(2, 2\) in the state, \(1, 1\) in"):
        evaluate(alone("a", Conv(4, (3, 3))), state_of(alone("b", Conv(4, (3, 3), 2))), x)


@pytest.mark.parametrize(
    "call", [evaluate, lambda *args: gradients(*args, np.zeros((3, 6, 7, 6)))], ids=["out", "back"]
)
def test_another_momentum_is_warned_of_where_the_call_is(call):
    network, other = (alone("net", BatchNorm(momentum=m)) for m in (0.1, 0.2))
    state, x = state_of(other), input_of(network)
    with pytest.warns(UserWarning, match=r"'2' \(0\.2, here 0\.1\)") as warned:
        call(network, state, x)
    assert [each.filename for each in warned] == [__file__]


POOLED = alone("net", Pool("max", 2, 2))
test_inputs_that_do_not_fit_are_refused = refuses(
    lambda x: evaluate(POOLED, initialize(POOLED), x),
    (np.zeros((1, 3, 7, 6), int), TypeError, "x must be an array of floats; received .*int64"),
    (np.zeros((1, 3, 7, 6), np.float16), TypeError, "float32 or float64; received float16"),
    (np.zeros((3, 7, 6)), ValueError, r"\(B, C, H, W\); received shape \(3, 7, 6\)"),
    (np.zeros((1, 2, 7, 6)), StateError, r"not one of 'net': entry '1\.weight' is of .*"),
    (np.zeros((1, 3, 1, 6)), ValueError, r"'2' needs at least 2 rows.*received 1"),
)


def test_an_output_gradient_of_another_shape_is_refused():
    network = alone("net")
    x = input_of(network)
    with pytest.raises(ValueError, match=r"must have shape \(3, 6, 7, 6\); received \(3, 6\)"):
        gradients(network, initialize(network), x, np.zeros((3, 6)))
