"""BSConv layers and their loss in Keras: what the contract does not ask."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
import keras_layers  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import array, assert_same  # noqa: E402

import doconv_tf  # noqa: E402
from doconv_core import NotFoldable, orthonormality, orthonormality_gradient  # noqa: E402
from doconv_tf import (  # noqa: E402
    BSConvS,
    BSConvS1D,
    BSConvS2D,
    BSConvU,
    BSConvU1D,
    BSConvU2D,
    BSConvU3D,
    add_orthonormality,
    mark_orthonormal,
    orthonormality_loss,
    over_parameterize,
)
from doconv_tf.bsconv_fold import as_array, put_kernel  # noqa: E402
from doconv_tf.over_parameterized import OverParameterized  # noqa: E402

SHAPE = (2, 7, 8, 8)
BACKEND = keras.backend.backend()
# JAX computes in float32 unless it is told otherwise.
DOUBLE, TOLERANCE = ("float32", 1e-5) if BACKEND == "jax" else ("float64", 1e-11)
BOTH = pytest.mark.parametrize("cls", [BSConvU2D, BSConvS2D])


def layer(cls=BSConvS2D, shape=SHAPE, **options):
    """Return a built layer, with values as after training."""
    made = cls(6, 3, **options)
    made.build(shape)
    rng = np.random.default_rng(0)
    for variable in made.weights:
        values = 0.3 * rng.standard_normal(variable.shape)
        variable.assign(np.abs(values) + 0.5 if "variance" in variable.path else values)
    return made


def image(shape=SHAPE, dtype="float32"):
    return keras_layers.image(shape, dtype)


def close(found, expected, tolerance=1e-5):
    found, expected = array(found), array(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


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


def value_and_gradient(function, variable):
    """Return a function's value, and its gradient with respect to a variable, on any backend."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        return value, tape.gradient(value, variable.value)
    if BACKEND == "torch":
        import torch

        value = function()
        return value, torch.autograd.grad(value, variable.value)[0]
    import jax

    def call(values):
        with keras.StatelessScope(state_mapping=[(variable, values)]):
            return function()

    return jax.value_and_grad(call)(variable.value)


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
    assert (BSConvU, BSConvS) == (BSConvU2D, BSConvS2D)
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


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (BSConvU2D, {"groups": 2}, ValueError, "BSConvU2D takes groups=1 alone.*groups=2"),
        (BSConvS2D, {"p": 0}, ValueError, "p must be above 0 and at most 1; received p=0"),
        (BSConvS2D, {"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        (BSConvS2D, {"orthonormality": "1"}, TypeError, "orthonormality must be a number; rec"),
        (BSConvU2D, {"strides": 0}, ValueError, "strides must be at least 1"),
        (BSConvU2D, {"around": -1}, ValueError, "around must be at least 0"),
        (
            BSConvU2D,
            {"around": 1, "padding": "same"},
            ValueError,
            "around, zeros on every side, goes with padding='valid' alone; received .*'same'",
        ),
        (BSConvU2D, {"padding": "full"}, ValueError, "padding"),
        (BSConvU2D, {"with_bn": None}, TypeError, "with_bn must be True or False"),
        (BSConvU2D, {"bn_options": {"epsilon": 1}}, ValueError, "give with_bn=True as well"),
        (
            BSConvU2D,
            {"with_bn": True, "bn_options": {"eps": 1}},
            TypeError,
            "bn_options may have momentum, epsilon.*received 'eps'",
        ),
        (BSConvU2D, {"lora_rank": 2}, TypeError, "BSConvU2D takes no lora_rank"),
    ],
)
def test_arguments_that_give_no_layer_are_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(6, 3, **options)


def test_what_is_not_built_says_so():
    made = BSConvU2D(6, 3, name="one")
    for call in (made.fold, made.composed_kernel):
        with pytest.raises(ValueError, match="layer 'one' is not built; call it"):
            call()
    with pytest.raises(ValueError, match="layer 'one': the number of input channels must be known"):
        made.build((None, 8, 8, None))
    with pytest.raises(ValueError, match="negative"):
        made.build((None, 2, 2, 8))


@BOTH
@pytest.mark.parametrize("around", [0, 1])
def test_stored_loaded_and_made_of_a_configuration(cls, around, tmp_path):
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


