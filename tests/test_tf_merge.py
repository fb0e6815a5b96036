"""Keras: branches become one convolution, whatever the layers are called; or stay, and why."""

from __future__ import annotations

import random

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import BACKEND, assert_same  # noqa: E402

from doconv_core import Change  # noqa: E402
from doconv_core.maths.linear import COSTLIER, SHIFTED, TWICE  # noqa: E402
from doconv_core.models.merge import APART, USED  # noqa: E402
from doconv_core.models.report import NOT_FINITE, READ, SEVERAL, SHARED  # noqa: E402
from doconv_tf import fold, over_parameterize, verify  # noqa: E402
from doconv_tf.batchnorm import REGULARIZED, TRAINING  # noqa: E402
from doconv_tf.branches import HELD, IN_OTHERS, STRIDED, UNLIKE  # noqa: E402
from doconv_tf.graph import UNKNOWN  # noqa: E402
from doconv_tf.pieces import POOLED, ROUNDED, UNSIZED  # noqa: E402

CLOSE = 1e-5
DOUBLE = ["float64"] if BACKEND == "tensorflow" else []  # which Keras rounds elsewhere
CONVS = (layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.DepthwiseConv1D,
         layers.DepthwiseConv2D, layers.SeparableConv1D, layers.SeparableConv2D)  # fmt: skip


def image(model, seed=1):
    sizes = [9 + n if size is None else size for n, size in enumerate(model.input_shape[1:])]
    return np.random.default_rng(seed).standard_normal((2, *sizes)).astype("float32")


def ready(model):
    """Give all variables values as after training; return the model."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        positive = variable.path.endswith(("variance", "gamma"))
        values = rng.uniform(0.5, 2, variable.shape) if positive else rng.normal(
            0, 0.5, variable.shape
        )  # fmt: skip
        variable.assign(values)
    return model


def network(run, shape=(9, 10, 4)):
    """Return a functional model of what a function makes of an image."""
    x = keras.Input(shape, name="image")
    return ready(keras.Model(x, run(x), name="network"))


def pair(x, filters, size, strides=1, name=None, padding="same", norm=True, **options):
    conv = layers.Conv2D(filters, size, strides, padding, use_bias=False, name=name, **options)(x)
    return layers.BatchNormalization(name=name and f"{name}_norm")(conv) if norm else conv


def repvgg(x, filters=4, strides=1, **options):
    """RepVGG's block."""
    terms = [pair(x, filters, 3, strides, **options), pair(x, filters, 1, strides, **options)]
    if strides == 1 and x.shape[-1] == filters:
        terms.append(layers.BatchNormalization()(x))
    return layers.ReLU()(layers.Add()(terms))


def mobileone(x, strides=1):
    """MobileOne's depthwise block: several of one size, a scale, and a batch norm alone."""

    def deep(size):
        conv = layers.DepthwiseConv2D(size, strides, "same", use_bias=False)
        return layers.BatchNormalization()(conv(x))

    total = deep(3) + deep(3) + deep(1)
    if strides == 1:
        total = total + layers.BatchNormalization()(layers.Dropout(0.1)(x))
    return layers.ReLU()(total)


def acnet(x):
    terms = [pair(x, 4, 3), pair(x, 4, (1, 3)), pair(x, 4, (3, 1))]
    return layers.ReLU()(layers.Add()(terms))


def dbb(x):
    """DBB's block where zeros inside stay zeros: 3x3, 1x1, 1x1 then 3x3, an average."""
    inner = layers.Conv2D(8, 1, use_bias=False)(x)
    around = layers.ZeroPadding2D(1)(layers.Conv2D(4, 1, use_bias=False)(x))
    average = layers.BatchNormalization()(layers.AveragePooling2D(3, 1)(around))
    return layers.Add()([pair(x, 4, 3), pair(x, 4, 1), pair(inner, 4, 3), average])


