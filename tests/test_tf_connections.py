"""What the state of a Keras model takes from how its layers are connected.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import assert_same, random_values  # noqa: E402

from doconv_core import Geometry, State, StateError  # noqa: E402
from doconv_core.maths.layout import to_channels_first  # noqa: E402
from doconv_core.state.layers import CHANNELS_FIRST, OWN  # noqa: E402
from doconv_tf import DOConv2D, export_state, load_state  # noqa: E402

SHAPE = (6, 5, 3)


def convolution(padding="valid", strides=2, cls=layers.Conv2D):
    return cls(3, 3, strides=strides, padding=padding, name="conv")


def functional(*calls):
    inputs = x = keras.Input(SHAPE)
    for call in calls:
        x = call(x)
    return keras.Model(inputs, x)


def pads_of(model):
    (form,) = [f for f in export_state(model).layers.values() if f.kind == "convolution"]
    return form.geometry.padding


class Custom(keras.Model):
    """A model of its own class that calls one layer after the other."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def custom(*parts):
    model = Custom(*parts)
    model(np.zeros((1, *SHAPE), "float32"))
    return model


def inner(*parts):
    return keras.Sequential(list(parts))


PAD, NONE, ONE = layers.ZeroPadding2D, ((0, 0), (0, 0)), ((1, 1), (1, 1))
PADDED = {
    "not": (lambda: functional(convolution()), NONE),
    "same, strided": (lambda: functional(convolution("same")), ("same", "same")),
    "same": (lambda: functional(convolution("same", 1)), ONE),
    "pairs": (lambda: functional(PAD(((0, 1), (2, 3))), convolution()), ((0, 1), (2, 3))),
    "DO-Conv": (lambda: functional(PAD(1), convolution(cls=DOConv2D)), ONE),
    "same after zeros": (
        lambda: functional(PAD(1), convolution("same")), ("same after zeros (1, 1)",) * 2,
    ),
    "sigmoid": (lambda: functional(PAD(1), layers.Activation("sigmoid"), convolution()), NONE),
    "threshold": (lambda: functional(PAD(1), layers.ReLU(threshold=0.5), convolution()), NONE),
    "of zero is zero": (
        lambda: functional(
            PAD(1), layers.ReLU(), layers.Dropout(0.5), layers.Identity(),
            layers.Activation("tanh"), ops.relu, convolution(),
        ),
        ONE,
    ),
    "twice": (lambda: functional(PAD(1), PAD((2, 0)), convolution("same", 1)), ((4, 4), (2, 2))),
    "sequential": (lambda: inner(keras.Input(SHAPE), PAD(1), convolution(strides=1)), ONE),
    "from the outside in": (lambda: functional(PAD(1), inner(convolution())), ONE),
    "from the inside out": (
        lambda: functional(functional(layers.ReLU(), PAD(1)), functional_of_any(convolution())),
        ONE,
    ),
    "custom": (lambda: custom(PAD(1), convolution()), NONE),
    "within a custom one": (lambda: custom(inner(PAD(1), convolution())), ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_zeros_before_a_convolution_count_as_its_padding(name):
    model, expected = PADDED[name]
    assert pads_of(model()) == expected


def functional_of_any(*calls):
    inputs = x = keras.Input((None, None, 3))
    for call in calls:
        x = call(x)
    return keras.Model(inputs, x)


def test_a_convolution_with_several_uses_has_them_all():
    shared, inputs = convolution("same", 1), keras.Input(SHAPE)
    x = shared(layers.ZeroPadding2D(1)(shared(inputs)))
    assert pads_of(keras.Model(inputs, x)) == ("(1, 1) or (2, 2)",) * 2
    once = keras.Model(inputs, shared(inputs))  # the other use is not in this model
    assert pads_of(once) == ((1, 1), (1, 1))


def test_a_causal_and_a_transposed_convolution_have_pairs_too():
    inputs = keras.Input((8, 3))
    x = layers.Conv1D(4, 3, dilation_rate=2, padding="causal", name="a")(inputs)
    x = layers.Conv1DTranspose(4, 3, strides=2, padding="same", name="b")(x)
    x = layers.Conv1DTranspose(4, 3, strides=2, output_padding=1, name="c")(x)
    x = layers.Conv1DTranspose(4, 3, strides=2, padding="same", output_padding=1, name="d")(x)
    x = layers.Conv1DTranspose(4, 2, strides=2, name="e")(layers.ZeroPadding1D((1, 2))(x))
    found = export_state(keras.Model(inputs, x)).layers
    assert {path: form.geometry for path, form in found.items()} == {
        "a": Geometry(1, 2, ((4, 0),)),
        "b": Geometry(2, 1, ((0, 1),)),
        "c": Geometry(2, 1, ((0, -1),)),
        "d": Geometry(2, 1, ((0, 1),)),
        "e": Geometry(2, 1, ((-2, -4),)),
    }


def test_the_order_is_that_in_which_data_meets_the_layers():
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(4, 1, name="stem")(inputs)
    short = layers.Conv2D(4, 1, name="short")(x)
    y = layers.Conv2D(4, 3, padding="same", name="first")(x)
    y = layers.Conv2D(4, 3, padding="same", name="second")(layers.ReLU()(y))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Add()([y, short])))
    assert list(export_state(model).layers) == ["stem", "first", "second", "short", "head"]
    other = keras.Model(inputs, layers.Dense(2, name="head")(layers.Add()([short, y])))
    assert list(export_state(other).layers) == ["stem", "short", "first", "second", "head"]


