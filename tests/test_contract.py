"""The contract: every layer of the table, in every backend, against the core in float64."""

from __future__ import annotations

import numpy as np
import pytest
from contract import (
    CASES,
    FLOAT32_TOLERANCE,
    HALF_CASES,
    ask,
    check,
    make_problem,
    solve,
    tolerances,
)
from frameworks import BACKENDS, adapter_of

from doconv_core import available_backends, compose, difference, pad

# MXNet has no bfloat16.
HALF_TYPES = [
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("tf", "float16"),
    ("tf", "bfloat16"),
    ("mx", "float16"),
]


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def built(adapter, case, problem, dtype="float32"):
    """Return the layer, and whether it pads like the case by itself."""
    native = adapter.pads(case)
    return adapter.build(case if native else case.padded_outside(), problem, dtype), native


def as_input(case, x, native):
    return x if native else pad(x, case.padding, case.padding_mode)


def test_every_registered_backend_has_an_adapter():
    assert set(available_backends()) == set(BACKENDS)


def test_the_table_covers_what_it_promises():
    assert len(set(map(str, CASES))) == len(CASES) >= 60
    multipliers = {
        (s.depth_multiplier - s.taps, s.depth_multiplier / s.taps)
        for s in (c.spec for c in CASES if c.spec.over_parameterized)
    }
    assert {0, 3} <= {over for over, _ in multipliers}
    assert 2 in {ratio for _, ratio in multipliers}
    assert any(c.spec.depth_multiplier == 2 * c.spec.taps + 1 for c in CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_agree_with_the_core(adapter, case):
    problem = make_problem(case, "float32")
    expected = solve(case, problem)
    layer, native = built(adapter, case, problem)
    found = ask(adapter, layer, case, problem, native)
    check(found, expected, tolerances(case, problem, expected, "float32"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folded_layer_agrees_with_the_core(adapter, case):
    problem = make_problem(case, "float32")
    layer, native = built(adapter, case, problem)
    folded = layer.fold()
    assert type(folded) is adapter.ordinary_type(case)
    output = adapter.forward(folded, as_input(case, problem.x, native))
    assert difference(output, solve(case, problem).output).relative <= FLOAT32_TOLERANCE
    unfolded = adapter.forward(layer, as_input(case, problem.x, native))
    np.testing.assert_array_equal(output, unfolded)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_depthwise_weight_is_the_ordinary_layer_bit_for_bit(adapter, case):
    problem = make_problem(case, "float32", zero_depthwise=True)
    layer, native = built(adapter, case, problem)
    kernel = compose(problem.weight, problem.depthwise, case.spec)
    np.testing.assert_array_equal(adapter.composed_kernel(layer), kernel)
    plain = adapter.ordinary(case if native else case.padded_outside(), kernel, problem.bias)
    x = as_input(case, problem.x, native)
    np.testing.assert_array_equal(adapter.forward(layer, x), adapter.forward(plain, x))
    taken_over = type(layer).from_conv(plain)
    np.testing.assert_array_equal(adapter.forward(taken_over, x), adapter.forward(plain, x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saving_and_loading_changes_no_bit(adapter, case, tmp_path):
    problem = make_problem(case, "float32")
    layer, native = built(adapter, case, problem)
    loaded = adapter.round_trip(layer, case if native else case.padded_outside(), tmp_path)
    expected = {"weight": problem.weight}
    if case.spec.over_parameterized:
        expected["depthwise_weight"] = problem.depthwise
    if case.bias:
        expected["bias"] = problem.bias
    for state in (adapter.state(layer), adapter.state(loaded)):
        assert state.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(state[name], values)
    x = as_input(case, problem.x, native)
    np.testing.assert_array_equal(adapter.forward(loaded, x), adapter.forward(layer, x))


@pytest.mark.parametrize(("backend", "dtype"), HALF_TYPES)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_is_within_its_bound(backend, case, dtype):
    adapter = adapter_of(backend)
    problem = make_problem(case, dtype)
    expected = solve(case, problem)
    layer, native = built(adapter, case, problem, dtype)
    found = ask(adapter, layer, case, problem, native)
    check(found, expected, tolerances(case, problem, expected, dtype))
    folded = layer.fold()
    output = adapter.forward(folded, as_input(case, problem.x, native))
    np.testing.assert_array_equal(output, found.output)
