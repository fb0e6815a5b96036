"""Whole Keras models and BSConv: what the contract does not ask."""

from __future__ import annotations

import numpy as np
import pytest
from contract_bsconv import in_form
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402
from keras_layers import array, assert_same  # noqa: E402
from keras_models import filled, functional, images, nested, subclassed, traces, walk  # noqa: E402

from doconv_core.kinds.base import recipe  # noqa: E402
from doconv_core.kinds.bsconv import GROUPED, SHARES  # noqa: E402
from doconv_core.models.report import TRANSPOSED  # noqa: E402
from doconv_core.networks.nodes import (  # noqa: E402
    Activation,
    BatchNorm,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    numbered,
)
from doconv_tf import BSConvS2D, BSConvU2D, build, fold, to_bsconv, verify  # noqa: E402
from doconv_tf.bsconv import SEPARABLE  # noqa: E402

SIZES = [(8, 1), (8, 2), (12, 1), (12, 2)]  # channels and stride


def network():
    """Return a model with convolutions of each kind, one of them in a model inside it."""
    inputs = keras.Input((9, 9, 8))
    inner = layers.Conv2D(6, 3, name="conv", activation="relu", use_bias=False)(inputs)
    block = keras.Model(inputs, inner, name="block")
    x = keras.Input((11, 11, 6))
    y = layers.Conv2D(8, 3, name="first", dtype="float32", kernel_regularizer="l2")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Conv2D(6, 3, name="last", strides=2, padding="same")(block(y))
    y = layers.DepthwiseConv2D(3, name="depthwise", padding="same")(y)
    y = layers.SeparableConv2D(5, 3, name="separable", padding="same")(y)
    y = layers.Conv2DTranspose(5, 3, name="transposed")(y)
    return filled(keras.Model(x, layers.Dense(3, name="head")(y), name="net"))


def x():
    return images((2, 11, 11, 6))


def test_the_layer_keeps_what_is_not_its_weight():
    model = network()
    conv = model.get_layer("first")
    conv.tag = "mine"
    conv.trainable = False
    bias = array(conv.bias)
    model.compile("sgd", "mse", jit_compile=False)
    report = to_bsconv(model, with_bn=True, inplace=True).report
    assert [change.path for change in report.changed] == ["first", "block.conv", "last"]
    kinds = {"depthwise": GROUPED, "separable": SEPARABLE, "transposed": TRANSPOSED}
    assert {each.path: each.reason for each in report.left} == kinds
    assert report.parameters_after == model.count_params() < report.parameters_before
    made = model.get_layer("first")
    assert made is conv
    assert (type(made), made.tag, made.name, made.trainable) == (BSConvU2D, "mine", "first", False)
    assert_same(made.depthwise.bias, bias)
    assert type(made.pointwise.kernel_regularizer) is keras.regularizers.L2
    assert model.get_layer("last").padding == "same"
    assert model.get_layer("block").get_layer("conv").depthwise.activation is keras.activations.relu
    assert not model.compiled
    model.compile("sgd", "mse", jit_compile=False)
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
    folded = fold(filled(model), **in_form("dense"), inplace=True).model
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
    folded = fold(made, **in_form(form)).model
    assert not traces(folded)
    assert verify(folded, made, inputs).relative <= 1e-5
    assert verify(model, filled(make()), inputs).absolute == 0


def test_a_constraint_of_the_kernel_is_not_one_of_its_parts():
    held = layers.Conv2D(4, 3, name="held", kernel_constraint="max_norm")
    other = layers.Conv2D(4, 3, name="other", bias_constraint="non_neg")
    report = to_bsconv(keras.Sequential([keras.Input((9, 9, 4)), held, other])).report
    assert [change.path for change in report.changed] == ["other"]
    (left,) = report.left
    assert left.reason.startswith("its kernel_constraint would hold for each part's kernel, not")
    with pytest.raises(ValueError, match="layer 'held': its kernel_constraint would hold for each"):
        BSConvU2D.from_conv(held)


def test_what_shares_a_weight_is_left_and_what_is_not_built_refused():
    convs = [layers.Conv2D(4, 3, name=str(n), use_bias=False) for n in range(2)]
    model = keras.Sequential([keras.Input((9, 9, 4)), *convs])
    convs[1]._tracker.unlock()
    convs[1]._kernel = convs[0]._kernel
    report = to_bsconv(model).report
    assert [each.reason for each in report.left] == [SHARES, SHARES]
    with pytest.raises(ValueError, match="is not built"):
        to_bsconv(keras.Sequential([layers.Conv2D(4, 3)]))


@pytest.mark.parametrize("form", ["keep", "dense"])
def test_folded_models_are_stored_and_trained(form, tmp_path):
    model = filled(to_bsconv(network(), "s", start="random").model, 1)
    model, _ = fold(model, **in_form(form), inplace=True)
    assert not traces(model)
    model.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    assert_same(loaded(x()), model(x()))
    model.compile("sgd", "mse", jit_compile=False)
    y = np.zeros(model(x()).shape)
    assert np.isfinite(model.fit(x(), y, verbose=0).history["loss"]).all()


def described(kind):
    """Return a network with convolutions of this kind, strided and not, and batch norms."""
    parts = [(Conv(width, (3, 3), stride, kind=kind), BatchNorm()) for width, stride in SIZES]
    nodes = [node for pair in parts for node in (*pair, Activation("relu"))]
    return build(Network("net", numbered([*nodes, GlobalPool(), Flatten(), Linear(3)]), (3, 9, 9)))


def test_networks_by_description_have_the_layers(tmp_path):
    x = images((2, 9, 9, 3))
    model = described(recipe("bsconvs", p=0.25))
    assert len([each for _, each in walk(model) if isinstance(each, BSConvS2D)]) == len(SIZES)
    folded = fold(model, **in_form("merge"), fuse_batchnorm=True).model
    assert verify(folded, model, x).relative <= 1e-4
    model.save(tmp_path / "net.keras")
    assert_same(keras.saving.load_model(tmp_path / "net.keras")(x), model(x))
    # A dense convolution keeps the zeros around the image.
    folded, _ = fold(described(recipe("bsconvu")), **in_form("dense"))
    kinds = [
        [type(part) for part in each.layers]
        for _, each in walk(folded)
        if type(each) is keras.Sequential
    ]
    assert kinds == [[layers.ZeroPadding2D, layers.Conv2D]] * 2
    assert not traces(folded)
    assert "doconv" not in folded.to_json()
