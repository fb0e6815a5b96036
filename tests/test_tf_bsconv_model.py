"""Whole Keras models and BSConv: `to_bsconv`, `fold`, and networks by name."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402
from keras_layers import array, assert_same  # noqa: E402
from keras_models import filled, functional, images, nested, subclassed, traces  # noqa: E402

from doconv_core import BSConvReport, Converted, FoldReport, Left, NotFoldable, Report  # noqa: E402
from doconv_core.kinds.bsconv import GROUPED, OVER_PARAMETERIZED, PART, SHARES  # noqa: E402
from doconv_core.models.report import NOT_SELECTED, SUBCLASS, TRANSPOSED  # noqa: E402
from doconv_tf import (  # noqa: E402
    BSConvS2D,
    BSConvU1D,
    BSConvU2D,
    DOConv2D,
    DODepthwiseConv2D,
    export_state,
    fold,
    get_model,
    load_state,
    orthonormality_loss,
    over_parameterize,
    to_bsconv,
    verify,
)
from doconv_tf.bsconv_kind import SEPARABLE  # noqa: E402
from doconv_tf.ordinary import walk  # noqa: E402

FORMS = ["keep", "merge", "dense"]
REPLACED = ["first", "block.conv", "last"]


def network():
    """Return a model with convolutions of each kind, one of them in a model inside it."""
    inputs = keras.Input((9, 9, 8))
    inner = layers.Conv2D(6, 3, name="conv", activation="relu", use_bias=False)(inputs)
    block = keras.Model(inputs, inner, name="block")
    x = keras.Input((11, 11, 6))
    y = layers.Conv2D(8, 3, name="first", dtype="float32", kernel_regularizer="l2")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Conv2D(6, 3, name="last", strides=2, padding="same")(block(y))
    y = layers.Conv2D(6, 3, groups=2, name="grouped", padding="same")(y)
    y = layers.DepthwiseConv2D(3, name="depthwise", padding="same")(y)
    y = layers.SeparableConv2D(5, 3, name="separable", padding="same")(y)
    y = layers.Conv2DTranspose(5, 3, name="transposed")(y)
    y = layers.Conv2D(4, 1, name="one_tap")(y)
    return filled(keras.Model(x, layers.Dense(3, name="head")(y), name="net"))


def x():
    return images((2, 11, 11, 6))


def converted(variant="u", **options):
    """Return the network with BSConvs, with values as after training."""
    return filled(to_bsconv(network(), variant, start="random", **options).model, 1)


def test_the_report_tells_what_was_done():
    original = network()
    before = array(original.get_layer("first").kernel)
    result = to_bsconv(original, "s", p=0.5)
    assert type(result) is Converted
    model, report = result
    assert type(report) is BSConvReport
    assert [change.path for change in report.changed] == REPLACED
    assert {change[1:] for change in report.changed} == {("Conv2D", "BSConvS2D")}
    assert type(model.get_layer("first")) is BSConvS2D
    assert report.parameters_before == original.count_params()
    assert report.parameters_after == model.count_params() < original.count_params()
    assert [path for path, _ in report.explained] == REPLACED
    assert all(0 < share < 1 for _, share in report.explained)
    assert "explained variance of the trained kernels" in str(report)
    assert report.left == (
        Left("grouped", "Conv2D", GROUPED),
        Left("depthwise", "DepthwiseConv2D", GROUPED),
        Left("separable", "SeparableConv2D", SEPARABLE),
        Left("transposed", "Conv2DTranspose", TRANSPOSED),
        Left("one_tap", "Conv2D", "its kernel_size (1, 1) is not among kernel_sizes"),
    )
    assert type(original.get_layer("first")) is layers.Conv2D
    np.testing.assert_array_equal(array(original.get_layer("first").kernel), before)


@pytest.mark.parametrize("variant", ["u", "s"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_a_bsconv_already_is_found_again(variant, inplace):
    """A network of dense convolutions that are BSConvs in fact has its outputs unchanged."""
    dense = fold(converted(variant), form="dense").model
    expected, conv = array(dense(x())), dense.get_layer("first")
    model, report = to_bsconv(dense, variant, inplace=inplace)
    assert (model is dense) == inplace
    assert (model.get_layer("first") is conv) == inplace
    assert np.abs(array(model(x())) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert [share for _, share in report.explained] == pytest.approx([1, 1, 1])


def test_the_layer_keeps_what_is_not_its_weight():
    model = network()
    conv = model.get_layer("first")
    conv.tag = "mine"
    conv.trainable = False
    bias = array(conv.bias)
    model.compile("sgd", "mse")
    to_bsconv(model, with_bn=True, inplace=True)
    made = model.get_layer("first")
    assert made is conv
    assert (type(made), made.tag, made.name, made.trainable) == (BSConvU2D, "mine", "first", False)
    assert_same(made.depthwise.bias, bias)
    assert type(made.pointwise.kernel_regularizer) is keras.regularizers.L2
    assert model.get_layer("last").padding == "same"
    assert model.get_layer("block").get_layer("conv").depthwise.activation is keras.activations.relu
    assert not model.compiled
    model.compile("sgd", "mse")
    y = np.zeros(model(x()).shape)
    assert np.isfinite(model.fit(x(), y, verbose=0).history["loss"]).all()
    assert_same(made.depthwise.bias, bias)
    assert array(model.get_layer("last").batch_norm.moving_mean).any()


def test_an_activation_with_weights_stays_the_one_that_is_shared():
    activation = layers.PReLU(shared_axes=[1, 2], name="prelu")
    inputs = keras.Input((9, 9, 3))
    y = layers.Conv2D(4, 3, activation=activation, name="conv")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 3, activation=activation, name="other")(y))
    to_bsconv(model, where="conv", inplace=True)
    assert model.get_layer("conv").depthwise.activation is activation
    folded = fold(filled(model), form="dense", inplace=True).model
    assert folded.get_layer("conv").activation is activation


@pytest.mark.parametrize(
    ("make", "form"), [(functional, "keep"), (subclassed, "merge"), (nested, "keep")]
)
def test_models_of_every_kind(make, form):
    model = filled(make())
    inputs = [images(seed=1), images(seed=2)] if make is functional else images()
    made, report = to_bsconv(model, "s", kernel_sizes=(3, (1, 3)), with_bn=True)
    assert len(report.changed) >= 1
    filled(made)
    folded = fold(made, form=form).model
    assert not traces(folded)
    assert verify(folded, made, inputs).relative <= 1e-5
    assert verify(model, filled(make()), inputs).absolute == 0


def left(model, path, **options):
    return {entry.path: entry.reason for entry in to_bsconv(model, **options).report.left}[path]


def test_what_is_left_has_its_reason():
    def model(*body):
        return keras.Sequential([keras.Input((9, 9, 4)), *body])

    with pytest.warns(UserWarning, match="the model has no convolution that could be replaced"):
        assert left(model(DOConv2D(4, 3, name="0")), "0") == OVER_PARAMETERIZED
    own = type("Own", (layers.Conv2D,), {})
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        assert left(model(own(4, 3, name="0")), "0") == SUBCLASS
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        assert left(model(BSConvU2D(1, 3, name="0")), "0.depthwise") == PART
    convs = [layers.Conv2D(4, 3, name=str(n), use_bias=False) for n in range(3)]
    several = model(*convs)
    assert left(several, "1", where="0") == NOT_SELECTED
    convs[1]._tracker.unlock()
    convs[1]._kernel = convs[0]._kernel
    assert left(several, "1") == SHARES


def test_ranks_are_chosen_by_kernel_size():
    convs = [layers.Conv1D(4, 3, name="a", padding="causal"), layers.Conv1D(4, 5, name="b")]
    model = keras.Sequential([keras.Input((9, 4)), *convs])
    made = to_bsconv(model, kernel_sizes=(3,)).model
    assert [type(each) for each in made.layers] == [BSConvU1D, layers.Conv1D]
    folded = fold(made, form="dense").model
    assert [type(each) for each in folded.layers] == [layers.Conv1D] * 2
    assert verify(folded, made, images((2, 9, 4))).relative <= 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "x"}, ValueError, "variant must be one of 'u', 's'; received variant='x'"),
        ({"start": "zeros"}, ValueError, "start must be one of 'weights', 'random'"),
        ({"kernel_sizes": 3}, TypeError, "kernel_sizes must be a sequence of kernel sizes"),
        ({"variant": "s", "p": 0}, ValueError, "p must be above 0 and at most 1"),
        ({"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        ({"bn_options": {"epsilon": 1}}, ValueError, "give with_bn=True as well"),
        ({"where": 3}, TypeError, "where must be None, a glob pattern or several"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    model = keras.Sequential([keras.Input((9, 9, 4)), layers.Conv2D(4, 3)])
    with pytest.raises(error, match=message):
        to_bsconv(model, **options, inplace=True)
    assert type(model.layers[0]) is layers.Conv2D


def test_a_kernel_that_is_not_finite_is_named_before_anything_is_changed():
    model = network()
    kernel = model.get_layer("last").kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match=r"layer 'last': kernel must be finite"):
        to_bsconv(model, inplace=True)
    assert type(model.get_layer("first")) is layers.Conv2D
    with pytest.raises(ValueError, match="is not built"):
        to_bsconv(keras.Sequential([layers.Conv2D(4, 3)]))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["u", "s"])
def test_models_fold_in_every_form(variant, form, inplace):
    original = converted(variant)
    expected = array(original(x()))
    first = original.get_layer("first")
    model, report = fold(original, form=form, inplace=inplace)
    assert (model.get_layer("first") is first) == inplace
    assert np.abs(array(model(x())) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert type(report) is FoldReport
    assert [change.path for change in report.changed] == REPLACED
    after = "Conv2D" if form == "dense" else "Sequential"
    assert {change[1:] for change in report.changed} == {(f"BSConv{variant.upper()}2D", after)}
    assert not traces(model)
    assert "doconv" not in model.to_json()
    forms = dict(zip(FORMS, report.choices[0].cost, strict=True))
    assert model.get_layer("first").count_params() == forms[form].parameters
    assert f"form={form!r}; each form's parameters" in str(report)
    again, report = fold(model, form=form)
    assert (type(report), report.changed) == (Report, ())
    assert_same(again(x()), model(x()))


@pytest.mark.parametrize("form", ["keep", "dense"])
def test_folded_models_are_stored_and_trained(form, tmp_path):
    model = fold(converted("s"), form=form, inplace=True).model
    model.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    assert_same(loaded(x()), model(x()))
    model.compile("sgd", "mse")
    y = np.zeros(model(x()).shape)
    assert np.isfinite(model.fit(x(), y, verbose=0).history["loss"]).all()


def test_merging_folds_batch_norms_that_a_dense_kernel_cannot():
    model = converted("s", with_bn=True)
    with pytest.raises(NotFoldable, match=r"layer 'last': .* meets zero padding"):
        fold(model, form="dense", inplace=True)
    assert type(model.get_layer("first")) is BSConvS2D
    merged = fold(model, form="merge").model
    names = [part.name for part in merged.get_layer("first").layers]
    assert names == ["pointwise", "depthwise"]
    assert verify(merged, model, x()).relative <= 1e-5
    fused, report = fold(model, fuse_batchnorm=True)
    assert type(fused.get_layer("first").get_layer("batch_norm1")) is layers.Identity
    assert verify(fused, model, x()).relative <= 1e-5
    assert "first.batch_norm1" in [change.path for change in report.changed]


@keras.saving.register_keras_serializable(package="doconv_tests")
class Doubled(BSConvU2D):
    """A BSConv that computes something else."""

    def call(self, inputs, **options):
        return 2 * super().call(inputs, **options)


def test_a_layer_of_ones_own_is_kept_and_not_folded():
    model = keras.Sequential([keras.Input((9, 9, 4)), Doubled(4, 3, name="0")])
    kept, report = fold(model)
    assert type(kept.layers[0]) is Doubled
    assert report.left == (Left("0", "Doubled", SUBCLASS),)
    with pytest.raises(NotFoldable, match=r"layer '0': .*Doubled has a call of its own"):
        fold(model, form="merge")
    with pytest.raises(ValueError, match="form must be one of 'keep', 'merge', 'dense'"):
        fold(model, form="deploy")


@pytest.mark.parametrize("form", FORMS)
def test_over_parameterized_depthwise_parts_fold(form):
    model, report = over_parameterize(converted("s"), where="*.depthwise", depth_multiplier=11)
    assert [change.path for change in report.changed] == [f"{path}.depthwise" for path in REPLACED]
    filled(model)
    folded, report = fold(model, form=form)
    assert verify(folded, model, x()).relative <= 1e-5
    assert not any(isinstance(each, DODepthwiseConv2D) for _, each in walk(folded))
    expected = [] if form == "dense" else [f"{path}.depthwise" for path in REPLACED]
    found = [change.path for change in report.changed if change.before == "DODepthwiseConv2D"]
    assert found == expected


def test_states_go_between_models():
    model = converted("s", with_bn=True, p=0.5)
    state = export_state(model)
    assert state.arrays["first.pointwise1.weight"].shape == (4, 6, 1)
    other = filled(to_bsconv(network(), "s", with_bn=True, p=0.5).model, 5)
    load_state(other, state)
    assert verify(other, model, x()).absolute == 0


def test_the_loss_of_a_converted_model_is_zero_at_first_and_gone_when_it_is_folded():
    model = to_bsconv(network(), "s").model
    assert float(array(orthonormality_loss(model))) <= 1e-5
    with pytest.raises(ValueError, match="the Functional has no weight to make orthonormal"):
        orthonormality_loss(fold(model).model)


def test_networks_by_name_have_the_layers(tmp_path):
    model = get_model("cifar_resnet20_bsconvs_p1d4", num_classes=10, input_shape=(3, 8, 8))
    made = [each for _, each in walk(model) if isinstance(each, BSConvS2D)]
    assert len(made) == 19
    images_ = images((2, 8, 8, 3))
    folded = fold(model, form="merge", fuse_batchnorm=True).model
    assert verify(folded, model, images_).relative <= 1e-4
    model.save(tmp_path / "net.keras")
    assert_same(keras.saving.load_model(tmp_path / "net.keras")(images_), model(images_))


def test_a_dense_convolution_keeps_the_zeros_around_the_image():
    model = get_model("cifar_resnet20_bsconvu", num_classes=10, input_shape=(3, 16, 16))
    folded, _ = fold(model, form="dense")
    assert verify(folded, model, images((2, 16, 16, 3))).relative <= 1e-4
    kinds = [
        [type(part) for part in each.layers]
        for _, each in walk(folded)
        if type(each) is keras.Sequential
    ]
    assert kinds == [[layers.ZeroPadding2D, layers.Conv2D]] * 2


def test_linear_convolutions_of_mobilenets_are_marked():
    options = {"num_classes": 5, "input_shape": (3, 32, 32)}
    name = "cifar_mobilenetv2_w1d4"
    model = get_model(f"{name}_bsconvs_p1d6", **options)
    assert float(array(orthonormality_loss(model))) > 0
    with pytest.raises(ValueError, match="has no weight to make orthonormal"):
        orthonormality_loss(get_model(name, **options))
    assert "doconv" not in fold(model).model.to_json()
