"""Branches with batch norms in Keras alone: depthwise layers, padding, dtypes, `fit` and files."""

from __future__ import annotations

import numpy as np
import pytest
from cases import tail_but
from equal import assert_close, assert_same
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402

import doconv_tf as package  # noqa: E402
from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.normed import NO_LAYER, NO_NORM  # noqa: E402
from doconv_tf.bsconv import CONSTRAINED  # noqa: E402
from doconv_tf.normed import NORM_BOUND, STRIDED  # noqa: E402


def model_of(*parts, size=(9, 8), channels=4):
    """Return a functional model, with values as after training, and an input."""
    x = y = keras.Input((*size, channels))
    for part in parts:
        y = part(y)
    model, rng = keras.Model(x, y), np.random.default_rng(0)
    for part in model.layers:
        if isinstance(part, layers.BatchNormalization):
            part.moving_variance.assign(rng.uniform(0.5, 2, part.moving_variance.shape))
            for variable in (part.moving_mean, part.beta, part.gamma):
                if variable is not None:
                    variable.assign(rng.standard_normal(variable.shape))
    return model, rng.standard_normal((2, *(n or 9 for n in size), channels)).astype("f4")


def pair(conv=None, **norm):
    conv = conv or layers.Conv2D(4, 3, padding="same", name="conv")
    return conv, layers.BatchNormalization(name="norm", **norm), layers.ReLU(name="relu")


def over(model, kind, **options):
    """Return what takes a model's place, of which something was replaced."""
    made, report = package.over_parameterize(model, kind=kind, **options)
    assert report.changed
    return made


def reason(kind, *parts):
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        report = package.over_parameterize(model_of(*parts)[0], kind=kind).report
    (left,) = report.left
    return left.reason


@pytest.mark.parametrize("kind", ["repvgg", "mobileone", "acnet", "dbb", "qarepvgg"])
def test_depthwise_convolutions_become_depthwise_layers(kind, tmp_path):
    conv = layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, name="conv")
    model, x = model_of(layers.ZeroPadding2D(1), *pair(conv))
    made = over(model, kind)
    layer = made.get_layer("conv")
    assert type(layer) is package.NormedDepthwiseConv2D
    assert type(made.get_layer("norm")) is layers.Identity
    output = made(x)
    assert_close(output, model(x))
    state = package.export_state(made)
    geometry = {name: form.geometry for name, form in state.layers.items() if form.geometry}
    assert geometry["conv.dense0_conv" if kind == "mobileone" else "conv.dense_conv"].padding == (
        (1, 1), (1, 1),
    )  # fmt: skip
    assert kind == "acnet" or geometry["conv.pointwise_conv"].padding == ((0, 0), (0, 0))
    made.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(loaded(x), output)
    folded = package.fold(loaded).model
    assert type(folded.get_layer("conv")) is layers.DepthwiseConv2D
    assert_close(folded(x), output)

    line, x = model_of(*pair(layers.DepthwiseConv1D(3, padding="same", name="conv")), size=(9,))
    made = over(line, "dbb")
    assert type(made.get_layer("conv")) is package.NormedDepthwiseConv1D
    assert_close(package.fold(made).model(x), line(x))


