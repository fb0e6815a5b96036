"""The contract of comparing models: every backend tells the same difference and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from equal import same
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
    for name, value in models.values(twin).items():
        np.testing.assert_array_equal(models.values(model)[name], value, err_msg=name)
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
