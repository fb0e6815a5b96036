"""Folding to Keras' own layers and taking them over.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import (  # noqa: E402
    EACH,
    SHAPE,
    arguments,
    array,
    assert_same,
    image,
    random_values,
    shape_for,
    shifted_relu,
    trained,
    with_multiplier,
)

from doconv_tf import DOConv2D, DODepthwiseConv2D  # noqa: E402


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


@EACH
def test_fold_keeps_what_the_layer_was(do_conv, conv):
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
    drawn = array(seed.state).copy()
    folded = layer.fold()
    assert_same(seed.state, drawn)
    assert type(folded) is conv
    assert folded.built
    theirs, ours = folded.get_config(), layer.get_config()
    assert {name: ours[name] for name in theirs} == theirs
    assert folded.activation is layer.activation
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


@EACH
@pytest.mark.parametrize(("multiplier", "trainable"), [(None, False), (30, True)])
def test_from_conv_keeps_what_the_layer_was(do_conv, conv, multiplier, trainable):
    usual = {"kernel_size": 3, "padding": "same", "use_bias": False, "name": "named"}
    plain = conv(**arguments(conv, **usual), trainable=trainable)
    x = image(shape_for(do_conv))
    expected = array(plain(x))
    layer = do_conv.from_conv(plain, **with_multiplier(do_conv, multiplier))
    assert_same(layer(x), expected)
    assert_same(layer.fold().kernel, plain.kernel)
    assert layer.bias is None
    assert layer.name == "named"
    assert layer.trainable is trainable
    assert {v.trainable for v in layer.weights} == {trainable}
    theirs, ours = plain.get_config(), layer.get_config()
    assert {name: ours[name] for name in theirs} == theirs


def test_from_conv_refuses_what_computes_something_else():
    with pytest.raises(
        TypeError, match=r"keras\.layers\.DepthwiseConv2D, exactly; received .*Conv"
    ):
        DODepthwiseConv2D.from_conv(layers.Conv2D(6, 3))
    plain = layers.Conv2D(6, 3)
    plain.build(SHAPE)
    plain.enable_lora(2)
    with pytest.raises(TypeError, match="is quantized or has LoRA enabled"):
        DOConv2D.from_conv(plain)
    with pytest.raises(TypeError, match="is quantized or has LoRA enabled"):
        DOConv2D.from_conv(layers.Conv2D(6, 3, dtype="int8_from_float32"))
