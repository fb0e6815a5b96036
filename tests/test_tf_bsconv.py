"""BSConv layers and their loss in Keras: what the contract does not ask."""

from __future__ import annotations

import numpy as np
import pytest
from contract_bsconv import FORMS, check_refused, in_form
from equal import assert_close
from frameworks import fresh, need

need("tf")

import keras  # noqa: E402
import keras_layers  # noqa: E402
from adapters.tf import BACKEND, DOUBLE  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import array, assert_same  # noqa: E402
from keras_models import filled  # noqa: E402

from doconv_core import orthonormality  # noqa: E402
from doconv_tf import (  # noqa: E402
    BSConvS2D,
    BSConvU1D,
    BSConvU2D,
    add_orthonormality,
    mark_orthonormal,
    orthonormality_loss,
)
from doconv_tf.bsconv import as_array  # noqa: E402

SHAPE = (2, 7, 8, 8)
TOLERANCE = 1e-5 if DOUBLE == "float32" else 1e-11
BOTH = pytest.mark.parametrize("cls", [BSConvU2D, BSConvS2D])


def layer(cls=BSConvS2D, shape=SHAPE, **options):
    """Return a built layer, with values as after training."""
    made = cls(6, 3, **options)
    made.build(shape)
    return filled(made)


def image(shape=SHAPE, dtype="float32"):
    return keras_layers.image(shape, dtype)


def two(**options):
    body = [
        keras.Input((7, 8, 8)), BSConvS2D(8, 3, padding="same", **options), layers.ReLU(),
        BSConvS2D(4, 3, **options),
    ]  # fmt: skip
    keras.utils.set_random_seed(0)
    return keras.Sequential(body)


def w1(made):
    return as_array(made.pointwise1.kernel, "*IO")[:, :, 0, 0].astype("float32")


def expected_loss(model):
    return sum(orthonormality(w1(s)) for s in model.layers if isinstance(s, BSConvS2D))


@BOTH
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_layer_takes_the_place_of_the_ordinary_one(cls, data_format):
    arguments = (6, (3, 5), (1, 1), "same", data_format, (2, 1), 1, "relu", False)
    made, plain = cls(*arguments), layers.Conv2D(*arguments)
    for name in (
        "filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "groups",
        "activation", "use_bias",
    ):  # fmt: skip
        assert getattr(made, name) == getattr(plain, name), name
    assert made.compute_output_shape(SHAPE) == plain.compute_output_shape(SHAPE)
    assert not made.built
    assert made(keras.Input(SHAPE[1:])).shape == plain(keras.Input(SHAPE[1:])).shape
    assert made.bias is None
    assert made.spec.in_channels == (8 if data_format == "channels_last" else 7)
    if data_format == "channels_last" or BACKEND != "tensorflow":
        assert array(made(image())).min() == 0  # TensorFlow has none channels first on the CPU
    with pytest.raises(ValueError, match="expected min_ndim=4, found ndim=3"):
        cls(6, 3)(image()[0])


def test_parts_have_the_options_of_their_layer():
    options = {"momentum": 0.8, "epsilon": 0.1}
    made = layer(with_bn=True, p=0.5, bn_options=options, dtype=DOUBLE, strides=2, around=1)
    assert [part.name for part in made.layers] == [
        "pointwise1", "batch_norm1", "pointwise2", "batch_norm2", "zero_padding", "depthwise",
    ]  # fmt: skip
    assert (made.batch_norm1.epsilon, made.batch_norm2.momentum) == (0.1, 0.8)
    assert made.pointwise1.filters == 4
    assert {variable.dtype for variable in made.weights} == {DOUBLE}
    assert type(made.depthwise) is layers.DepthwiseConv2D
    assert made.compute_output_shape(SHAPE) == made(image()).shape == (2, 4, 4, 6)
    unequal = layer(BSConvU2D, strides=(2, 1))
    assert type(unequal.depthwise) is layers.Conv2D
    assert unequal(image()).shape == (2, 3, 6, 6)
    assert layer(BSConvU1D, (2, 9, 8), padding="causal")(image((2, 9, 8))).shape == (2, 9, 6)
    keras.utils.set_random_seed(0)
    fresh = BSConvS2D(4, 3, p=1.0)
    fresh.build((None, 8, 8, 4))
    assert np.abs(array(fresh.pointwise1.kernel) - array(fresh.pointwise2.kernel)).max() > 0.1


