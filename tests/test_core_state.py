"""Canonical states in memory and on disk, atomic files, differences, and finding backends."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata

import ml_dtypes
import numpy as np
import pytest
from cases import one_test
from equal import assert_same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from strategies import states

import doconv_core.backends
from doconv_core import (
    BatchNormSpec,
    ConvSpec,
    Geometry,
    LayerForm,
    LinearSpec,
    State,
    StateError,
    available_backends,
    difference,
    read_state,
    require_framework,
    write_state,
)
from doconv_core.atomic import replacing, write_json

SPEC = ConvSpec(4, 6, (3, 3), 2, 12)
GEOMETRY = Geometry((2, 2), (1, 1), ((1, 1), "same"))
FORMS = {
    "features.0": LayerForm(SPEC, over_parameterized=True, geometry=GEOMETRY),
    "features.1": LayerForm(BatchNormSpec(6, 1e-5, 0.1), scale=False),
    "features.2": LayerForm(ConvSpec(6, 5, (1, 1)), over_parameterized=True, bias=False),
    "head": LayerForm(LinearSpec(5, 3), flattening="channels first"),
}


def filled(forms, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        f"{path}.{name}": rng.standard_normal(shape).astype(dtype)
        for path, form in forms.items()
        for name, shape in form.shapes.items()
    }


@pytest.fixture
def state():
    return State(FORMS, filled(FORMS))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_written_and_read_back_without_a_changed_bit(tmp_path, dtype):
    state = State(FORMS, filled(FORMS, dtype))
    write_state(state, tmp_path / "a.safetensors")
    back = read_state(tmp_path / "a.safetensors")
    assert back.layers == state.layers
    assert_same(back.arrays, state.arrays)
    assert {array.dtype for array in back.arrays.values()} == {np.dtype(dtype)}


def test_a_state_file_has_the_usual_permissions(state, tmp_path):
    (tmp_path / "usual").touch()
    write_state(state, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_equal_states_are_equal_files(state, tmp_path):
    state = replace(state, origin={"framework": "torch", "network": "of mine"})
    for name in "abcdef":
        write_state(state, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    forms = {"": LayerForm(LinearSpec(5, 3), bias=False)}
    weight = np.arange(15.0).reshape(5, 3).T
    write_state(State(forms, {"weight": weight}), tmp_path / "a.safetensors")
    assert_same(read_state(tmp_path / "a.safetensors").arrays["weight"], weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for property tests, in which each example replaces the last one's file."""
    return tmp_path_factory.mktemp("states")


@given(states())
def test_any_state_comes_back_from_its_file(folder, state):
    write_state(state, folder / "a.safetensors")
    back = read_state(folder / "a.safetensors")
    assert list(back.layers.items()) == list(state.layers.items())  # in their order too
    assert back.origin == state.origin
    assert list(back.arrays) == list(state.arrays)
    assert_same(back.arrays, state.arrays)


@given(states(), st.data())
def test_a_changed_file_is_read_or_refused(folder, state, data):
    file = folder / "a.safetensors"
    write_state(state, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    back, message = None, ""
    try:
        back = read_state(file)
    except StateError as error:
        message = str(error)
    assert isinstance(back, State) or str(file) in message


def test_files_of_version_1_are_read(tmp_path):
    convolution = {
        "kind": "convolution",
        "spec": {
            "in_channels": 4, "out_channels": 6, "kernel_size": [3, 3], "groups": 2,
            "depth_multiplier": 12,
        },
        "over_parameterized": True,
        "bias": False,
    }  # fmt: skip
    linear = {
        "kind": "linear", "spec": {"in_features": 5, "out_features": 3},
        "over_parameterized": False, "bias": True,
    }  # fmt: skip
    layers = json.dumps({"a": convolution, "head": linear})
    forms = {
        "a": LayerForm(SPEC, over_parameterized=True, bias=False),
        "head": LayerForm(LinearSpec(5, 3), flattening="unrecorded"),
    }
    arrays = filled(forms)
    header = {"format": "doconv", "version": "1", "layers": layers}
    save_file(arrays, tmp_path / "a.safetensors", metadata=header)
    back = read_state(tmp_path / "a.safetensors")
    assert (back.layers, back.origin) == (forms, {})
    assert_same(back.arrays["a.depthwise_weight"], arrays["a.depthwise_weight"])


@one_test
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"entry 'head.bias' is missing; expected shape \(3,\)"),
        (
            {"features.0.depthwise_weight": np.zeros((4, 9, 9))},
            r"'features.0.depthwise_weight' has shape \(4, 9, 9\); expected \(4, 9, 12\)",
        ),
        ({"head.bias": np.zeros(3, int)}, "'head.bias' must be float16.*found int64"),
        ({"head.bias": [0.0, 0.0, 0.0]}, "entry 'head.bias' must be an array; found list"),
        ({"head.gamma": np.zeros(3)}, "entry 'head.gamma' belongs to no layer"),
    ],
)
def test_a_state_is_checked_against_its_layers(change, message):
    arrays = {k: v for k, v in (filled(FORMS) | change).items() if v is not None}
    with pytest.raises(StateError, match=message):
        State(FORMS, arrays)


