"""Layers of branches with batch norms in Keras' files: folded as in Python, and loaded by Keras."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import tail_but
from command_line import IMPOSSIBLE, doconv
from equal import assert_close
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402

import doconv_tf as package  # noqa: E402
from doconv_core import CheckpointError, NotFoldable, fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_core.files.normed import UNTOLD  # noqa: E402
from doconv_core.kinds.normed import RULES  # noqa: E402

EXACT = 1e-6  # two ways to the same float32 result
EPSILON = 2e-3


@pytest.fixture(autouse=True)
def names():
    """Let layers be numbered from the start."""
    keras.utils.clear_session()


def unit(x, conv):
    return layers.ReLU()(layers.BatchNormalization(epsilon=EPSILON)(conv(x)))


def network(rule, **options):
    """Return a model of each class of layers, beside ordinary ones, with values as trained."""
    size = 7 if rule in ("replknet", "unireplknet") else 3
    x = y = keras.Input((9, 8, 4))
    y = unit(y, layers.Conv2D(6, size, padding="same", name="first"))
    y = layers.Conv2D(6, 1, name="bare")(y)
    y = unit(y, layers.DepthwiseConv2D(size, depth_multiplier=2, padding="same"))
    inner = z = keras.Input((9, 8, 12))
    z = unit(z, layers.Conv2D(12, size, padding="same", groups=3, use_bias=False))
    y = keras.Model(inner, z, name="inner")(y)
    model, report = package.over_parameterize(keras.Model(x, y), kind=rule, **options)
    assert len(report.changed) == 3
    return trained(model)


def trained(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        drawn = rng.standard_normal(variable.shape) * 0.3
        variable.assign(rng.uniform(0.5, 2, drawn.shape) if "variance" in variable.path else drawn)
    return model


def images(model):
    return np.random.default_rng(1).standard_normal((2, *model.input_shape[1:])).astype("f4")


@pytest.mark.parametrize("rule", tail_but((r for r in RULES if r != "qarepvgg"), "acnet", "dbb"))
def test_files_are_folded_as_the_model_is(rule, tmp_path):
    model = network(rule)
    x, expected = images(model), package.fold(model).model
    file, out = tmp_path / "in.keras", tmp_path / "out.keras"
    model.save(file)
    report = fold_checkpoint(file, out)
    assert len(report.changed) == 3
    assert all("epsilon" not in change.before for change in report.changed)
    loaded = keras.models.load_model(out)
    assert {type(layer).__module__.split(".")[0] for layer in loaded._flatten_layers()} == {"keras"}
    assert_close(loaded.predict(x, verbose=0), expected.predict(x, verbose=0), 1e-5)
    for one, other in zip(loaded.weights, expected.weights, strict=True):
        assert_close(np.asarray(one), np.asarray(other), EXACT)
    doconv("verify", file, out)

    file, out = tmp_path / "in.weights.h5", tmp_path / "out.weights.h5"
    model.save_weights(file)
    fold_checkpoint(file, out, epsilon=EPSILON)
    doconv("verify", file, out, "--epsilon", EPSILON)
    for variable in loaded.weights:
        variable.assign(np.zeros(variable.shape))
    loaded.load_weights(out)
    assert_close(loaded.predict(x, verbose=0), expected.predict(x, verbose=0), 1e-5)


@keras.saving.register_keras_serializable(package="tests")
class Net(keras.Model):
    """A model of which a layer of branches is an attribute."""

    def __init__(self, stem, block, **options):
        super().__init__(**options)
        self.stem, self.blocks = stem, [block, layers.ReLU()]

    def call(self, inputs):
        x = self.stem(inputs)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_layer_that_is_an_attribute(tmp_path):
    normed = package.NormedConv2D
    model = Net(normed(6, 3, rule="dbb", padding="same"), normed(6, 3, rule="acnet"))
    model(np.zeros((1, 9, 8, 4), "f4"))
    trained(model)
    model.save_weights(tmp_path / "in.weights.h5")
    fold_checkpoint(tmp_path / "in.weights.h5", tmp_path / "out.weights.h5", epsilon=1e-3)
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 4)).astype("f4")
    folded = Net(model.stem.fold(), model.blocks[0].fold())
    folded(x)
    trained(folded)
    folded.load_weights(tmp_path / "out.weights.h5")
    assert_close(np.asarray(folded(x)), np.asarray(model(x)), 1e-5)


def test_half_precision_is_rounded_once(tmp_path):
    x = keras.Input((6, 6, 4), dtype="bfloat16")
    y = layers.Conv2D(4, 3, padding="same", dtype="bfloat16", name="conv2d")(x)
    y = layers.BatchNormalization(epsilon=EPSILON, dtype="bfloat16")(y)
    model = keras.Model(x, y)
    model = trained(package.over_parameterize(model, kind="repvgg").model)
    model.save_weights(tmp_path / "in.weights.h5")
    fold_checkpoint(tmp_path / "in.weights.h5", tmp_path / "out.weights.h5", epsilon=EPSILON)
    folded = package.fold(model).model
    with open_checkpoint(tmp_path / "out.weights.h5") as found:
        own = {layer.path: layer for layer in found.layers}["conv2d"]
        kernel, bias = (found.read(own.entries[role]) for role in ("weight", "bias"))
    conv = next(layer for layer in folded.layers if isinstance(layer, layers.Conv2D))
    assert np.array_equal(kernel, np.asarray(conv.kernel).astype("f4"))
    assert np.array_equal(bias, np.asarray(conv.bias).astype("f4"))


def test_what_a_file_does_not_tell_is_refused_or_said(tmp_path):
    file, out = tmp_path / "in.weights.h5", tmp_path / "out.weights.h5"
    network("repvgg").save_weights(file)
    error = "nothing in the file tells the epsilon of its batch norms, which is Keras' 0.001"
    with pytest.raises(NotFoldable, match=error):
        fold_checkpoint(file, out)
    doconv("fold", file, out, code=IMPOSSIBLE, error=error)
    doconv("verify", file, file)
    told = "the file does not tell the epsilon of the blocks' batch norms: "
    assert f"{told}--epsilon says it" in doconv("inspect", file).stdout
    rows = json.loads(doconv("inspect", file, "--json").stdout)["layers"]
    blocks = {row["path"]: row["block"] for row in rows if row["block"]}
    assert {*blocks} == {"first", "inner.conv2d", "depthwise_conv2d"}
    names = [f"layers/normed_conv2d/vars/{n}" for n in (0, 1)]
    assert blocks["first"]["folds_to"] == names
    network("qarepvgg").save(tmp_path / "in.keras")
    with pytest.raises(CheckpointError, match=UNTOLD):
        fold_checkpoint(tmp_path / "in.keras", tmp_path / "out.keras")
    assert not out.exists()
    assert not (tmp_path / "out.keras").exists()