def test_arguments_that_give_no_layer_are_refused():
    """Those of Keras alone, and what is not built."""
    around = "around, zeros on every side, goes with padding='valid' alone; received .*'same'"
    made, small, plain = BSConvU2D(6, 3, name="one"), BSConvU2D(6, 3), layers.Conv2D(4, 3)
    unbuilt, unknown = (
        "layer 'one' is not built; c",
        "layer 'one': the number of input channels",
    )
    number = "orthonormality must be a number; rec"
    check_refused(
        (lambda: BSConvS2D(6, 3, orthonormality="1"), TypeError, number),
        (lambda: BSConvU2D(6, 3, around=1, padding="same"), ValueError, around),
        (lambda: BSConvU2D(6, 3, padding="full"), ValueError, "padding"),
        (lambda: BSConvU2D(6, 3, lora_rank=2), TypeError, "BSConvU2D takes no lora_rank"),
        (made.fold, ValueError, unbuilt),
        (made.composed_kernel, ValueError, unbuilt),
        (lambda: BSConvU2D.from_conv(plain), ValueError, f"layer '{plain.name}' is not built"),
        (lambda: made.build((None, 8, 8, None)), ValueError, unknown),
        (lambda: small.build((None, 2, 2, 8)), ValueError, "negative"),
    )


@BOTH
def test_stored_loaded_and_made_of_a_configuration(cls, tmp_path):
    for around in (0, 1):
        options = {"orthonormality": 0.2, "p": 0.5} if cls is BSConvS2D else {}
        made = layer(
            cls, with_bn=True, bn_options={"epsilon": 0.1}, activation="relu", around=around,
            kernel_regularizer="l2", name="one", dtype="mixed_bfloat16", **options,
        )  # fmt: skip
        model = keras.Sequential([keras.Input(SHAPE[1:]), made])
        model.save(tmp_path / "net.keras")
        loaded = keras.saving.load_model(tmp_path / "net.keras")
        assert type(loaded.layers[0]) is cls
        assert loaded.layers[0].get_config() == made.get_config()
        assert_same(loaded(image()), model(image()))
        assert len(loaded.losses) == len(model.losses) == (3 if cls is BSConvS2D else 2)
        other = keras.Sequential([keras.Input(SHAPE[1:]), cls.from_config(made.get_config())])
        model.save_weights(tmp_path / "net.weights.h5")
        other.load_weights(tmp_path / "net.weights.h5")
        assert_same(other(image()), model(image()))


@BOTH
def test_in_functional_models_of_any_size(cls):
    made = cls(6, 3, name="shared")
    a, b = keras.Input((None, None, 8)), keras.Input((9, 9, 8))
    model = keras.Model([a, b], [made(a), made(b)])
    large, small = model([image((2, 12, 12, 8)), image((2, 9, 9, 8))])
    assert (large.shape, small.shape) == ((2, 10, 10, 6), (2, 7, 7, 6))
    x = image((2, 3, 9, 9, 8))
    assert layers.TimeDistributed(cls(4, 3))(x).shape == (2, 3, 7, 7, 4)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    made = layer(with_bn=True, dtype=policy)
    assert {variable.dtype for variable in made.weights} == {"float32"}
    assert keras.backend.standardize_dtype(made(image()).dtype) == policy.removeprefix("mixed_")
    expected = layer(with_bn=True)(image())
    assert_close(ops.cast(made(image()), "float32"), expected, 2e-2)


def test_folding_keeps_names_policies_and_regularizers():
    made = layer(dtype=DOUBLE, activation="relu", kernel_regularizer="l2", name="one")
    regular = layer(activity_regularizer=keras.regularizers.L2(0.1))
    regular(image())
    expected = sum(regular.losses)
    for form in FORMS:
        folded = made.fold(**in_form(form))
        assert (folded.name, folded.dtype_policy.name) == ("one", DOUBLE), form
        assert_close(folded(image(dtype=DOUBLE)), made(image(dtype=DOUBLE)), TOLERANCE)
        folded = regular.fold(**in_form(form))
        folded(image())
        assert_close(sum(folded.losses), expected)


def test_from_conv_keeps_what_is_not_its_weight():
    options = {"activation": "relu", "dilation_rate": 2, "name": "one"}
    conv = layer(BSConvU2D, **options).fold(**in_form("dense"))
    found = BSConvU2D.from_conv(conv)
    assert (found.name, found.dilation_rate) == ("one", (2, 2))
    assert_close(found(image()), conv(image()))


# The loss.


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), (DOUBLE, DOUBLE)])
def test_the_loss_is_computed_in_float32_at_least(dtype, wide):
    made = layer(dtype=dtype, orthonormality=1.0)
    (penalty,) = made.losses
    for found in (orthonormality_loss(made, 1), penalty):
        assert keras.backend.standardize_dtype(found.dtype) == wide
        assert float(array(found)) == pytest.approx(orthonormality(w1(made)), rel=1e-5)


def total(model):
    return sum(float(array(loss)) for loss in model.losses)


