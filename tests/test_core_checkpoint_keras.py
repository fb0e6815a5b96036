"""Keras' `.keras` and `.weights.h5` as checkpoints: folded files load into ordinary models."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from checkpoint_files import numbers, refused
from equal import assert_close, close
from frameworks import need

need("tf")

import h5py  # noqa: E402
import keras  # noqa: E402
import ml_dtypes  # noqa: E402
from keras_checkpoints import IMAGE, functional, images, randomized  # noqa: E402

from doconv_core import ConvSpec, difference  # noqa: E402
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_core.files.hdf5 import creation_order  # noqa: E402
from doconv_core.files.keras_layers import numbered, snake_case, stem_of  # noqa: E402
from doconv_tf import DOConv1D, DOConv2D  # noqa: E402

pytestmark = pytest.mark.usefixtures("afresh", "unprobed")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.keras"


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "model.weights.h5"


def same_outputs(found, expected):
    assert_close(found(images()), expected(images()))


def no_trace_of_ours(model):
    for layer in model._flatten_layers():
        assert type(layer).__module__.startswith("keras.")


@pytest.mark.parametrize("multiplier", [None, 12])
def test_a_folded_archive_loads_as_an_ordinary_model(file, tmp_path, multiplier):
    model = functional(depth_multiplier=multiplier)
    model.save(file)
    report = fold_checkpoint(file, tmp_path / "out.keras")
    assert len(report.changed) == 5
    with zipfile.ZipFile(tmp_path / "out.keras") as archive:
        assert archive.namelist() == zipfile.ZipFile(file).namelist()
        config = archive.read("config.json")
    assert b"doconv" not in config
    assert b"DOConv" not in config
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    no_trace_of_ours(loaded)
    assert type(loaded.get_layer("first")) is keras.layers.Conv2D
    assert type(loaded.get_layer("spread")) is keras.layers.DepthwiseConv2D
    assert loaded.get_layer("spread").depth_multiplier == 2
    same_outputs(loaded, model)
    loaded.compile("sgd", "mse", run_eagerly=True)
    loaded.fit(images(), np.zeros((2, 3)), verbose=0)


def test_the_layers_of_an_archive(file):
    functional(depth_multiplier=12).save(file)
    with open_checkpoint(file) as checkpoint:
        layers = {layer.path: layer for layer in checkpoint.layers}
        assert checkpoint.format == "Keras"
        assert {path: layer.spec for path, layer in layers.items() if layer.over_parameterized} == {
            "first": ConvSpec(3, 4, (3, 3)),
            "do_conv2d": ConvSpec(4, 4, (3, 3), 2, 12),
            "do_conv2d_1": ConvSpec(4, 4, (3, 3)),
            "spread": ConvSpec(4, 8, (3, 3), 4),
            "inner.do_conv2d_3": ConvSpec(2, 2, (2, 2)),
        }
        assert layers["spread"].layout == "*CN"
        assert layers["conv2d"].spec == ConvSpec(4, 4, (1, 1))
        assert layers["inner.do_conv2d_2"].spec == ConvSpec(8, 2, (1, 1))
        norm = layers["batch_normalization"]
        roles = ["weight", "bias", "running_mean", "running_var"]
        assert (norm.kind, list(norm.entries)) == ("batch norm", roles)
        assert (layers["dense"].kind, layers["dense"].kernel_shape) == ("linear", (3, 18))
        dense = checkpoint.kernel(layers["dense"])
        assert dense.shape == (3, 18)


def test_batch_norms_without_scale_or_center(file):
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(scale=False),
                              keras.layers.BatchNormalization(center=False)])  # fmt: skip
    model.save(file)
    with open_checkpoint(file) as checkpoint:
        roles = [list(layer.entries) for layer in checkpoint.layers]
    assert roles == [["bias", "running_mean", "running_var"],
                     ["weight", "running_mean", "running_var"]]  # fmt: skip


def test_a_trained_models_optimizer_is_carried_over(file, tmp_path):
    layers = [DOConv2D(4, 3), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    model = randomized(keras.Sequential([keras.Input(IMAGE), *layers]))
    model.compile("adam", "mse")
    model.fit(images(), np.zeros((2, 3)), verbose=0)
    model.save(file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.others == ("optimizer",)
    fold_checkpoint(file, tmp_path / "out.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'adam'"):
        loaded = keras.saving.load_model(tmp_path / "out.keras")
    same_outputs(loaded, model)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_compressed_archives_are_read_and_stay_compressed(file, tmp_path, compression):
    model = functional()
    model.save(file)
    packed = tmp_path / "packed.keras"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("assets/vocabulary.txt", "words")
    fold_checkpoint(packed, tmp_path / "out.keras")
    with zipfile.ZipFile(tmp_path / "out.keras") as archive:
        assert {info.compress_type for info in archive.infolist()} == {compression}
        assert archive.read("assets/vocabulary.txt") == b"words"
    same_outputs(keras.saving.load_model(tmp_path / "out.keras"), model)


def ordinary_of(model, tmp_path):
    """Return the ordinary model of the same architecture, with other weights."""
    model.save(tmp_path / "whole.keras")
    fold_checkpoint(tmp_path / "whole.keras", tmp_path / "ordinary.keras")
    plain = keras.saving.load_model(tmp_path / "ordinary.keras", compile=False)
    for weight in plain.weights:
        weight.assign(weight * 0)
    return plain


def test_folded_weights_load_into_the_ordinary_model(weights, tmp_path):
    model = functional()
    model.save_weights(weights)
    plain = ordinary_of(model, tmp_path)
    report = fold_checkpoint(weights, tmp_path / "out.weights.h5")
    assert "inner.do_conv2d_3" in {change.path for change in report.changed}
    plain.load_weights(tmp_path / "out.weights.h5")
    same_outputs(plain, model)
    again = fold_checkpoint(tmp_path / "out.weights.h5", tmp_path / "twice.weights.h5")
    assert again.changed == ()


def test_a_large_depth_multiplier_in_weights_needs_the_kernel_size(weights, tmp_path):
    model = functional(depth_multiplier=12)
    model.save_weights(weights)
    plain = ordinary_of(model, tmp_path)
    refused(weights, r"layer 'do_conv2d': its kernel size is not in the file")
    fold_checkpoint(weights, tmp_path / "out.weights.h5", kernel_sizes={"do_conv2d": (3, 3)})
    plain.load_weights(tmp_path / "out.weights.h5")
    same_outputs(plain, model)


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.Model):
    """Layers as attributes and in a list, whose order no config tells.

    Keras stores attributes in the order of their names, `layers` among them: what comes later is
    stored as one of the layers.
    """

    def __init__(self, conv="DOConv2D", first="do_conv2d", **options):
        super().__init__(**options)
        make = {"DOConv2D": DOConv2D, "Conv2D": keras.layers.Conv2D}[conv]
        self.blocks = [
            keras.layers.Conv2D(4, 1), make(4, 3), keras.layers.Conv2D(4, 1), make(4, 1), make(4, 2)
        ]  # fmt: skip
        self.first = first
        setattr(self, first, make(4, 3))

    def call(self, x):
        x = getattr(self, self.first)(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_subclassed_models_weights(weights, tmp_path):
    model, plain = Block(), Block("Conv2D")
    for one in (model, plain):
        one(images())
    randomized(model)
    model.save_weights(weights)
    fold_checkpoint(weights, tmp_path / "out.weights.h5")
    with h5py.File(tmp_path / "out.weights.h5") as file:
        assert list(file["blocks"]) == ["conv2d", *(f"conv2d_{n}" for n in range(1, 5))]
        assert "do_conv2d" in file  # an attribute's name
    plain.load_weights(tmp_path / "out.weights.h5")
    same_outputs(plain, model)


def test_a_list_that_shares_layers_with_an_attribute_is_not_guessed(weights):
    model = Block(first="attribute")
    model(images())
    model.save_weights(weights)
    refused(weights, r"'blocks' has over-parameterized and ordinary convolut")


def rewritten(source, target, **options):
    """Copy an HDF5 file in the order of the names, as other writers might."""
    with h5py.File(source) as old, h5py.File(target, "w", **options) as new:
        for name in old:
            old.copy(name, new)


@pytest.mark.parametrize(
    "options", [{}, {"libver": "latest"}], ids=["a layer gone", "newer format"]
)
def test_an_order_that_the_file_does_not_tell_is_not_guessed(weights, tmp_path, options):
    functional().save_weights(weights)
    if options:
        rewritten(weights, tmp_path / "in.weights.h5", **options)
    else:
        with h5py.File(weights, "a") as file:
            del file["layers/do_conv2d"]
        weights.rename(tmp_path / "in.weights.h5")
    message = r"'layers' has over-parameterized and ordinary convolutions, and nothing in the file"
    refused(tmp_path / "in.weights.h5", message)


def test_the_order_of_making_is_read_from_the_file(weights):
    names = ["zebra", "a", "much_longer_than_the_others_are", "b", *map(str, range(300, 0, -1))]
    with h5py.File(weights, "w") as file:
        group = file.create_group("deep").create_group("layers")
        for name in names:
            group.create_group(name)
    with h5py.File(weights) as file, weights.open("rb") as raw:
        address = h5py.h5o.get_info(file["deep/layers"].id).addr
        assert sorted(names) == list(file["deep/layers"])
        assert creation_order(raw, address, names) == names
        assert creation_order(raw, address, [*names, "other"]) is None
        assert creation_order(raw, address + 8, names) is None
        assert creation_order(raw, 1 << 70, names) is None


@keras.saving.register_keras_serializable(package="tests")
class Doubled(DOConv2D):
    """What computes something else than a layer of ours."""

    def call(self, x):
        return 2 * super().call(x)


def test_subclasses_are_not_folded(file):
    model = keras.Sequential([keras.Input(IMAGE), Doubled(4, 3, name="double")])
    model.save(file)
    refused(file, r"layer 'double': it is a Doubled, which may compute")


def test_wrapped_layers(file, tmp_path):
    layers = [keras.layers.TimeDistributed(DOConv2D(4, 3)), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((2, *IMAGE)), *layers, keras.layers.Dense(2)])
    randomized(model).save(file)
    fold_checkpoint(file, tmp_path / "out.keras")
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    x = numbers(2, 2, *IMAGE)
    assert close(loaded(x), model(x))
    assert type(loaded.layers[0].layer) is keras.layers.Conv2D


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "float64", "mixed_float16"])
def test_dtypes(file, tmp_path, policy):
    layers = [DOConv2D(4, 3, dtype=policy), keras.layers.Flatten(), keras.layers.Dense(2)]
    model = randomized(keras.Sequential([keras.Input(IMAGE), *layers]))
    model.save(file)
    fold_checkpoint(file, tmp_path / "out.keras")
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    found, expected = loaded.layers[0], model.layers[0].fold()
    assert found.kernel.dtype == expected.kernel.dtype
    assert found.dtype_policy.name == policy
    kernels = [
        keras.ops.convert_to_numpy(layer.kernel).astype(float) for layer in (found, expected)
    ]
    assert difference(*kernels).relative <= {"float64": 1e-14, "mixed_float16": 1e-6}.get(
        policy, 0.02
    )
    with open_checkpoint(file) as checkpoint:
        dtype = "float32" if policy == "mixed_float16" else policy
        assert checkpoint.entries["layers/do_conv2d/vars/0"].dtype == dtype


def test_other_ranks(file, tmp_path):
    model = keras.Sequential([keras.Input((9, 3)), DOConv1D(4, 3), keras.layers.Conv1D(4, 2)])
    randomized(model).save(file)
    fold_checkpoint(file, tmp_path / "out.keras")
    loaded, x = keras.saving.load_model(tmp_path / "out.keras"), numbers(2, 9, 3)
    assert close(loaded(x), model(x))


def test_names_are_kerass_own():
    from keras.src.utils.naming import to_snake_case

    for name in ("DOConv2D", "DODepthwiseConv2D", "Conv2DTranspose", "BatchNormalization", "GRU",
                 "MyOwn_Layer2", "LSTMCell"):  # fmt: skip
        assert snake_case(name) == to_snake_case(name)
    assert numbered(["a", "b", "a", "a"]) == ["a", "b", "a_1", "a_2"]
    assert [stem_of(name) for name in ("conv2d", "conv2d_12", "a_b")] == [
        ("conv2d", 0), ("conv2d", 12), ("a_b", 0)
    ]  # fmt: skip


def test_bfloat16_is_stored_as_keras_stores_it(weights):
    values = np.array([1.5, -2.25]).astype(ml_dtypes.bfloat16)
    with h5py.File(weights, "w") as file:
        data = file.create_dataset("layers/dense/vars/0", data=values)
        data.attrs["dtype"] = "bfloat16"
    with open_checkpoint(weights) as checkpoint:
        assert checkpoint.entries["layers/dense/vars/0"].dtype == "bfloat16"
        np.testing.assert_array_equal(checkpoint.read("layers/dense/vars/0"), values.astype("f4"))


@pytest.mark.parametrize("use_ema", [True, False])
def test_an_optimizer_s_averages_of_the_weights_are_named(file, tmp_path, use_ema):
    model = keras.Sequential([keras.Input((6, 6, 2)), DOConv2D(3, 3)])
    optimizer = keras.optimizers.SGD(use_ema=use_ema)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.fit(np.ones((1, 6, 6, 2)), np.ones((1, 4, 4, 3)), verbose=0)
    model.save(file)
    report = fold_checkpoint(file, tmp_path / "out.keras")
    assert [left.path for left in report.left] == ["optimizer"] * use_ema
    assert "moving averages" in str(report) or not use_ema
