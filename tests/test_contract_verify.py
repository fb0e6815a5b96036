"""The contract of comparing models: every backend tells the same difference and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from equal import as_array, assert_same, same
from frameworks import BACKENDS
from model_contract import BRANCHES, Layer, Net, conv, models_of

from doconv_core import Difference, State

EACH = pytest.mark.parametrize("backend", BACKENDS)


@EACH
def test_equal_models_and_different_ones(backend):
    models, net = models_of(backend), Net({"relu": Layer("relu"), "head": conv})
    package, model, x = models.package, models.build(net), net.input()
    model = models.train(package.over_parameterize(model)[0])
    folded, _ = package.fold(model)
    given = models.array(x if backend != "tf" else np.moveaxis(x, 1, -1))
    assert package.verify(model, folded, given) == Difference(0.0, 0.0)
    state = package.export_state(folded)
    arrays = {**state.arrays, "head.bias": state.arrays["head.bias"] + np.float32(0.5)}
    package.load_state(folded, State(state.layers, arrays))
    (output,) = models.outputs(model, x)
    absolute, relative = package.verify(model, folded, given)
    assert absolute == pytest.approx(0.5, rel=1e-5)
    assert relative == pytest.approx(0.5 / np.abs(output).max(), rel=1e-5)


@EACH
def test_it_is_in_inference_and_changes_nothing(backend):
    models, x = models_of(backend), BRANCHES.input()
    verify, (model, twin) = models.package.verify, (models.build(BRANCHES) for _ in range(2))
    given = models.array(x if backend != "tf" else np.moveaxis(x, 1, -1))
    before = np.array(x)
    for inputs in (given, given if backend == "tf" else (given,)):
        assert verify(model, model, inputs) == (0.0, 0.0), "no dropout"
        assert verify(model, twin, inputs) == (0.0, 0.0)
    assert_same(models.values(model), models.values(twin))
    assert same(models.outputs(model, x), models.outputs(twin, x))
    np.testing.assert_array_equal(x, before)


STRUCTURES = {
    "alone": lambda x: x,
    "tuple": lambda x: (x, [x, {"a": x}], None),
    "mapping": lambda x: {"a": x, "b": (x, x)},
    "numbers": lambda x: {"parts": [(x,), None], "number": 3, "flag": True, "half": 2.5},
    "NumPy": lambda x: {"found": x, "other": [np.float32(4), np.ones(2)]},
}


@EACH
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_array_of_nested_outputs_is_compared(backend, structure):
    models, build = models_of(backend), STRUCTURES[structure]
    x = models.array(np.array([[1.0, -2.0], [0.0, 4.0]], np.float32))
    more = models.array(np.array([[0.0, 0.0], [0.0, 1.0]], np.float32))
    a, b = models.returning(build), models.returning(lambda x: build(x + more))
    assert models.package.verify(a, a, x) == Difference(0.0, 0.0)
    assert models.package.verify(a, b, x) == Difference(1.0, 0.25)
    assert models.package.verify(a, lambda x: build(x + more), x) == Difference(1.0, 0.25)


@EACH
@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (lambda x: (x, x), lambda x: (x,), ValueError, "different structures: '0' and '0', '1'"),
        (lambda x: {"a": x}, lambda x: {"b": x}, ValueError, "different structures: 'b' and 'a'"),
        (lambda x: x, lambda x: [x], ValueError, "the outputs have different structures"),
        (lambda x: x, lambda x: {"s": x, "p": [(x,)]}, ValueError, r"'s', 'p\.0\.0'"),
        (lambda x: x, lambda x: x[:1], ValueError, r"a result of shape \(2, 4, 8, 7\); received"),
        (lambda x: {"a": x}, lambda x: {"a": x[:1]}, ValueError, "output 'a': expected a"),
        (lambda x: None, lambda x: None, ValueError, "hold no arrays"),
        (lambda x: [x, "text"], lambda x: x, TypeError, r"output '1' is a (builtins\.)?str; expec"),
        (lambda x: x, lambda x: {"p": [x, "3"]}, TypeError, r"output 'p\.1' is a (builtins\.)?str"),
    ],
)
def test_outputs_that_cannot_be_compared(backend, a, b, error, message):
    models = models_of(backend)
    with pytest.raises(error, match=message):
        models.package.verify(
            models.returning(a), models.returning(b), models.array(BRANCHES.input())
        )


@EACH
def test_a_nan_is_equal_to_nothing(backend):
    models, x = models_of(backend), np.array([[1.0, -2.0]], np.float32)
    verify, given = models.package.verify, models.array(x)
    for bad in (np.nan, np.inf):
        diverged = models.returning(lambda x, bad=bad: {"a": x, "b": x * 0 + bad})
        assert np.isnan(verify(diverged, diverged, given)).all()
        right = models.returning(lambda x: {"a": x, "b": x * 0})
        assert verify(right, diverged, given) == (np.inf, np.inf)


# Of whose models inputs are several arguments, or one; Keras' take one, which may be nested.
SEVERAL = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "tf"])


@SEVERAL
def test_a_tuple_is_several_arguments_and_a_list_is_one(backend):
    models = models_of(backend)
    verify, x, y = models.package.verify, *(models.array(BRANCHES.input(n)) for n in (1, 2))
    a, b = models.returning(lambda x, y: x - y), models.returning(lambda x, y: y - x)
    assert verify(a, b, (x, x)) == (0.0, 0.0)
    assert verify(a, b, (x, y)).relative == 2
    total = models.returning(lambda pair: pair[0] + pair[1])
    for each in (sum, models.returning(sum)):
        assert verify(total, each, [x, y]) == (0.0, 0.0)


@SEVERAL
def test_each_model_is_given_inputs_of_its_own(backend):
    def forward(x, states):
        x += 1
        states[0] *= 2
        return x + states[0]

    models, values = models_of(backend), BRANCHES.input()
    x, states = models.array(values), [models.array(values)]
    for a in (forward, models.returning(forward)):
        assert models.package.verify(a, models.returning(forward), (x, states)) == (0.0, 0.0)
    assert_same(x, values)
    assert_same(states[0], values)


@EACH
def test_functions_may_return_numpy_arrays_and_numbers(backend):
    models, x = models_of(backend), np.ones((2, 2), np.float32)
    verify, given, weight = models.package.verify, models.array(x), np.float32(2)
    doubled = models.returning(lambda x: 2 * x)
    assert verify(doubled, lambda x: as_array(x) * weight, given) == (0.0, 0.0)
    assert verify(lambda x: (1.0, None), lambda x: (3.0, None), given) == (2, 2)
    assert verify(lambda x: [4.0], lambda x: [as_array(x)[0, 0] + 4], given) == (1.0, 0.25)
    numbers = lambda x: (3, 2.5, True, np.float32(4))  # noqa: E731
    assert verify(numbers, numbers, given) == (0.0, 0.0)