def test_the_loss_joins_the_models_losses_once():
    model = two()
    assert total(model) == 0
    for alpha in (0.3, 0.1):
        add_orthonormality(model, alpha)
        assert total(model) == pytest.approx(alpha * expected_loss(model), rel=1e-5)
        assert model.layers[0].orthonormality == alpha
    by_argument = two(orthonormality=0.1, kernel_regularizer=keras.regularizers.L2(0.01))
    decay = sum(
        0.01 * np.square(array(variable)).sum()
        for variable in by_argument.weights
        if variable.path.endswith("kernel")
    )
    expected = decay + 0.1 * expected_loss(by_argument)
    assert total(by_argument) == pytest.approx(expected, rel=1e-5)
    by_argument.layers[0].trainable = False
    assert len(by_argument.losses) == 3


def fitted(model, **options):
    """Return what `fit` says the loss of one step is, and its target."""
    target = np.zeros(model.output_shape[1:], "float32")[None].repeat(2, 0)
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model.fit(image(), target, verbose=0).history["loss"][0], target


def test_fit_includes_the_loss():
    model = two()
    plain, target = fitted(model, jit_compile=BACKEND != "torch")
    extra = expected_loss(model)
    # Without compiling again: what was compiled is not to lose the loss in silence.
    add_orthonormality(model, 0.5)
    found = model.fit(image(), target, verbose=0).history["loss"][0]
    assert found == pytest.approx(plain + 0.5 * extra, rel=1e-4)


def test_fit_includes_the_loss_with_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = two()
    finally:
        keras.config.set_dtype_policy("float32")
    plain, _ = fitted(model)
    add_orthonormality(model, 0.5)
    found, _ = fitted(model)
    assert found == pytest.approx(plain + 0.5 * expected_loss(model), rel=1e-2)


# Devices must be told before TensorFlow starts, so that it takes a process of its own: for each
# loss a list of layers, and the callbacks that train them.
TWO_DEVICES = """
import contextlib, keras, numpy as np, sys, tensorflow as tf
from doconv_tf import BSConvS2D, DGConv2D, ProgressCallback

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
# Equal halves, whose batch norms have what the whole's have.
x = np.random.default_rng(0).standard_normal((2, 7, 8, 8))
x = np.tile(x, (2, 1, 1, 1)).astype("float32")
for given in sys.argv[1:]:
    results = []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        with scope:
            keras.utils.set_random_seed(0)
            layers, callbacks = eval(given)
            model = keras.Sequential([keras.Input(x.shape[1:]), *layers])
            before = model.get_weights()
            model.compile(keras.optimizers.SGD(0.1), "mse")
        y = np.zeros((4, *model.output_shape[1:]))
        fit = model.fit(x, y, 4, 2, 0, callbacks, shuffle=False)
        changes = (b - a for a, b in zip(before, model.get_weights()))
        results.append([fit.history["loss"], *changes])
    assert all(np.abs(step).max() > 1e-4 for step in results[0]), given
    for found, expected in zip(*results):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=given)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")
def test_fit_on_two_devices_trains_as_on_one():
    orthonormal = "[BSConvS2D(n, 3, orthonormality=0.5) for n in (8, 4)], []"
    lasso = "[DGConv2D(8, 3, lasso=0.5)], [ProgressCallback()]"
    fresh("-c", TWO_DEVICES, orthonormal, lasso)


def test_marked_convolutions_keep_their_regularizer_and_are_stored(tmp_path):
    linear = mark_orthonormal(layers.Conv2D(6, 1, use_bias=False, kernel_regularizer="l2"))
    x = keras.Input((7, 8, 6))
    model = keras.Model(x, layers.Conv2D(4, 1)(linear(linear(x))))
    expected = orthonormality(as_array(linear.kernel, "*IO")[:, :, 0, 0].astype("float32"))
    assert float(array(orthonormality_loss(model, 1))) == pytest.approx(expected, rel=1e-5)
    assert mark_orthonormal(linear).kernel_regularizer.other is not None
    assert type(linear.kernel_regularizer.other) is keras.regularizers.L2
    add_orthonormality(model, 0.7)
    model.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    assert_same(sum(loaded.losses), sum(model.losses))
    last = model.layers[-1]
    mark_orthonormal(last)  # which is built
    assert array(orthonormality_loss(model, 1)) > expected
    one, unbuilt = mark_orthonormal(layers.Conv2D(4, 1, name="one")), BSConvS2D(4, 3)
    late = mark_orthonormal(layers.Conv2D(8, 1))
    late.build((None, 4, 4, 3))
    check_refused(
        (lambda: add_orthonormality(unbuilt), ValueError, "neither a .* that is built"),
        (lambda: orthonormality_loss(one), ValueError, "layer 'one' is not built"),
        (lambda: add_orthonormality(two(), float("inf")), ValueError, "alpha must be finite"),
        (lambda: add_orthonormality(two(), -1), ValueError, "alpha must not be negative"),
        (lambda: BSConvS2D(4, 3, orthonormality=-1), ValueError, "orthonormality must not be neg"),
        (
            lambda: orthonormality_loss(late),
            ValueError,
            "rows cannot be orthonormal; received 3 in",
        ),
    )
