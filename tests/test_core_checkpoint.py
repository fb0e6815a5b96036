"""Checkpoints in general, and in safetensors files: layers found, folding, what is refused."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import SPECS, folded_arrays, numbers, one_layer, pair, refused, state_dict
from equal import assert_close
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from doconv_core import ConvSpec, LayerForm, State, compose, read_state, write_state
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint
from doconv_core.files.entries import BLOCK, CheckpointError, compose_blocks
from doconv_core.state.file import entry
from doconv_core.state.layers import LinearSpec


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def close(found, expected, dtype=np.float32):
    assert_close(found, expected, {np.float64: 1e-15, np.float32: 1e-6, np.float16: 1e-3}[dtype])


def test_the_layers_of_a_state_dict(file):
    save_file(state_dict()[0], file)
    with open_checkpoint(file) as checkpoint:
        layers = {layer.path: layer for layer in checkpoint.layers}
        assert checkpoint.format == "safetensors"
        assert checkpoint.parts == ("",)
        assert {p: layer.spec for p, layer in layers.items() if layer.over_parameterized} == SPECS
        for path, spec in SPECS.items():
            assert layers[path].kernel_shape == spec.kernel_shape
            assert layers[path].origin == "doconv"
            roles = {role: f"{path}.{role}" for role in ("bias", "weight", "depthwise_weight")}
            assert layers[path].entries == roles
        kinds = {path: layer.kind for path, layer in layers.items() if path not in SPECS}
        assert kinds == {
            "norm": "batch norm", "plain": "convolution", "head": "linear", "": "other"
        }  # fmt: skip
        assert set(layers["norm"].entries) == {
            "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
        }  # fmt: skip
        assert layers["plain"].kernel_shape == (4, 4, 3, 3)
        assert layers["plain"].spec is None
        assert layers[""].entries == {"position": "position"}


def test_pairs_and_kernels(file):
    arrays = state_dict()[0]
    save_file(arrays, file)
    with open_checkpoint(file) as checkpoint:
        layers = {layer.path: layer for layer in checkpoint.layers}
        for seed, (path, spec) in enumerate(SPECS.items()):
            weight, depthwise = checkpoint.pair(layers[path])
            np.testing.assert_array_equal(weight, arrays[f"{path}.weight"].reshape(weight.shape))
            np.testing.assert_array_equal(depthwise, arrays[f"{path}.depthwise_weight"])
            close(checkpoint.kernel(layers[path]), pair(spec, seed)[2])
        weight, depthwise = checkpoint.pair(layers["plain"])
        assert depthwise is None
        np.testing.assert_array_equal(weight, arrays["plain.weight"])
        np.testing.assert_array_equal(checkpoint.kernel(layers["plain"]), weight)
        np.testing.assert_array_equal(checkpoint.kernel(layers["head"]), arrays["head.weight"])
        with pytest.raises(CheckpointError, match=r"layer 'norm': its kind, batch norm, has no ke"):
            checkpoint.kernel(layers["norm"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_folded_file_differs_in_its_over_parameterized_layers_alone(file, tmp_path, dtype):
    arrays, folded = state_dict(dtype=dtype)
    save_file(arrays, file, metadata={"epoch": "3"})
    calls = []
    report = fold_checkpoint(
        file, tmp_path / "out.safetensors", progress=lambda *done: calls.append(done)
    )
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == folded.keys()
    for name, expected in folded.items():
        assert found[name].dtype == expected.dtype
        close(found[name], expected, dtype)
        if f"{name.removesuffix('weight')}depthwise_weight" not in arrays:
            np.testing.assert_array_equal(found[name], expected)
    with safe_open(tmp_path / "out.safetensors", "np") as stored:
        assert stored.metadata() == {"epoch": "3"}
    assert {change.path for change in report.changed} == set(SPECS)
    assert calls == [(done, 5) for done in range(6)]
    assert "folded 5 layers, left 0; parameters: " in str(report)
    statistics = 4 + 4 + 1
    assert report.parameters_before == sum(a.size for a in arrays.values()) - statistics
    assert report.parameters_after == sum(a.size for a in folded.values()) - statistics


def test_folding_twice_is_folding_once(file, tmp_path):
    save_file(state_dict()[0], file)
    fold_checkpoint(file, tmp_path / "once")
    report = fold_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert report.changed == ()
    assert (tmp_path / "twice").read_bytes() == (tmp_path / "once").read_bytes()


def test_the_order_of_the_data_is_kept(file, tmp_path):
    arrays = state_dict()[0]
    save_file(arrays, file)
    with open_checkpoint(file) as checkpoint:
        before = [name for name in checkpoint.entries if not name.endswith("depthwise_weight")]
    fold_checkpoint(file, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert list(checkpoint.entries) == before


def test_bfloat16_is_composed_in_float32_and_rounded_once(file):
    arrays = {k: v for k, v in state_dict()[0].items() if k.startswith("features.2")}
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    found = folded_arrays(rounded, file)[1]["features.2.weight"]
    with open_checkpoint(file) as checkpoint:
        assert {e.dtype for e in checkpoint.entries.values()} == {"bfloat16"}
        assert checkpoint.read("features.2.bias").dtype == np.float32
    assert found.dtype == ml_dtypes.bfloat16
    wide = {name: array.astype(np.float32) for name, array in rounded.items()}
    weight = wide["features.2.weight"].reshape(8, 2, 9)
    expected = compose(weight, wide["features.2.depthwise_weight"], SPECS["features.2"])
    np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))


def test_d_in_a_wider_type_than_w(file):
    weight, depthwise, _ = pair(SPECS["features.2"])
    half = weight.astype(np.float16)
    _, found = folded_arrays({"weight": half, "depthwise_weight": depthwise}, file)
    expected = compose(half.astype(np.float32).reshape(8, 2, 9), depthwise, SPECS["features.2"])
    np.testing.assert_array_equal(found["weight"], expected.astype("f2"))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_names_are_kept_and_are_in_no_path(file, wrapper):
    arrays, folded = state_dict()
    named = {f"{wrapper}{name}": array for name, array in arrays.items()}
    _, found = folded_arrays({**named, "n_averaged": np.array(3)}, file)
    with open_checkpoint(file) as checkpoint:
        assert {layer.path for layer in checkpoint.layers} == {*SPECS, "norm", "plain", "head", ""}
    assert found.keys() == {f"{wrapper}{name}" for name in folded} | {"n_averaged"}


def test_an_averaged_copy_without_dots_is_folded_too(file):
    weight, depthwise, kernel = pair(SPECS["features.2"])
    names = ("model.conv.", "model_ema.conv")
    arrays = {f"{n}weight": weight for n in names}
    report, found = folded_arrays(arrays | {f"{n}depthwise_weight": depthwise for n in names}, file)
    assert found.keys() == {"model.conv.weight", "model_ema.convweight"}
    close(found["model_ema.convweight"], kernel)
    assert len(report.changed) == 2


def test_a_kernel_size_that_is_not_in_the_file_must_be_given(file):
    arrays, kernel = one_layer(ConvSpec(4, 6, (3, 3), 2, 12))
    save_file(arrays, file)
    with open_checkpoint(file) as checkpoint:
        (layer,) = checkpoint.layers
        assert layer.over_parameterized
        assert layer.spec is None
        assert checkpoint.pair(layer)[0].shape == (6, 2, 12)
    refused(
        file, "layer 'a': its kernel size is not in the file, which tells 9 taps; give it, with"
    )
    _, found = folded_arrays(arrays, file, kernel_sizes={"a*": (3, 3), "?": [9]})
    close(found["a.weight"], kernel)
    for first, shape in (("a", (6, 2, 3, 3)), ("*", (6, 2, 9))):  # the first that matches counts
        sizes = {first: shape[2:], "a": (3, 3), "*": (9,)}
        with open_checkpoint(file, kernel_sizes=sizes) as checkpoint:
            assert checkpoint.layers[0].kernel_shape == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"x": (3, 3)}, r"kernel_sizes: 'x' matches no over-parameterized layer; the file has 'a'"),
        ({"a": (3, 2)}, r"layer 'a' has 9 kernel taps; received the kernel size \(3, 2\), which"),
        ({"a": 9}, r"must give 1 to 3 integers for each pattern; received 9 for 'a'"),
        ({"a": (3, 0)}, r"kernel_sizes\['a'\] must be at least 1; received .*=0"),
    ],
)
def test_kernel_sizes_that_do_not_fit_are_refused(file, sizes, message):
    save_file(one_layer(ConvSpec(4, 6, (3, 3), 2, 12))[0], file)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(file, kernel_sizes=sizes)


def test_a_kernel_size_that_contradicts_the_file_is_refused(file):
    save_file(one_layer(SPECS["features.0"])[0], file)
    message = r"has the kernel size \(3, 3\) in the file; received \(9,\)"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(file, kernel_sizes={"a": (9,)})


@pytest.mark.parametrize(
    "shapes",
    [
        ((8, 3, 3, 3), (4, 9, 9)),
        ((8, 3, 3, 3), (3, 9, 12)),
        ((8, 3, 9), (3, 12, 9)),
        ((9, 3, 3, 3), (6, 9, 9)),
        ((8, 3), (3, 9, 9)),
        ((216,), (243,)),  # a shard of a layer of ours
        ((8, 3, 3, 3), (3, 9)),
    ],
)
def test_what_is_named_like_a_layer_of_ours_but_is_none_is_refused(file, shapes):
    save_file({"a.weight": numbers(*shapes[0]), "a.depthwise_weight": numbers(*shapes[1])}, file)
    message = (
        "layer 'a': named like an over-parameterized layer, but its entries make none: "
        f"'depthwise_weight' {shapes[1]} of float32, 'weight' {shapes[0]} of float32."
    )
    refused(file, re.escape(message))
    with open_checkpoint(file) as checkpoint:  # to look at it is another matter
        (layer,) = checkpoint.layers
    assert (layer.kind, layer.over_parameterized, [*layer.entries]) == (
        "other", False, ["depthwise_weight", "weight"]
    )  # fmt: skip


def test_integers_are_refused(file):
    arrays, _ = one_layer(SPECS["features.0"])
    save_file(arrays | {"a.weight": arrays["a.weight"].astype(np.int8)}, file)
    refused(file, r"'weight' \(8, 3, 3, 3\) of int8")


def test_a_d_without_its_w_is_refused(file):
    """As PyTorch's weight normalization leaves it: W is of two entries then."""
    _, depthwise, _ = pair(SPECS["features.0"])
    arrays = {"a.weight_g": numbers(8, 1, 1, 1), "a.weight_v": numbers(8, 3, 3, 3)}
    save_file({**arrays, "a.depthwise_weight": depthwise, "b.bias": numbers(3)}, file)
    refused(file, r"layer 'a': .*'weight_g' \(8, 1, 1, 1\) of float32, 'w")