def vector(*calls, shape=SHAPE):
    """Return a model of these layers, and then a dense one of two units."""
    inputs = x = keras.Input(shape)
    for call in (*calls, layers.Dense(2, name="head")):
        x = call(x)
    return keras.Model(inputs, x)


def merged(x):
    return layers.Add()([layers.ReLU()(x), layers.Conv2D(3, 1)(x)])


def two_flattened(x):
    return layers.Concatenate()([layers.Flatten()(x), layers.Flatten()(layers.Conv2D(3, 1)(x))])


class Mixing(layers.Layer):
    """A layer of a class of its own that keeps the shape; what it does cannot be seen."""

    def call(self, x):
        return ops.flip(x, 1)


def point(to=3):
    return layers.Conv2D(to, 1)


FLATTENED = [
    (lambda: vector(point(), layers.GlobalAveragePooling2D()), None),
    (lambda: vector(point()), None),
    (lambda: vector(point(), layers.Flatten()), CHANNELS_FIRST),
    (lambda: vector(point(), layers.Reshape((-1,))), CHANNELS_FIRST),
    (lambda: vector(point(), lambda x: ops.reshape(x, (-1, 90))), CHANNELS_FIRST),
    (lambda: vector(point(1), layers.Flatten()), None),
    (lambda: vector(layers.Conv2D(3, (6, 5)), layers.Flatten()), None),
    (
        lambda: vector(
            layers.MaxPooling2D(), layers.ReLU(), merged, layers.Flatten(), layers.Dropout(0.5),
            layers.Activation("relu"), ops.tanh,
        ),
        CHANNELS_FIRST,
    ),
    (lambda: vector(inner(point(), layers.ReLU()), layers.Flatten()), CHANNELS_FIRST),
    (lambda: vector(point(), layers.Flatten(), layers.Dense(90)), None),
    (lambda: vector(point(), layers.Flatten(), Mixing()), OWN),
    (lambda: vector(point(), Mixing(), layers.Flatten()), OWN),
    (lambda: vector(two_flattened), OWN),
    (lambda: vector(point(), layers.Permute((2, 1, 3)), layers.Flatten()), OWN),
    (lambda: vector(layers.Flatten()), OWN),  # images, but in which format?
    (lambda: vector(layers.Flatten(), shape=(28, 28, 1)), None),
    (lambda: vector(layers.Flatten(), shape=(1, 28, 28)), None),
    (lambda: vector(layers.Flatten(), shape=(28, 28)), None),
    (lambda: vector(shape=(90,)), None),
    (lambda: vector(layers.Embedding(9, 4), layers.Flatten(), shape=(6,)), None),
    (lambda: vector(layers.Conv1D(4, 3), layers.Flatten(), shape=(6, 2)), CHANNELS_FIRST),
    (
        lambda: vector(
            point(), layers.GlobalMaxPooling2D(), layers.Reshape((1, 1, 3)), point(2),
            layers.Flatten(),
        ),
        None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "flattening"), FLATTENED)
