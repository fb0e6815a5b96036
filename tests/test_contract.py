"""The contract: every layer of the table, in every backend, against the core in float64."""

from __future__ import annotations

import numpy as np
import pytest
from contract import (
    CASES,
    FLOAT32_TOLERANCE,
    HALF_CASES,
    HALF_ROUNDOFF,
    ask,
    case,
    check,
    make_problem,
    rounded,
    solve,
    tolerances,
)
from frameworks import BACKENDS, adapter_of

from doconv_core import available_backends, compose, difference, pad

# MXNet has no bfloat16; and no float16 convolution on the CPU, so that its adapter convolves the
# layer's own float16 kernel in float32. TensorFlow sums a bias's gradient in the half type itself.
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


def test_every_backend_of_this_package_has_an_adapter():
    assert set(BACKENDS) <= set(available_backends())
    ours = {n for n, entry in available_backends().items() if entry.value.startswith("doconv_")}
    assert ours <= set(BACKENDS)


def test_the_table_covers_what_it_promises():
    assert len(set(map(str, CASES))) == len(CASES) >= 60
    for rank in (1, 2, 3):
        cases = [c for c in CASES if c.spec.rank == rank]
        specs = [c.spec for c in cases]
        multipliers = {s.depth_multiplier - s.taps for s in specs} | {
            "2M" if s.depth_multiplier == 2 * s.taps else "2M+1"
            for s in specs
            if s.over_parameterized and s.depth_multiplier - 2 * s.taps in (0, 1)
        }
        assert {0, 3, "2M", "2M+1"} <= multipliers
        assert {1, "between", "depthwise"} <= {
            1 if s.groups == 1 else "depthwise" if s.groups == s.in_channels else "between"
            for s in specs
        }
        assert any(s.groups == s.in_channels < s.out_channels for s in specs)  # a multiplier
        assert any(size % 2 == 0 for s in specs for size in s.kernel_size)
        assert rank == 1 or any(len(set(s.kernel_size)) > 1 for s in specs)
        assert any(max(c.stride) > 1 for c in cases)
        assert any(max(c.dilation) > 1 for c in cases)
        assert any(not c.symmetric for c in cases)
        assert {True, False} == {c.bias for c in cases}
        assert any(not s.over_parameterized for s in specs)
    assert {c.padding_mode for c in CASES} == {"zeros", "reflect", "replicate", "circular"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_framework_pads_by_itself_where_it_can(backend):
    pads = adapter_of(backend).pads
    assert sum(map(pads, CASES)) > len(CASES) / 2
    assert backend == "mx" or any(pads(c) and not c.symmetric for c in CASES)


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
    allowed = tolerances(case, problem, expected, dtype, sums_in_half=backend == "tf")
    check(found, expected, allowed)
    folded = layer.fold()
    output = adapter.forward(folded, as_input(case, problem.x, native))
    np.testing.assert_array_equal(output, found.output)


@pytest.mark.parametrize(("backend", "dtype"), HALF_TYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_small_depthwise_weight_is_not_lost_in_half_precision(backend, dtype, groups):
    """Added to a 1 in half precision, a D of less than its last bit would be gone."""
    adapter = adapter_of(backend)
    layer_case = case(16, 16, (3, 3), (5, 5), groups=groups)
    spec = layer_case.spec
    problem = make_problem(layer_case, dtype)
    small = rounded(0.9 * HALF_ROUNDOFF[dtype] * np.eye(9), dtype)
    problem = problem._replace(depthwise=np.tile(small, (16, 1, 1)))
    kernel = adapter.composed_kernel(adapter.build(layer_case, problem, dtype))
    exact = compose(problem.weight.astype(float), problem.depthwise.astype(float), spec)
    # Half the distance of neighbouring numbers is what one rounding may be off by.
    half_spacing = HALF_ROUNDOFF[dtype] * 2.0 ** np.floor(np.log2(np.abs(exact)))
    # The product with D may be rounded as well: in its own last place, or where float16 ends.
    underflow = 2.0**-25 if dtype == "float16" else 0.0
    assert (np.abs(kernel - exact) <= 1.02 * half_spacing + underflow).all()
