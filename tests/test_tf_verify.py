"""Comparing whole Keras models.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import pytest
from frameworks import need

need("tf")

from keras import ops  # noqa: E402
from keras_layers import array, assert_same  # noqa: E402
from keras_models import filled, functional, images, subclassed  # noqa: E402

from doconv_tf import fold, verify  # noqa: E402


def test_verify_takes_nested_inputs_and_outputs():
    model = filled(functional())
    other, _ = fold(model)
    a, b = images(seed=1), images(seed=2)
    assert verify(model, other, {"a": a, "b": b}).absolute == 0
    assert verify(model, other, [ops.convert_to_tensor(a), b]).absolute == 0
    head = other.get_layer("head")
    head.bias.assign(head.bias + 1)
    found = verify(model, other, [a, b])
    assert found.absolute == pytest.approx(1, abs=1e-4)
    assert 0 < found.relative < found.absolute


def test_verify_runs_in_inference_and_takes_functions():
    model = filled(subclassed())
    before = [array(v).copy() for v in model.weights]
    assert verify(model, model, images()).absolute == 0  # no dropout
    for variable, value in zip(model.weights, before, strict=True):
        assert_same(variable, value)  # no statistics
    assert verify(model, lambda x: array(model(x)), images()).absolute == 0
    assert verify(lambda x: (1.0, None), lambda x: (3.0, None), images()) == (2, 2)
    with pytest.raises(TypeError, match=r"output '1' is a builtins\.str; expected tensors"):
        verify(lambda x: (1.0, "text"), model, images())
    with pytest.raises(ValueError, match="different structures"):
        verify(model, lambda x: [array(model(x))], images())