def mixer(x):
    """FastViT's: a difference, a gain by channel and the input itself."""
    gain = np.random.default_rng(2).uniform(size=(1, 1, 4)).astype("float32")
    deep = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x))
    return x + ops.multiply(gain, deep - layers.BatchNormalization()(x))


def scaled(x):
    a = layers.Conv2D(4, 3, padding="same")(layers.Rescaling(2.0)(x))
    b = layers.Conv2D(4, 1)(x / 3)
    mean = layers.Average()([a, b, layers.Activation("linear")(x)])
    return ops.relu(layers.Rescaling([1.0, 2.0, 3.0, 4.0], 0.5)(-mean) - 1)


def padded(x):
    """As many networks of PyTorch's are ported: a layer of zeros, then no padding."""
    large = layers.Conv2D(6, 3, 2)(layers.ZeroPadding2D(1)(x))
    return layers.ReLU()(large + layers.Conv2D(6, 1, 2)(x))


def nested(x):
    y = keras.Input(x.shape[1:])
    inner = keras.Model(y, layers.Add()([pair(y, 4, 3), pair(y, 4, 1)]), name="inner")
    return layers.ReLU()(layers.BatchNormalization()(inner(x)))


def some(x):
    """A sum of which a part alone is one convolution."""
    a, b = layers.Conv2D(4, 3, padding="same", name="a"), layers.Conv2D(4, 1, name="b")
    return layers.Add(name="add")([a(x), layers.ReLU()(x), b(x)])


def differing(x):
    a, b = layers.Conv2D(4, 3, padding="same"), layers.Conv2D(4, 1)
    return a(x) - layers.ReLU()(x) - b(x)


def lopsided(x):
    """What has a padding that no word of Keras' says."""
    large = layers.Conv2D(4, 3)(layers.ZeroPadding2D(((0, 2), (2, 0)))(x))
    return large + layers.Conv2D(4, 1)(x)


def expanded(x):
    x = layers.Conv2D(16, 1, use_bias=False)(x)
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.Conv2D(4, 1)(x))


FAMILIES = {
    "repvgg": repvgg,
    "strided, even": lambda x: repvgg(x[:, :8, :8], 6, 2),
    "strided, odd": lambda x: repvgg(x, 6, 2),
    "three strides": lambda x: repvgg(x, 6, 3),
    "groups": lambda x: repvgg(x, groups=2),
    "mobileone": mobileone,
    "mobileone, strided": lambda x: mobileone(x, 2),
    "acnet": acnet,
    "dbb": dbb,
    "mixer": mixer,
    "scaled": scaled,
    "padded": padded,
    "nested": nested,
    "some": some,
    "differing": differing,
    "expanded": expanded,
    "lopsided": lopsided,
    "separable": lambda x: layers.SeparableConv2D(4, 3, padding="same")(x)
    + layers.Conv2D(4, 3, padding="same")(x),
    "dilated": lambda x: layers.Conv2D(4, 5, padding="same")(x)
    + layers.Conv2D(4, 3, padding="same", dilation_rate=2)(x),
    "even": lambda x: layers.Conv2D(4, 2, padding="same")(x) + layers.Conv2D(4, 1)(x),
}  # fmt: skip


def convolutions(model):
    """Return the convolutions of a model, at any depth."""
    found = [layer for layer in model._flatten_layers() if isinstance(layer, CONVS)]
    return list({id(layer): layer for layer in found}.values())


def merged(model, **options):
    """Return the folded model and its report; check that it computes the same, and is stored."""
    before = [keras.ops.convert_to_numpy(v) for v in model.weights]
    folded, report = fold(model, merge_branches=True, **options)
    for seed in range(2):
        assert verify(model, folded, image(model, seed)).relative < CLOSE
    for variable, values in zip(model.weights, before, strict=True):
        assert_same(variable, values)
    return folded, report