def test_causal_padding_and_channels_first():
    line, x = model_of(*pair(layers.Conv1D(6, 3, padding="causal", name="conv")), size=(9,))
    made = over(line, "dbb")
    made.get_layer("conv").sequence_norm2.gamma.assign(np.arange(6.0))
    made.get_layer("conv").average_norm2.gamma.assign(np.arange(6.0))
    assert_close(package.fold(made).model(x), made(x))
    assert type(package.fold(made).model.get_layer("conv")) is layers.Conv1D

    layer = package.NormedConv2D(6, 3, padding="same", data_format="channels_first", rule="dbb")
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype("f4")
    assert tuple(layer(x).shape) == (2, 6, 6, 5)
    assert layer.compute_output_shape((2, 4, 6, 5)) == (2, 6, 6, 5)
    assert_close(layer.fold()(x), layer(x))


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (7, 12), (2, 1)])
@pytest.mark.parametrize(
    "kind",
    tail_but(["repvgg", "mobileone", "acnet", "dbb", "qarepvgg", "replknet"], "dbb", "replknet"),
)
def test_same_padding_with_strides_is_that_of_the_inputs_size(kind, size):
    """As the convolution has it, of whatever size, and as what it folds to has it."""
    kernel = (7, 7) if kind == "replknet" else (3, 5)
    strides = 3 if kind in ("repvgg", "dbb") else 2
    conv = layers.Conv2D(6, kernel, strides=strides, padding="same", name="conv")
    for given in (size, (None, None)):  # which is not known before it is called
        model, _ = model_of(*pair(conv.from_config(conv.get_config())), size=given)
        x = np.random.default_rng(0).standard_normal((2, *size, 4)).astype("f4")
        made = over(model, kind)
        assert made.output_shape == model.output_shape
        assert_close(made(x), model(x), 1e-5)
        layer = made.get_layer("conv")
        rng = np.random.default_rng(1)
        for part in layer.spec.parts:
            if part.endswith(("norm", "norm2")):
                getattr(layer, part).gamma.assign(
                    rng.uniform(0.5, 1, getattr(layer, part).gamma.shape)
                )
        folded = package.fold(made).model
        assert folded.get_layer("conv").padding == "same"
        expected = made.predict(x, verbose=0)
        assert_close(folded.predict(x, verbose=0), expected, 1e-5)
        assert made(x, training=True).shape == expected.shape
        first = next(iter(layer.spec.parts))
        geometry = package.export_state(made).layers[f"conv.{first}"].geometry
        assert all(isinstance(pad, str) for pad in geometry.padding)


@pytest.mark.parametrize("size", [(9, 8), (None, None)])
def test_the_zeros_of_same_with_strides_are_not_in_inner_norms_statistics(size):
    """DBB's branches in training: those of a layer whose input's zeros are its own."""
    conv = layers.Conv2D(4, 3, strides=2, padding="same", name="conv")
    made = over(model_of(*pair(conv), size=size)[0], "dbb")
    layer = made.get_layer("conv")
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 4)).astype("f4")
    statistics = {
        name: getattr(layer, name).moving_mean
        for name, part in layer.spec.parts.items()
        if getattr(part, "inner", False)
    }
    assert statistics
    before = {name: np.array(mean) for name, mean in statistics.items()}
    made(x, training=True)
    for name, mean in statistics.items():
        inner = getattr(layer, name.replace("norm", "conv"), None)
        seen = x if inner is None else inner(x)
        momentum = getattr(layer, name).momentum
        expected = momentum * before[name] + (1 - momentum) * np.mean(seen, (0, 1, 2))
        assert_close(mean, expected, 1e-5)


def test_what_is_left_and_why():
    conv, norm = layers.Conv2D, layers.BatchNormalization
    assert reason("unireplknet", *pair(conv(4, 5, strides=2))) == STRIDED
    with pytest.raises(ValueError, match=r"rule='unireplknet' takes no strides.*strides=\(2, 2\)"):
        package.NormedConv2D(4, 5, 2, rule="unireplknet")
    assert reason("repvgg", *pair(layers.SeparableConv2D(4, 3))) == NO_LAYER
    assert CONSTRAINED in reason("acnet", *pair(conv(4, 3, kernel_constraint="max_norm")))
    assert NORM_BOUND in reason("acnet", conv(4, 3), norm(gamma_regularizer="l2"))
    assert "has an activation before it" in reason("acnet", conv(4, 3, activation="relu"), norm())
    assert "normalizes another axis" in reason("acnet", conv(4, 3), norm(1))
    assert reason("acnet", conv(4, 3), layers.ReLU(), norm()) == NO_NORM


