"""What is special to Keras: everything a user does with `keras.layers.Conv2D`.

Nothing here names TensorFlow but the export, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from functools import partial
from operator import attrgetter

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402

from doconv_core import StateError, compose, difference, from_canonical, to_canonical  # noqa: E402
from doconv_tf import (  # noqa: E402
    DOConv1D,
    DOConv2D,
    DOConv3D,
    DODepthwiseConv2D,
    export_state,
    load_state,
)

BACKEND = keras.backend.backend()
PAIRS = [
    (DOConv1D, layers.Conv1D),
    (DOConv2D, layers.Conv2D),
    (DOConv3D, layers.Conv3D),
    (DODepthwiseConv2D, layers.DepthwiseConv2D),
]
EACH = pytest.mark.parametrize(("do_conv", "conv"), PAIRS, ids=["1d", "2d", "3d", "depthwise"])
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 12, 18, 19])
SHAPE = (2, 7, 8, 4)


def arguments(do_conv, **options):
    """Return arguments that a layer of any of the classes takes, for 4 channels of input."""
    if do_conv in (DODepthwiseConv2D, layers.DepthwiseConv2D):
        return {"depth_multiplier": 2, **options}
    return {"filters": 6, "groups": 2, **options}


def with_multiplier(do_conv, multiplier):
    name = "d_multiplier" if do_conv is DODepthwiseConv2D else "depth_multiplier"
    return {name: multiplier}


def random_values(layer, seed=0):
    """Give every variable of the layer random values, as after training; return the layer."""
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(0.3 * rng.standard_normal(variable.shape))
    return layer


def trained(multiplier=None, **options):
    layer = DOConv2D(6, 3, padding="same", groups=2, depth_multiplier=multiplier, **options)
    layer.build(SHAPE)
    return random_values(layer)


def image(shape=SHAPE, dtype="float32"):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def shape_for(do_conv):
    return (2, *[5] * {DOConv1D: 1, DOConv3D: 3}.get(do_conv, 2), 4)


def array(values):
    return ops.convert_to_numpy(values)


def assert_same(found, expected):
    np.testing.assert_array_equal(array(found), array(expected))


@EACH
def test_the_signature_is_the_ordinary_one_and_keywords(do_conv, conv):
    ours = inspect.signature(do_conv.__init__).parameters.values()
    theirs = inspect.signature(conv.__init__).parameters.values()
    usual = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in usual] == [p.name for p in theirs if p.kind is not p.VAR_KEYWORD]
    assert {p.name for p in ours if p.kind is p.KEYWORD_ONLY} == (
        {"d_multiplier", "d_initializer", "d_regularizer", "d_constraint"}
        if do_conv is DODepthwiseConv2D
        else {
            "depth_multiplier",
            "depthwise_initializer",
            "depthwise_regularizer",
            "depthwise_constraint",
        }
    )
    ours = do_conv(**arguments(do_conv, kernel_size=3)).get_config()
    theirs = conv(**arguments(conv, kernel_size=3)).get_config()
    assert {**ours, "name": ""} | {**theirs, "name": ""} == {**ours, "name": ""}
    assert issubclass(do_conv, conv)


@EACH
@pytest.mark.parametrize("steps", [(2, 1), (1, 3)])
def test_every_positional_argument_reaches_its_place(do_conv, conv, steps):
    rank = len(shape_for(do_conv)) - 2
    regularizers = [keras.regularizers.L2(0.1 * n) for n in (1, 2, 3)]
    values = {
        "filters": 9,
        "kernel_size": (2, 3, 4)[:rank],
        "strides": steps[0],
        "padding": "same",
        "depth_multiplier": 5,
        "data_format": "channels_first",
        "dilation_rate": steps[1],
        "groups": 3,
        "activation": "relu",
        "use_bias": False,
        "kernel_initializer": "he_normal",
        "depthwise_initializer": "he_normal",
        "bias_initializer": "ones",
        "kernel_regularizer": regularizers[0],
        "depthwise_regularizer": regularizers[0],
        "bias_regularizer": regularizers[1],
        "activity_regularizer": regularizers[2],
        "kernel_constraint": "max_norm",
        "depthwise_constraint": "max_norm",
        "bias_constraint": "non_neg",
    }
    parameters = list(inspect.signature(conv).parameters.values())[:-1]
    given = [values[p.name] for p in parameters]
    ours, theirs = do_conv(*given).get_config(), conv(*given).get_config()
    assert {name: ours[name] for name in theirs} | {"name": ""} == {**theirs, "name": ""}
    usual = conv(**arguments(conv, kernel_size=1)).get_config()
    same = {p.name for p in parameters if theirs[p.name] == usual[p.name]}
    assert same == {"dilation_rate" if steps[1] == 1 else "strides"}


def test_numpy_sizes_are_taken_as_the_ordinary_layer_takes_them():
    given = (np.int64(4), np.array([3, 2]))
    ours, theirs = DOConv2D(*given).get_config(), layers.Conv2D(*given).get_config()
    assert {name: ours[name] for name in theirs} | {"name": ""} == {**theirs, "name": ""}


@EACH
def test_a_fresh_layer_is_the_ordinary_one_of_the_same_seed(do_conv, conv):
    x, outputs, kernels = image(shape_for(do_conv)), [], []
    for cls in (conv, do_conv):
        keras.utils.set_random_seed(0)
        layer = cls(**arguments(cls, kernel_size=3))
        outputs.append(layer(x))
        kernels.append(layer.kernel)
    assert_same(*outputs)
    assert_same(*kernels)
    assert not array(layer.depthwise_kernel).any()


@EACH
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
def test_options_of_the_ordinary_layer(do_conv, conv, data_format, padding):
    usual = {
        "kernel_size": 3,
        "padding": padding,
        "data_format": data_format,
        "activation": "relu",
        "use_bias": padding != "same",
        "dilation_rate": 2,
    }
    if padding == "causal" and do_conv is not DOConv1D:
        with pytest.raises(ValueError, match="padding"):
            do_conv(**arguments(do_conv, **usual))
        return
    x = image(shape_for(do_conv))
    if data_format == "channels_first":
        x = np.moveaxis(x, -1, 1)
    layer, plain = (cls(**arguments(cls, **usual)) for cls in (do_conv, conv))
    layer.build(x.shape)
    plain.build(x.shape)
    random_values(layer)
    plain.kernel.assign(layer.composed_kernel())
    if plain.use_bias:
        plain.bias.assign(layer.bias)
    assert_same(layer(x), plain(x))
    assert layer.compute_output_shape(x.shape) == plain.compute_output_shape(x.shape)
    assert tuple(layer(x).shape) == layer.compute_output_shape(x.shape)


@MULTIPLIERS
@EACH
def test_composition_is_the_cores(do_conv, conv, multiplier):
    size = {DOConv1D: 9, DOConv3D: (1, 3, 3)}.get(do_conv, 3)
    options = with_multiplier(do_conv, multiplier)
    layer = do_conv(**arguments(do_conv, kernel_size=size), padding="same", **options)
    layer.build(shape_for(do_conv))
    random_values(layer)
    w = to_canonical(array(layer._kernel), layer.layout).reshape(layer.spec.weight_shape)
    d = array(layer.depthwise_kernel)
    expected = compose(w.astype(np.float64), d.astype(np.float64), layer.spec)
    found = to_canonical(array(layer.composed_kernel()), layer.layout)
    assert difference(found, expected).relative < 1e-6


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_composes_in_the_variables_dtype_and_casts_once(policy):
    half = policy.removeprefix("mixed_")
    layer = trained(dtype=policy)
    standard = keras.backend.standardize_dtype
    seen = {}
    convolution = layer.convolution_op
    composed = layer.composed_kernel

    def watch_kernel():
        seen["composed"] = composed()
        return seen["composed"]

    def watch_convolution(inputs, kernel):
        seen["kernel"] = kernel
        return convolution(inputs, kernel)

    layer.composed_kernel, layer.convolution_op = watch_kernel, watch_convolution
    output = layer(image())
    assert standard(output.dtype) == standard(seen["kernel"].dtype) == half
    assert standard(seen["composed"].dtype) == "float32"
    assert_same(
        ops.cast(seen["kernel"], "float32"), ops.cast(ops.cast(composed(), half), "float32")
    )
    assert {v.dtype for v in layer.weights} == {"float32"}
    folded = layer.fold()
    assert folded.dtype_policy.name == policy
    assert_same(ops.cast(folded(image()), "float32"), ops.cast(output, "float32"))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_policies_of_one_dtype(dtype):
    if (BACKEND, dtype) == ("jax", "float64"):
        dtype = "float32"  # without jax_enable_x64, JAX has no float64
    layer = trained(dtype=dtype)
    assert {v.dtype for v in layer.weights} == {dtype}
    assert keras.backend.standardize_dtype(layer(image()).dtype) == dtype
    folded = layer.fold()
    assert_same(ops.cast(folded(image()), "float32"), ops.cast(layer(image()), "float32"))
    if dtype == "float64":
        w = to_canonical(array(layer._kernel), "*IO").reshape(layer.spec.weight_shape)
        expected = compose(w, array(layer.depthwise_kernel), layer.spec)
        found = to_canonical(array(layer.composed_kernel()), "*IO")
        assert difference(found, expected).relative < 1e-14


def test_a_policy_map_gives_each_path_its_own():
    policies = keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("float32"))
    policies["double"] = keras.DTypePolicy("float16")
    policies["eight"] = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    layer = DOConv2D(6, 3, name="double", dtype=policies)
    layer.build(SHAPE)
    assert {v.dtype for v in layer.weights} == {"float16"}
    with pytest.raises(ValueError, match=r"quantized dtype policy 'int8_from_float32'.*fold\(\)"):
        DOConv2D(6, 3, name="eight", dtype=policies).build(SHAPE)


def test_fold_and_from_conv_keep_what_decides_the_dtype():
    policies = keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("float32"))
    policies["inner/double"] = keras.DTypePolicy("float16")
    policies["inner/double/slope"] = keras.DTypePolicy("bfloat16")
    slope = layers.PReLU(name="slope", dtype=policies)
    layer = DOConv2D(6, 3, name="double", dtype=policies, autocast=False, activation=slope)
    with keras.name_scope("inner"):
        layer.build(SHAPE)
        with keras.name_scope("double"):
            slope.build((None, 5, 6, 6))
    folded = layer.fold()
    for found in (layer, folded, DOConv2D.from_conv(folded)):
        assert not found.autocast
        assert {v.dtype for v in found.weights if v.name != "alpha"} == {"float16"}
        assert found.activation.alpha.dtype == "bfloat16"


@keras.saving.register_keras_serializable(package="doconv_tests")
class Subclassed(keras.Model):
    """A model whose layers Keras finds by attribute, where their class does not matter."""

    def __init__(self, convolution):
        super().__init__()
        self.first, self.pool, self.last = convolution, layers.Flatten(), layers.Dense(3)

    def build(self, input_shape):
        if not self.first.built:
            self.first.build(input_shape)
        self.last.build((None, 6 * 7 * 8))

    def call(self, x):
        return self.last(self.pool(self.first(x)))

    def get_config(self):
        return {"convolution": keras.saving.serialize_keras_object(self.first)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["convolution"]))


def model_of(kind, first):
    """Return a built model of the kind around a convolution that keeps the image's size."""
    if kind == "subclassed":
        model = Subclassed(first)
        model.build(SHAPE)
        return model
    rest = [layers.Flatten(name="flat"), layers.Dense(3, name="last")]
    inputs = keras.Input(SHAPE[1:])
    if kind == "sequential":
        return keras.Sequential([inputs, first, *rest])
    return keras.Model(inputs, rest[1](rest[0](first(inputs))))


