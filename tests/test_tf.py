"""What is special to Keras: everything a user does with `keras.layers.Conv2D`.

Models and the canonical state are in `test_tf_*.py`.
Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_same
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import (  # noqa: E402
    BACKEND,
    EACH,
    SHAPE,
    arguments,
    array,
    image,
    model_of,
    random_values,
    shape_for,
    shifted_relu,
    stored,
    trained,
    with_multiplier,
)

from doconv_tf import DOConv1D, DOConv2D, DODepthwiseConv2D  # noqa: E402


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


@one_test
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
    of_w = "depthwise_constraint" if do_conv is DODepthwiseConv2D else "kernel_constraint"
    given = [values[p.name] for p in parameters]
    with pytest.raises(ValueError, match=f"{of_w} would hold for one of the weights"):
        do_conv(*given)
    values[of_w] = None
    given = [values[p.name] for p in parameters]
    ours, theirs = do_conv(*given).get_config(), conv(*given).get_config()
    assert {name: ours[name] for name in theirs} | {"name": ""} == {**theirs, "name": ""}
    usual = conv(**arguments(conv, kernel_size=1)).get_config()
    same = {p.name for p in parameters if theirs[p.name] == usual[p.name]}
    assert same == {"dilation_rate" if steps[1] == 1 else "strides", of_w}


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
    assert not array(layer.d_kernel).any()


@one_test
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


def test_a_policy_map_gives_each_path_its_own():
    policies = keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("float32"))
    policies["double"] = keras.DTypePolicy("float16")
    policies["eight"] = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    layer = DOConv2D(6, 3, name="double", dtype=policies)
    layer.build(SHAPE)
    assert {v.dtype for v in layer.weights} == {"float16"}
    with pytest.raises(ValueError, match=r"quantized dtype policy 'int8_from_float32'.*fold\(\)"):
        DOConv2D(6, 3, name="eight", dtype=policies).build(SHAPE)


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


test_wrong_arguments_are_refused = refuses(
    lambda given: DOConv2D(**{"filters": 6, "kernel_size": 3, **given}),
    ({"filters": 0}, ValueError, "filters must be at least 1; received filters=0"),
    ({"filters": 2.5}, TypeError, "filters must be an integer; received filters=2.5"),
    ({"groups": 4}, ValueError, "filters must be evenly divisible .*groups=4, filters=6"),
    ({"strides": 2, "dilation_rate": 2}, ValueError, "not supported in conjunction"),
    ({"padding": "full"}, ValueError, "padding"),
    ({"data_format": "last"}, ValueError, "data_format"),
    ({"dilation": 2}, ValueError, "Unrecognized keyword arguments.*dilation"),
)


test_wrong_arguments_of_the_depthwise_layer_are_refused = refuses(
    lambda given: DODepthwiseConv2D(3, **given),
    ({"depth_multiplier": 0}, ValueError, "depth_multiplier must be at least 1; received dep"),
    ({"d_multiplier": 8}, ValueError, "^d_multiplier must be at least .* received d_mult"),
    ({"d_multiplier": "9"}, TypeError, "^d_multiplier must be an integer"),
    ({"strides": (1, 2, 1)}, ValueError, "strides must be one integer or 2 of them"),
)


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
    assert layer.d_kernel is None
    layer.load_own_variables(stored(random_values(plain)))
    assert_same(layer(x), plain(x))
    assert stored(layer).keys() == {"0", "1"}
    assert_same(layer.fold()(x), plain(x))
    again = do_conv.from_conv(plain)
    assert_same(again(x), plain(x))
    assert do_conv.from_config(layer.get_config()).get_config() == layer.get_config()


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
        "bias_initializer": keras.initializers.RandomNormal(
            seed=(seed := keras.random.SeedGenerator(1))
        ),
        "bias_regularizer": "l2",
    }
    layer = do_conv(**arguments(do_conv, **usual), **with_multiplier(do_conv, 28))
    setattr(layer, f"{w}_constraint", keras.constraints.MaxNorm())  # as one from a file has it
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