def test_a_batch_norm_without_gamma_and_beta_gets_fixed_ones():
    model, x = model_of(*pair(center=False, scale=False))
    for kind in ("repvgg", "qarepvgg"):
        made = over(model, kind)
        layer = made.get_layer("conv")
        norm = layer.norm if kind == "qarepvgg" else layer.dense_norm
        assert not norm.gamma.trainable
        assert not norm.beta.trainable
        assert_close(made(x), model(x))
        assert_close(package.fold(made).model(x), model(x))


def test_layers_are_trained_by_fit_and_regularized_as_the_convolution_is():
    conv = layers.Conv2D(4, 3, padding="same", kernel_regularizer="l2", name="conv")
    model, x = model_of(*pair(conv), layers.GlobalAveragePooling2D())
    made = over(model, "dbb")
    made.compile(keras.optimizers.SGD(0.1), "mse")
    before = [np.array(variable) for variable in made.trainable_variables]
    made.fit(x, np.ones((2, 4)), epochs=8, verbose=0)  # the first changes gammas of zero
    assert len(made.losses) == 5  # one for each kernel
    # A bias before a batch norm takes no part in training; nor a factor, with a mean alone between.
    free = {"average_norm/gamma", "average_norm/beta", "sequence_norm/beta", "dense_conv/bias"}
    for variable, values in zip(made.trainable_variables, before, strict=True):
        moved = abs(np.array(variable) - values).max() > 1e-6
        assert moved or variable.path.removeprefix("conv/") in free, variable.path
    assert_close(package.fold(made).model(x), made(x))


def test_mixed_precision_keeps_its_policy():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, x = model_of(*pair())
        made = over(model, "repvgg")
    finally:
        keras.config.set_dtype_policy(policy)
    layer = made.get_layer("conv")
    assert {part.dtype_policy.name for part in (layer, layer.dense_conv)} == {"mixed_float16"}
    assert_close(made(x), model(x), 2e-3)
    folded = package.fold(made).model.get_layer("conv")
    assert (folded.dtype_policy.name, str(folded.kernel.dtype)) == ("mixed_float16", "float32")


def test_what_was_changed_is_not_folded():
    def relu(layer):
        layer.pointwise_conv.activation = keras.activations.relu

    def axis(layer):
        layer.dense_norm.axis = 1

    def watched(layer):
        layer.dense_norm.activity_regularizer = keras.regularizers.L2(0.1)

    for change, message in (
        (relu, "its pointwise_conv is not as its rule makes it"),
        (axis, "its dense_norm cannot be folded: normalizes another axis"),
        (watched, "its dense_norm has an activity regularizer"),
    ):
        layer = package.NormedConv2D(4, 3, rule="repvgg")
        layer.build((None, 8, 8, 4))
        change(layer)
        with pytest.raises(NotFoldable, match=message):
            layer.fold()
    with pytest.raises(ValueError, match=r"is not built; call it, or its build\(\), first"):
        package.NormedConv2D(4, 3).fold()
    with pytest.raises(ValueError, match="takes no activation, which would stand before its batch"):
        package.NormedConv2D(4, 3, activation="relu")
    with pytest.raises(ValueError, match="input channels must be known; received the input shape"):
        package.NormedConv2D(4, 3).build((None, 8, 8, None))


def test_a_state_tells_whether_the_input_is_a_branch():
    """Of `qarepvgg` nothing else does: zeros before the layer are not its padding then."""
    for rule, padding in (("repvgg", (1, 1)), ("qarepvgg", (0, 0))):
        conv = layers.Conv2D(4, 3, name="conv")
        made = over(model_of(layers.ZeroPadding2D(1), *pair(conv))[0], rule)
        form = package.export_state(made).layers["conv.dense_conv"]
        assert form.geometry.padding == (padding, padding)