KINDS = pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
JIT = [False] if BACKEND == "torch" else [False, True]


@KINDS
@pytest.mark.parametrize("jit", JIT)
def test_fit_lowers_the_loss_and_trains_d(kind, jit):
    keras.utils.set_random_seed(0)
    layer = DOConv2D(6, 3, padding="same", groups=2, depth_multiplier=12, name="first")
    model = model_of(kind, layer)
    before = {v.path: array(v).copy() for v in model.weights}
    x = image((16, *SHAPE[1:]))
    y = x.mean(axis=(1, 2))[:, :3]
    model.compile("sgd", "mse", jit_compile=jit)
    history = model.fit(x, y, batch_size=8, epochs=5, verbose=0, shuffle=False).history["loss"]
    assert history[-1] < 0.5 * history[0]
    for variable in model.weights:
        assert (array(variable) != before[variable.path]).any(), variable.path
    assert difference(model.predict(x, verbose=0), array(model(x))).relative < 1e-5


@pytest.fixture
def mixed_float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.usefixtures("mixed_float16")
@pytest.mark.parametrize("jit", JIT)
def test_training_goes_on_from_a_stored_model_with_the_loss_scaled(jit, tmp_path):
    keras.utils.set_random_seed(0)
    model = model_of("functional", DOConv2D(6, 3, padding="same", depth_multiplier=12, name="a"))
    model.compile("adam", "mse", jit_compile=jit)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    x = image((8, *SHAPE[1:]))
    fit = {"x": x, "y": x.mean(axis=(1, 2))[:, :3], "batch_size": 4, "verbose": 0, "shuffle": False}
    model.fit(**fit)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    before = [array(v).copy() for v in model.weights]
    losses = [m.fit(**fit).history["loss"] for m in (model, again)]
    assert np.isfinite(losses).all()
    assert model.optimizer.variables
    for kind in ("weights", "optimizer.variables"):
        values = [attrgetter(kind)(m) for m in (model, again)]
        for one, other in zip(*values, strict=True):
            assert difference(array(one), array(other)).relative < 1e-6, one.path
    assert all((array(v) != b).any() for v, b in zip(model.weights, before, strict=True))