def test_an_ordinary_depthwise_kernel_under_ds_name_is_left(file):
    arrays = {"a.weight": numbers(8, 3, 3, 3), "a.depthwise_weight": numbers(3, 1, 3, 3)}
    report, found = folded_arrays(arrays, file)
    assert report.changed == ()
    assert found.keys() == arrays.keys()
    (left,) = report.left
    assert left.reason.startswith("named like an over-parameterized layer, but its entries make")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_kernel_that_is_not_finite_is_refused(file, bad):
    arrays, _ = one_layer(SPECS["features.0"])
    arrays["a.weight"][3, 1, 0, 0] = bad
    arrays["a.depthwise_weight"] *= 4
    save_file(arrays, file)
    refused(file, r"layer 'a': the folded kernel is not finite")


def test_an_existing_target_is_kept_unless_asked(file, tmp_path):
    save_file(state_dict()[0], file)
    (tmp_path / "out").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out exists; pass overwrite=True to replace it"):
        fold_checkpoint(file, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"
    fold_checkpoint(file, tmp_path / "out", overwrite=True)
    assert load_file(tmp_path / "out").keys() == state_dict()[1].keys()


def test_a_file_can_be_folded_in_its_place(file):
    arrays, folded = state_dict()
    save_file(arrays, file)
    fold_checkpoint(file, file, overwrite=True)
    assert load_file(file).keys() == folded.keys()
    assert list(file.parent.iterdir()) == [file]


def test_an_interrupted_fold_leaves_the_old_file(file, tmp_path):
    save_file(state_dict()[0], file)
    before = file.read_bytes()

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(file, file, overwrite=True, progress=interrupt)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_doconv_state_stays_one(tmp_path):
    forms = {
        "a": LayerForm(ConvSpec(4, 6, (3, 3), 2, 12), over_parameterized=True),
        "b": LayerForm(ConvSpec(6, 5, (1, 1)), bias=False),
        "head": LayerForm(LinearSpec(5, 3)),
    }
    arrays = {
        entry(path, name): numbers(*shape, seed=seed)
        for seed, (path, form) in enumerate(forms.items())
        for name, shape in form.shapes.items()
    }
    write_state(State(forms, arrays), tmp_path / "state")
    with open_checkpoint(tmp_path / "state") as checkpoint:
        assert checkpoint.format == "doconv state (safetensors)"
        assert [(layer.path, layer.kind) for layer in checkpoint.layers] == [
            ("a", "convolution"), ("b", "convolution"), ("head", "linear")
        ]  # fmt: skip
        assert checkpoint.layers[0].spec == forms["a"].spec
        assert checkpoint.kernel(checkpoint.layers[1]).shape == (5, 6, 1, 1)
    fold_checkpoint(tmp_path / "state", tmp_path / "out")
    folded = read_state(tmp_path / "out")
    assert folded.layers["a"] == LayerForm(ConvSpec(4, 6, (3, 3), 2))
    assert {k: v for k, v in folded.layers.items() if k != "a"} == {
        k: v for k, v in read_state(tmp_path / "state").layers.items() if k != "a"
    }
    expected = compose(arrays["a.weight"], arrays["a.depthwise_weight"], forms["a"].spec)
    close(folded.arrays["a.weight"], expected.reshape(6, 2, 9))
    np.testing.assert_array_equal(folded.arrays["head.weight"], arrays["head.weight"])


def test_blocks_compose_as_the_whole_does():
    spec = ConvSpec(32, 640, (3, 3), 2)
    weight, depthwise, kernel = pair(spec)
    assert weight.size > BLOCK / 4
    close(
        compose_blocks(weight.reshape(spec.weight_shape), depthwise).reshape(kernel.shape), kernel
    )
    depthwise_spec = ConvSpec(4096, 4096, (3, 3), 4096)
    weight, depthwise, kernel = pair(depthwise_spec)
    blocks = compose_blocks(weight.reshape(4096, 1, 9), depthwise)
    close(blocks.reshape(kernel.shape), kernel)


def test_a_format_that_nothing_reads(file, monkeypatch):
    save_file({"a": numbers(2)}, file)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    with pytest.raises(ImportError, match=r"no installed package reads files: .*doconv\.formats"):
        open_checkpoint(file)