def reloaded(model, folder):
    """Return a model stored and loaded again, by Keras alone."""
    path = folder / "folded.keras"
    model.save(path)
    return keras.models.load_model(path)


@pytest.mark.parametrize("case", FAMILIES)
def test_families_become_one_convolution(case, tmp_path):
    model = network(lambda x: layers.ReLU()(FAMILIES[case](layers.Conv2D(4, 1)(x))))
    folded, report = merged(model)
    assert len(convolutions(folded)) == 2
    assert report.changed
    assert folded.name == model.name
    again = reloaded(folded, tmp_path)
    x = image(model)
    assert_same(again(x), folded(x))
    assert fold(folded, merge_branches=True).report.changed == ()


def names(model):
    return [layer.name for layer in model.layers]


def test_what_a_model_becomes():
    def run(x):
        a, b = pair(x, 4, 3, name="a"), pair(x, 4, 1, name="b")
        x = layers.ReLU(name="relu")(layers.Add(name="add")([a, b]))
        y = layers.Conv2D(6, 3, 2, name="c")(layers.ZeroPadding2D(1, name="zeros")(x))
        return layers.Add(name="sum")([y, layers.Conv2D(6, 1, 2, name="d")(x)])

    model = network(run, (9, 9, 4))
    folded, report = merged(model)
    assert names(folded) == ["image", "a", "relu", "c"]
    assert folded.get_layer("a").padding == folded.get_layer("c").padding == "same"
    assert report.changed == (
        Change("a", "Functional", "Conv2D of a, a_norm, b, b_norm, add"),
        Change("c", "Functional", "Conv2D of zeros, c, d, sum"),
    )
    assert "  Functional -> Conv2D of a, a_norm, b, b_norm, add (1)\n    a" in str(report)
    assert "doconv" not in str(folded.to_json())
    assert folded.output_names == ["c"]
    assert [variable.path for variable in folded.weights] == [
        "a/kernel", "a/bias", "c/kernel", "c/bias"
    ]  # fmt: skip
    folded, _ = merged(network(run, (10, 10, 4)))
    assert names(folded) == ["image", "a", "relu", "zeros", "c"]


def test_what_is_left_of_a_sum():
    folded, report = merged(network(some))
    assert names(folded) == ["image", "a", "re_lu", "add"] or len(folded.layers) == 4
    assert report.changed == (Change("a", "Functional", "Conv2D of a, b"),)
    assert isinstance(folded.layers[-1], layers.Add)
    assert isinstance(merged(network(differing))[0].layers[-1], layers.Subtract)