def test_nested_shared_and_time_distributed_layers_are_stored(tmp_path):
    shared = DOConv2D(4, 3, padding="same", depth_multiplier=12, name="shared")
    each_row = layers.TimeDistributed(DOConv1D(5, 3, depth_multiplier=4), name="rows")
    inputs = keras.Input(SHAPE[1:])
    inner = keras.Sequential([keras.Input(SHAPE[1:]), DODepthwiseConv2D(3, padding="same")])
    model = random_values(keras.Model(inputs, each_row(inner(shared(shared(inputs))))))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert len(again.weights) == 9
    assert_same(again(image()), model(image()))
    rows = again.get_layer("rows").layer
    assert_same(rows.fold()(image()[0]), rows(image()[0]))


@KINDS
@MULTIPLIERS
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_stored_model_comes_back_bit_for_bit(kind, multiplier, suffix, tmp_path):
    model = model_of(kind, trained(multiplier, name="first"))
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
        other = keras.saving.load_model(path)
        assert type(other.layers[-3]) is DOConv2D
    else:
        model.save_weights(path)
        fresh = DOConv2D(6, 3, padding="same", groups=2, depth_multiplier=multiplier, name="first")
        other = model_of(kind, fresh)
        other.load_weights(path)
    for found, expected in zip(other.weights, model.weights, strict=True):
        assert_same(found, expected)
    assert_same(other(image()), model(image()))


