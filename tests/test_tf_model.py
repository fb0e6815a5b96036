"""Whole Keras models, over-parameterized and folded: the same function, and all else kept.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers  # noqa: E402
from keras_layers import BACKEND, array, assert_same  # noqa: E402
from keras_models import (  # noqa: E402
    EACH_KIND,
    KINDS,
    SHAPE,
    as_trained,
    assert_equal_outputs,
    depthwise,
    filled,
    functional,
    images,
    inputs_of,
    predicted,
    sequential,
    subclassed,
    traces,
    walk,
)

from doconv_core import Report  # noqa: E402
from doconv_core.models.report import OUTPUT  # noqa: E402
from doconv_tf import DOConv2D, fold, over_parameterize, verify  # noqa: E402

DOUBLE = [] if BACKEND == "jax" else ["float64"]  # which JAX has by a switch for all of a process
CONVERTED = {
    "functional": ["shared", "depthwise", "separable"],
    "sequential": ["first", "grouped"],
    "subclassed": [
        "stem", "block.c0", "block.c1", "block.named", "block.pair", "block.inner.conv",
        "features.conv", "rows.row",
    ],
    "nested": [
        "siamese.conv", "stack.conv", "block.c0", "block.c1", "block.named", "block.pair",
        "block.inner.conv",
    ],
}  # fmt: skip


UNKNOWN = "what it follows is known only where functional and sequential models alone hold it"
FUSED = {
    "functional": ({}, {"norm": OUTPUT}),
    "sequential": ({"norm": "fused into Conv2D"}, {}),
    "subclassed": ({}, dict.fromkeys(["block.inner.norm", "block.norm", "features.bn"], UNKNOWN)),
    "nested": ({}, dict.fromkeys(["block.inner.norm", "block.norm"], UNKNOWN)),
}


def values(model):
    return {v.path: array(v).copy() for v in model.weights}


def kinds(model):
    return [(path, type(layer)) for path, layer in walk(model)]


@pytest.mark.parametrize(
    ("kind", "multiplier"),
    [("functional", 12), ("sequential", None), ("subclassed", None), ("nested", 10)],
)
def test_there_and_back(kind, multiplier):
    """Nothing changes but the layers, and folding gives the ordinary ones back."""
    model, inputs = filled(KINDS[kind]()), inputs_of(kind)
    model.get_layer(index=-1).trainable = False
    before, structure, flags = values(model), kinds(model), [v.trainable for v in model.weights]
    new, report = over_parameterize(model, depth_multiplier=multiplier)
    assert [change.path for change in report.changed] == CONVERTED[kind]
    assert isinstance(report, Report)
    assert_equal_outputs(model, new, inputs)
    assert kinds(model) == structure
    assert [v.trainable for v in model.weights] == flags
    assert_same(values(model), before)
    assert type(new) is type(model)
    assert new.name == model.name
    ds = depthwise(new)
    assert len(ds) == len(report.changed)
    rest = [v for v in new.weights if not any(v is d for d in ds)]
    assert [v.path for v in rest] == [v.path for v in model.weights]
    assert [v.trainable for v in rest] == flags
    assert not {id(v) for v in new.weights} & {id(v) for v in model.weights}
    assert report.parameters_before == model.count_params()
    assert report.parameters_after == new.count_params()

    before = values(as_trained(new))
    reference, first = fold(new)
    fused, told = fold(new, fuse_batchnorm=True)
    assert_same(values(new), before)
    assert_equal_outputs(new, reference, inputs)
    check_fused(kind, fused, told, new, inputs)
    changed, second = fold(new, inplace=True)
    assert changed is new
    for folded, report in ((reference, first), (changed, second)):
        assert verify(reference, folded, inputs).absolute == 0
        assert kinds(folded) == structure
        assert [(v.path, v.shape) for v in folded.weights] == [
            (v.path, v.shape) for v in model.weights
        ]
        assert {change.after for change in report.changed} <= {
            "Conv1D", "Conv2D", "DepthwiseConv2D", "SeparableConv2D",
        }  # fmt: skip
        assert report.parameters_after == model.count_params()
        assert not traces(folded)
        again, report = fold(folded)
        assert not report.changed
        assert verify(folded, again, inputs).absolute == 0
        if kind != "subclassed":
            assert "doconv" not in json.dumps(folded.get_config(), default=repr).lower()


def check_fused(kind, fused, report, model, inputs):
    """Assert which batch norms have been fused, and that the function is the model's."""
    assert verify(model, fused, inputs).relative < 1e-5
    found = [predicted(m, inputs) for m in (model, fused)]
    for one, other in zip(*map(keras.tree.flatten, found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    norms = {c.path: c.after for c in report.changed if c.before == "BatchNormalization"}
    assert (norms, {left.path: left.reason for left in report.left}) == FUSED[kind]
    assert [path for path, _ in walk(fused)] == [path for path, _ in walk(model)]
    assert not traces(fused)


@EACH_KIND
def test_inplace_gives_the_model_itself(kind):
    model, inputs = filled(KINDS[kind]()), inputs_of(kind)
    model.compile("sgd", "mse", run_eagerly=kind in ("sequential", "nested"))
    expected = keras.tree.map_structure(np.copy, model.predict(inputs, verbose=0))
    layers_before = [layer for _, layer in walk(model)]
    new, report = over_parameterize(model, inplace=True)
    assert new is model
    assert [change.path for change in report.changed] == CONVERTED[kind]
    assert all(a is b for a, (_, b) in zip(layers_before, walk(model), strict=True))
    assert not model.compiled
    found = model.predict(inputs, verbose=0)
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)
    # The compiled function is not the former one.
    changed = as_trained(model).predict(inputs, verbose=0)
    flat = zip(keras.tree.flatten(changed), keras.tree.flatten(expected), strict=True)
    assert any((a != b).any() for a, b in flat)


def test_a_shared_layer_stays_one_and_so_do_attributes():
    new, _ = over_parameterize(functional())
    assert len(new.get_layer("shared")._inbound_nodes) == 2
    model = subclassed()
    model.stem.note = "mine"
    new, _ = over_parameterize(model)
    block = new.blocks[0]
    assert block.again is block.listed[0]
    assert type(block.again) is DOConv2D
    assert new.stem.note == "mine"
    assert "kernel" not in vars(new.stem)


def test_training_goes_on_saving_and_loading(tmp_path):
    keras.utils.set_random_seed(0)
    model = filled(sequential())
    model.compile("adam", "mse")
    x, y = images((8, *SHAPE[1:])), np.ones((8, 2), "float32")
    new, _ = over_parameterize(model)
    assert not new.compiled
    assert model.compiled
    with pytest.raises(ValueError, match="compile"):
        new.fit(x, y, verbose=0)
    new.compile("adam", "mse", run_eagerly=True)
    before = [array(d).copy() for d in depthwise(new)]
    losses = new.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert all((array(d) != b).any() for d, b in zip(depthwise(new), before, strict=True))
    new.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert verify(new, loaded, x).absolute == 0
    fold(new).model.save(tmp_path / "folded.keras")
    for name, expected in (("model", True), ("folded", False)):
        archive = zipfile.ZipFile(tmp_path / f"{name}.keras")
        content = b"".join(archive.read(member) for member in archive.namelist()).lower()
        assert (b"doconv" in content, b"depthwise" in content) == (expected, expected)
    folded = keras.saving.load_model(tmp_path / "folded.keras")
    assert verify(new, folded, x).absolute == 0
    clone = keras.models.clone_model(new)
    clone.set_weights(new.get_weights())
    assert verify(new, clone, x).absolute == 0
    assert [type(layer) for layer in clone.layers] == [type(layer) for layer in new.layers]


def test_a_nested_functional_model_can_be_saved_cloned_and_extended(tmp_path):
    model, _ = over_parameterize(filled(functional()))
    model.get_layer("half").function = keras.activations.linear  # a lambda is not loaded
    inputs = inputs_of("functional")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert verify(model, loaded, inputs).absolute == 0
    features = keras.Model(model.inputs, model.get_layer("norm").output)
    np.testing.assert_array_equal(array(features(inputs)), array(model(inputs)["maps"][1]))
    x = keras.Input(SHAPE[1:])
    around = keras.Model(x, model([x, x])["scores"])
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        twice, report = over_parameterize(around)
    assert not report.changed
    assert verify(around, twice, images()).absolute == 0


def test_an_extractor_that_shares_layers_is_left_by_a_copy_and_follows_inplace():
    model = filled(sequential())
    extractor = keras.Model(model.inputs[0], model.get_layer("norm").output)
    expected = array(extractor(images())).copy()
    over_parameterize(model)
    assert type(extractor.get_layer("first")) is layers.Conv2D
    over_parameterize(model, inplace=True)
    assert type(extractor.get_layer("first")) is DOConv2D
    np.testing.assert_array_equal(array(extractor(images())), expected)
    assert len(extractor.weights) == 6
    config = extractor.get_config()
    assert config["layers"][2]["class_name"] == "DOConv2D"


def test_dtype_policies_are_kept():
    inputs, policies = keras.Input(SHAPE[1:]), ["mixed_float16", "mixed_bfloat16", *DOUBLE]
    convs = [layers.Conv2D(4, 3, dtype=policy, name=policy) for policy in policies]
    outputs = [layers.BatchNormalization()(conv(inputs)) for conv in convs]
    model = filled(keras.Model(inputs, outputs))
    new, _ = over_parameterize(model)
    for policy in policies:
        assert new.get_layer(policy).dtype_policy.name == policy
    assert_equal_outputs(model, new, images())


def test_a_layer_by_itself_and_channels_first():
    conv = layers.Conv1D(4, 3, data_format="channels_first", name="conv")
    conv.build((None, 5, 9))
    new, report = over_parameterize(conv)
    assert str(report).splitlines()[1:] == ["  Conv1D -> DOConv1D (1)", "    (the model itself)"]
    assert new.data_format == "channels_first"
    assert_same(new.kernel, conv.kernel)
    again, _ = over_parameterize(conv, inplace=True)
    assert again is conv
    assert type(conv).__name__ == "DOConv1D"


def test_an_activation_with_weights_stays_shared():
    slope = layers.PReLU(shared_axes=[1, 2], name="slope")
    inputs = keras.Input(SHAPE[1:])
    x = layers.Conv2D(3, 3, padding="same", activation=slope, name="a")(inputs)
    model = filled(keras.Model(inputs, layers.Conv2D(3, 3, activation=slope, name="b")(x)))
    new, _ = over_parameterize(model)
    assert new.get_layer("a").activation is new.get_layer("b").activation
    assert new.get_layer("a").activation is not slope
    assert len(new.weights) == len(model.weights) + 2
    assert_equal_outputs(model, new, images())


def test_what_is_left_is_in_the_report_with_the_reason():
    low_rank = layers.Conv2D(3, 3, padding="same", name="lora")
    stack = [
        keras.Input(SHAPE[1:]), low_rank, layers.Conv2D(3, 3, padding="same", name="selected"),
        layers.Reshape((9, 9, 3), name="reshape"), layers.ConvLSTM1D(2, 3, name="recurrent"),
    ]  # fmt: skip
    model = keras.Sequential(stack)
    low_rank.enable_lora(2)
    new, report = over_parameterize(model)
    assert type(new.get_layer("selected")) is DOConv2D
    assert [change.path for change in report.changed] == ["selected"]
    reasons = {left.path: left.reason for left in report.left}
    assert reasons == {"lora": "LoRA is enabled", "recurrent": "recurrent"}


class Holder(layers.Layer):
    """Has layers as attributes."""

    def __init__(self, **held):
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)
        self.build(None)

    def build(self, input_shape):
        self.built = True

    def call(self, inputs):
        return self.first(inputs)


