"""Keras' older HDF5, of Keras 2 and 3: read, folded, compared and converted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoint_files import numbers, refused
from command_line import IMPOSSIBLE, doconv
from equal import assert_close
from frameworks import need
from safetensors.numpy import load_file

need("tf")

import h5py  # noqa: E402
import keras  # noqa: E402

from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_core.files.entries import CheckpointError  # noqa: E402
from doconv_tf import DOConv2D, DODepthwiseConv2D, DOSeparableConv2D  # noqa: E402

layers = keras.layers


def write(path, groups, config=None, **attributes):
    """Write arrays by layer and variable, as Keras 2 does; with a config, a whole model."""
    with h5py.File(path, "w") as file:
        root = file
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
            root = file.create_group("model_weights")
        root.attrs["layer_names"] = [name.encode() for name in groups]
        for key, value in (
            {"keras_version": "2.15.0", "backend": "tensorflow"} | attributes
        ).items():
            root.attrs[key] = value
        for name in sorted(groups):
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{each}:0".encode() for each in groups[name]]
            for each, array in groups[name].items():
                group[f"{each}:0"] = array
    return path


def norm(name, channels):
    return {f"{name}/{own}": numbers(channels) ** 2 + 1
            for own in ("gamma", "beta", "moving_mean", "moving_variance")}  # fmt: skip


GROUPS = {
    "input_1": {},
    "block/conv": {"block/conv/kernel": numbers(3, 3, 3, 4), "block/conv/bias": numbers(4)},
    "norm": norm("norm", 4),
    "act": {"act/alpha": numbers(1, 1, 4)},
    "sep": {"sep/depthwise_kernel": numbers(3, 3, 4, 1),
            "sep/pointwise_kernel": numbers(1, 1, 4, 6), "sep/bias": numbers(6)},
    "dw": {"dw/depthwise_kernel": numbers(3, 3, 6, 2), "dw/bias": numbers(12)},
    "nested": {"inner/kernel": numbers(1, 1, 12, 5), **norm("inner_norm", 5)},
    "up": {"up/kernel": numbers(2, 2, 7, 5), "up/bias": numbers(7)},
    "do": {"do/kernel": numbers(3, 3, 7, 2), "do/d_kernel": numbers(7, 9, 9)},
    "older": {"older/kernel": numbers(3, 3, 2, 2), "older/depthwise_kernel": numbers(2, 9, 9)},
    "fc": {"fc/kernel": numbers(36, 3), "fc/bias": numbers(3)},
    "words": {"words/embeddings": numbers(9, 4)},
    "lstm": {f"lstm/lstm_cell/{own}": numbers(3, 8) for own in ("kernel", "recurrent_kernel")},
    "attention": {"attention/query/kernel": numbers(4, 2, 3)},
    "stats": {"stats/gamma": numbers(3), "stats/moving_mean": numbers(3)},
}  # fmt: skip
KINDS = {
    "block/conv": "convolution", "norm": "batch norm", "act": "other",
    "sep.depthwise": "convolution", "sep.pointwise": "convolution", "dw": "convolution",
    "nested.inner": "convolution", "nested.inner_norm": "batch norm",
    "up": "transposed convolution", "do": "convolution", "older": "convolution", "fc": "linear",
    "words": "linear", "lstm.lstm_cell": "other", "attention.query": "other", "stats": "other",
}  # fmt: skip


def test_weights_alone_are_told_by_lists_and_names(tmp_path):
    file = write(tmp_path / "w.h5", GROUPS)
    with open_checkpoint(file) as checkpoint:
        found = {layer.path: layer for layer in checkpoint.layers}
        assert {path: layer.kind for path, layer in found.items()} == KINDS
        assert checkpoint.parameters(found["norm"]) == 8
        assert checkpoint.parameters(found["stats"]) == 3
        assert found["dw"].kernel_shape == (12, 1, 3, 3)
        assert [path for path in found if found[path].over_parameterized] == ["do", "older"]
        assert not checkpoint.ordered  # of nested models, what is frozen comes last
    error = "w.h5 lists last what is frozen in a layer, and does not tell the order of the model"
    doconv("verify", file, file, "--match", "order", code=IMPOSSIBLE, error=error)
    fold_checkpoint(file, tmp_path / "f.h5")
    doconv("verify", file, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as folded:
        assert list(folded["do"].attrs["weight_names"]) == ["do/kernel:0"]
        assert list(folded["do/do"]) == ["kernel:0"]
    doconv(
        "convert", file, tmp_path / "w.safetensors", "--flatten", "fc=4x3x3", "--flatten",
        "words=no", "--drop", "lstm*", "--drop", "attention*", "--drop", "stats*",
    )  # fmt: skip
    rest = {name: {v: a * 0 for v, a in arrays.items()} for name, arrays in GROUPS.items()
            if name not in ("lstm", "attention", "stats")}  # fmt: skip
    like = write(tmp_path / "like.h5", rest)
    args = ["convert", tmp_path / "w.safetensors", tmp_path / "back.h5", "--like", like]
    doconv(*args, "--flatten", "fc=4x3x3", "--flatten", "words=no")
    with h5py.File(tmp_path / "back.h5") as back:
        for name, arrays in rest.items():
            for variable in arrays:
                assert_close(back[f"{name}/{variable}:0"][:], GROUPS[name][variable])


def node(kind, name, calls, **config):
    config = {"name": name, "batch_input_shape": [None, 4, 4, 3]} | config
    return {"class_name": kind, "config": config, "name": name, "inbound_nodes": calls}


def model(name, inner, first, last):
    config = {"name": name, "layers": inner, "input_layers": [first], "output_layers": [last]}
    return {"class_name": "Functional", "config": config}


CONV = {"kernel_size": [1, 1], "strides": [1, 1], "dilation_rate": [1, 1], "groups": 1,
        "padding": "valid", "data_format": "channels_last", "activation": "relu"}  # fmt: skip


def test_the_config_of_keras_2_tells_order_classes_and_connections(tmp_path):
    inner = model("nested", [
        node("InputLayer", "i", []), node("Conv2D", "conv", [[["i", 0, 0, {}]]], filters=5, **CONV),
        node("BatchNormalization", "norm", [[["conv", 0, 0, {}]]], epsilon=0.01),
    ], ["i", 0, 0], ["norm", 0, 0])  # fmt: skip
    config = model("model", [
        node("InputLayer", "input", []),
        node("Conv2D", "shared", [[[name, 0, 0, {}]] for name in ("input", "shared")], filters=3,
             **CONV),
        # A model's first call is counted as the second there.
        {**inner, "name": "nested", "inbound_nodes": [[["shared", 1, 0, {}]]]},
        node("Add", "add", [[["nested", 1, 0, {"y": ["nested", 1, 0]}]]]),
        node("Flatten", "flat", [[["add", 0, 0, {}]]], data_format="channels_last"),
        node("Dense", "fc", [[["flat", 0, 0, {}]]], activation="softmax"),
    ], ["input", 0, 0], ["fc", 0, 0])  # fmt: skip
    frozen = {**norm("norm", 5), "conv/kernel": numbers(1, 1, 3, 5)}  # comes last when it is frozen
    groups = {
        "input": {}, "shared": {"shared/kernel": numbers(1, 1, 3, 3)}, "nested": frozen, "add": {},
        "fc": {"fc/kernel": numbers(80, 2)},
    }  # fmt: skip
    file = write(tmp_path / "m.h5", groups, config)
    with open_checkpoint(file) as checkpoint:
        names = ["shared", "nested.conv", "nested.norm", "fc"]
        assert ([x.path for x in checkpoint.layers], checkpoint.ordered) == (names, True)
    told = doconv("convert", file, tmp_path / "m.safetensors").stdout
    assert "must have epsilon 0.01: nested.norm" in told
    assert "an image of 5x16 reordered" in told
    kernel = groups["fc"]["fc/kernel"].reshape(16, 5, 2).transpose(2, 1, 0).reshape(2, 80)
    assert_close(load_file(tmp_path / "m.safetensors")["fc.weight"], kernel)


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    inner = keras.Sequential([keras.Input((6, 6, 6)), DOConv2D(4, 2, name="deep")], name="nested")
    x = layers.BatchNormalization()(DOConv2D(4, 3, padding="same", name="block_conv")(image))
    x = DOSeparableConv2D(6, 3, activation="relu")(layers.PReLU(shared_axes=[1, 2])(x))
    x = DODepthwiseConv2D(2)(inner(x))
    shared = layers.Conv2D(4, 1)
    x = layers.Conv2DTranspose(5, 2)(shared(shared(x)))
    net = keras.Model(image, layers.Dense(3)(layers.Flatten()(layers.DepthwiseConv2D(2)(x))))
    net.compile("adam", keras.losses.MeanSquaredError())
    net.fit(numbers(2, 8, 8, 3), numbers(2, 3), verbose=0)
    return net


def test_whole_models_of_keras_3(trained, tmp_path):
    old, new, folded = tmp_path / "m.h5", tmp_path / "m.keras", tmp_path / "f.h5"
    trained.save(old)
    trained.save(new)
    with open_checkpoint(old) as checkpoint:
        count = sum(checkpoint.parameters(layer) for layer in checkpoint.layers)
        assert count == sum(int(np.prod(w.shape)) for w in trained.trainable_weights)
        assert (checkpoint.others, checkpoint.ordered) == (("optimizer_weights",), True)
    for match in ("name", "order"):
        doconv("verify", old, new, "--match", match)
    assert len(fold_checkpoint(old, folded).changed) == 4
    plain = keras.models.load_model(folded, compile=False)
    assert {type(layer).__module__.partition(".")[0] for layer in plain.layers} == {"keras"}
    images = numbers(2, 8, 8, 3)
    assert_close(*(keras.ops.convert_to_numpy(each(images)) for each in (plain, trained)))
    doconv("convert", old, tmp_path / "m.safetensors")
    doconv("convert", tmp_path / "m.safetensors", tmp_path / "b.h5", "--like", old)
    back = keras.models.load_model(tmp_path / "b.h5", compile=False)
    for ours, theirs in zip(back.weights, trained.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def changed(**attributes):
    return lambda path: write(path, {"fc": {"fc/kernel": numbers(2, 2)}}, **attributes)


def edited(change):
    def make(path):
        with h5py.File(changed()(path), "a") as file:
            change(file)

    return make


REFUSED = {
    "no group": (edited(lambda f: f.pop("fc")), "lists the layer 'fc', and has no group of that"),
    "no array": (edited(lambda f: f["fc/fc"].pop("kernel:0")),
                 "lists the array 'fc/kernel:0' of the layer 'fc', and has none"),
    "twice": (edited(lambda f: f["fc"].attrs.create("weight_names", [b"fc/kernel:0"] * 2)),
              "lists the array 'fc/fc/kernel:0' twice"),
    "unlisted": (edited(lambda f: f.create_dataset("fc/fc/more:0", data=[1.0])),
                 "the array 'fc/fc/more:0' is in no layer's list of arrays"),
    "numbers": (edited(lambda f: f.attrs.create("layer_names", [1, 2])),
                "the attribute layer_names of '/' is no list of names"),
    "Keras 1": (changed(keras_version="1.2.2"), "was written by Keras '1.2.2', whose arrays"),
    "Theano": (changed(backend="theano"), "was written with the backend theano, whose arrays are"),
    "no JSON": (edited(lambda f: f.attrs.create("model_config", "{")), "model_config is no JSON"),
    "no model": (edited(lambda f: f.attrs.create("model_config", "[1]")),
                 "model_config is not the config of a Keras model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("unprobed")
def test_files_that_contradict_themselves_are_refused(case, tmp_path):
    make, message = REFUSED[case]
    make(tmp_path / "a.h5")
    refused(tmp_path / "a.h5", message, CheckpointError)


def test_long_lists_are_in_parts(tmp_path):
    file = changed()(tmp_path / "a.h5")
    with h5py.File(file, "a") as old:
        del old.attrs["layer_names"], old["fc"].attrs["weight_names"]
        for part in range(2):
            old.attrs[f"layer_names{part}"] = [b"fc", b"none"][part : part + 1]
        old["fc"].attrs["weight_names0"] = [b"fc/kernel:0"]
        old.create_group("none").attrs["weight_names"] = np.array([])
    with open_checkpoint(file) as checkpoint:
        assert [layer.path for layer in checkpoint.layers] == ["fc"]


def test_a_prelu_goes_from_any_framework_to_any_other(tmp_path):
    slopes = {"act": {"act/alpha": numbers(1, 1, 4)}}
    k = write(tmp_path / "k.h5", slopes)
    g, t, back = tmp_path / "g.params", tmp_path / "t.safetensors", tmp_path / "back.h5"
    for source, target, *like in ((k, g), (k, t), (t, back, "--like", k)):
        doconv("convert", source, target, *like)
        doconv("verify", source, target)
    assert load_file(t)["act.weight"].shape == (4,)
    doconv("convert", t, tmp_path / "g2.params", "--like", g)
    doconv("verify", g, tmp_path / "g2.params")
    full = write(tmp_path / "full.h5", {"act": {"act/alpha": numbers(5, 5, 4)}})
    error = r"'act' has a slope for each position, \(5, 5, 4\); PyTorch has one, or .* shared_axes"
    doconv("convert", full, tmp_path / "f.pt", code=IMPOSSIBLE, error=error)