@EACH
def test_configuration_and_registration(do_conv, conv):
    options = dict.fromkeys(
        ["d_initializer", "d_regularizer", "d_constraint"]
        if do_conv is DODepthwiseConv2D
        else ["depthwise_initializer", "depthwise_regularizer", "depthwise_constraint"]
    )
    values = (keras.initializers.Constant(0.5), keras.regularizers.L1(0.1), "non_neg")
    options = dict(zip(options, values, strict=True))
    usual = arguments(do_conv, kernel_size=[2] * (len(shape_for(do_conv)) - 2), name="named")
    layer = do_conv(**usual, **options, **with_multiplier(do_conv, 19), trainable=False)
    again = do_conv.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert layer.get_config()[next(iter(with_multiplier(do_conv, 19)))] == 19
    stored = keras.saving.serialize_keras_object(layer)
    assert stored["registered_name"] == f"doconv>{do_conv.__name__}"
    again = keras.saving.deserialize_keras_object(stored)
    assert type(again) is do_conv
    again.build(shape_for(do_conv))
    assert again.depthwise_kernel.shape == again.spec.depthwise_shape
    assert (array(again.depthwise_kernel) == 0.5).all()
    assert isinstance(again.depthwise_kernel.constraint, keras.constraints.NonNeg)
    assert not again.trainable_weights


def by_clone_model(model):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [by_clone_model, by_pickle, copy.deepcopy])
def test_clones_and_copies_are_layers_of_their_own(copied):
    model = model_of("functional", trained(12, name="first"))
    other, expected = copied(model), array(model(image())).copy()
    assert type(other.get_layer("first")) is DOConv2D
    assert_same(other(image()), expected)
    random_values(other, seed=7)
    assert_same(model(image()), expected)


def test_clone_model_folds_with_a_clone_function():
    def folded(layer):
        return (
            layer.fold() if hasattr(layer, "fold") else type(layer).from_config(layer.get_config())
        )

    model = model_of("functional", trained(12, name="first"))
    clone = keras.models.clone_model(model, clone_function=folded)
    clone.get_layer("last").set_weights(model.get_layer("last").get_weights())
    assert type(clone.get_layer("first")) is layers.Conv2D
    assert_same(clone(image()), model(image()))


@EACH
@MULTIPLIERS
def test_what_an_ordinary_layer_stored_loads_and_resets_d(do_conv, conv, multiplier):
    if multiplier == 18 and do_conv is DOConv3D:
        multiplier = 54  # twice the taps
    multiplier = multiplier and max(multiplier, 27 if do_conv is DOConv3D else 0)
    layer = do_conv(**arguments(do_conv, kernel_size=3), **with_multiplier(do_conv, multiplier))
    plain = conv(**arguments(conv, kernel_size=3))
    x, store = image(shape_for(do_conv)), {}
    layer.build(x.shape)
    plain.build(x.shape)
    random_values(plain, seed=2).save_own_variables(store)
    random_values(layer).load_own_variables({k: array(v) for k, v in store.items()})
    assert_same(layer(x), plain(x))
    assert not array(layer.depthwise_kernel).any()


def test_an_ordinary_models_weights_load_where_keras_finds_them(tmp_path):
    plain = layers.Conv2D(6, 3, padding="same", groups=2, name="first")
    path = tmp_path / "model.weights.h5"
    model_of("subclassed", plain).save_weights(path)
    other = model_of("subclassed", trained(12, name="first"))
    other.load_weights(path)
    assert_same(other.first(image()), plain(image()))
    plain = layers.Conv2D(6, 3, padding="same", groups=2, name="first")
    model_of("sequential", plain).save_weights(path)
    with pytest.raises(ValueError, match=r"layer 'first': the store has no entries.*load_state"):
        model_of("sequential", trained(12, name="first")).load_weights(path)


def stored(layer, **changes):
    store = {}
    layer.save_own_variables(store)
    store = {**{name: array(value) for name, value in store.items()}, **changes}
    return {name: value for name, value in store.items() if value is not None}


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (lambda: stored(trained()), r"entry '0' has shape \(3, 3, 2, 6\); expected \(12, 2, 6\)"),
        (lambda: stored(trained(18)), r"entry '0' has shape \(18, 2, 6\); expected \(12, 2, 6\)"),
        (lambda: stored(trained(12), **{"1": np.zeros(5)}), r"entry '1' has shape \(5,\); exp"),
        (lambda: stored(trained(12), **{"1": None}), "found the entries '0', 'depthwise_kernel'"),
        (lambda: stored(trained(12), depthwise_kernel=None), "found the entries '0', '1'; exp"),
        (lambda: stored(trained(12), **{"2": np.zeros(1)}), "'2'; expected '0', '1', 'depthwise"),
        (lambda: stored(trained(), depthwise_kernel=None, **{"0": np.zeros((2, 2, 2, 6))}), "'0'"),
        (dict, "the store has no entries for it"),
    ],
)
def test_a_wrong_store_is_named_and_changes_nothing(store, message):
    layer = trained(12)
    before = [array(v).copy() for v in layer.weights]
    with pytest.raises(ValueError, match=message):
        layer.load_own_variables(store())
    for variable, value in zip(layer.weights, before, strict=True):
        assert_same(variable, value)


def test_an_ordinary_layer_refuses_what_this_one_stored():
    plain = layers.Conv2D(6, 3, groups=2)
    plain.build(SHAPE)
    with pytest.raises(ValueError, match="expected 2 variables, but received 3"):
        plain.load_own_variables(stored(trained()))


