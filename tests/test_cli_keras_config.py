"""What the configs of Keras models tell of what feeds their layers."""

from __future__ import annotations

import importlib
import json

import pytest

from doconv_core.cli.keras_config import fed_layers
from doconv_core.state.flattening import Fed

IMAGE = (6, 6, 4)


def fed(keras, model):
    """Return what is told of a model's Dense layers and norms, by their names."""
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
    found = fed_layers(config)
    groups = importlib.import_module("doconv_core.files.keras_layers").stored_nodes(config)
    named = {group: node["config"].get("name") for group, _, node in groups}
    return {named[group]: told for group, told in found.items() if group in named}


def behind(keras, head, shape=IMAGE):
    """Return what is told of a Dense layer behind `head` behind a convolution of 5 channels."""
    inputs = keras.Input(shape)
    rank = len(shape) - 1
    conv = getattr(keras.layers, f"Conv{rank}D")(5, 1, name="conv")
    x = head(keras.layers, conv(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="fc")(x))
    return fed(keras, model)["fc"].image


def mirrored(x):
    return x[:, ::-1]


def squeezed(layers, x):
    y = layers.Reshape((1, 1, 5))(layers.GlobalMaxPooling2D()(x))
    y = layers.Activation("sigmoid")(layers.Conv2D(5, 1)(layers.ReLU()(y)))
    return layers.Flatten()(layers.Multiply()([x, y]))


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (lambda layers, x: layers.Flatten()(x), (5, 6, 6)),
        (lambda layers, x: layers.Reshape((180,))(x), (5, 6, 6)),
        (lambda layers, x: layers.Flatten()(layers.MaxPooling2D(2)(x)), (5, 3, 3)),
        (lambda layers, x: layers.Dropout(0.1)(layers.Flatten()(layers.ReLU()(x))), (5, 6, 6)),
        (lambda layers, x: layers.Flatten()(layers.Add()([x, layers.ReLU()(x)])), (5, 6, 6)),
        (lambda layers, x: layers.Flatten()(x * 2.0), (5, 6, 6)),
        (lambda layers, x: layers.Flatten()(layers.Concatenate()([x, x])), (10, 6, 6)),
        (squeezed, (5, 6, 6)),
        (lambda layers, x: layers.GlobalAveragePooling2D()(x), ()),
        (lambda layers, x: layers.Flatten()(layers.AveragePooling2D(6)(x)), ()),
        (lambda layers, x: layers.Flatten()(layers.Conv2D(1, 1)(x)), ()),
        (lambda layers, x: layers.Dense(3)(layers.Flatten()(x)), ()),
        (lambda layers, x: layers.Flatten()(layers.Permute((3, 1, 2))(x)), ()),
        (lambda layers, x: x, ()),  # of each position alone
        (lambda layers, x: layers.LSTM(4)(layers.Reshape((36, 5))(x)), ()),
        # What cannot be told.
        (lambda layers, x: layers.Flatten()(layers.Permute((2, 3, 1))(x)), None),
        (lambda layers, x: layers.Flatten()(layers.Lambda(mirrored, IMAGE)(x)), None),
        (lambda layers, x: layers.Flatten()(layers.Dense(3)(x)), None),
        (lambda layers, x: layers.Flatten()(layers.Reshape((36, 5))(x)), None),
        (lambda layers, x: layers.Reshape((6, 30))(x), None),
        (lambda layers, x: layers.Concatenate()([layers.Flatten()(x)] * 2), None),
        (lambda layers, x: layers.Activation(mirrored)(layers.Flatten()(x)), None),
    ],
)
def test_what_a_config_tells_of_a_dense_layer(keras, head, expected):
    assert behind(keras, head) == expected


def test_of_sequences(keras):
    assert behind(keras, lambda layers, x: layers.Flatten()(x), (7, 4)) == (5, 7)
    words = keras.Input((7,))
    layers = keras.layers
    x = layers.Flatten()(layers.Embedding(9, 4, name="words")(words))
    found = fed(keras, keras.Model(words, layers.Dense(2, name="fc")(x)))
    assert found["fc"] == found["words"] == Fed(())


def test_nested_and_shared_models(keras):
    layers = keras.layers
    inner = keras.Sequential([keras.Input((None, None, 4)), layers.Conv2D(5, 1), layers.ReLU()])
    inputs = keras.Input(IMAGE)
    fc = layers.Dense(2, name="fc")
    flat = layers.Flatten()(inner(inputs))
    found = fed(keras, keras.Model(inputs, fc(layers.BatchNormalization(name="bn")(flat))))
    assert found["fc"].image == found["bn"].image == (5, 6, 6)
    # A layer that is called twice, with an image and with none.
    twice = layers.Dense(180, name="twice")
    found = fed(keras, keras.Model(inputs, twice(twice(flat))))
    assert found["twice"].image is None
    again = keras.Sequential([keras.Input(IMAGE), layers.Conv2D(5, 1), layers.Flatten(), fc])
    assert fed(keras, keras.Sequential([keras.Input(IMAGE), again]))["fc"].image == (5, 6, 6)


def test_channels_first(keras):
    layers, first = keras.layers, {"data_format": "channels_first"}
    inputs = keras.Input((4, 6, 6))
    x = layers.Conv2D(5, 1, **first)(inputs)
    for options, expected in (({}, ()), (first, (5, 6, 6))):
        head = layers.Dense(2, name="fc")(layers.Flatten(**options)(x))
        assert fed(keras, keras.Model(inputs, head))["fc"].image == expected
    head = layers.Dense(2, name="fc")(layers.GlobalAveragePooling2D(**first)(x))
    assert fed(keras, keras.Model(inputs, head))["fc"].image == ()


def test_a_size_that_is_not_known(keras):
    layers = keras.layers
    inner = keras.Sequential([layers.Flatten()])
    inputs = keras.Input((None, 6, 4))
    x = inner(layers.Conv2D(5, 1)(inputs))
    model = keras.Model(inputs, layers.Dropout(0.1, name="drop")(x))
    assert fed(keras, model)["drop"].image == (5, None, 6)


def test_a_subclass_of_a_functional_model_may_do_anything(keras):
    class Own(keras.Model):
        pass

    inputs = keras.Input(IMAGE)
    layers = keras.layers
    x = layers.Flatten()(layers.Conv2D(5, 1)(inputs))
    assert fed(keras, Own(inputs, layers.Dense(2)(x))) == {}


def test_configs_that_are_no_models(keras):
    inputs = keras.Input(IMAGE)
    layers = keras.layers
    x = layers.Permute((3, 1, 2))(layers.Reshape((6, 6, 4))(inputs))
    x = layers.Dense(2)(layers.Flatten()(layers.Conv2D(5, 1)(x)))
    text = json.dumps(keras.saving.serialize_keras_object(keras.Model(inputs, x)))
    keys = {*find_keys(json.loads(text))} - {"class_name", "config", "module"}
    assert len(keys) > 30
    for key in keys:
        for value in (None, [], {}, 3, "x", [None], [[]], {"a": [3]}):
            fed_layers(replaced(json.loads(text), key, value))


def replaced(config, key, value):
    """Return a config with another value wherever it has the key."""
    if isinstance(config, list):
        return [replaced(each, key, value) for each in config]
    if not isinstance(config, dict):
        return config
    return {k: value if k == key else replaced(v, key, value) for k, v in config.items()}


def find_keys(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield from value
    for each in inner:
        yield from find_keys(each)