def test_a_depthwise_block_stays_depthwise():
    (conv,) = convolutions(merged(network(mobileone))[0])
    assert type(conv) is layers.DepthwiseConv2D
    assert conv.padding == "same"


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    conv = (layers.Conv1D, layers.Conv3D)[rank // 2]

    def run(x):
        a = conv(4, 3, 2, "same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization()(a) + conv(4, 1, 2)(x))

    folded, _ = merged(network(run, (*(6, 7, 8)[:rank], 4)))
    assert [type(layer) for layer in convolutions(folded)] == [conv]
    causal = network(lambda x: layers.Conv1D(4, 3, padding="causal")(x) + x, (6, 4))
    (made,) = convolutions(merged(causal)[0])
    assert made.padding == "causal"


def test_channels_first():
    options = {"data_format": "channels_first", "use_bias": False}

    def run(x):
        gain = np.arange(1.0, 5, dtype="float32").reshape(1, 4, 1, 1)
        large = layers.Conv2D(4, 3, 2, "same", **options)(x)
        small = layers.Conv2D(4, 1, 2, **options)(x)
        # TensorFlow's convolution of channels first with a bias is wrong on some CPUs.
        normed = (lambda y: y) if BACKEND == "tensorflow" else layers.BatchNormalization(axis=1)
        return layers.ReLU()(ops.multiply(layers.Add()([normed(large), small]), gain))

    folded, _ = merged(network(run, (4, 8, 9)))
    (conv,) = convolutions(folded)
    assert conv.data_format == "channels_first"


def test_a_sequential_model():
    row = [
        keras.Input((8, 8, 4)), layers.Conv2D(8, 1, use_bias=False, name="wide"),
        layers.Identity(name="same"), layers.Conv2D(4, 3, name="last"), layers.ReLU(),
    ]  # fmt: skip
    model = ready(keras.Sequential(row))
    folded, report = merged(model)
    assert [type(layer) for layer in folded.layers] == [layers.Conv2D, layers.ReLU]
    assert report.changed == (Change("last", "Sequential", "Conv2D of wide, same, last"),)
    assert len(folded.weights) == 2
    folded.add(layers.ReLU())
    assert folded(image(model)).shape == (2, 6, 6, 4)


def test_blocks_in_a_row(tmp_path):
    def block(name):
        x = keras.Input((None, None, 4))
        return keras.Model(x, repvgg(x), name=name)

    model = ready(keras.Sequential([keras.Input((8, 8, 4)), block("a"), block("b")]))
    folded, report = merged(model)
    assert [change.path.split(".")[0] for change in report.changed] == ["a", "b"]
    assert len(convolutions(folded)) == 2
    assert_same(reloaded(folded, tmp_path)(image(model)), folded(image(model)))


def test_a_model_that_is_called_twice_is_merged_inside():
    y = keras.Input((None, None, 4))
    inner = keras.Model(y, pair(y, 4, 3) + pair(y, 4, 1), name="inner")
    model = network(lambda x: inner(ops.relu(inner(x))) + layers.Conv2D(4, 1)(x))
    folded, report = merged(model)
    assert len(convolutions(folded)) == 2
    assert len(report.changed) == 1


class Custom(keras.Model):
    """A model of its own class, with a functional one inside."""

    def __init__(self):
        super().__init__()
        self.inner = network(repvgg, (8, 8, 4))

    def call(self, x):
        return self.inner(x) * 2


def test_inside_a_subclassed_model_it_is_asked_for():
    model = Custom()
    x = np.ones((2, 8, 8, 4), "float32")
    expected = ops.convert_to_numpy(model(x))
    folded, report = fold(model, merge_branches=True)
    assert not report.changed
    assert any(UNKNOWN in left.reason for left in report.left)
    fold(model.inner, merge_branches=True, inplace=True)
    assert len(convolutions(model)) == 1
    assert_same(ops.convert_to_numpy(folded(x)), expected)
    assert np.allclose(model(x), expected, rtol=CLOSE, atol=CLOSE)


def test_several_inputs_and_outputs():
    a, b = keras.Input((8, 8, 4), name="a"), keras.Input((8, 8, 4), name="b")
    x, y = repvgg(a), pair(b, 4, 3) + pair(b, 4, 1)
    model = ready(keras.Model({"a": a, "b": b}, {"x": x, "both": x + y, "y": y}))
    inputs = {name: np.random.default_rng(3).random((2, 8, 8, 4), "float32") for name in "ab"}
    folded, _ = fold(model, merge_branches=True)
    assert verify(model, folded, inputs).relative < CLOSE
    assert len(convolutions(folded)) == 2


def test_over_parameterized_and_with_batch_norms():
    model = network(lambda x: repvgg(repvgg(pair(x, 4, 3)), 6, 2))
    trained, _ = over_parameterize(model)
    for variable in trained.trainable_variables:
        variable.assign_add(0.05 * np.random.default_rng(4).standard_normal(variable.shape))
    folded, _ = merged(trained, fuse_batchnorm=True)
    assert len(convolutions(folded)) == 3
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in folded.layers)


def test_branches_that_give_zeros():
    model = network(lambda x: pair(x, 4, 3) + pair(x, 4, 1))
    for variable in model.trainable_variables:
        if variable.path.endswith(("gamma", "beta")):
            variable.assign(0 * variable)
    folded, _ = merged(model)
    assert len(convolutions(folded)) == 1
    assert_same(folded(image(model)), 0 * image(model))


def test_in_place():
    model = network(lambda x: repvgg(x))
    x, relu = image(model), model.layers[-1]
    expected = ops.convert_to_numpy(model(x))
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)
    folded, _ = fold(model, merge_branches=True, inplace=True)
    assert folded is model
    assert model.layers[-1] is relu
    assert not model.compiled
    assert np.allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    model.compile("sgd", "mse")
    model.fit(x, expected, verbose=0)
    assert len(model.trainable_variables) == 2


