"""Keras models with the layers: training, storing, copying, loading and exporting them.

Nothing here names TensorFlow but the export, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import copy
import pickle
from operator import attrgetter

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import (  # noqa: E402
    BACKEND,
    EACH,
    MULTIPLIERS,
    SHAPE,
    arguments,
    array,
    assert_same,
    image,
    model_of,
    random_values,
    shape_for,
    stored,
    trained,
    with_multiplier,
)

from doconv_core import difference  # noqa: E402
from doconv_tf import (  # noqa: E402
    DOConv1D,
    DOConv2D,
    DOConv3D,
    DODepthwiseConv1D,
    DODepthwiseConv2D,
    DOSeparableConv1D,
    DOSeparableConv2D,
    fold,
    over_parameterize,
    to_bsconv,
)
from doconv_tf.depthwise_conv import DO_CONVS  # noqa: E402

JIT = BACKEND != "torch"


@pytest.mark.parametrize(
    ("kind", "jit"),
    [
        ("sequential", False),
        pytest.param("functional", JIT, marks=pytest.mark.exhaustive),
        ("subclassed", JIT),
    ],
)
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
def test_training_goes_on_from_a_stored_model_with_the_loss_scaled(tmp_path):
    keras.utils.set_random_seed(0)
    model = model_of("functional", DOConv2D(6, 3, padding="same", depth_multiplier=12, name="a"))
    model.compile("adam", "mse", jit_compile=False)
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


@pytest.mark.parametrize(
    ("kind", "multiplier"), [("sequential", 19), ("functional", None), ("subclassed", 19)]
)
def test_a_stored_model_comes_back_bit_for_bit(kind, multiplier, tmp_path):
    model = model_of(kind, trained(multiplier, name="first"))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-3]) is DOConv2D
    fresh = DOConv2D(6, 3, padding="same", groups=2, depth_multiplier=multiplier, name="first")
    other = model_of(kind, fresh)
    other.load_weights(tmp_path / "model.weights.h5")
    for each in (loaded, other):
        assert_same(each.weights, model.weights)
        assert_same(each(image()), model(image()))


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
    assert again.d_kernel.shape == again.spec.depthwise_shape
    assert (array(again.d_kernel) == 0.5).all()
    assert isinstance(again.d_kernel.constraint, keras.constraints.NonNeg)
    assert not again.trainable_weights


class Hidden(keras.Model):
    """Makes a convolution of its own, of which its configuration does not tell."""

    def __init__(self, told=None, **options):
        super().__init__(**options)
        self.told, self.conv = told, self.own()

    def own(self):
        return layers.Conv2D(4, 3, padding="same", name="conv")

    def call(self, x):
        return self.conv(x if self.told is None else self.told(x))

    def get_config(self):
        return {**super().get_config(), "told": keras.saving.serialize_keras_object(self.told)}

    @classmethod
    def from_config(cls, config):
        return cls(**config | {"told": keras.saving.deserialize_keras_object(config["told"])})


class Given(Hidden):
    """Has all its layers from its configuration."""

    def own(self):
        return layers.ReLU()


def hidden(holder=Hidden):
    """Return a functional model around a subclassed one."""
    told = layers.Conv2D(4, 3, padding="same", name="conv")
    inner = holder(told, name="inner")
    return keras.Sequential([keras.Input(SHAPE[1:]), inner])


def over_parameterized_parts(model):
    model = keras.Sequential([keras.Input(SHAPE[1:]), layers.Conv2D(4, 3, name="inner")])
    return over_parameterize(to_bsconv(model)[0], where="*.depthwise")


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (over_parameterize, "Hidden 'inner' holds 'conv', a DOConv2D"),
        (to_bsconv, "Hidden 'inner' holds 'conv', a BSConvU2D"),
        (over_parameterized_parts, "BSConvU2D 'inner' holds 'depthwise', a DODepthwiseConv2D"),
    ],
    ids=["over-parameterized", "bsconv", "parts of a bsconv"],
)
def test_what_a_configuration_does_not_tell_of_is_no_file_that_cannot_be_loaded(
    convert, name, tmp_path
):
    model = random_values(convert(hidden())[0])
    file = tmp_path / "model.keras"
    hidden().save(file)
    before = file.read_bytes()
    refused = pytest.raises(TypeError, match=f"{name}, .*does not tell.*save_weights")
    store = keras.callbacks.ModelCheckpoint(file)
    store.set_model(model)
    for save in (
        lambda: model.save(file),
        lambda: store.on_epoch_end(0, {}),
        lambda: pickle.dumps(model),
        lambda: by_clone_model(model),
    ):
        with refused:
            save()
    assert file.read_bytes() == before
    store = keras.callbacks.ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True)
    store.set_model(model)
    store.on_epoch_end(0, {})
    other = convert(hidden())[0]
    other.load_weights(tmp_path / "a.weights.h5")
    assert_same(other(image()), model(image()))
    folded = fold(model)[0]
    assert not any({"get_config", "save"} & vars(each).keys() for each in [folded, *folded.layers])
    folded.get_config()


def test_what_a_configuration_tells_of_is_stored_and_loaded(tmp_path):
    classes = {"Hidden": Hidden, "Given": Given}
    given = over_parameterize(hidden(Given))[0]
    folded = fold(random_values(over_parameterize(hidden())[0]))[0]
    for model in (random_values(given), folded):
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras", custom_objects=classes)
        assert_same(again(image()), model(image()))
    assert type(given.get_layer("inner").told) is DOConv2D


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
    assert not array(layer.d_kernel).any()


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
        squares = [float((array(v) ** 2).sum()) for v in (layer._kernel, layer.d_kernel)]
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
def test_constraint_of_d_is_its_own_and_one_of_w_comes_from_files_alone(do_conv, conv):
    w, d = ("depthwise", "d") if do_conv is DODepthwiseConv2D else ("kernel", "depthwise")
    of_d = do_conv(**arguments(do_conv, kernel_size=3), **{f"{d}_constraint": "non_neg"})
    usual = do_conv(**arguments(do_conv, kernel_size=3)).get_config()
    told = f"{w}_constraint holds for one of the weights .* not for the kernel"
    with pytest.warns(UserWarning, match=told):
        of_w = do_conv.from_config(
            {**usual, f"{w}_constraint": {"class_name": "NonNeg", "config": {}}}
        )
    for layer, constrained in [(of_w, "_kernel"), (of_d, "d_kernel")]:
        layer.build(shape_for(do_conv))
        random_values(layer)
        gradients = [ops.zeros(v.shape) for v in layer.trainable_variables]
        keras.optimizers.SGD(0.1).apply(gradients, layer.trainable_variables)
        negative = {
            name for name in ("_kernel", "d_kernel") if (array(getattr(layer, name)) < 0).any()
        }
        assert negative == {"_kernel", "d_kernel"} - {constrained}


@pytest.mark.parametrize("cls", DO_CONVS.types.values(), ids=lambda cls: cls.__name__)
def test_d_has_one_name_that_no_ordinary_layer_has(cls, tmp_path):
    rest = (
        {} if issubclass(cls, layers.DepthwiseConv1D | layers.DepthwiseConv2D) else {"filters": 4}
    )
    layer = cls(kernel_size=3, name="layer", **rest)
    model = keras.Sequential([keras.Input((*[5] * layer.rank, 4)), layer])
    random_values(model)
    ordinary = layer.fold()
    own = {v.name for v in layer.weights} - {v.name for v in ordinary.weights}
    assert own == {"d_kernel"}
    # By this attribute TensorFlow's checkpoints find D.
    attribute = "d_kernel" if "Separable" in cls.__name__ else "depthwise_kernel"
    assert vars(layer)[attribute] is layer.d_kernel
    assert layer.d_kernel.shape == layer.spec.depthwise_shape
    assert {*stored(layer)} - {*stored(ordinary)} == {"depthwise_kernel"}  # in files, as it was
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["d_kernel"])
    before = {v.name: array(v).copy() for v in layer.weights}
    optimizer.apply([ops.zeros(v.shape) for v in layer.weights], layer.weights)
    assert {v.name for v in layer.weights if (array(v) == before[v.name]).all()} == {"d_kernel"}


@pytest.mark.parametrize(
    ("conv", "w", "after"),
    [
        (layers.Conv1D(4, 3), "kernel", DOConv1D),
        (layers.Conv2D(4, 3), "kernel", DOConv2D),
        (layers.Conv3D(4, 3), "kernel", DOConv3D),
        (layers.DepthwiseConv1D(3), "depthwise", DODepthwiseConv1D),
        (layers.DepthwiseConv2D(3), "depthwise", DODepthwiseConv2D),
        (layers.SeparableConv1D(4, 3), "depthwise", DOSeparableConv1D),
        (layers.SeparableConv2D(4, 3), "depthwise", DOSeparableConv2D),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
@pytest.mark.parametrize("name", ["non_neg", "max_norm"])
def test_a_constraint_of_the_kernel_is_not_lost(conv, w, after, name):
    usual = {**conv.get_config(), "name": "conv"}
    own = f"{w}_constraint"
    plain = type(conv).from_config(usual)
    held = type(conv)(**{**usual, "name": "held", own: name})
    others = [prefix for prefix in ("bias", "pointwise") if f"{prefix}_constraint" in usual]
    other = type(conv)(
        **{**usual, "name": "other", **{f"{prefix}_constraint": name for prefix in others}}
    )
    shape = (None, *[9] * conv.rank, 4)
    convs = [plain, held, other]
    for each in convs:
        each.build(shape)
    inputs = keras.Input(shape[1:])
    model, report = over_parameterize(keras.Model(inputs, [each(inputs) for each in convs]))
    assert {change.path for change in report.changed} == {"conv", "other"}
    (left,) = report.left
    assert left.path == "held"
    assert left.reason.startswith(f"its {own} would hold for one of the weights")
    assert type(model.get_layer("held")) is type(conv)
    refused = pytest.raises(ValueError, match=f"{own} .* and not for the kernel. Leave it out")
    with refused:
        after.from_conv(held)
    with refused:
        after(**{**usual, own: name})


def test_a_constraint_holds_for_a_kernel_that_is_not_composed():
    layer = DOConv2D(4, 1, kernel_constraint="non_neg")
    layer.build(SHAPE)
    random_values(layer)
    keras.optimizers.SGD(0.1).apply([ops.zeros(v.shape) for v in layer.weights], layer.weights)
    assert (array(layer.kernel) >= 0).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a SavedModel is TensorFlow's")
@pytest.mark.parametrize(
    "do_conv",
    [
        DOConv2D,
        DODepthwiseConv2D,
        *(pytest.param(cls, marks=pytest.mark.exhaustive) for cls in (DOConv1D, DOConv3D)),
    ],
)
def test_saved_model_export(do_conv, tmp_path):
    import tensorflow as tf

    x = image(shape_for(do_conv))
    made = [
        do_conv(**arguments(do_conv, kernel_size=3), **with_multiplier(do_conv, multiplier))
        for multiplier in (None, 30)
    ]
    model = random_values(keras.Sequential([keras.Input(x.shape[1:]), *made]))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert difference(array(loaded.serve(x)), array(model(x))).relative < 1e-5
