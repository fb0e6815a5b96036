"""Canonical states in memory and on disk, atomic files, differences, and finding backends."""

from __future__ import annotations

import json
from importlib import metadata

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import doconv_core.backends
from doconv_core import (
    ConvSpec,
    LayerForm,
    LinearSpec,
    State,
    StateError,
    available_backends,
    difference,
    fit_state,
    read_state,
    require_framework,
    write_state,
)
from doconv_core.files import replacing, write_json
from doconv_core.state import check_owned, unsupported_layer

SPEC = ConvSpec(4, 6, (3, 3), 2, 12)
ORDINARY = ConvSpec(4, 6, (3, 3), 2)
FORMS = {
    "features.0": LayerForm(SPEC, over_parameterized=True),
    "features.2": LayerForm(ConvSpec(6, 5, (1, 1)), over_parameterized=True, bias=False),
    "head": LayerForm(LinearSpec(5, 3)),
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
    write_state(state, tmp_path / "new folder" / "a.safetensors")
    back = read_state(tmp_path / "new folder" / "a.safetensors")
    assert back.layers == state.layers
    assert back.arrays.keys() == state.arrays.keys()
    for name, array in state.arrays.items():
        assert back.arrays[name].dtype == dtype
        np.testing.assert_array_equal(back.arrays[name], array)


def test_a_state_file_has_the_usual_permissions(state, tmp_path):
    (tmp_path / "usual").touch()
    write_state(state, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    forms = {"": LayerForm(LinearSpec(5, 3), bias=False)}
    weight = np.arange(15.0).reshape(5, 3).T
    write_state(State(forms, {"weight": weight}), tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_state(tmp_path / "a.safetensors").arrays["weight"], weight)


def test_one_tap_has_no_depthwise_entry():
    assert FORMS["features.2"].shapes == {"weight": (5, 6, 1)}
    assert FORMS["features.2"] == LayerForm(ConvSpec(6, 5, (1, 1)), bias=False)


def test_forms_are_of_the_right_types():
    with pytest.raises(TypeError, match="bias must be True or False; received 'no'"):
        LayerForm(ORDINARY, bias="no")
    with pytest.raises(
        TypeError, match=r"spec must be a ConvSpec or LinearSpec; received \(4, 6\)"
    ):
        LayerForm((4, 6))


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


def test_fit_returns_each_layer_its_arrays(state):
    fitted = fit_state(state, FORMS)
    assert fitted.keys() == FORMS.keys()
    for path, arrays in fitted.items():
        assert arrays.keys() == FORMS[path].shapes.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, state.arrays[f"{path}.{name}"])


@pytest.mark.parametrize("spec", [SPEC, ORDINARY], ids=["S=12", "S=M"])
def test_an_ordinary_entry_fits_an_over_parameterized_layer(spec):
    forms = {"": LayerForm(ORDINARY)}
    state = State(forms, filled(forms) and {k[1:]: v for k, v in filled(forms).items()})
    arrays = fit_state(state, {"": LayerForm(spec, over_parameterized=True)})[""]
    assert arrays["weight"].shape == spec.weight_shape
    np.testing.assert_array_equal(arrays["weight"][..., :9], state.arrays["weight"])
    assert not arrays["weight"][..., 9:].any()
    assert arrays["depthwise_weight"].shape == spec.depthwise_shape
    assert not arrays["depthwise_weight"].any()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"features.0": None}, "layer 'features.0' is not in the model, though the state has it"),
        ({"haed": LayerForm(LinearSpec(5, 3))}, "'haed' is not in the state.*closest is 'head'"),
        ({"head": LayerForm(LinearSpec(5, 4))}, r"'head.weight' is of LinearSpec\(.*features=3\)"),
        ({"head": LayerForm(ORDINARY)}, "'head.weight' is of LinearSpec.*expected ConvSpec"),
        (
            {"head": LayerForm(LinearSpec(5, 3), bias=False)},
            "entry 'head.bias' is there; expected a layer without bias",
        ),
        (
            {"features.2": LayerForm(ConvSpec(6, 5, (1, 1)), bias=True)},
            "entry 'features.2.bias' is missing; expected a layer with bias",
        ),
        (
            {"features.0": LayerForm(ORDINARY)},
            "'features.0.depthwise_weight' is for an over-parameterized layer.*Fold the model",
        ),
        (
            {"features.0": LayerForm(ORDINARY, over_parameterized=True)},
            "'features.0.weight' is of .*depth_multiplier=12.*expected .*depth_multiplier=9",
        ),
        (
            {"features.0": LayerForm(ConvSpec(4, 6, (3, 3), 1, 12), over_parameterized=True)},
            "'features.0.weight' is of .*groups=2.*expected .*groups=1",
        ),
    ],
)
def test_what_does_not_fit_is_named(state, wanted, message):
    forms = {k: v for k, v in ({**FORMS, **wanted}).items() if v is not None}
    with pytest.raises(StateError, match=message):
        fit_state(state, forms)