def test_a_merged_model_is_extended_and_cut():
    folded, _ = merged(network(lambda x: repvgg(repvgg(x))))
    x = image(folded)
    half = keras.Model(folded.input, folded.layers[2].output)
    more = keras.Model(folded.input, layers.ReLU()(folded.output))
    assert_same(more(x), folded(x))
    assert convolutions(half) == convolutions(folded)[:1]
    clone = keras.models.clone_model(folded)
    clone.set_weights(folded.get_weights())
    assert_same(clone(x), folded(x))


@pytest.mark.parametrize("dtype", [*DOUBLE, "bfloat16", "mixed_bfloat16"])
def test_types_are_kept(dtype):
    keras.config.set_dtype_policy(dtype)
    try:
        x = keras.Input((8, 8, 4))
        model = ready(keras.Model(x, layers.ReLU()(pair(x, 4, 3) + pair(x, 4, 1))))
    finally:
        keras.config.set_dtype_policy("float32")
    (conv,) = convolutions(fold(model, merge_branches=True).model)
    assert conv.dtype_policy.name == dtype
    assert {str(v.dtype) for v in conv.weights} == {"float32" if "_" in dtype else dtype}


def test_whether_it_is_trained_is_kept():
    model = network(repvgg)
    (conv,) = convolutions(fold(model, merge_branches=True).model)
    assert conv.trainable
    model.trainable = False
    (conv,) = convolutions(fold(model, merge_branches=True).model)
    assert not conv.trainable


def test_random_numbers_are_not_drawn():
    model, state = network(repvgg), random.getstate()
    fold(model, merge_branches=True)
    assert random.getstate() == state


def both(x, a=None, b=None):
    a, b = a or layers.Conv2D(4, 3, padding="same"), b or layers.Conv2D(4, 1)
    return layers.Add()([a(x), b(x)])


def branch_used(x):
    a = layers.Conv2D(4, 3, padding="same")(x)
    return layers.Concatenate()([a + layers.Conv2D(4, 1)(x), a])


def called_twice(x):
    a = layers.Conv2D(4, 3, padding="same")
    return a(ops.relu(both(x, a)))


def tied():
    a, b = layers.Conv2D(4, 3, padding="same"), layers.Conv2D(4, 3, padding="same")
    model = network(lambda x: both(x, a, b))
    b._tracker.unlock()
    b._kernel = a._kernel
    return model


def infinite():
    model = network(both)
    for variable in model.weights:
        variable.assign(ops.full(variable.shape, 3e38))
    return model


def by_a_function():
    a = layers.Conv2D(4, 3, padding="same")
    return network(lambda x: layers.Lambda(lambda y: y * a.kernel[0, 0, 0])(both(x, a)))


def by_an_operation(x):
    a = layers.Conv2D(4, 3, padding="same")
    return ops.relu(both(x, a)) * a.bias


def as_an_attribute():
    a = layers.Conv2D(4, 3, padding="same")
    model = network(lambda x: both(x, a))
    model.favourite = a
    return model


def in_training(x, training=True):
    norm = layers.BatchNormalization()
    return layers.Conv2D(4, 1)(x) + norm(layers.Conv2D(4, 3, padding="same")(x), training=training)


