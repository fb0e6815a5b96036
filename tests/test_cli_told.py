"""What `doconv convert` knows of layers beyond arrays: compared, kept, or listed."""

from __future__ import annotations

import dataclasses
import importlib
import json

import numpy as np
import pytest
from command_line import DIFFERENT, IMPOSSIBLE, doconv, save, state_dict
from frameworks import need

from doconv_core import ConvSpec, LayerForm, State, read_state, write_state
from doconv_core.files.formats import open_checkpoint
from doconv_core.files.gluon import write_params
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.state.layers import BatchNormSpec, LinearSpec

ORIGIN = {"framework": "torch", "version": "2.6"}


def state(path, *, stride=2, padding=1, epsilon=1e-5, momentum=0.1, geometry=True, origin=ORIGIN):
    """Write a state of a convolution and a batch norm, and return it."""
    rng = np.random.default_rng(0)
    moves = Geometry((stride,) * 2, (1, 1), symmetric((padding,) * 2)) if geometry else None
    layers = {
        "conv": LayerForm(ConvSpec(3, 4, (3, 3)), geometry=moves),
        "bn": LayerForm(BatchNormSpec(4, epsilon, momentum)),
    }
    arrays = {
        f"{name}.{role}": rng.random(shape).astype("float32")
        for name, form in layers.items()
        for role, shape in form.shapes.items()
    }
    found = State(layers, arrays, origin)
    write_state(found, path)
    return found


def like(folder, *options, **checks):
    return doconv(
        "convert", folder / "in.safetensors", folder / "out.safetensors", "--like",
        folder / "like.safetensors", "--force", *options, **checks,
    )  # fmt: skip


@pytest.mark.parametrize("match", ["name", "order"])
def test_a_state_keeps_what_it_tells(tmp_path, match):
    found = state(tmp_path / "in.safetensors")
    state(tmp_path / "like.safetensors", momentum=0.5, geometry=False, origin={})
    like(tmp_path, "--match", match)
    made = read_state(tmp_path / "out.safetensors")
    assert made.layers == found.layers
    assert made.origin == ORIGIN
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(made.arrays[name], array, err_msg=name, strict=True)


def test_states_that_compute_otherwise_are_refused(tmp_path):
    state(tmp_path / "in.safetensors")
    state(tmp_path / "like.safetensors", epsilon=1e-3)
    error = "layer 'bn' adds epsilon=1e-05 to the variance in .*in.safetensors, 0.001 in .*like"
    like(tmp_path, code=IMPOSSIBLE, error=error)
    like(tmp_path, "--ignore", "geometry", code=IMPOSSIBLE, error=error)
    state(tmp_path / "like.safetensors", stride=1)
    error = (
        r"layer 'conv' would compute something else .*stride is \(2, 2\) in .*\(1, 1\) in .*--ig"
    )
    like(tmp_path, code=IMPOSSIBLE, error=error)
    assert not (tmp_path / "out.safetensors").exists()
    like(tmp_path, "--ignore", "geometry")
    made = read_state(tmp_path / "out.safetensors")
    assert made.layers["conv"].geometry.stride == (1, 1)


def keras_network(folder, *, strides=2, padding="valid", pad=1, epsilon=1e-5):
    need("tf")
    keras = importlib.import_module("keras")
    layers = keras.layers
    pads = [layers.ZeroPadding2D(pad)] if pad else []
    norm = layers.BatchNormalization(name="bn", epsilon=epsilon)
    conv = layers.Conv2D(4, 3, strides=strides, padding=padding, name="conv")
    model = keras.Sequential([keras.Input((8, 8, 3)), *pads, conv, norm])
    model.save(folder / "like.keras")


def to_keras(folder, *options, **checks):
    return doconv(
        "convert", folder / "in.safetensors", folder / "out.keras", "--like",
        folder / "like.keras", "--force", *options, **checks,
    )  # fmt: skip


def test_a_state_and_a_keras_file_must_agree(tmp_path):
    state(tmp_path / "in.safetensors")
    keras_network(tmp_path, padding="same", pad=0)
    error = r"padding is \(\(1, 1\), \(1, 1\)\) in .*in.safetensors, \('same', 'same'\) in .*keras"
    to_keras(tmp_path, code=IMPOSSIBLE, error=error)
    to_keras(tmp_path, "--ignore", "geometry")
    keras_network(tmp_path, strides=1)
    to_keras(tmp_path, code=IMPOSSIBLE, error=r"stride is \(2, 2\) in .*, \(1, 1\) in")
    keras_network(tmp_path, epsilon=1e-3)
    to_keras(tmp_path, code=IMPOSSIBLE, error="layer 'bn' adds epsilon=1e-05 to the variance in")
    # A layer before it pads, which is seen, but not by how much.
    keras_network(tmp_path)
    text = to_keras(tmp_path).stdout
    assert "out.keras must have stride 2x2, padding 1x1: conv\n" in text
    assert "epsilon" not in text
    state(tmp_path / "in.safetensors", stride=1)
    keras_network(tmp_path, strides=1, padding="same", pad=0)
    assert "must have" not in to_keras(tmp_path).stdout