@BOTH
def test_the_composed_kernel_is_that_of_the_layer_and_has_its_gradients(cls):
    made = layer(cls, dtype=DOUBLE)
    x = image(dtype=DOUBLE)

    def by_kernel():
        return ops.sum(ops.square(ops.conv(x, made.composed_kernel()) + made.bias))

    def by_layer():
        return ops.sum(ops.square(made(x)))

    for part in (made.layers[0], made.depthwise):
        found, gradient = value_and_gradient(by_kernel, part.kernel)
        expected, exact = value_and_gradient(by_layer, part.kernel)
        close(found, expected, TOLERANCE)
        close(gradient, exact, TOLERANCE)
    with pytest.raises(NotFoldable, match="with batch norms is no mere kernel; fold"):
        layer(cls, with_bn=True).composed_kernel()


def test_half_types_are_composed_and_folded_with_one_rounding():
    made = layer(dtype="bfloat16")
    exact = layer(dtype="float32")
    for variable, wide in zip(made.weights, exact.weights, strict=True):
        wide.assign(ops.cast(variable, "float32"))
    kernel = made.fold(form="dense").kernel
    composed = made.composed_kernel()
    expected = ops.cast(exact.composed_kernel(), "bfloat16")
    for found in (kernel, composed):
        assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
        close(ops.cast(found, "float32"), ops.cast(expected, "float32"), 2**-7)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    made = layer(with_bn=True, dtype=policy)
    assert {variable.dtype for variable in made.weights} == {"float32"}
    assert keras.backend.standardize_dtype(made(image()).dtype) == policy.removeprefix("mixed_")
    expected = layer(with_bn=True)(image())
    close(ops.cast(made(image()), "float32"), expected, 2e-2)


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_folding_keeps_names_policies_and_what_is_trainable(form):
    made = layer(dtype=DOUBLE, activation="relu", kernel_regularizer="l2", name="one")
    for variable in made.weights:
        variable.trainable = False
    folded = made.fold(form=form)
    assert (folded.name, folded.dtype_policy.name) == ("one", DOUBLE)
    assert not folded.trainable_variables
    assert {variable.dtype for variable in folded.weights} == {DOUBLE}
    close(folded(image(dtype=DOUBLE)), made(image(dtype=DOUBLE)), TOLERANCE)


def test_activity_regularizers_go_with_the_output():
    made = layer(activity_regularizer=keras.regularizers.L2(0.1))
    made(image())
    expected = sum(made.losses)
    for form in ("keep", "merge", "dense"):
        folded = made.fold(form=form)
        folded(image())
        close(sum(folded.losses), expected)


def own_call(made):
    made.call = made.call


def activated(made):
    made.pointwise1.activation = keras.activations.relu


def regularized(made):
    made.pointwise2.activity_regularizer = keras.regularizers.L2(0.1)


def turned(made):
    made.batch_norm1.axis = 1


def more(made):
    made.add(layers.ReLU(name="more"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (own_call, "has a call of its own, so the convolution"),
        (activated, "its pointwise1 is no pointwise convolution of stride 1 without activation"),
        (regularized, "its pointwise2 has an activity regularizer, which would see other values"),
        (turned, "its batch_norm1 cannot be folded: normalizes another axis"),
        (more, "its parts are pointwise1, batch_norm1, .*, more; expected pointwise1"),
    ],
)
def test_what_may_compute_something_else_is_not_folded(change, message):
    made = layer(with_bn=True)
    change(made)
    with pytest.raises(NotFoldable, match=message):
        made.fold(form="dense")


def test_folding_says_which_forms_there_are():
    with pytest.raises(ValueError, match="form must be one of 'keep', 'merge', 'dense'"):
        layer().fold(form="deploy")
    for options in ({"padding": "same"}, {"around": 1}):
        with pytest.raises(NotFoldable, match=r"meets zero padding .* use form='merge'"):
            layer(with_bn=True, **options).fold(form="dense")


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
@pytest.mark.parametrize(("cls", "shape"), [(BSConvS2D, SHAPE), (BSConvU3D, (1, 5, 5, 5, 4))])
def test_the_depthwise_part_may_be_a_do_layer(form, cls, shape):
    made, report = over_parameterize(layer(cls, shape), depth_multiplier=30)
    assert [change.path for change in report.changed] == ["depthwise"]
    d = made.depthwise.depthwise_kernel
    d.assign(0.1 * np.random.default_rng(1).standard_normal(d.shape))
    expected = made(image(shape))
    close(ops.conv(image(shape), made.composed_kernel()) + made.bias, expected)
    folded = made.fold(form=form)
    assert not any(isinstance(part, OverParameterized) for part in folded._flatten_layers())
    close(folded(image(shape)), expected)