@EACH
def test_regularizer_of_d_is_the_kernels_unless_told_otherwise(do_conv, conv):
    w, d = ("depthwise", "d") if do_conv is DODepthwiseConv2D else ("kernel", "depthwise")

    def penalty(**options):
        layer = do_conv(**arguments(do_conv, kernel_size=3), **options)
        layer.build(shape_for(do_conv))
        random_values(layer)
        squares = [float((array(v) ** 2).sum()) for v in (layer._kernel, layer.depthwise_kernel)]
        return float(sum(map(array, layer.losses))), squares

    of_kernel = {f"{w}_regularizer": keras.regularizers.L2(0.5)}
    loss, squares = penalty(**of_kernel)
    assert loss == pytest.approx(0.5 * sum(squares), rel=1e-5)
    loss, squares = penalty(**of_kernel, **{f"{d}_regularizer": keras.regularizers.L2(0.0)})
    assert loss == pytest.approx(0.5 * squares[0], rel=1e-5)
    loss, squares = penalty(**{f"{d}_regularizer": "l2"})
    assert loss == pytest.approx(0.01 * squares[1], rel=1e-5)
    assert penalty()[0] == 0


@EACH
def test_constraint_of_d_is_its_own(do_conv, conv):
    w, d = ("depthwise", "d") if do_conv is DODepthwiseConv2D else ("kernel", "depthwise")
    for options, constrained in [
        ({f"{w}_constraint": "non_neg"}, "_kernel"),
        ({f"{d}_constraint": "non_neg"}, "depthwise_kernel"),
    ]:
        layer = do_conv(**arguments(do_conv, kernel_size=3), **options)
        layer.build(shape_for(do_conv))
        random_values(layer)
        gradients = [ops.zeros(v.shape) for v in layer.trainable_variables]
        keras.optimizers.SGD(0.1).apply(gradients, layer.trainable_variables)
        negative = {
            name
            for name in ("_kernel", "depthwise_kernel")
            if (array(getattr(layer, name)) < 0).any()
        }
        assert negative == {"_kernel", "depthwise_kernel"} - {constrained}


@EACH
def test_lora_and_quantization_are_refused(do_conv, conv):
    layer = do_conv(**arguments(do_conv, kernel_size=3))
    layer.build(shape_for(do_conv))
    with pytest.raises(NotImplementedError, match=r"cannot be quantized.*fold\(\) it to a keras"):
        layer.quantize("int8")
    with pytest.raises(NotImplementedError, match=r"cannot be quantized.*fold\(\)"):
        layer.quantized_build(shape_for(do_conv), "int8")
    for policy in ("int8_from_float32", "float8_from_float32"):
        with pytest.raises(ValueError, match=rf"quantized dtype policy '{policy}'.*fold\(\)"):
            do_conv(**arguments(do_conv, kernel_size=3), dtype=policy)
        with pytest.raises(ValueError, match=rf"quantized dtype policy '{policy}'.*fold\(\)"):
            layer.dtype_policy = policy
    assert layer.dtype_policy.name == "float32"
    layer.dtype_policy = "mixed_bfloat16"
    assert layer.compute_dtype == "bfloat16"
    if do_conv is DODepthwiseConv2D:
        assert not hasattr(layer, "enable_lora")
        return
    with pytest.raises(NotImplementedError, match=r"cannot have LoRA.*fold\(\)"):
        layer.enable_lora(2)
    for name in ("lora_rank", "lora_alpha"):
        with pytest.raises(ValueError, match=rf"takes no {name}.*fold\(\)"):
            do_conv(**arguments(do_conv, kernel_size=3), **{name: 2})


def test_quantizing_a_model_leaves_the_layer_as_it_is_and_says_so():
    layer = trained(name="first")
    model = model_of("sequential", layer)
    expected = array(layer(image()))
    with warnings.catch_warnings():
        # Keras names in the same way every layer that it cannot quantize, such as its own Conv2D.
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        with pytest.warns(UserWarning, match=r"DOConv2D cannot be quantized.*fold\(\)"):
            model.quantize("int8")
    assert_same(layer(image()), expected)
    assert layer.quantization_mode is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"filters": 0}, ValueError, "filters must be at least 1; received filters=0"),
        ({"filters": 2.5}, TypeError, "filters must be an integer; received filters=2.5"),
        ({"groups": 0}, ValueError, "groups must be at least 1; received groups=0"),
        ({"groups": 4}, ValueError, "filters must be evenly divisible .*groups=4, filters=6"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be one integer or 2 of them"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer"),
        ({"strides": 0}, ValueError, "strides must be at least 1; received strides=0"),
        ({"dilation_rate": (1, -1)}, ValueError, r"dilation_rate\[1\] must be at least 1"),
        ({"strides": 2, "dilation_rate": 2}, ValueError, "not supported in conjunction"),
        ({"padding": "full"}, ValueError, "padding"),
        ({"data_format": "last"}, ValueError, "data_format"),
        ({"depth_multiplier": 8}, ValueError, "depth_multiplier must be at least the number of"),
        ({"depth_multiplier": 9.5}, TypeError, "depth_multiplier must be an integer"),
        ({"dilation": 2}, ValueError, "Unrecognized keyword arguments.*dilation"),
    ],
)
def test_wrong_arguments_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        DOConv2D(**{"filters": 6, "kernel_size": 3, **given})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"depth_multiplier": 0}, ValueError, "depth_multiplier must be at least 1; received dep"),
        ({"d_multiplier": 8}, ValueError, "^d_multiplier must be at least .* received d_mult"),
        ({"d_multiplier": "9"}, TypeError, "^d_multiplier must be an integer"),
        ({"strides": (1, 2, 1)}, ValueError, "strides must be one integer or 2 of them"),
    ],
)
def test_wrong_arguments_of_the_depthwise_layer_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        DODepthwiseConv2D(3, **given)