def convolution(name="conv", **options):
    conv = layers.Conv2D(3, 3, padding="same", name=name, **options)
    conv.build((None, 9, 9, 3))
    return conv


def test_quantized_layers_and_tied_variables_are_left():
    first, second = convolution("first"), convolution("second")
    second._tracker.unlock()
    second._kernel = first._kernel
    quantized = layers.Conv2D(3, 3, dtype="int8_from_float32", name="quantized")
    holder = Holder(first=first, second=second, quantized=quantized, third=convolution("third"))
    new, report = over_parameterize(holder)
    assert [change.path for change in report.changed] == ["third"]
    tied = "it shares a weight with what is not over-parameterized alike"
    expected = {"first": tied, "second": tied, "quantized": "quantized"}
    assert {left.path: left.reason for left in report.left} == expected
    assert new.first._kernel is new.second._kernel


def test_what_is_not_built_is_refused_before_anything_is_changed():
    with pytest.raises(ValueError, match=r"the model itself .* is not built"):
        fold(DOConv2D(3, 3))
    model = keras.Sequential([layers.Conv2D(3, 3)], name="stack")
    message = r"the model itself \(Sequential 'stack'\) is not built, .*; call the model on data"
    with pytest.raises(ValueError, match=message):
        over_parameterize(model)
    message = r"layer 'conv' \(Conv2D 'conv'\) is not built"
    with pytest.raises(ValueError, match=message):
        over_parameterize(Holder(first=convolution("a"), conv=layers.Conv2D(3, 3, name="conv")))
    inputs = keras.Input(SHAPE[1:])
    depthwise_model = keras.Model(inputs, layers.DepthwiseConv2D(3, name="dw")(inputs))
    with pytest.raises(ValueError, match=r"layer 'dw': depth_multiplier must be at least"):
        over_parameterize(depthwise_model, depth_multiplier=8)


def test_what_cannot_be_copied_is_named_and_changed_inplace():
    holder = Holder(first=convolution(), source=(n for n in range(3)))
    message = "Holder 'holder.*' cannot be copied: its attribute 'source': .* With inplace=True"
    with pytest.raises(TypeError, match=message):
        over_parameterize(holder)
    assert type(holder.first) is layers.Conv2D
    over_parameterize(holder, inplace=True)
    assert type(holder.first) is DOConv2D


class Helper:
    """Is no layer, and holds one."""

    __slots__ = ("conv", "made")

    def __init__(self, conv):
        self.conv, self.made = conv, {conv: [conv]}


def test_a_copy_keeps_what_is_reached_by_other_objects():
    conv = convolution()
    holder = Holder(
        first=conv, helper=Helper(conv), bound=conv.count_params, options={3: ({conv},)}
    )
    new, _ = over_parameterize(holder)
    assert new.helper.conv is new.helper.made[new.first][0] is new.first
    assert new.bound.__self__ is new.first
    assert new.options[3][0] == {new.first}
    assert new.first is not conv
