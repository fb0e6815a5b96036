"""Folding whole Keras models.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import array, assert_same  # noqa: E402
from keras_models import (  # noqa: E402
    EACH_KIND,
    KINDS,
    SHAPE,
    assert_equal_outputs,
    images,
    inputs_of,
    over_parameterized,
    sequential,
    traces,
)

from doconv_core import NotFoldable  # noqa: E402
from doconv_tf import DOConv2D, fold, verify  # noqa: E402
from doconv_tf.ordinary import walk  # noqa: E402


@EACH_KIND
@pytest.mark.parametrize("inplace", [False, True])
def test_folding_gives_ordinary_layers_of_the_same_function(kind, inplace, tmp_path):
    original = KINDS[kind]()
    model = over_parameterized(kind)
    inputs = inputs_of(kind)
    reference, _ = fold(model)
    before = [array(v).copy() for v in model.weights]
    for value, variable in zip(before, model.weights, strict=True):
        assert_same(variable, value)
    if not inplace:
        assert_equal_outputs(model, reference, inputs)
    folded, report = fold(model, inplace=inplace)
    assert (folded is model) == inplace
    assert verify(reference, folded, inputs).absolute == 0
    assert [type(layer) for _, layer in walk(folded)] == [
        type(layer) for _, layer in walk(original)
    ]
    assert [v.path for v in folded.weights] == [v.path for v in original.weights]
    assert [v.shape for v in folded.weights] == [v.shape for v in original.weights]
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


def test_no_trace_is_left_in_the_files(tmp_path):
    model = over_parameterized("sequential")
    model.compile("adam", "mse")
    model.fit(images(), np.ones((2, 2), "float32"), verbose=0)
    model.save(tmp_path / "before.keras")
    folded, _ = fold(model)
    folded.save(tmp_path / "model.keras")
    folded.save_weights(tmp_path / "model.weights.h5")
    for name, expected in (("before", True), ("model", False)):
        archive = zipfile.ZipFile(tmp_path / f"{name}.keras")
        content = b"".join(archive.read(member) for member in archive.namelist()).lower()
        assert (b"doconv" in content) == expected
        assert (b"depthwise" in content) == expected
    content = (tmp_path / "model.weights.h5").read_bytes().lower()
    assert b"doconv" not in content
    assert b"depthwise" not in content
    ordinary = sequential()
    ordinary.load_weights(tmp_path / "model.weights.h5")
    assert verify(model, ordinary, images()).absolute == 0
    assert verify(keras.saving.load_model(tmp_path / "model.keras"), ordinary, images())[0] == 0


class Doubled(DOConv2D):
    """Computes something else."""

    def call(self, inputs):
        return 2 * super().call(inputs)


def test_what_is_not_foldable_is_named_before_anything_is_changed():
    inputs = keras.Input(SHAPE[1:])
    x = DOConv2D(3, 3, name="plain")(inputs)
    model = keras.Model(inputs, Doubled(3, 3, name="twice")(x))
    for inplace in (False, True):
        with pytest.raises(NotFoldable, match=r"layer 'twice': .*Doubled has a call of its own"):
            fold(model, inplace=inplace)
    assert type(model.get_layer("plain")) is DOConv2D
    model = keras.Model(inputs, DOConv2D(3, 3, name="patched")(inputs))
    model.get_layer("patched").call = ops.relu
    with pytest.raises(NotFoldable, match="layer 'patched': its forward pass was replaced"):
        fold(model)
    with pytest.raises(ValueError, match=r"the model itself .* is not built"):
        fold(DOConv2D(3, 3))
    layer = DOConv2D(3, 3)
    layer.build((None, 9, 9, 3))
    folded, report = fold(layer, inplace=True)
    assert folded is layer
    assert type(layer) is layers.Conv2D
    assert "folded 1 layer, left 0" in str(report)
