"""Networks from descriptions, in Keras: stored, compiled, trained, and in either image format."""

from __future__ import annotations

import io

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from networks.described import NETWORKS, ONE_WAY, OTHER_WAY, SHAPE, USUAL  # noqa: E402

from doconv_core.networks.initialize import initialize  # noqa: E402
from doconv_core.networks.lowering import layers as described_layers  # noqa: E402
from doconv_core.networks.nodes import Conv, Network, Sequence, numbered, sequence  # noqa: E402
from doconv_core.state.layers import OWN  # noqa: E402
from doconv_tf import build, export_state, load_state  # noqa: E402
from doconv_tf.pooling import PaddedAveragePooling2D, PaddedMaxPooling2D  # noqa: E402

C, H, W = SHAPE
X = np.random.default_rng(0).standard_normal((4, H, W, C)).astype(np.float32)


def built(name):
    keras.utils.set_random_seed(1)
    return build(NETWORKS[name])


def outputs(model):
    return ops.convert_to_numpy(model(X, training=False))


def check_stored(name, folder):
    model, other = built(name), build(NETWORKS[name])
    expected = outputs(model)
    model.save(folder / "net.keras")
    loaded = keras.saving.load_model(folder / "net.keras")
    np.testing.assert_array_equal(outputs(loaded), expected)
    assert list(export_state(loaded).layers) == list(export_state(model).layers)
    model.save_weights(folder / "net.weights.h5")
    other.load_weights(folder / "net.weights.h5")
    np.testing.assert_array_equal(outputs(other), expected)


def check_trained(name, jit):
    model = built(name)
    expected = outputs(model)
    model.compile("sgd", "mse", jit_compile=jit)
    fit = {"epochs": 3, "batch_size": 4, "verbose": 0}
    history = model.fit(X, np.zeros_like(expected), **fit).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]
    expected = outputs(model)
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", USUAL)
def test_stored_without_custom_objects(name, tmp_path):
    check_stored(name, tmp_path)


@pytest.mark.parametrize("name", ONE_WAY)
def test_trained(name):
    check_trained(name, jit=False)


@pytest.mark.parametrize("name", OTHER_WAY)
def test_every_network_trained_when_xla_compiles_it(name):
    check_trained(name, jit=True)


@pytest.mark.parametrize("name", USUAL)
def test_channels_first_has_the_same_state(name):
    network = NETWORKS[name]
    keras.config.set_image_data_format("channels_first")
    try:
        model = build(network)
        load_state(model, initialize(network))
        exported = export_state(model)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert model.input_shape == (None, *SHAPE)
    assert list(exported.layers) == list(described_layers(network))
    for entry, array in initialize(network).arrays.items():
        np.testing.assert_array_equal(exported.arrays[entry], array)


def test_it_reads_as_described():
    text = io.StringIO()
    build(NETWORKS["residuals"]).summary(expand_nested=True, print_fn=text.write)
    for words in (
        "stage1 (Functional)",
        "└ shortcut (Functional)",
        "└ add (Add)",
        "last (Flatten)",
    ):
        assert words in text.getvalue()


def test_layers_that_help_leave_the_names_to_the_description():
    body = sequence(("input", Conv(4, (3, 3), stride=2)), ("input_pad", Conv(2)), ("add", Conv(3)))
    network = Network("one", numbered([body, Sequence()]), SHAPE)
    model = build(network)
    assert list(export_state(model).layers) == ["1.input", "1.input_pad", "1.add"]
    names = [layer.name for layer in model.get_layer("1").layers]
    assert names == ["input_", "input_pad_", "input", "input_pad", "add"]
    assert outputs(model).shape == (4, 5, 5, 3)


def test_same_padding_where_it_is_the_same():
    body = sequence(
        ("a", Conv(2, (3, 5))), ("b", Conv(2, (3, 3), stride=2)), ("c", Conv(2, (2, 2), padding=1))
    )
    model = build(Network("one", body, SHAPE))
    assert [type(layer).__name__ for layer in model.layers] == [
        "InputLayer", "Conv2D", "ZeroPadding2D", "Conv2D", "ZeroPadding2D", "Conv2D",
    ]  # fmt: skip
    assert [model.get_layer(name).padding for name in "abc"] == ["same", "valid", "valid"]


@pytest.mark.parametrize("cls", [PaddedMaxPooling2D, PaddedAveragePooling2D])
def test_padded_pooling_is_a_layer_like_others(cls):
    layer = cls(3, 2, around=1, name="pool")
    assert layer.compute_output_shape((None, H, W, C)) == (None, 5, 5, C)
    assert layer.compute_output_shape((None, None, W, C)) == (None, None, 5, C)
    twin = cls.from_config(layer.get_config())
    np.testing.assert_array_equal(twin(X), layer(X))
    assert layer(X).shape == (4, 5, 5, C)
    with pytest.raises(ValueError, match="around must be at least 0; received around=-1"):
        cls(3, 2, around=-1)
    assert isinstance(layer, (layers.MaxPooling2D, layers.AveragePooling2D))


@pytest.mark.parametrize(
    ("dims", "flattening"), [((3, 1, 2), None), ((3, 2, 1), OWN), ((1, 2, 3), OWN)]
)
def test_only_channels_put_first_are_flattened_in_canonical_order(dims, flattening):
    x = keras.Input((H, W, C))
    y = layers.Flatten()(layers.Permute(dims)(layers.Conv2D(2, 3, name="conv")(x)))
    model = keras.Model(x, layers.Dense(2, name="dense")(y))
    assert export_state(model).layers["dense"].flattening == flattening
