"""Fusing batch norms into the convolutions that they follow, in Keras.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from equal import assert_close
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402
from keras_layers import BACKEND, array  # noqa: E402
from keras_models import (  # noqa: E402
    SHAPE,
    filled,
    images,
    over_parameterized,
)

from doconv_core.models.report import (  # noqa: E402
    AXIS,
    NOT_DIRECT,
    NOT_FINITE,
    SEVERAL,
    behind,
)
from doconv_tf import fold, over_parameterize, verify  # noqa: E402
from doconv_tf.batchnorm import READ  # noqa: E402

# JAX has float64 by a switch for all of a process, and on PyTorch Keras casts it in batch norms.
DOUBLE = ["float64"] if BACKEND == "tensorflow" else []
UNKNOWN = "what it follows is known only where functional and sequential models alone hold it"


def test_a_fused_model_can_be_saved_and_cut(tmp_path):
    fused, _ = fold(over_parameterized("sequential"), fuse_batchnorm=True)
    assert type(fused.get_layer("norm")) is layers.Identity
    assert fused.get_layer("first").use_bias
    fused.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert verify(fused, loaded, images()).absolute == 0
    cut = keras.Model(fused.inputs[0], fused.get_layer("norm").output)
    assert cut(images()).shape == (2, 9, 9, 4)
    again, report = fold(fused, fuse_batchnorm=True)
    assert not report.changed
    assert verify(fused, again, images()).absolute == 0


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", *DOUBLE])
def test_every_kind_of_convolution_is_fused(policy, data_format):
    axis, double = (-1 if data_format == "channels_last" else 1), policy == "float64"
    options = {"data_format": data_format, "padding": "same", "dtype": policy, "use_bias": double}
    convs = [
        layers.Conv2D(6, 3, groups=3, **options),
        layers.Conv2D(6, 1, **options),
        layers.DepthwiseConv2D(3, depth_multiplier=2, **options),
        layers.SeparableConv2D(6, 3, depth_multiplier=2, **options),
    ]
    inputs, norm = keras.Input((3, 3, 3)), {"axis": axis, "dtype": policy, "center": not double}
    outputs = [layers.BatchNormalization(**norm)(conv(inputs)) for conv in convs]
    model = filled(keras.Model(inputs, outputs))
    fused, report = fold(model, fuse_batchnorm=True)
    expected = sorted(f"fused into {type(conv).__name__}" for conv in convs)
    assert sorted(change.after for change in report.changed) == expected
    if data_format == "channels_first" and BACKEND == "tensorflow":
        return  # which has no such kernel on CPUs
    bound = {"float32": 1e-5, "float64": 1e-12, "mixed_bfloat16": 3e-2}[policy]
    x = images((2, 3, 3, 3))
    for conv, before, after in zip(convs, model(x), fused(x), strict=True):
        assert_close(after, before, bound, conv.name)
        assert after.dtype == before.dtype
    for conv in convs:
        assert fused.get_layer(conv.name).dtype_policy.name == policy


class OwnCall(keras.Sequential):
    """Calls its layers in another order."""

    def call(self, x, training=None):
        return self.layers[0](self.layers[1](x, training=training))


def test_batch_norms_that_cannot_be_fused_are_left_with_the_reason():
    inputs = keras.Input((9, 9, 3))

    def conv(name, **options):
        return layers.Conv2D(3, 3, padding="same", name=f"c_{name}", **options)

    def norm(name, **options):
        return layers.BatchNormalization(name=name, **options)

    x = norm("activation")(conv("activation", activation="relu")(inputs))
    x = norm("axis", axis=1)(conv("axis")(x))
    x = norm("regularized")(conv("regularized", activity_regularizer="l2")(x))
    x = norm("regularized_norm", activity_regularizer="l2")(conv("regularized_norm")(x))
    x = norm("training")(conv("training")(x), training=True)
    shared, after = conv("shared"), norm("shared")
    x = after(shared(after(shared(x))))
    x = norm("dense", axis=1)(layers.Dense(3, name="d")(x))
    x = norm("drop")(layers.Dropout(0.5)(conv("drop")(x), training=True))
    x = norm("noise")(layers.Dropout(0.5, activity_regularizer="l2")(conv("noise")(x)))
    x = norm("rounded")(layers.Identity(dtype="bfloat16")(conv("rounded")(x)))
    inner = keras.Sequential([conv("inner"), norm("inner")], name="stack")
    x = inner(x, training=True)
    x = OwnCall([conv("call"), norm("call")], name="own_call")(x)
    lora, bad = conv("lora"), norm("bad")
    x = norm("lora")(lora(bad(conv("bad")(x))))
    model = filled(keras.Model(inputs, norm("good")(conv("good")(x))))
    bad.moving_variance.assign(-2 * np.ones(3))
    lora.enable_lora(1)
    fused, report = fold(model, fuse_batchnorm=True)
    training = "called with training=True, whatever the model does"
    assert {left.path: left.reason for left in report.left} == {
        "activation": "its convolution has an activation before it",
        "axis": AXIS,
        "training": training,
        "shared": SEVERAL,
        "dense": AXIS,
        "drop": NOT_DIRECT,
        "noise": NOT_DIRECT,
        "rounded": NOT_DIRECT,
        "stack.inner": training,
        "regularized": "it or its convolution has an activity regularizer",
        "regularized_norm": "it or its convolution has an activity regularizer",
        "own_call.call": UNKNOWN,
        "bad": NOT_FINITE,
        "lora": behind("LoRA is enabled"),
    }
    assert [change.path for change in report.changed] == ["good"]
    bad.moving_variance.assign(np.ones(3))
    fused.get_layer("bad").moving_variance.assign(np.ones(3))
    assert verify(model, fused, images()).relative < 1e-5


class Named(layers.BatchNormalization):
    """A batch norm with a constructor, a configuration and a method of its own."""

    def __init__(self, note="", **options):
        super().__init__(**options)
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}

    def told(self):
        return self.note


def behind_of(conv, *between, norm=layers.BatchNormalization, **options):
    """Return the layers of a chain: a batch norm behind one, perhaps with others between."""
    return [conv, *between, norm(**options)]


VALID = {"padding": "valid", "data_format": "channels_last"}
FUSED = {
    "transposed": lambda: behind_of(layers.Conv2DTranspose(4, 3, strides=2, use_bias=False)),
    "dense": lambda: behind_of(layers.Dense(4)),
    "dense of vectors": lambda: [layers.Flatten(), *behind_of(layers.Dense(4), axis=1)],
    "subclass": lambda: behind_of(layers.Conv2D(4, 3), norm=Named),
    "frozen": lambda: behind_of(layers.Conv2D(4, 3), trainable=False),
    "passed on": lambda: behind_of(
        layers.Conv2D(4, 3), layers.Identity(), layers.Activation("linear"), layers.Dropout(0.5),
        layers.SpatialDropout2D(0.5), layers.GaussianNoise(0.5),
    ),
    "ahead": lambda: [layers.BatchNormalization(), layers.Conv2D(4, 3, activation="relu", **VALID)],
    "ahead of groups": lambda: [
        *behind_of(layers.ReLU()), layers.Conv2D(6, 3, groups=3, use_bias=False, **VALID)
    ],
    "ahead of depthwise": lambda: [
        *behind_of(layers.ReLU()), layers.Dropout(0.5),
        layers.DepthwiseConv2D(3, depth_multiplier=2, **VALID),
    ],
    "ahead of separable": lambda: [
        *behind_of(layers.ReLU()), layers.SeparableConv2D(4, 3, depth_multiplier=2, **VALID)
    ],
}  # fmt: skip
if BACKEND == "tensorflow":
    FUSED["synchronized"] = lambda: behind_of(layers.Conv2D(4, 3), synchronized=True)


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_batch_norm_is_fused_wherever_that_is_exact(make):
    model = filled(keras.Sequential([keras.Input(SHAPE[1:]), *make()]))
    fused, report = fold(model, fuse_batchnorm=True)
    assert (len(report.changed), report.left) == (1, ())
    assert verify(model, fused, images()).relative < 1e-5
    again = keras.Sequential.from_config(fused.get_config())
    again.set_weights(fused.get_weights())
    assert verify(fused, again, images()).absolute == 0


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (layers.Conv2D(4, 3, padding="same"), NOT_DIRECT),
        (layers.Conv2DTranspose(4, 3), NOT_DIRECT),
        (layers.Dense(4), NOT_DIRECT),
    ],
)
def test_a_batch_norm_ahead_of_what_meets_a_border_is_left(conv, reason):
    model = filled(keras.Sequential([keras.Input(SHAPE[1:]), layers.BatchNormalization(), conv]))
    (left,) = fold(model, fuse_batchnorm=True).report.left
    assert left.reason == reason


class Global(layers.Layer):
    """A layer whose code reads a batch norm by a global name."""

    def call(self, x):
        return x * GLOBAL.gamma


GLOBAL = layers.BatchNormalization(name="norm")


def test_what_a_call_may_read_by_a_global_name_is_not_fused():
    model = filled(
        keras.Sequential([keras.Input(SHAPE[1:]), layers.Conv2D(3, 3), GLOBAL, Global()])
    )
    report = fold(model, fuse_batchnorm=True, inplace=True).report
    assert [left.reason for left in report.left] == [READ]


def conv_and_norm(name="inner"):
    inputs = keras.Input(SHAPE[1:])
    x = layers.Conv2D(3, 3, padding="same", name="conv")(inputs)
    return keras.Model(inputs, layers.BatchNormalization(name="norm")(x), name=name)


class Holder(keras.Model):
    """Does something with a functional model inside another one."""

    def __init__(self, run):
        super().__init__()
        inputs = keras.Input(SHAPE[1:])
        self.inner = conv_and_norm()
        self.outer = keras.Model(inputs, self.inner(inputs), name="outer")
        self.run = run

    def call(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: model.inner(x, training=True),
        lambda model, x: model.outer(x, training=True),
        lambda model, x: model.inner.get_layer("conv")(x) + model.outer(x),
    ],
    ids=["training", "training further in", "one of its layers"],
)
def test_what_a_call_in_no_structure_does_with_a_functional_model_is_not_guessed(run):
    model = Holder(run)
    model(images())
    filled(model)
    fused, report = fold(model, fuse_batchnorm=True)
    assert {left.reason for left in report.left} == {UNKNOWN}
    assert not report.changed
    expected, found = (array(m(images())) for m in (model, fused))
    np.testing.assert_array_equal(found, expected)


def test_a_functional_model_whose_call_was_replaced_is_not_fused():
    model = filled(conv_and_norm())
    model.call = lambda x, training=None, mask=None: model.get_layer("conv")(x)
    _, report = fold(model, fuse_batchnorm=True)
    assert [(left.path, left.reason) for left in report.left] == [("norm", UNKNOWN)]


def test_a_convolution_that_another_layer_holds_is_not_fused():
    model = conv_and_norm()
    model.other = layers.TimeDistributed(model.get_layer("conv"), name="other")
    _, report = fold(model, fuse_batchnorm=True)
    reasons = {left.path: left.reason for left in report.left}
    assert reasons == {"norm": SEVERAL}


def reads(read, layer):
    """Return a function that reads something of a layer, which it holds in its closure."""
    return lambda x: x * read(layer)


READERS = {
    "of its closure": lambda norm, conv: reads(lambda n: n.moving_variance, norm),
    "of a default": lambda norm, conv: lambda x, norm=norm: x * norm.gamma,
    "of a partial": lambda norm, conv: functools.partial(lambda x, n: x * n.epsilon, n=norm),
    "of the convolution": lambda norm, conv: reads(lambda c: keras.ops.sum(c.kernel), conv),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_a_function_may_read_is_not_fused(reader, inplace):
    conv, norm = layers.Conv2D(3, 3, name="conv"), layers.BatchNormalization(name="norm")
    other = [layers.Conv2D(3, 3, name="other"), layers.BatchNormalization(name="fused")]
    read = layers.Lambda(reader(norm, conv), output_shape=(7, 7, 3))
    model = filled(keras.Sequential([keras.Input(SHAPE[1:]), conv, norm, read, *other]))
    expected = array(model(images())).copy()
    fused, report = fold(model, fuse_batchnorm=True, inplace=inplace)
    assert [change.path for change in report.changed] == ["fused"]
    assert {left.path: left.reason for left in report.left} == {"norm": READ}
    for variable in () if inplace else model.weights:  # the copy's function reads the copy's
        variable.assign(variable + 1)
    np.testing.assert_allclose(array(fused(images())), expected, rtol=1e-4, atol=1e-5)


def test_operations_go_on_with_the_variables_of_a_norm_that_is_fused():
    inputs = keras.Input(SHAPE[1:])
    conv, norm = layers.Conv2D(3, 3, name="first"), layers.BatchNormalization(name="norm")
    outputs = keras.ops.conv(norm(conv(inputs)), conv.kernel) * norm.moving_variance
    model = filled(keras.Model(inputs, outputs))
    fused, report = fold(model, fuse_batchnorm=True)
    assert [change.path for change in report.changed] == ["norm"]
    assert verify(model, fused, images()).relative < 1e-5


@pytest.mark.parametrize("training", [None, True])
def test_what_a_time_distributed_layer_holds_is_fused(training):
    inputs = keras.Input((2, *SHAPE[1:]))
    each = layers.TimeDistributed(conv_and_norm(), name="each")
    model = filled(keras.Model(inputs, each(inputs, training=training)))
    fused, report = fold(model, fuse_batchnorm=True)
    if training:
        reason = "called with training=True, whatever the model does"
        assert [(left.path, left.reason) for left in report.left] == [("each.inner.norm", reason)]
    else:
        assert [change.path for change in report.changed] == ["each.inner.norm"]
        assert verify(model, fused, images((2, 2, *SHAPE[1:]))).relative < 1e-5


def test_losses_of_activities_stay():
    inputs = keras.Input(SHAPE[1:])
    x = layers.Conv2D(3, 3, activity_regularizer="l2")(inputs)
    model = filled(keras.Model(inputs, layers.BatchNormalization()(x)))
    fused, _ = fold(over_parameterize(model)[0], fuse_batchnorm=True)
    losses = []
    for each in (model, fused):
        each(images())
        losses.append([float(array(loss)) for loss in each.losses])
    assert losses[0] == losses[1] != []