def test_a_wrong_input_is_refused_before_anything_is_created():
    layer = DOConv2D(6, 3, groups=2)
    with pytest.raises(ValueError, match="must be divisible by groups; received in_channels=5"):
        layer.build((2, 7, 8, 5))
    with pytest.raises(TypeError, match="in_channels must be an integer; received in_channels=No"):
        layer.build((2, 7, 8, None))
    with pytest.raises(ValueError, match="output size would be zero or negative"):
        layer.build((2, 2, 2, 4))
    assert not layer.weights
    layer.build(SHAPE)
    with pytest.raises(ValueError, match="axis -1 of input shape to have value 4"):
        layer(image((2, 7, 8, 6)))


@EACH
def test_a_layer_without_weights_says_so(do_conv, conv):
    layer = do_conv(**arguments(do_conv, kernel_size=3, name="raw"))
    for call in (layer.composed_kernel, layer.fold, lambda: layer.load_own_variables({"0": 1})):
        with pytest.raises(ValueError, match="layer 'raw' is not built"):
            call()
    with pytest.raises(AttributeError):
        _ = layer.kernel
    with pytest.raises(ValueError, match="is not built"):
        do_conv.from_conv(conv(**arguments(conv, kernel_size=3)))
    layer.save_own_variables(store := {})
    assert not store


@EACH
def test_one_tap_is_the_ordinary_layer(do_conv, conv):
    layer = do_conv(**arguments(do_conv, kernel_size=1), **with_multiplier(do_conv, 5))
    plain = conv(**arguments(conv, kernel_size=1))
    x = image(shape_for(do_conv))
    layer.build(x.shape)
    plain.build(x.shape)
    assert layer.depthwise_kernel is None
    layer.load_own_variables(stored(random_values(plain)))
    assert_same(layer(x), plain(x))
    assert stored(layer).keys() == {"0", "1"}
    assert_same(layer.fold()(x), plain(x))
    again = do_conv.from_conv(plain)
    assert_same(again(x), plain(x))
    assert do_conv.from_config(layer.get_config()).get_config() == layer.get_config()


def shifted_relu(x):
    """An activation that Keras cannot find again by name."""
    return ops.relu(x) + 1


@EACH
@pytest.mark.parametrize("frozen", [(), ("_kernel",), ("_kernel", "depthwise_kernel"), ("bias",)])
def test_fold_keeps_what_the_layer_was(do_conv, conv, frozen):
    w = "depthwise" if do_conv is DODepthwiseConv2D else "kernel"
    usual = {
        "kernel_size": 3,
        "strides": 2,
        "padding": "same",
        "activation": shifted_relu,
        "name": "named",
        "dtype": "mixed_bfloat16",
        f"{w}_initializer": "he_normal",
        f"{w}_regularizer": "l1",
        f"{w}_constraint": "max_norm",
        "bias_initializer": keras.initializers.RandomNormal(
            seed=(seed := keras.random.SeedGenerator(1))
        ),
        "bias_regularizer": "l2",
    }
    layer = do_conv(**arguments(do_conv, **usual), **with_multiplier(do_conv, 28))
    layer.build(shape_for(do_conv))
    random_values(layer)
    for name in frozen:
        getattr(layer, name).trainable = False
    state, drawn = random.getstate(), array(seed.state).copy()
    folded = layer.fold()
    assert random.getstate() == state
    assert_same(seed.state, drawn)
    assert type(folded) is conv
    assert folded.built
    theirs, ours = folded.get_config(), layer.get_config()
    assert {name: ours[name] for name in theirs} == theirs
    assert folded.activation is layer.activation
    assert folded.kernel.trainable == (len(frozen) < 2)
    assert folded.bias.trainable == ("bias" not in frozen)
    x = image(shape_for(do_conv))
    assert_same(folded.kernel, layer.composed_kernel())
    assert_same(ops.cast(folded(x), "float32"), ops.cast(layer(x), "float32"))
    random_values(folded, seed=3)
    assert (array(folded.kernel) != array(layer.composed_kernel())).any()


