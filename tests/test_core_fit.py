"""Fitting a state to a model's layers: which takes whose arrays, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import states

from doconv_core import (
    BatchNormSpec,
    ConvSpec,
    EmbeddingSpec,
    Geometry,
    GroupNormSpec,
    LayerForm,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    State,
    StateError,
    fit_state,
)
from doconv_core.state.layers import CHANNELS_FIRST, OWN, UNRECORDED, suspect_flattening
from doconv_core.state.match import Assignment, check_assignments, check_owned, unsupported_layer

SPEC = ConvSpec(4, 6, (3, 3), 2, 12)
ORDINARY = ConvSpec(4, 6, (3, 3), 2)
NORM = BatchNormSpec(6, 1e-5, 0.1)
FORMS = {
    "features.0": LayerForm(SPEC, over_parameterized=True),
    "features.1": LayerForm(NORM),
    "features.2": LayerForm(ConvSpec(6, 5, (1, 1)), over_parameterized=True, bias=False),
    "head": LayerForm(LinearSpec(5, 3)),
}


def filled(forms):
    rng = np.random.default_rng(0)
    return {
        f"{path}.{name}" if path else name: rng.standard_normal(shape).astype(np.float32)
        for path, form in forms.items()
        for name, shape in form.shapes.items()
    }


def state_of(forms, **changes):
    return State(forms, {**filled(forms), **changes}, {"framework": "torch"})


@pytest.fixture
def state():
    return state_of(FORMS)


def test_fit_returns_each_layer_its_arrays(state):
    fitted = fit_state(state, FORMS)
    assert list(fitted) == list(FORMS)
    for path, arrays in fitted.items():
        assert arrays.keys() == FORMS[path].shapes.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, state.arrays[f"{path}.{name}"])


@pytest.mark.parametrize("spec", [SPEC, ORDINARY], ids=["S=12", "S=M"])
def test_an_ordinary_entry_fits_an_over_parameterized_layer(spec):
    state = state_of({"": LayerForm(ORDINARY)})
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
        ({"head": LayerForm(ORDINARY)}, "layer 'head' is of LinearSpec.*expected ConvSpec"),
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
        (
            {"features.1": LayerForm(BatchNormSpec(6, 1e-3, 0.1))},
            "layer 'features.1' adds epsilon=1e-05 to the variance in the state, 0.001 in the "
            "model. Build the model's layer with 1e-05",
        ),
        (
            {"features.1": LayerForm(BatchNormSpec(5, 1e-5, 0.1))},
            "'features.1' is of BatchNormSpec.features=6.*expected BatchNormSpec.features=5",
        ),
        (
            {"features.1": LayerForm(LayerNormSpec(6, 1e-5))},
            "'features.1' is of BatchNormSpec.*expected LayerNormSpec",
        ),
        (
            {"features.1": LayerForm(NORM, scale=False)},
            "entry 'features.1.gamma' is there, and not 1 throughout; the model's layer has no ga",
        ),
        (
            {"features.1": LayerForm(NORM, bias=False)},
            "entry 'features.1.beta' is there, and not 0 throughout",
        ),
    ],
)
def test_what_does_not_fit_is_named(state, wanted, message):
    forms = {k: v for k, v in ({**FORMS, **wanted}).items() if v is not None}
    with pytest.raises(StateError, match=message):
        fit_state(state, forms)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (GroupNormSpec(6, 2, 1e-5), GroupNormSpec(6, 3, 1e-5)),
        (PReLUSpec(1), PReLUSpec(6)),
        (EmbeddingSpec(6, 5), EmbeddingSpec(5, 6)),
    ],
)
def test_sizes_must_agree(found, wanted):
    with pytest.raises(StateError, match=r"'a.*' is of .*; expected "):
        fit_state(state_of({"a": LayerForm(found)}), {"a": LayerForm(wanted)})


def test_what_is_no_state_and_what_has_no_layers(state):
    with pytest.raises(TypeError, match="state must be a State; received dict"):
        fit_state({"weight": 1}, FORMS)
    with pytest.raises(StateError, match=r"'features.0' is not in the model.*it has no layers"):
        fit_state(state, {})


def test_a_gamma_of_ones_and_a_beta_of_zeros_come_and_go():
    bare, whole = LayerForm(NORM, bias=False, scale=False), LayerForm(NORM)
    arrays = fit_state(state_of({"a": bare}), {"a": whole})["a"]
    np.testing.assert_array_equal(arrays["gamma"], np.ones(6))
    np.testing.assert_array_equal(arrays["beta"], np.zeros(6))
    assert arrays["gamma"].dtype == np.float32
    neutral = {"a.gamma": np.ones(6), "a.beta": np.zeros(6)}
    assert fit_state(state_of({"a": whole}, **neutral), {"a": bare})["a"].keys() == {
        "running_mean",
        "running_var",
    }


def test_epsilon_is_compared_as_float32_has_it():
    wanted = {"a": LayerForm(BatchNormSpec(6, float(np.float32(1e-5)), 0.1))}
    assert "gamma" in fit_state(state_of({"a": LayerForm(NORM)}), wanted)["a"]


def test_another_momentum_is_warned_of(state, recwarn):
    fit_state(state, {**FORMS, "features.1": LayerForm(BatchNormSpec(6, 1e-5, 1 - 0.9))})
    assert not recwarn.list  # 1 - 0.9 is not 0.1, but means it
    with pytest.warns(UserWarning, match=r"statistics differs: 'features.1' \(0.1, here 0.01\)"):
        fit_state(state, {**FORMS, "features.1": LayerForm(BatchNormSpec(6, 1e-5, 1 - 0.99))})


def renamed(forms):
    return {f"other.{n}": form for n, form in enumerate(forms.values())}


def test_order_pairs_the_first_with_the_first(state):
    fitted = fit_state(state, renamed(FORMS), match="order")
    assert list(fitted) == ["other.0", "other.1", "other.2", "other.3"]
    for path, arrays in zip(FORMS, fitted.values(), strict=True):
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, state.arrays[f"{path}.{name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"other.1": LayerForm(BatchNormSpec(5, 1e-5, 0.1))},
            r"layer 'features.1', the model's 'other.1', is of BatchNormSpec\(features=6.*",
        ),
        ({"other.3": LayerForm(LinearSpec(5, 4))}, "entry 'head.weight' is of LinearSpec.*"),
        ({"other.3": None}, "layer 'head' of the state has no counterpart: the model has fewer"),
        (
            {"other.4": LayerForm(NORM)},
            "layer 'other.4' of the model has no counterpart: the state has fewer layers",
        ),
    ],
)
def test_order_refuses_any_mismatch_and_shows_both_sides(state, change, message):
    forms = {k: v for k, v in {**renamed(FORMS), **change}.items() if v is not None}
    with pytest.raises(StateError, match=message) as raised:
        fit_state(state, forms, match="order")
    _, heading, *rows = str(raised.value).split("\n")
    assert re.fullmatch(r" +the state +the model", heading)
    assert len(rows) == max(len(FORMS), len(forms))
    marked = next(iter(change))[-1]
    assert [row.startswith("  > ") for row in rows] == [n == int(marked) for n in range(len(rows))]
    assert rows[0].split("  ")[2] == "features.0: DO-Conv (6, 2, 12) + depthwise_weight, bias"
    assert rows[0].endswith("  other.0: DO-Conv (6, 2, 12) + depthwise_weight, bias")


def test_a_long_listing_shows_what_is_around_the_mismatch():
    forms = {f"layer{n}": LayerForm(LinearSpec(2, 2)) for n in range(40)}
    wanted = {**forms, "layer20": LayerForm(LinearSpec(2, 3))}
    with pytest.raises(StateError) as raised:
        fit_state(state_of(forms), wanted, match="order")
    rows = str(raised.value).split("\n")[2:]
    assert rows[0] == "    … 15 before"
    assert rows[6] == "  > layer20: linear (2, 2) + bias  layer20: linear (3, 2) + bias"
    assert rows[-1] == "    … 9 more"


def test_a_mapping_renames_some_layers(state):
    forms = {"stem" if path == "features.0" else path: form for path, form in FORMS.items()}
    fitted = fit_state(state, forms, match={"features.0": "stem"})
    np.testing.assert_array_equal(fitted["stem"]["bias"], state.arrays["features.0.bias"])
    with pytest.raises(StateError, match="'feature' is not in the state, though match names it"):
        fit_state(state, forms, match={"feature": "stem"})
    with pytest.raises(StateError, match="'stem' is not in the state with its paths re"):
        fit_state(state, forms, match={"features.0": "stom"})
    with pytest.raises(StateError, match="match gives 'head' to more than one layer of the state"):
        fit_state(state, FORMS, match={"features.0": "head", "head": "head"})


@pytest.mark.parametrize("match", ["name", None, 3])
def test_match_is_one_of_three(state, match):
    with pytest.raises(ValueError, match="match must be 'path', 'order', or a mapping"):
        fit_state(state, FORMS, match=match)


GEOMETRY = Geometry((2, 2), (1, 1), ((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Geometry((2, 2), (1, 1), ("same", "same")),
            r"padding is \(\(1, 1\), \(1, 1\)\) in the state, \('same', 'same'\) in the model",
        ),
        (Geometry((1, 2), (1, 1), ((1, 1), (1, 1))), r"stride is \(2, 2\) in the state, \(1, 2\)"),
        (Geometry((2, 2), (2, 1), ((1, 1), (1, 1))), r"dilation is \(1, 1\) in the state, \(2, 1"),
        (
            Geometry((2, 2), (1, 1), ((1, 1), (1, 1)), "reflect"),
            "padding_mode is zeros in the state, reflect in the model",
        ),
    ],
)
def test_another_geometry_is_refused_unless_it_is_to_be_ignored(other, message):
    state = state_of({"a": LayerForm(ORDINARY, geometry=GEOMETRY)})
    wanted = {"a": LayerForm(ORDINARY, geometry=other)}
    with pytest.raises(StateError, match=message):
        fit_state(state, wanted)
    for ignore in ("geometry", ["geometry", "flattening"]):
        assert fit_state(state, wanted, ignore=ignore)["a"].keys() == {"weight", "bias"}
    assert fit_state(state, {"a": LayerForm(ORDINARY)})  # of which nothing is known
    with pytest.raises(ValueError, match="ignore must be of 'geometry', 'flattening'; received ig"):
        fit_state(state, wanted, ignore="padding")
    with pytest.raises(TypeError, match=r"ignore must be a name, or several, .*received ignore=3"):
        fit_state(state, wanted, ignore=3)


@pytest.mark.parametrize(
    ("found", "wanted", "framework", "fits"),
    [
        (None, CHANNELS_FIRST, "keras", True),
        (CHANNELS_FIRST, None, "keras", True),
        (OWN, OWN, "torch", True),
        (OWN, OWN, "keras", False),
        (OWN, OWN, None, False),
        (None, OWN, "torch", False),
        (OWN, None, "torch", False),
        (OWN, CHANNELS_FIRST, "torch", False),
        (UNRECORDED, None, "keras", True),
        (UNRECORDED, CHANNELS_FIRST, "keras", False),
        (UNRECORDED, OWN, "keras", False),
    ],
)
def test_features_of_an_image_need_a_known_order(found, wanted, framework, fits):
    state = state_of({"a": LayerForm(LinearSpec(8, 2), flattening=found)})
    layers = {"a": LayerForm(LinearSpec(8, 2), flattening=wanted)}
    if not fits:
        with pytest.raises(StateError, match="'a' may have the features of a flattened image"):
            fit_state(state, layers, framework=framework)
    ignore = () if fits else "flattening"
    assert fit_state(state, layers, framework=framework, ignore=ignore)["a"].keys() == {
        "weight",
        "bias",
    }


def test_a_flattening_is_suspected_of_multiples_of_the_channels_before():
    conv = LayerForm(ConvSpec(3, 6, (3, 3)))
    layers = {
        "a": conv,
        "plain": LayerForm(LinearSpec(6, 24)),
        "hidden": LayerForm(LinearSpec(24, 24)),
        "b": conv,
        "prelu": LayerForm(PReLUSpec(1)),
        "flat": LayerForm(LinearSpec(54, 2)),
        "c": conv,
        "seen": LayerForm(LinearSpec(54, 2)),
        "d": conv,
        "known": LayerForm(LinearSpec(54, 2), flattening=CHANNELS_FIRST),
    }
    found = suspect_flattening(layers, layers.keys() - {"seen"})
    assert list(found) == list(layers)
    changed = {path: form.flattening for path, form in found.items() if form != layers[path]}
    assert changed == {"flat": OWN}


def test_one_parameter_takes_one_array():
    parameter, a = object(), np.array([1, np.nan], np.float32)
    both = [Assignment(name, parameter, "float32", a.copy()) for name in ("a", "b")]
    assert check_assignments(both) is None
    other = Assignment("c", parameter, "float32", a + 1)
    with pytest.raises(StateError, match="'a' and 'c' are one parameter in the model, but differ"):
        check_assignments([*both, other])


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65520.0), ("float32", 1e39), ("bfloat16", 3.4e38)]
)
def test_what_a_dtype_cannot_hold_is_refused(dtype, value):
    array = np.array([0, -value, np.inf])
    with pytest.raises(StateError, match=f"'a' has .*, which the model's {dtype} cannot"):
        check_assignments([Assignment("a", object(), dtype, array)])
    assert check_assignments([Assignment("a", object(), dtype, array[[0, 2]])]) is None


def test_what_a_layer_owns_is_checked_by_name():
    assert check_owned("head", 1.5, ["bias", "weight"], FORMS["head"].shapes) is None
    with pytest.raises(
        TypeError, match="'head', a float, has 'weight_orig'; expected 'weight', 'bi"
    ):
        check_owned("head", 1.5, ["weight_orig"], FORMS["head"].shapes)
    error = unsupported_layer("norm", 1.5, ["gamma"])
    assert str(error).startswith("layer 'norm' is a float with 'gamma'; a canonical state holds")
    error = unsupported_layer("norm", 1.5, ["gamma"], "it is odd")
    assert str(error) == "layer 'norm' is a float with 'gamma'; it is odd."


@given(states())
def test_any_state_fits_its_own_layers_and_by_order_none_more(state):
    fitted = fit_state(state, state.layers, match="order", ignore="flattening")
    assert list(fitted) == list(state.layers)
    arrays = {f"{path}.{n}": array for path, each in fitted.items() for n, array in each.items()}
    assert arrays.keys() == state.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state.arrays[name])
    more = {**state.layers, "one.more": LayerForm(NORM)}
    with pytest.raises(StateError, match=r"the state has fewer layers(.|\n)*  > -"):
        fit_state(state, more, match="order", ignore="flattening")


def test_a_norm_without_arrays_gets_them():
    bare = LayerForm(LayerNormSpec(5, 1e-5), bias=False, scale=False)
    arrays = fit_state(State({"a": bare}, {}), {"a": LayerForm(LayerNormSpec(5, 1e-5))})["a"]
    assert (arrays["gamma"] == 1).all()
    assert (arrays["beta"] == 0).all()


@given(st.permutations(list(FORMS)))
def test_the_order_of_paths_does_not_matter_where_paths_match(order):
    state = state_of(FORMS)
    fitted = fit_state(state, {path: FORMS[path] for path in order})
    assert list(fitted) == order
    for path in order:
        for name, array in fitted[path].items():
            np.testing.assert_array_equal(array, state.arrays[f"{path}.{name}"])