def test_a_flattened_image_is_seen(model, flattening):
    assert export_state(model()).layers["head"].flattening == flattening


@pytest.mark.parametrize(
    ("calls", "flattening"),
    [
        ([layers.Reshape((1, 90))], OWN),
        ([layers.Reshape((2, 45)), layers.ReLU(), layers.BatchNormalization()], OWN),
        ([layers.Reshape((2, 45)), layers.GlobalAveragePooling1D()], OWN),
        ([layers.Flatten(), layers.Reshape((1, 90)), layers.ReLU()], OWN),
        ([layers.Flatten(), layers.RepeatVector(2), layers.ReLU()], OWN),
        ([layers.Reshape((30, 3))], None),
        ([layers.Flatten(), layers.Reshape((6, 5, 3))], None),
        ([layers.Reshape((1, 90)), layers.Dense(4)], None),
    ],
)
def test_channels_that_are_mixed_with_positions_are_seen(calls, flattening):
    calls = [type(call).from_config(call.get_config()) for call in calls]  # not built before
    model = vector(layers.Conv2D(3, 1, name="conv"), *calls)
    state = export_state(model)
    assert state.layers["conv"].flattening is None
    assert state.layers["head"].flattening == flattening


@pytest.mark.parametrize("cls", [layers.Conv2D, DOConv2D, layers.Conv2DTranspose])
def test_a_convolution_of_mixed_channels_is_of_one_framework(cls):
    def model():
        image = [layers.Conv2D(3, 1, name="conv"), layers.Reshape((1, 1, 90), name="flat")]
        return functional(*image, cls(2, 1, name="point"))

    state = export_state(random_values(model()))
    assert state.layers["point"].flattening == OWN
    load_state(model(), state)
    other = State(state.layers, state.arrays, {"framework": "torch"})
    with pytest.raises(StateError, match="'point' may have the features of a flattened image"):
        load_state(model(), other)


def test_a_convolution_of_a_subclassed_model_is_not_suspected():
    pooled = [layers.GlobalAveragePooling2D(), layers.Reshape((1, 1, 3))]
    model = custom(*pooled, layers.Conv2D(2, 1, name="c"))
    assert [form.flattening for form in export_state(model).layers.values()] == [None]


def test_a_deep_network_is_walked_without_going_in_circles():
    def deep(x):
        for _ in range(400):
            x = layers.Add()([x, x])
        return x

    model = vector(layers.Conv2D(3, 1), deep, layers.Flatten(), deep)
    assert export_state(model).layers["head"].flattening == CHANNELS_FIRST
    model = vector(layers.Dense(6, name="first"), deep, layers.Reshape((2, 3)), shape=(4,))
    assert export_state(model).layers["first"].flattening == OWN


@pytest.mark.parametrize(
    ("end", "flattening"),
    [
        ([layers.Reshape((2, 1)), layers.Flatten()], None),
        ([layers.ReLU(), layers.Reshape((2, 3))], OWN),
        ([layers.Flatten()], None),
    ],
)
def test_features_that_become_an_image_are_seen(end, flattening):
    inputs = keras.Input((4,))
    x = layers.Dense(6 if flattening else 2, name="head")(inputs)
    for layer in end:
        x = layer(x)
    assert export_state(keras.Model(inputs, x)).layers["head"].flattening == flattening