def test_from_conv_says_what_it_takes():
    conv = layers.Conv2D(4, 3, groups=2, name="conv")
    with pytest.raises(TypeError, match=r"BSConvU2D.from_conv takes over a keras.layers.Conv2D"):
        BSConvU2D.from_conv(layers.Conv1D(4, 3))
    with pytest.raises(ValueError, match="layer 'conv' is not built"):
        BSConvU2D.from_conv(conv)
    conv.build(SHAPE)
    with pytest.raises(ValueError, match=r"takes groups=1 alone.*received groups=2"):
        BSConvU2D.from_conv(conv)
    plain = layers.Conv2D(4, 3)
    plain.build(SHAPE)
    with pytest.raises(ValueError, match="start must be one of 'weights', 'random'"):
        BSConvU2D.from_conv(plain, start="zeros")


@pytest.mark.parametrize("with_bn", [False, True])
def test_from_conv_starts_from_the_weights(with_bn):
    options = {"activation": "relu", "dilation_rate": 2, "name": "one"}
    conv = layer(BSConvU2D, **options).fold(form="dense")
    bn_options = {"epsilon": 1e-9} if with_bn else None
    found = BSConvU2D.from_conv(conv, with_bn=with_bn, bn_options=bn_options)
    assert found.explained == pytest.approx(1)
    assert (found.name, found.dilation_rate) == ("one", (2, 2))
    close(found(image()), conv(image()))
    random = BSConvU2D.from_conv(conv, start="random")
    assert random.explained is None
    assert np.abs(array(random.pointwise.kernel)).max() > 0
    assert_same(random.bias, conv.bias)


def test_the_loss_and_its_gradient_are_the_cores():
    model = two()
    first = model.layers[0].pointwise1.kernel
    loss, gradient = value_and_gradient(lambda: orthonormality_loss(model, alpha=0.5), first)
    assert float(array(loss)) == pytest.approx(0.5 * expected_loss(model), rel=1e-5)
    expected = 0.5 * orthonormality_gradient(w1(model.layers[0])).T
    np.testing.assert_allclose(array(gradient)[0, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_orthonormal_rows_is_zero():
    made = layer()
    put_kernel(made.pointwise1, np.eye(4, 8))
    loss, gradient = value_and_gradient(lambda: orthonormality_loss(made), made.pointwise1.kernel)
    assert float(array(loss)) == 0
    assert not array(gradient).any()


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), (DOUBLE, DOUBLE)])
def test_the_loss_is_computed_in_float32_at_least(dtype, wide):
    made = layer(dtype=dtype, orthonormality=1.0)
    (penalty,) = made.losses
    for found in (orthonormality_loss(made, 1), penalty):
        assert keras.backend.standardize_dtype(found.dtype) == wide
        assert float(array(found)) == pytest.approx(orthonormality(w1(made)), rel=1e-5)


def test_the_loss_joins_the_models_losses_once():
    model = two()
    assert sum(float(array(loss)) for loss in model.losses) == 0
    expected = expected_loss(model)
    for alpha in (0.3, 0.1):
        add_orthonormality(model, alpha)
        found = sum(float(array(loss)) for loss in model.losses)
        assert found == pytest.approx(alpha * expected, rel=1e-5)
        assert model.layers[0].orthonormality == alpha
    by_argument = two(orthonormality=0.1, kernel_regularizer=keras.regularizers.L2(0.01))
    first = by_argument.layers[0]
    decay = sum(
        0.01 * np.square(array(variable)).sum()
        for variable in by_argument.weights
        if variable.path.endswith("kernel")
    )
    found = sum(float(array(loss)) for loss in by_argument.losses)
    assert found == pytest.approx(decay + 0.1 * expected_loss(by_argument), rel=1e-5)
    first.trainable = False
    assert len(by_argument.losses) == 3


def fitted(model, alpha=None, **options):
    """Return what `fit` says the loss of one step is, and its mean squared error."""
    x = image()
    target = np.zeros(model.output_shape[1:], "float32")[None].repeat(2, 0)
    if alpha is not None:
        add_orthonormality(model, alpha)
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model.fit(x, target, verbose=0).history["loss"][0], target