def test_what_is_no_state_and_what_has_no_layers(state):
    with pytest.raises(TypeError, match="state must be a State; received dict"):
        fit_state({"weight": 1}, FORMS)
    with pytest.raises(StateError, match=r"'features.0' is not in the model.*it has no layers"):
        fit_state(state, {})


def test_what_a_layer_owns_is_checked_by_name():
    assert check_owned("head", 1.5, ["bias", "weight"], FORMS["head"].shapes) is None
    with pytest.raises(
        TypeError, match="'head', a float, has 'weight_orig'; expected 'weight', 'bi"
    ):
        check_owned("head", 1.5, ["weight_orig"], FORMS["head"].shapes)
    error = unsupported_layer("norm", 1.5, ["gamma"])
    assert str(error).startswith("layer 'norm' is a float with 'gamma'; a canonical state holds")


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
    layer = {"kind": "linear", "spec": spec, "over_parameterized": False, "bias": True}
    return {"layers": json.dumps({"head": layer | changes})}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": "2"}, "has format version 2; this doconv reads 1"),
        ({"layers": "{"}, "a.safetensors: the header's layers are no JSON: Expecting property"),
        ({"layers": "[" * 100_000}, "a.safetensors: the header's layers are no JSON"),
        ({"layers": "[]"}, r"the header's layers must be a JSON object; found \[\]"),
        ({"layers": '{"head": null}'}, "layer 'head': expected an object of bias.*found None"),
        ({"layers": '{"head": {"kind": "linear"}}'}, "layer 'head': expected an object of bias, k"),
        (
            described(kind="dense"),
            "layer 'head': kind must be linear or convolution; found 'dense'",
        ),
        (described(spec={"in_features": 5}), "layer 'head': spec must have in_features, out_feat"),
        (described(bias="no"), "layer 'head': bias must be True or False; received 'no'"),
        (
            described(spec={"in_features": -5, "out_features": 3}),
            "layer 'head': in_features must be at least 1; received in_features=-5",
        ),
        ({"layers": "{}"}, "entry 'w' belongs to no layer"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path, header, message):
    file = tmp_path / "a.safetensors"
    usual = {"format": "doconv", "version": "1", "layers": json.dumps({})}
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
    assert difference([np.nan, np.inf], [np.nan, np.inf]) == (0.0, 0.0)
    assert difference([np.nan, 1.0], [0.0, 1.0]) == (np.inf, np.inf)
    assert difference([np.inf, 1.0], [-np.inf, 1.0]) == (np.inf, np.inf)
    with pytest.raises(ValueError, match=r"shape \(2,\); received \(1, 2\)"):
        difference([[1, 2]], [1, 2])
    with pytest.raises(TypeError, match="results must be real; received dtypes complex128 and flo"):
        difference([1j], [0.0])


def test_backends_are_found_through_entry_points():
    found = available_backends()
    ours = {"mx": "doconv_mx", "tf": "doconv_tf", "torch": "doconv_torch"}
    assert ours.items() <= {name: entry.value for name, entry in found.items()}.items()


class Fakes:
    """Stand-ins for what is installed, so that absence and other versions can be tried here."""

    def __init__(self, monkeypatch, version="1.2", requires='six>=1.1,<2; extra == "tf"'):
        monkeypatch.setattr(metadata, "requires", lambda _: [requires])
        monkeypatch.setattr(doconv_core.backends, "_version", lambda _: version)
        present = object() if version else None
        monkeypatch.setattr(doconv_core.backends, "find_spec", lambda _: present)


@pytest.mark.parametrize("version", ["1.1", "1.9.1.post0", "1.9.1rc1+cpu", "1.1a0+vendor"])
def test_a_supported_framework_is_accepted(monkeypatch, version):
    Fakes(monkeypatch, version)
    assert require_framework("tf", "six") is None


def test_a_pinned_post_release_is_accepted(monkeypatch):
    Fakes(monkeypatch, "0.10.5.post0", 'six==0.10.5.post0; extra == "mx"')
    assert require_framework("mx", "six") is None


def test_a_missing_framework_names_the_extra(monkeypatch):
    Fakes(monkeypatch, version=None)
    message = r'doconv_tf needs six.*not installed\. Install it with: .*pip install "doconv\[tf\]"'
    with pytest.raises(ImportError, match=message):
        require_framework("tf", "six")


def test_another_distribution_is_named_as_the_one_to_install(monkeypatch):
    Fakes(monkeypatch, version=None, requires='six>=1.1; extra == "fourth"')
    with pytest.raises(ImportError, match=r'pip install "doconv-fourth\[fourth\]"'):
        require_framework("fourth", "six", "doconv-fourth")


def test_an_unsupported_version_is_refused(monkeypatch):
    Fakes(monkeypatch, "2.0")
    with pytest.raises(ImportError, match=r"doconv_tf supports six <2,>=1.1; found 2.0\. Install"):
        require_framework("tf", "six")


def test_an_unsupported_python_is_refused(monkeypatch):
    Fakes(monkeypatch, requires='six>=1.1; python_version < "3" and extra == "tf"')
    with pytest.raises(
        ImportError, match=r'needs six>=1.1, .*python_version < "3"; this is Python'
    ):
        require_framework("tf", "six")