def test_an_origin_is_of_texts():
    with pytest.raises(StateError, match=r"origin must be of texts; found \{'version': 2\}"):
        State({}, {}, {"version": 2})


def test_damaged_and_foreign_files_are_refused(state, tmp_path):
    file = tmp_path / "a.safetensors"
    write_state(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(StateError, match=r"a\.safetensors is not a whole safetensors file"):
        read_state(file)
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(StateError, match="is not a whole safetensors file"):
        read_state(file)
    save_file({"weight": np.zeros(3)}, file)
    with pytest.raises(StateError, match="no doconv state: its header's format is None"):
        read_state(file)
    with pytest.raises(IsADirectoryError, match="is a folder; name a state file"):
        read_state(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.int32], ids=["bfloat16", "int32"])
def test_files_with_other_numbers_are_refused(tmp_path, dtype):
    file = tmp_path / "a.safetensors"
    array = np.zeros(3, dtype)
    save_file({"w": array}, file)
    with pytest.raises(StateError, match="no doconv state"):
        read_state(file)
    header = {"format": "doconv", "version": "1", "layers": "{}"}
    save_file({"w": array}, file, metadata=header)
    with pytest.raises(StateError, match=r"entry 'w' is (BF16|I32); expected F16, F32 or F64"):
        read_state(file)


def described(**changes):
    """A header whose one layer is described with these changes."""
    spec = {"in_features": 5, "out_features": 3}
    layer = {
        "kind": "linear", "spec": spec, "over_parameterized": False, "bias": True, "scale": False,
        "geometry": None, "flattening": None,
    }  # fmt: skip
    return {"layers": json.dumps({"head": layer | changes})}


def with_geometry(**changes):
    """The same of a convolution, with these changes to its geometry."""
    spec = {
        "in_channels": 5, "out_channels": 3, "kernel_size": [3], "groups": 1, "depth_multiplier": 3,
    }  # fmt: skip
    geometry = {"stride": [1], "dilation": [1], "padding": [[0, 0]], "padding_mode": "zeros"}
    return described(kind="convolution", spec=spec, geometry=geometry | changes)


@one_test
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": "3"}, "has format version 3; this doconv reads 1 and 2"),
        ({"layers": "{"}, "a.safetensors: the header's layers is no JSON: Expecting property"),
        ({"layers": "[" * 100_000}, "a.safetensors: the header's layers is no JSON"),
        ({"layers": "[]"}, r"the header's layers must be a JSON object; found \[\]"),
        ({"origin": "[]"}, r"the header's origin must be a JSON object; found \[\]"),
        ({"origin": '{"version": 2}'}, "a.safetensors: origin must be of texts; found {'version'"),
        ({"layers": '{"head": null}'}, "layer 'head': it must be an object of bias.*found None"),
        ({"layers": '{"head": {"kind": "linear"}}'}, "'head': it must be an object of bias, f"),
        (
            described(kind="dense"),
            "layer 'head': kind must be one of convolution, .*embedding; found 'dense'",
        ),
        (described(kind=["linear"]), r"layer 'head': kind must be one of .*; found \['linear'\]"),
        (
            described(spec={"in_features": 5}),
            "layer 'head': spec must be an object of in_features, out_feat",
        ),
        (described(bias="no"), "layer 'head': bias must be True or False; received 'no'"),
        (
            described(spec={"in_features": -5, "out_features": 3}),
            "layer 'head': in_features must be at least 1; received in_features=-5",
        ),
        (
            described(kind="batch_norm", spec={"features": 3, "epsilon": "1e-5", "momentum": 0.1}),
            "layer 'head': epsilon must be a number; received epsilon='1e-5'",
        ),
        (described(flattening="some"), "layer 'head': flattening must be one of None, 'channels"),
        (described(geometry={}), "layer 'head': geometry must be an object of dilation, padding"),
        (with_geometry(padding=[[0, 0, 0]]), r"padding\[0\] must be a pair \(before, after\)"),
        (with_geometry(stride=[0]), r"layer 'head': stride\[0\] must be at least 1"),
        (with_geometry(padding_mode="x"), "layer 'head': padding_mode must be one of zeros, refl"),
        (
            with_geometry(stride=[1, 1], dilation=[1, 1], padding=["same", "same"]),
            "layer 'head': geometry must be of the kernel's 1 dimensions; received 2",
        ),
        ({"layers": "{}"}, "entry 'w' belongs to no layer"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path, header, message):
    file = tmp_path / "a.safetensors"
    usual = {"format": "doconv", "version": "2", "origin": "{}", "layers": "{}"}
    save_file({"w": np.zeros(3)}, file, metadata=usual | header)
    with pytest.raises(StateError, match=message):
        read_state(file)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "results.json"
    write_json(file, {"accuracy": 1})

    def interrupted():
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads(file.read_text()) == {"accuracy": 1}
    assert list(tmp_path.iterdir()) == [file]
    write_json(file, {"accuracy": 2})
    assert json.loads(file.read_text()) == {"accuracy": 2}