REFUSED = {
    "bias inside": (lambda x: pair(layers.Conv2D(4, 1)(x), 4, 3), SHIFTED),
    "batch norm inside": (lambda x: pair(pair(x, 4, 1), 4, 3), SHIFTED),
    "padded twice": (lambda x: pair(pair(x, 4, 3), 4, 3), TWICE),
    "residual": (lambda x: x + layers.Conv2D(4, 1)(ops.relu(layers.Conv2D(4, 1)(x))), APART),
    "a mean's part": (
        lambda x: layers.Average()([layers.Conv2D(4, 1)(x), layers.Conv2D(4, 1)(x), ops.relu(x)]),
        APART,
    ),
    "branch used": (branch_used, USED),
    "costlier": (
        lambda x: both(x, layers.DepthwiseConv2D(7, padding="same")), COSTLIER
    ),
    "regularized": (
        lambda x: both(x, b=layers.Conv2D(4, 1, activity_regularizer="l2")), REGULARIZED
    ),
    "called twice": (called_twice, SEVERAL),
    "tied": (tied, SHARED),
    "not finite": (infinite, NOT_FINITE),
    "dtypes": (lambda x: both(x, b=layers.Conv2D(4, 1, dtype="bfloat16")), UNLIKE),
    "rounded between": (
        lambda x: x + layers.Activation("linear", dtype="bfloat16")(layers.Conv2D(4, 1)(x)), ROUNDED
    ),
    "by an operation": (by_an_operation, READ),
    "an attribute": (as_an_attribute, HELD),
    "in training": (in_training, TRAINING),
    "in training, by a number": (lambda x: in_training(x, 1), TRAINING),
    "in training, by NumPy": (lambda x: in_training(x, np.bool_(True)), TRAINING),
    "strides and dilations": (
        lambda x: layers.Conv2D(4, 3)(layers.Conv2D(4, 1, 2, use_bias=False)(x)), STRIDED
    ),
    "average": (
        lambda x: layers.Conv2D(4, 1)(x) + layers.AveragePooling2D(3, 1, "same")(x), POOLED
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_branches_that_stay(case):
    make, reason = REFUSED[case]
    model = make() if make in (tied, infinite, as_an_attribute) else network(make)
    folded, report = fold(model, merge_branches=True)
    assert reason in {entry.reason for entry in report.left}
    assert report.changed == ()
    assert names(folded) == names(model)
    if case != "not finite":
        assert verify(model, folded, image(model)).absolute == 0


def test_a_function_that_holds_a_layer():
    model = by_a_function()
    _, report = fold(model, merge_branches=True)
    assert report.changed == ()
    assert [entry.kind for entry in report.left] == ["Functional"]


def test_a_size_that_the_graph_leaves_open():
    model = network(lambda x: repvgg(x, 6, 2), (None, None, 4))
    _, report = fold(model, merge_branches=True)
    assert report.changed == ()
    assert [entry.reason for entry in report.left] == [UNSIZED]
    folded, _ = merged(network(repvgg, (None, None, 4)))
    assert len(convolutions(folded)) == 1


def test_another_model_of_the_same_calls():
    model = network(lambda x: repvgg(repvgg(x)))
    half = keras.Model(model.input, model.layers[len(model.layers) // 2].output)
    x = image(model)
    expected = ops.convert_to_numpy(half(x))
    assert len(fold(model, merge_branches=True).report.changed) == 2
    _, report = fold(model, merge_branches=True, inplace=True)
    assert IN_OTHERS in {entry.reason for entry in report.left}
    assert_same(half(x), expected)


def test_values_of_other_shapes_are_no_branches():
    def run(x):
        pooled = layers.Conv2D(4, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x))
        return ops.relu(both(x) + pooled)

    folded, _ = merged(network(run))
    assert len(convolutions(folded)) == 2


def test_without_it_branches_stay():
    model = network(repvgg)
    folded, report = fold(model)
    assert report.changed == ()
    assert names(folded) == names(model)
