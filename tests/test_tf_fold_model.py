"""Folding whole Keras models.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import json

import pytest
from frameworks import need

need("tf")

from keras_layers import array, assert_same  # noqa: E402
from keras_models import (  # noqa: E402
    EACH_KIND,
    KINDS,
    assert_equal_outputs,
    inputs_of,
    over_parameterized,
    traces,
    walk,
)

from doconv_tf import DOConv2D, fold, verify  # noqa: E402


@EACH_KIND
def test_folding_gives_ordinary_layers_of_the_same_function(kind):
    original, model, inputs = KINDS[kind](), over_parameterized(kind), inputs_of(kind)
    before = [array(v).copy() for v in model.weights]
    reference, first = fold(model)
    for value, variable in zip(before, model.weights, strict=True):
        assert_same(variable, value)
    assert_equal_outputs(model, reference, inputs)
    changed, second = fold(model, inplace=True)
    assert changed is model
    for folded, report in ((reference, first), (changed, second)):
        assert verify(reference, folded, inputs).absolute == 0
        types = [[type(layer) for _, layer in walk(m)] for m in (folded, original)]
        assert types[0] == types[1]
        shapes = [[(v.path, v.shape) for v in m.weights] for m in (folded, original)]
        assert shapes[0] == shapes[1]
        assert {change.after for change in report.changed} <= {
            "Conv1D", "Conv2D", "DepthwiseConv2D", "SeparableConv2D",
        }  # fmt: skip
        assert report.parameters_after == original.count_params()
        assert not traces(folded)
        again, report = fold(folded)
        assert not report.changed
        assert verify(folded, again, inputs).absolute == 0
        if kind != "subclassed":
            assert "doconv" not in json.dumps(folded.get_config(), default=repr).lower()


def test_a_layer_that_is_not_built_is_not_folded():
    with pytest.raises(ValueError, match=r"the model itself .* is not built"):
        fold(DOConv2D(3, 3))