def test_what_is_no_state_is_not_written(tmp_path):
    file = tmp_path / "state.safetensors"
    for first, message in (
        (
            str(file),
            "received the path '.*state.safetensors': write_state.state, path. takes the st",
        ),
        ([], r"state must be a State; received list\."),
    ):
        with pytest.raises(TypeError, match=message):
            write_state(first, file)
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing of .* does not exist"):
        write_state(State({}, {}), tmp_path / "missing" / file.name)
    for name in ("a.pt", "a.keras", "a.h5", "a.params", "a.safetensors.index.json"):
        with pytest.raises(ValueError, match=rf"{name} would be a safetensors file .*says a \w+"):
            write_state(State({}, {}), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_written_to(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file to write"):
        write_json(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_difference_is_relative_to_the_largest_entry():
    assert difference([1.0, 2.0, -4.0], [1.0, 2.5, -4.0]) == (0.5, 0.125)
    assert difference(np.zeros(3, np.float32), np.zeros(3)) == (0.0, 0.0)
    assert difference([], []) == (0.0, 0.0)
    assert difference([1e-3], [0.0]) == (1e-3, np.inf)


def test_difference_of_what_is_not_finite():
    for alike in ([np.nan], [np.inf], [1.0, np.nan], [complex(np.nan, 0)]):
        assert np.isnan(difference(alike, alike)).all(), alike
    assert np.isnan(difference([np.nan, 1.0], [np.nan, 2.0])).all()
    assert difference([1e308], [-1e308]) == (np.inf, np.inf)
    assert difference([np.nan, 1.0], [0.0, 1.0]) == (np.inf, np.inf)
    assert difference([np.inf, 1.0], [-np.inf, 1.0]) == (np.inf, np.inf)
    with pytest.raises(ValueError, match=r"shape \(2,\); received \(1, 2\)"):
        difference([[1, 2]], [1, 2])
    assert difference([3 + 4j], [2 + 0j]) == pytest.approx((abs(1 + 4j), abs(1 + 4j) / 2))


def test_backends_are_found_through_entry_points():
    found = available_backends()
    ours = {"mx": "doconv_mx", "tf": "doconv_tf", "torch": "doconv_torch"}
    assert ours.items() <= {name: entry.value for name, entry in found.items()}.items()


def installed(monkeypatch, version, requires):
    """Have `six` installed in this version, or not at all, and this of it required."""
    monkeypatch.setattr(metadata, "requires", lambda _: [requires])
    monkeypatch.setattr(doconv_core.backends, "_version", lambda _: version)
    present = object() if version else None
    monkeypatch.setattr(doconv_core.backends, "find_spec", lambda _: present)


@one_test
@pytest.mark.parametrize(
    ("requires", "versions"),
    [
        ('six>=1.1,<2; extra == "tf"', ["1.1", "1.9.1.post0", "1.9.1rc1+cpu", "1.1a0+vendor"]),
        ('six==0.10.5.post0; extra == "tf"', ["0.10.5.post0"]),
    ],
)
def test_a_supported_framework_is_accepted(monkeypatch, requires, versions):
    for version in versions:
        installed(monkeypatch, version, requires)
        assert require_framework("tf", "six") is None, version


@one_test
@pytest.mark.parametrize(
    ("version", "requires", "asked", "message"),
    [
        (
            None, 'six>=1.1,<2; extra == "tf"', ("tf", "six"),
            r'doconv_tf needs six.*not installed\. Install it with: .*pip install "overconv\[tf\]"',
        ),
        (
            None, 'six>=1.1; extra == "fourth"', ("fourth", "six", "doconv-fourth"),
            r'pip install "doconv-fourth\[fourth\]"',
        ),
        (
            "2.0", 'six>=1.1,<2; extra == "tf"', ("tf", "six"),
            r"doconv_tf supports six <2,>=1.1; found 2.0\. Install",
        ),
        (
            "1.2", 'six>=1.1; python_version < "3" and extra == "tf"', ("tf", "six"),
            r'needs six>=1.1, .*python_version < "3"; this is Python',
        ),
    ],
)  # fmt: skip
def test_other_frameworks_are_refused(monkeypatch, version, requires, asked, message):
    installed(monkeypatch, version, requires)
    with pytest.raises(ImportError, match=message):
        require_framework(*asked)