@pytest.mark.parametrize("jit", [BACKEND == "jax", BACKEND != "torch"])
def test_fit_includes_the_loss(jit):
    model = two()
    plain, target = fitted(model, jit_compile=jit)
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
    found, _ = fitted(model, 0.5)
    assert found == pytest.approx(plain + 0.5 * expected_loss(model), rel=1e-2)


# Devices must be told before TensorFlow starts, so that it takes a process of its own.
TWO_DEVICES = """
import contextlib, keras, numpy as np, tensorflow as tf
from doconv_tf import BSConvS2D, add_orthonormality

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
rng = np.random.default_rng(0)
x, y = (rng.standard_normal(shape).astype("float32") for shape in ((4, 7, 8, 8), (4, 5, 6, 4)))
results = []
for scope in (contextlib.nullcontext(), strategy.scope()):
    with scope:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(x.shape[1:]), BSConvS2D(8, 3, padding="same")])
        model.add(BSConvS2D(4, 3))
        before = model.get_weights()
        add_orthonormality(model, 0.5)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        loss = model.fit(x, y, batch_size=4, verbose=0).history["loss"]
    results.append([loss, *(b - a for a, b in zip(before, model.get_weights()))])
assert all(np.abs(step).max() > 1e-4 for step in results[0])
for found, expected in zip(*results):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")
def test_fit_on_two_devices_trains_as_on_one():
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_marked_convolutions_count_once_wherever_they_are(tmp_path):
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
    both = keras.Sequential([keras.Input((7, 8, 8)), *two().layers, layers.Conv2D(3, 1)])
    one = array(orthonormality_loss(both))
    mark_orthonormal(both.layers[0].pointwise1)  # which counts already
    assert array(orthonormality_loss(both)) == one
    mark_orthonormal(both.layers[-1])  # which is built
    assert array(orthonormality_loss(both)) > one


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: orthonormality_loss(layers.Conv2D(4, 1)), ValueError, "the Conv2D has no weight"),
        (lambda: orthonormality_loss(layer(BSConvU2D)), ValueError, "neither a BSConvS1D, BSC"),
        (lambda: add_orthonormality(BSConvS2D(4, 3)), ValueError, "neither a .* that is built"),
        (
            lambda: orthonormality_loss(mark_orthonormal(layers.Conv2D(4, 1, name="one"))),
            ValueError,
            "layer 'one' is not built",
        ),
        (lambda: orthonormality_loss([]), TypeError, "must be a keras.Layer; received list"),
        (lambda: orthonormality_loss(two(), "1"), TypeError, "alpha must be a number; received"),
        (lambda: add_orthonormality(two(), float("inf")), ValueError, "alpha must be finite"),
        (lambda: mark_orthonormal(layers.Dense(2)), TypeError, "takes a convolution; received D"),
        (lambda: mark_orthonormal(layers.Conv2D(4, 3)), ValueError, r"kernel_size=\(3, 3\)"),
        (lambda: mark_orthonormal(layers.Conv1D(4, 1, groups=2)), ValueError, "rec.*groups=2"),
    ],
)
def test_what_has_no_loss_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("alpha", [0.1, 0])
def test_training_with_the_loss_makes_the_rows_orthonormal(alpha):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((9, 8)),
            BSConvS1D(6, 3, p=0.5, with_bn=True, orthonormality=alpha),
            layers.ReLU(),
            BSConvS1D(4, 3, p=0.5, orthonormality=alpha),
        ]
    )
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((16, 9, 8)), rng.standard_normal((16, 5, 4))
    x, target = (np.tile(each.astype("float32"), (300, 1, 1)) for each in (x, target))
    rate = keras.optimizers.schedules.CosineDecay(0.2, 300)
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(x, target, 16, shuffle=False, verbose=0)  # 300 steps
    for trained in (model.layers[0], model.layers[2]):
        w = as_array(trained.pointwise1.kernel, "*IO")[:, :, 0]
        off = np.abs(w @ w.T - np.eye(len(w))).max()
        assert off <= 1e-4 if alpha else off > 0.5


def test_the_package_has_every_name():
    names = {"BSConvU", "BSConvS", "to_bsconv", "mark_orthonormal", "add_orthonormality"}
    assert names <= set(doconv_tf.__all__)
