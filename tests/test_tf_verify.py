"""Comparing whole Keras models.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import pytest
from frameworks import need

need("tf")

from keras import ops  # noqa: E402
from keras_layers import array  # noqa: E402
from keras_models import filled, functional, images, sequential  # noqa: E402

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


def test_verify_takes_functions():
    model = filled(sequential())
    assert verify(model, lambda x: array(model(x)), images()).absolute == 0
