"""Keras' separable and one-dimensional depthwise layers in checkpoint files."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
from checkpoint_files import numbers, refused
from equal import close
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras_checkpoints import randomized  # noqa: E402

from doconv_core import difference, write_state  # noqa: E402
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_tf import (  # noqa: E402
    DODepthwiseConv1D,
    DODepthwiseConv2D,
    DOSeparableConv1D,
    DOSeparableConv2D,
    export_state,
)

layers = keras.layers


pytestmark = pytest.mark.usefixtures("afresh", "unprobed")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.keras"


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "model.weights.h5"


def network(multiplier=None):
    """A model with every such layer, of one tap too, among the ordinary ones of its class."""
    more = {"d_multiplier": multiplier}
    x = inputs = keras.Input((9, 3))
    x = layers.SeparableConv1D(4, 2)(x)
    x = DOSeparableConv1D(5, 3, depth_multiplier=2, name="one", **more)(x)
    x = DOSeparableConv1D(5, 2, use_bias=False, **more)(x)
    x = DODepthwiseConv1D(2, depth_multiplier=2, **more)(x)
    x = layers.DepthwiseConv1D(2)(x)
    x = DOSeparableConv1D(6, 1)(x)
    x = layers.Reshape((3, 2, 3))(x)
    shared = DOSeparableConv2D(3, 2, padding="same", activation="relu", **more)
    x = shared(shared(x))
    x = layers.SeparableConv2D(3, 2, padding="same")(x)
    x = keras.Sequential([DOSeparableConv2D(4, (1, 2), **more)], name="inner")(x)
    return randomized(keras.Model(inputs, layers.Flatten()(x)))


def outputs(model):
    return keras.ops.convert_to_numpy(model(numbers(2, 9, 3)))


@pytest.mark.parametrize("multiplier", [None, 12])
def test_a_folded_archive_loads_as_an_ordinary_model(file, tmp_path, multiplier):
    model = network(multiplier)
    model.save(file)
    report = fold_checkpoint(file, tmp_path / "out.keras")
    assert [change.path for change in report.changed] == [
        "do_depthwise_conv1d", "one.depthwise", "do_separable_conv1d.depthwise",
        "do_separable_conv2d.depthwise", "inner.do_separable_conv2d_1.depthwise",
    ]  # fmt: skip
    assert report.left == ()
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    assert report.parameters_before == model.count_params()
    assert report.parameters_after == loaded.count_params()
    for layer in loaded._flatten_layers():
        assert type(layer).__module__.startswith("keras.")
    assert type(loaded.get_layer("one")) is layers.SeparableConv1D
    assert loaded.get_layer("one").depth_multiplier == 2
    assert difference(outputs(loaded), outputs(model)).relative <= 1e-5
    with zipfile.ZipFile(tmp_path / "out.keras") as archive:
        text = archive.read("config.json")
    assert not re.search(rb"doconv|DO[A-Z]|d_multiplier|d_initializer", text)
    assert fold_checkpoint(tmp_path / "out.keras", tmp_path / "twice.keras").changed == ()


@pytest.mark.parametrize("multiplier", [None, 12])
def test_folded_weights_load_into_the_ordinary_model(file, weights, tmp_path, multiplier):
    model = network(multiplier)
    model.save(file)
    fold_checkpoint(file, tmp_path / "out.keras")
    plain = keras.saving.load_model(tmp_path / "out.keras")
    for weight in plain.weights:
        weight.assign(weight * 0)
    model.save_weights(weights)
    sizes = {"*separable_conv2d_1.*": (1, 2), "*separable_conv2d.*": (2, 2)} if multiplier else {}
    fold_checkpoint(weights, tmp_path / "out.weights.h5", kernel_sizes=sizes)
    plain.load_weights(tmp_path / "out.weights.h5")
    assert difference(outputs(plain), outputs(model)).relative <= 1e-5


def test_one_dimension_leaves_no_kernel_size_open(weights):
    network(12).save_weights(weights)
    with open_checkpoint(weights) as checkpoint:
        unknown = {x.path for x in checkpoint.layers if x.kernel_shape is None}
    assert unknown == {
        "do_separable_conv2d.depthwise", "inner.do_separable_conv2d_1.depthwise"
    }  # fmt: skip
    refused(weights, r"layer '.*conv2d.*\.depthwise': its kernel size is not")


@pytest.mark.parametrize("multiplier", [None, 12])
def test_the_layers_are_those_of_a_canonical_state(file, multiplier):
    model = network(multiplier)
    model.save(file)
    state = export_state(model)
    with open_checkpoint(file) as checkpoint:
        found = {layer.path: layer for layer in checkpoint.layers}
        assert {p: x.spec for p, x in found.items()} == {p: f.spec for p, f in state.layers.items()}
        for path, form in state.layers.items():
            layer = found[path]
            assert layer.kind == "convolution"
            assert layer.over_parameterized == form.over_parameterized
            weight, depthwise = checkpoint.pair(layer)
            assert np.array_equal(weight.ravel(), state.arrays[f"{path}.weight"].ravel())
            if depthwise is not None:
                assert np.array_equal(depthwise, state.arrays[f"{path}.depthwise_weight"])


class Attributes(keras.Model):
    """Layers whose groups are named for attributes, and which have names of their own."""

    def __init__(self, separable, depthwise, thin):
        super().__init__()
        self.a = separable(4, (2, 3), depth_multiplier=2, name="first")
        self.b = depthwise((3, 2), depth_multiplier=2, name="second")
        self.c = thin(3, 2, name="third")
        self.d = depthwise(2, depth_multiplier=2, use_bias=False, name="fourth")

    def call(self, x):
        x = self.b(self.a(self.d(x)))
        return self.c(keras.ops.reshape(x, (len(x), -1, x.shape[-1])))


def test_layers_that_no_class_tells(weights, tmp_path):
    model = Attributes(DOSeparableConv2D, DODepthwiseConv2D, DOSeparableConv1D)
    plain = Attributes(layers.SeparableConv2D, layers.DepthwiseConv2D, layers.SeparableConv1D)
    x = numbers(2, 7, 7, 3)
    plain(x), model(x)
    randomized(model).save_weights(weights)
    with open_checkpoint(weights) as checkpoint:
        shapes = {layer.path: layer.kernel_shape for layer in checkpoint.layers}
    assert shapes == {
        "first.depthwise": (12, 1, 2, 3), "first.pointwise": (4, 12, 1, 1), "second": (8, 1, 3, 2),
        "third.depthwise": (8, 1, 2), "third.pointwise": (3, 8, 1),
        "fourth": (2, 3, 2, 2),  # which a depthwise kernel without bias looks like
    }  # fmt: skip
    fold_checkpoint(weights, tmp_path / "out.weights.h5")
    plain.load_weights(tmp_path / "out.weights.h5")
    found, expected = (keras.ops.convert_to_numpy(each(x)) for each in (plain, model))
    assert difference(found, expected).relative <= 1e-5


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16"])
def test_dtypes(file, tmp_path, policy):
    model = keras.Sequential([keras.Input((6, 6, 2)), DOSeparableConv2D(3, 3, dtype=policy)])
    randomized(model).save(file)
    fold_checkpoint(file, tmp_path / "out.keras")
    found, expected = (
        keras.saving.load_model(tmp_path / "out.keras").layers[0], model.layers[0].fold()
    )  # fmt: skip
    assert found.dtype_policy.name == policy
    for one, other in zip(found.weights, expected.weights, strict=True):
        assert one.dtype == other.dtype
        pair = [keras.ops.convert_to_numpy(v).astype(float) for v in (one, other)]
        tolerance = 1e-6 if policy == "mixed_float16" else 0.02
        assert difference(*pair).relative <= tolerance


def test_wrapped_layers(file, tmp_path):
    wrapped = layers.TimeDistributed(DOSeparableConv2D(2, 3))
    model = randomized(keras.Sequential([keras.Input((2, 5, 5, 3)), wrapped]))
    model.save(file)
    fold_checkpoint(file, tmp_path / "out.keras")
    loaded, x = keras.saving.load_model(tmp_path / "out.keras"), numbers(2, 2, 5, 5, 3)
    assert type(loaded.layers[0].layer) is layers.SeparableConv2D
    assert close(loaded(x), model(x))


def test_a_state_is_folded_as_the_archive_is(file, tmp_path):
    model = network(12)
    model.save(file)
    write_state(export_state(model), tmp_path / "state")
    fold_checkpoint(file, tmp_path / "out.keras")
    fold_checkpoint(tmp_path / "state", tmp_path / "out")
    with open_checkpoint(tmp_path / "out.keras") as a, open_checkpoint(tmp_path / "out") as b:
        kernels = [{x.path: c.kernel(x) for x in c.layers} for c in (a, b)]
    assert kernels[0].keys() == kernels[1].keys()
    for path, kernel in kernels[0].items():
        assert difference(kernel, kernels[1][path]).relative <= 1e-6