def test_what_one_file_alone_tells_is_listed(tmp_path):
    state(tmp_path / "in.safetensors", epsilon=1e-3)
    text = doconv("convert", tmp_path / "in.safetensors", tmp_path / "o.params").stdout
    assert "o.params must have epsilon 0.001: bn\n" in text
    assert "o.params must have stride 2x2, padding 1x1: conv\n" in text
    state(tmp_path / "like.safetensors")
    args = [tmp_path / "o.params", tmp_path / "o.safetensors", "--like"]
    done = doconv("convert", *args, tmp_path / "like.safetensors", "--json")
    assert json.loads(done.stdout)["required"] == [
        {"network": "IN", "what": "stride 2x2, padding 1x1", "layers": ["conv"]},
        {"network": "IN", "what": "epsilon 1e-05", "layers": ["bn"]},
    ]
    keras_network(tmp_path, pad=0, strides=1, epsilon=1e-3)
    text = doconv("convert", tmp_path / "like.keras", tmp_path / "k.params").stdout
    assert "k.params must have epsilon 0.001: bn\n" in text
    assert text.count("must have") == 1


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("suffix", ["safetensors", "params"])
def test_types_that_a_format_lacks(tmp_path, dtype, suffix):
    need("torch")
    torch = importlib.import_module("torch")
    odd = torch.zeros(3).to(getattr(torch, dtype))
    torch.save({"fc.weight": torch.ones(2, 2), "odd": odd}, tmp_path / "in.pt")
    out = tmp_path / f"out.{suffix}"
    error = f"the entry 'odd' is {dtype}, which is not written to .* files; --drop 'odd' leaves"
    doconv("convert", tmp_path / "in.pt", out, "--keep", "*", code=IMPOSSIBLE, error=error)
    assert not out.exists()
    doconv("convert", tmp_path / "in.pt", out, "--drop", "odd")
    with open_checkpoint(out) as file:
        assert [*file.entries] == ["fc.weight"]


def test_a_gluon_file_has_the_types_of_its_template(tmp_path):
    half = np.full((2, 2), 1.5, "float16")
    write_params(tmp_path / "in.params", {"fc.weight": half})
    write_params(tmp_path / "like.params", {"fc.weight": half.astype("float32")})
    args = [tmp_path / "in.params", tmp_path / "out.params", "--like", tmp_path / "like.params"]
    done = doconv("convert", *args, "--json")
    assert json.loads(done.stdout)["entries"][0]["dtype"] == "float32"
    with open_checkpoint(tmp_path / "out.params") as file:
        np.testing.assert_array_equal(file.read("fc.weight"), half.astype("float32"), strict=True)


def test_verify_by_order_tells_where_the_layers_differ(tmp_path):
    layers = {"a.weight": np.eye(2), "b.weight": np.eye(3)}
    write_params(tmp_path / "a.params", layers)
    write_params(tmp_path / "b.params", {"a.weight": np.eye(2), "c.weight": np.eye(4)})
    args = ["verify", tmp_path / "a.params", tmp_path / "b.params", "--match", "order"]
    found = json.loads(doconv(*args, "--json", code=DIFFERENT).stdout)
    assert not found["equal"]
    assert [each["path"] for each in found["arrays"]] == ["a"]
    assert found["missing"][0].startswith("layer 2 of 2 differs: b, linear 3x3 in ")
    assert "no more layers were compared" in doconv(*args, code=DIFFERENT).stdout
    save(tmp_path / "s.safetensors", layers)
    error = "s.safetensors has its layers in the order of their names, not of the model"
    args[2] = tmp_path / "s.safetensors"
    doconv(*args, code=IMPOSSIBLE, error=error)


def test_totals_count_one_copy_of_a_model(tmp_path):
    need("torch")
    torch = importlib.import_module("torch")
    arrays = {n: torch.from_numpy(np.array(a)) for n, a in state_dict().items() if "block" not in n}
    torch.save(arrays, tmp_path / "one.pt")
    torch.save({"model": arrays, "model_ema": dict(arrays)}, tmp_path / "two.pt")
    one, two = (
        json.loads(doconv("inspect", tmp_path / name, "--json").stdout)
        for name in ("one.pt", "two.pt")
    )
    assert len(two["layers"]) == 2 * len(one["layers"])
    for name in ("parameters", "parameters_folded"):
        assert two[name] == one[name]


def test_a_kernel_that_is_the_same_in_both_layouts_is_not_refused(tmp_path):
    kernel = np.arange(512.0).reshape(8, 1, 1, 64)
    write_params(tmp_path / "m.params", {"c.weight": kernel})
    doconv("convert", tmp_path / "m.params", tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as file:
        np.testing.assert_array_equal(file.read("c.weight"), kernel)


def test_the_model_itself_is_named(tmp_path):
    form = LayerForm(LinearSpec(4, 2), flattening="own")
    arrays = {"weight": np.zeros((2, 4), "float32"), "bias": np.zeros(2, "float32")}
    write_state(State({"": form}, arrays), tmp_path / "in.safetensors")
    error = "in which order the inputs of the model itself are"
    args = ["convert", tmp_path / "in.safetensors", tmp_path / "m.params"]
    doconv(*args, code=IMPOSSIBLE, error=error)
    write_state(
        State({"": dataclasses.replace(form, flattening=None)}, arrays), tmp_path / "in.safetensors"
    )
    doconv(*args)
