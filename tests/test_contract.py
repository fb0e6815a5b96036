"""The contract: every layer of the table, in every backend, against the core in float64."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest
from cases import one_test
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
from equal import assert_close, assert_same
from frameworks import BACKENDS, adapter_of

from doconv_core import available_backends, compose, pad

# MXNet has no bfloat16; and no float16 convolution on the CPU, so that its adapter convolves the
# layer's own float16 kernel in float32. TensorFlow sums a bias's gradient in the half type itself.
HALF_TYPES = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in BACKENDS for d in HALF_ROUNDOFF if (b, d) != ("mx", "bfloat16")],
)


class Run:
    """A layer of one backend, built for a case, with the core's answer to it."""

    def __init__(self, adapter, case, dtype="float32", **options):
        self.adapter, self.case = adapter, case
        self.problem = make_problem(case, dtype, **options)
        self.native = adapter.pads(case)  # or else its input is padded before
        self.own = case if self.native else case.padded_outside()
        self.layer = adapter.build(self.own, self.problem, dtype)
        x = self.problem.x
        self.x = x if self.native else pad(x, case.padding, case.padding_mode)

    @cached_property
    def expected(self):
        return solve(self.case, self.problem)

    def results(self):
        return ask(self.adapter, self.layer, self.case, self.problem, self.native)

    def output(self, layer):
        return self.adapter.forward(layer, self.x)


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


@pytest.fixture(params=CASES, ids=str)
def run(adapter, request):
    return Run(adapter, request.param)


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


def test_each_framework_pads_by_itself_where_it_can(adapter):
    assert sum(map(adapter.pads, CASES)) > len(CASES) / 2
    ours = any(adapter.pads(c) and not c.symmetric for c in CASES)
    assert ours != (adapter is adapter_of("mx"))


def agrees_with_the_core(run, folder):
    bounds = tolerances(run.case, run.problem, run.expected, "float32")
    check(run.results(), run.expected, bounds)


def folds_to_the_ordinary_layer(run, folder):
    folded = run.layer.fold()
    assert type(folded) is run.adapter.ordinary_type(run.case)
    assert_close(run.output(folded), run.expected.output, FLOAT32_TOLERANCE, "of the core's")
    assert_same(run.output(folded), run.output(run.layer), "of the layer's")


def begins_as_the_ordinary_layer(run, folder):
    zero = Run(run.adapter, run.case, zero_depthwise=True)
    kernel = compose(zero.problem.weight, zero.problem.depthwise, run.case.spec)
    assert_same(run.adapter.composed_kernel(zero.layer), kernel, "kernel")
    plain = run.adapter.ordinary(run.own, kernel, zero.problem.bias)
    expected = zero.output(plain)
    assert_same(zero.output(zero.layer), expected, "zero D")
    assert_same(zero.output(type(zero.layer).from_conv(plain)), expected, "taken over")


def is_saved_and_loaded(run, folder):
    loaded = run.adapter.round_trip(run.layer, run.own, folder)
    problem, expected = run.problem, {"weight": run.problem.weight}
    if run.case.spec.over_parameterized:
        expected["depthwise_weight"] = problem.depthwise
    if run.case.bias:
        expected["bias"] = problem.bias
    assert_same(run.adapter.state(run.layer), expected, "exported")
    assert_same(run.adapter.state(loaded), expected, "loaded")
    assert_same(run.output(loaded), run.output(run.layer), "output")


@one_test
@pytest.mark.parametrize(
    "promise",
    [
        agrees_with_the_core,
        folds_to_the_ordinary_layer,
        begins_as_the_ordinary_layer,
        is_saved_and_loaded,
    ],
)
def test_a_layer_keeps_its_promises(run, promise, tmp_path):
    promise(run, tmp_path)


@HALF_TYPES
@one_test
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_is_within_its_bound(backend, case, dtype):
    run = Run(adapter_of(backend), case, dtype)
    found = run.results()
    bounds = tolerances(case, run.problem, run.expected, dtype, sums_in_half=backend == "tf")
    check(found, run.expected, bounds)
    assert_same(run.output(run.layer.fold()), found.output)


@HALF_TYPES
@one_test
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