def test_a_frozen_layer_folds_to_a_frozen_one():
    layer = trained()
    layer.trainable = False
    folded = layer.fold()
    assert folded.trainable is False
    assert not folded.trainable_weights
    folded.trainable = True
    assert len(folded.trainable_weights) == 2
    assert not layer.trainable_weights


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize(
    ("cls", "change"), [(DOConv2D, DOConv2D.fold), (layers.Conv2D, DOConv2D.from_conv)]
)
def test_an_activation_with_weights_is_cloned(cls, change, called):
    old = cls(
        6, 3, activation=layers.PReLU("ones", shared_axes=[1], name="slope", trainable=called)
    )
    old.build(SHAPE)
    if called:
        old(image())
        old.activation.alpha.trainable = False
    random_values(old)
    new = change(old)
    assert (new.activation.name, new.activation.trainable) == ("slope", called)
    assert_same(new(image()), old(image()))
    assert new.activation.alpha.trainable == old.activation.alpha.trainable
    new.activation.alpha.assign(new.activation.alpha + 1)
    assert (array(new(image())) != array(old(image()))).any()


class Doubled(DOConv2D):
    """Doubles the output."""

    def call(self, inputs):
        return 2 * super().call(inputs)


class Padded(DOConv2D):
    """Convolves something else."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs + 1, kernel)


class Centred(DOConv2D):
    """Convolves with another kernel than the composed one."""

    @property
    def kernel(self):
        return super().kernel - ops.mean(super().kernel)


class Renamed(DODepthwiseConv2D):
    """Computes what its base does."""


@pytest.mark.parametrize(
    ("cls", "name"), [(Doubled, "call"), (Padded, "convolution_op"), (Centred, "kernel")]
)
def test_fold_refuses_a_subclass_that_computes_something_else(cls, name):
    layer = cls(6, 3)
    layer.build(SHAPE)
    with pytest.raises(TypeError, match=rf"\.{cls.__name__} has a {name} of its own, so the conv"):
        layer.fold()


def test_fold_takes_a_subclass_that_computes_the_same():
    layer = Renamed(3)
    layer.build(SHAPE)
    assert_same(layer.fold()(image()), layer(image()))


@EACH
@pytest.mark.parametrize("multiplier", [None, 30])
@pytest.mark.parametrize("trainable", [True, False])
def test_from_conv_does_not_change_the_function(do_conv, conv, multiplier, trainable):
    usual = {"kernel_size": 3, "padding": "same", "use_bias": False, "name": "named"}
    plain = conv(**arguments(conv, **usual), trainable=trainable)
    x = image(shape_for(do_conv))
    expected = array(plain(x))
    state = random.getstate()
    layer = do_conv.from_conv(plain, **with_multiplier(do_conv, multiplier))
    assert random.getstate() == state
    assert_same(layer(x), expected)
    assert_same(layer.fold().kernel, plain.kernel)
    assert layer.bias is None
    assert layer.name == "named"
    assert layer.trainable is trainable
    assert {v.trainable for v in layer.weights} == {trainable}
    theirs, ours = plain.get_config(), layer.get_config()
    assert {name: ours[name] for name in theirs} == theirs


class Standardised(layers.Conv2D):
    """A convolution that computes something else."""


def test_from_conv_refuses_what_computes_something_else():
    message = r"takes over a keras\.layers\.Conv2D, exactly; received .*Standardised"
    with pytest.raises(TypeError, match=message):
        DOConv2D.from_conv(Standardised(6, 3))
    with pytest.raises(TypeError, match=r"received doconv_tf\.do_conv\.DOConv2D"):
        DOConv2D.from_conv(trained())
    with pytest.raises(
        TypeError, match=r"keras\.layers\.DepthwiseConv2D, exactly; received .*Conv"
    ):
        DODepthwiseConv2D.from_conv(layers.Conv2D(6, 3))
    plain = layers.Conv2D(6, 3)
    plain.build(SHAPE)
    with pytest.raises(ValueError, match="depth_multiplier must be at least"):
        DOConv2D.from_conv(plain, depth_multiplier=8)
    plain.enable_lora(2)
    with pytest.raises(TypeError, match="is quantized or has LoRA enabled"):
        DOConv2D.from_conv(plain)
    with pytest.raises(TypeError, match="is quantized or has LoRA enabled"):
        DOConv2D.from_conv(layers.Conv2D(6, 3, dtype="int8_from_float32"))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a SavedModel is TensorFlow's")
@EACH
@pytest.mark.parametrize("multiplier", [None, 30])
def test_saved_model_export(do_conv, conv, multiplier, tmp_path):
    import tensorflow as tf

    x = image(shape_for(do_conv))
    layer = do_conv(**arguments(do_conv, kernel_size=3), **with_multiplier(do_conv, multiplier))
    model = random_values(keras.Sequential([keras.Input(x.shape[1:]), layer]))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert difference(array(loaded.serve(x)), array(model(x))).relative < 1e-5


def network(multiplier=12, use_bias=True, cls=DOConv2D, end=()):
    """Return a model with a nested one, every kind of layer that a state holds, and others."""
    options = {"depth_multiplier": multiplier} if cls is DOConv2D else {}
    depthwise = DODepthwiseConv2D if cls is DOConv2D else layers.DepthwiseConv2D
    inner = keras.Sequential(
        [
            keras.Input((5, 6, 6)),
            depthwise(2, depth_multiplier=2, name="depthwise"),
            layers.Conv2D(5, 1, name="point"),
        ],
        name="inner",
    )
    return keras.Sequential(
        [
            keras.Input(SHAPE[1:]),
            cls(6, 3, groups=2, use_bias=use_bias, name="first", **options),
            layers.ReLU(),
            inner,
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(3, name="last"),
            *end,
        ]
    )


def test_state_goes_out_and_in():
    model, other = random_values(network()), network()
    state = export_state(model)
    assert list(state.layers) == ["first", "inner.depthwise", "inner.point", "last"]
    assert state.arrays["first.weight"].shape == (6, 2, 12)
    assert state.arrays["inner.depthwise.weight"].shape == (12, 1, 4)
    assert state.arrays["last.weight"].shape == (3, 100)
    load_state(other, state)
    assert_same(other(image()), model(image()))
    layer = trained()
    alone = export_state(layer)
    assert alone.arrays.keys() == {"weight", "depthwise_weight", "bias"}
    kernel = compose(alone.arrays["weight"], alone.arrays["depthwise_weight"], layer.spec)
    found = from_canonical(kernel, "*IO")
    assert difference(array(layer.composed_kernel()), found).relative < 1e-6


def test_a_state_does_not_share_memory_with_the_model():
    layer = trained()
    state = export_state(layer)
    before = {name: value.copy() for name, value in state.arrays.items()}
    random_values(layer, seed=5)
    for name, value in state.arrays.items():
        assert_same(value, before[name])


def test_an_ordinary_state_enters_an_over_parameterized_model():
    plain, model = random_values(network(cls=layers.Conv2D)), random_values(network(), seed=4)
    load_state(model, export_state(plain))
    assert_same(model(image()), plain(image()))


def test_bfloat16_state_loses_no_bit():
    layers_ = [DOConv2D(6, 3, dtype="bfloat16") for _ in range(2)]
    for layer in layers_:
        layer.build(SHAPE)
    random_values(layers_[0])
    state = export_state(layers_[0])
    assert {a.dtype for a in state.arrays.values()} == {np.dtype(np.float32)}
    load_state(layers_[1], state)
    for a, b in zip(layers_[0].weights, layers_[1].weights, strict=True):
        assert_same(ops.cast(a, "float32"), ops.cast(b, "float32"))


class Twins(keras.Layer):
    """A layer that gives two of its own layers one name."""

    def __init__(self):
        super().__init__(name="twins")
        self.left, self.right = layers.Dense(3, name="one"), layers.Dense(3, name="one")

    def build(self, input_shape):
        self.left.build(input_shape)
        self.right.build(input_shape)

    def call(self, x):
        return self.left(x) + self.right(x)


def with_lora(model, name):
    model.get_layer(name).enable_lora(2)
    return model


class Scaled(DOConv2D):
    """Has a variable that no canonical state has a place for."""

    def build(self, input_shape):
        super().build(input_shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: network(cls=layers.Conv2D), StateError, "'first.depthwise_weight'.*Fold the mod"),
        (lambda: network(18), StateError, "'first.weight' is of .*multiplier=12.*multiplier=18"),
        (lambda: network(use_bias=False), StateError, "'first.bias' is there; expected a layer w"),
        (lambda: network(end=[layers.Dense(2, name="new")]), StateError, "'new' is not in the st"),
        (lambda: network(end=[layers.BatchNormalization(name="norm")]), TypeError, "'norm' is a B"),
        (lambda: with_lora(network(), "last"), TypeError, "'last' is a Dense with LoRA or quant"),
        (
            lambda: with_lora(network(cls=layers.Conv2D), "first"),
            TypeError,
            "'first' is a Conv2D with LoRA or quantized",
        ),
        (
            lambda: network(cls=partial(layers.Conv2D, dtype="int8_from_float32")),
            TypeError,
            "'first' is a Conv2D with LoRA or quantized",
        ),
        (
            lambda: network(cls=Scaled),
            TypeError,
            "'first', a Scaled, has 'kernel', 'bias', 'depthwise_kernel', 'scale'; expected 'ker",
        ),
        (lambda: network(end=[Twins()]), ValueError, "two layers have the path 'twins.one'"),
    ],
)
def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(model, error, message):
    state, model = export_state(network()), random_values(model(), seed=4)
    before = [array(v).copy() for v in model.weights]
    with pytest.raises(error, match=message):
        load_state(model, state)
    for variable, value in zip(model.weights, before, strict=True):
        assert_same(variable, value)


def test_a_model_that_is_not_built_has_no_state():
    with pytest.raises(ValueError, match="layer 'raw' is not built"):
        export_state(DOConv2D(6, 3, name="raw"))
    with pytest.raises(ValueError, match="is not built; call the model"):
        export_state(keras.Sequential([DOConv2D(6, 3)]))
    model = Subclassed(trained())
    model.built = True
    with pytest.raises(ValueError, match=r"layer 'dense.*' is not built"):
        export_state(model)


def test_a_layer_used_twice_is_stored_once():
    shared = DOConv2D(4, 3, padding="same", name="shared")
    inputs = keras.Input(SHAPE[1:])
    model = keras.Model(inputs, shared(shared(inputs)))
    assert list(export_state(model).layers) == ["shared"]


def test_layers_without_weights_need_not_be_built():
    model = Subclassed(trained())
    model.flip, model.same = layers.RandomFlip(), layers.Lambda(shifted_relu)
    model(image())
    assert not model.flip.built
    assert not model.same.built
    state = export_state(model)
    assert len(state.layers) == 2
    load_state(model, state)