def test_channels_first_is_canonical_unless_flatten_turns_it():
    first = {"data_format": "channels_first"}
    plain = vector(layers.Conv2D(3, 1, **first), layers.Reshape((-1,)))
    assert export_state(plain).layers["head"].flattening is None
    turned = vector(layers.Conv2D(3, 1, **first), layers.Flatten(**first))
    assert export_state(turned).layers["head"].flattening == CHANNELS_FIRST
    unlike = vector(layers.Conv2D(3, 1), layers.Flatten(**first))
    assert export_state(unlike).layers["head"].flattening == OWN


def test_every_layer_behind_a_flattened_image_is_reordered():
    def model(seed):
        norms = [
            layers.BatchNormalization(name="norm"), layers.PReLU(name="prelu"),
            layers.LayerNormalization(name="layer_norm"),
        ]  # fmt: skip
        built = vector(layers.Conv2D(3, 1, name="conv"), layers.Flatten(), *norms)
        return random_values(built, seed)

    first, other = model(0), model(1)
    state = export_state(first)
    values = {
        "head.weight": first.get_layer("head").kernel,
        "norm.gamma": first.get_layer("norm").gamma,
        "norm.running_var": first.get_layer("norm").moving_variance,
        "layer_norm.beta": first.get_layer("layer_norm").beta,
    }
    for name, value in values.items():
        expected = to_channels_first(ops.convert_to_numpy(value).T, SHAPE[:2])
        np.testing.assert_array_equal(state.arrays[name], expected, err_msg=name)
    load_state(other, state)
    assert_same(other.weights, first.weights)


def test_groups_of_a_flattened_image_are_of_one_framework():
    def model():
        norm = layers.GroupNormalization(3, name="norm")
        return vector(layers.Conv2D(3, 1, name="conv"), layers.Flatten(), norm)

    state = export_state(random_values(model()))
    assert state.layers["norm"].flattening == OWN
    load_state(model(), state)


def test_what_a_subclassed_model_may_flatten_is_of_one_framework():
    def model(flatten):
        return custom(layers.Conv2D(4, 1, name="conv"), flatten, layers.Dense(2, name="head"))

    seen = model(layers.Flatten())
    assert export_state(seen).layers["head"].flattening == OWN
    hidden = model(layers.Lambda(lambda x: ops.reshape(x, (-1, 6 * 5 * 4)), output_shape=(120,)))
    assert export_state(hidden).layers["head"].flattening == OWN
    pooled = model(layers.GlobalAveragePooling2D())
    assert export_state(pooled).layers["head"].flattening is None
    other = model(layers.Flatten())
    load_state(other, export_state(seen))
    graph = vector(layers.Conv2D(4, 1, name="conv"), layers.Flatten())
    with pytest.raises(StateError, match="'head' may have the features of a flattened image, in "):
        load_state(graph, export_state(seen))


def scaled(image):
    """A flattened image as a factor of another image's channels."""
    small = layers.Flatten()(layers.Conv2D(2, 2, strides=2)(image))
    x = layers.Multiply()([layers.Conv2D(8, 3)(image), small])
    return layers.GlobalAveragePooling2D()(x)


FEATURES = {
    "a flattened image spread over another": ((4, 4, 3), scaled, OWN),
    "a residual of a sequence": (
        (20, 6),
        lambda x: layers.GlobalAveragePooling1D()(
            layers.Add()([x, layers.Conv1D(6, 3, padding="same")(x)])
        ),
        None,
    ),
    "a vector made an image": (
        (64,),
        lambda x: layers.Flatten()(layers.Conv2D(4, 3)(layers.Reshape((8, 8, 1))(x))),
        CHANNELS_FIRST,
    ),
    "dense on the last axis, flattened": (
        (5, 6), lambda x: layers.Flatten()(layers.Dense(4)(x)), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "body", "flattening"), FEATURES.values(), ids=FEATURES)
def test_the_order_of_features_behind_a_body(shape, body, flattening):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(2, name="head")(body(inputs)))
    assert export_state(model).layers["head"].flattening == flattening
