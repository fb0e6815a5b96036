"""The contract: every layer of the table, in every backend, against the core in float64."""

from __future__ import annotations

from functools import partial
from inspect import isclass, signature

import numpy as np
import pytest
from cases import one_test
from contract import (
    CASES,
    FLOAT32_TOLERANCE,
    HALF_CASES,
    HALF_ROUNDOFF,
    ask,
    built,
    case,
    check,
    check_refused,
    fill,
    make_problem,
    rounded,
    say,
    solve,
    tolerances,
)
from equal import assert_close, assert_same
from frameworks import BACKENDS, adapter_of

from doconv_core import available_backends, compose

# MXNet has no bfloat16; and no float16 convolution on the CPU, so that its adapter convolves the
# layer's own float16 kernel in float32. TensorFlow sums a bias's gradient in the half type itself.
HALF_TYPES = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in BACKENDS for d in HALF_ROUNDOFF if (b, d) != ("mx", "bfloat16")],
)


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


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


def test_layers_are_called_as_the_ordinary_ones(adapter):
    """By the names of arguments, too."""

    def names(cls):
        return list(signature(getattr(cls, adapter.WORDS["call"])).parameters)

    layers = [c for c in vars(adapter.package).values() if isclass(c) and hasattr(c, "ordinary")]
    assert len(layers) >= 9
    for cls in layers:
        expected = names(cls.ordinary)
        assert names(cls)[: len(expected)] == expected, cls


def in_double(problem):
    return {name: array.astype(float) for name, array in problem.arrays.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_keeps_its_promises(adapter, case, tmp_path):
    """It computes, is saved as, folds to and begins as what the core and ordinary layers say."""
    problem, spec = make_problem(case), case.spec
    expected = solve(case, problem)
    layer, x = built(adapter, case, problem)
    own = case if adapter.pads(case) else case.padded_outside()
    output = adapter.forward(layer, x)
    check(ask(adapter, layer, x, case, problem), expected, FLOAT32_TOLERANCE)

    loaded = adapter.round_trip(layer, adapter.build(own), x, tmp_path)
    for what, each in (("layer", layer), ("loaded", loaded)):
        assert (type(each), each.spec) == (type(layer), spec), what
        assert adapter.entries(each).keys() == problem.arrays.keys(), what
        assert_same(adapter.package.export_state(each).arrays, problem.arrays, what)
        assert_same(adapter.forward(each, x), output, what)

    folded = layer.fold()
    assert type(folded) is adapter.ordinary_type(case)
    assert_same(adapter.forward(folded, x), output, "folded")
    assert adapter.entries(folded).keys() == problem.arrays.keys() - {"depthwise_weight"}

    double = built(adapter, case, problem, adapter.DOUBLE)[0]
    exact, arrays = {"float64": 1e-14, "float32": 1e-6}[adapter.DOUBLE], in_double(problem)
    kernel = compose(arrays["weight"], arrays.get("depthwise_weight"), spec)
    assert_close(adapter.composed_kernel(double)[0], kernel, exact, "composed kernel")

    arrays = {n: 0 * a if n == "depthwise_weight" else a for n, a in problem.arrays.items()}
    fill(adapter, layer, case, arrays)
    kernel = compose(arrays["weight"], arrays.pop("depthwise_weight", None), spec)
    assert_same(adapter.composed_kernel(layer)[0], kernel, "kernel without D")
    arrays["weight"] = kernel.reshape(*kernel.shape[:2], spec.taps)
    plain = fill(adapter, adapter.build(own, kind="conv"), case, arrays)
    expected = adapter.forward(plain, x)
    assert_same(adapter.forward(layer, x), expected, "without D")
    taken = adapter.take_over(case, plain)
    assert taken.spec == spec
    assert_same(adapter.forward(taken, x), expected, "taken over")
    assert_same(adapter.composed_kernel(taken)[0], kernel, "kernel taken over")
    assert_same(adapter.forward(type(taken).from_conv(plain), x), expected, "of the usual S")


@one_test
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "depthwise_weight"), ("bias",)])
@pytest.mark.parametrize(
    "layer_case",
    [
        case(4, 6, (3, 3), (7, 8), groups=2),
        case(4, 6, (3, 3), (7, 8), groups=2, extra=3),
        case(4, 8, (3, 3), (6, 7), groups=4, depthwise_layer=True),
    ],
)
def test_folding_and_taking_over_keep_what_is_trained_and_draw_nothing(adapter, frozen, layer_case):
    layer, x = built(adapter, layer_case, make_problem(layer_case), adapter.DOUBLE)
    x = x.astype(adapter.DOUBLE)
    for name in frozen:
        adapter.freeze(adapter.entries(layer)[name])
    kernel, bias, found, nothing = len(frozen) < 2, "bias" not in frozen, [], lambda: None
    drawn = adapter.drawn_after(lambda: found.append(layer.fold()))
    assert_same(drawn, adapter.drawn_after(nothing), "folded")
    drawn = adapter.drawn_after(lambda: found.append(adapter.take_over(layer_case, found[0])))
    assert_same(drawn, adapter.drawn_after(nothing), "taken over")
    trained = {"weight": kernel, "depthwise_weight": kernel, "bias": bias}
    for each in found:
        entries = adapter.entries(each)
        assert {name: adapter.is_trained(p) for name, p in entries.items()} == {
            name: trained[name] for name in entries
        }
        assert adapter.dtypes(each) == {adapter.DOUBLE}
        assert_same(adapter.forward(each, x), adapter.forward(layer, x))


def test_what_computes_something_else_is_neither_folded_nor_taken_over(adapter):
    make, words = adapter.make, partial(say, adapter)
    take = type(make("do_conv", 4, 6, 3)).from_conv
    exactly, own = "takes over a {conv}, exactly; received .*", "has a {} of its own, so the co"
    check_refused(
        *(
            (make(cls, 4, 6, 3).fold, TypeError, rf"\b{cls.__name__} {own.format(name)}")
            for cls, name in adapter.OTHERS.items()
        ),
        (lambda: take(make("own", 4, 6, 3)), TypeError, words(exactly + "Own")),
        (lambda: take(make("conv", 4, 6, 3, 1)), TypeError, words(exactly + "Conv1{d}")),
        (
            lambda: take(make("do_conv", 4, 6, 3)),
            TypeError,
            words(rf"received {adapter.package.__name__}\.do_conv\.DOConv2{{d}}"),
        ),
        (
            lambda: take(make("conv", 4, 6, 3), depth_multiplier=8),
            ValueError,
            "depth_multiplier must be at least",
        ),
    )
    same, x = make(adapter.Named, 4, 6, 3), np.ones((2, 4, 5, 5), "float32")
    assert_same(adapter.forward(same.fold(), x), adapter.forward(same, x))


def test_wrong_arguments_are_refused(adapter):
    rows = [
        ({"kernel": (3, 3, 3)}, ValueError, "kernel_size must be one integer or 2 of them"),
        ({"kernel": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel": 2.5}, TypeError, "kernel_size must be an integer"),
        ({"groups": 0}, ValueError, "groups must be at least 1; received groups=0"),
        ({"stride": 0}, ValueError, "{stride} must be at least 1; received {stride}=0"),
        ({"dilation": (1, -1)}, ValueError, r"{dilation}\[1\] must be at least 1"),
        ({"depth_multiplier": 8}, ValueError, "depth_multiplier must be at least the number of"),
        ({"depth_multiplier": 9.5}, TypeError, "depth_multiplier must be an integer"),
    ]
    make, words = partial(adapter.make, "do_conv", 4, 6), partial(say, adapter)
    check_refused(
        *(
            (partial(make, **{"kernel": 3, **words(options)}), error, words(message))
            for options, error, message in rows
        )
    )


@HALF_TYPES
@one_test
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_is_within_its_bound(backend, case, dtype):
    adapter, problem = adapter_of(backend), make_problem(case, dtype)
    layer, x = built(adapter, case, problem, dtype)
    expected, found = solve(case, problem), ask(adapter, layer, x, case, problem)
    bounds = tolerances(case, problem, expected, dtype, sums_in_half=backend == "tf")
    check(found, expected, bounds)
    assert_same(adapter.forward(layer.fold(), x), found.output)


@HALF_TYPES
@one_test
@pytest.mark.parametrize("groups", [1, 2])
def test_a_small_depthwise_weight_is_not_lost_in_half_precision(backend, dtype, groups):
    """Added to a 1 in half precision, a D of less than its last bit would be gone."""
    adapter, layer_case = adapter_of(backend), case(16, 16, (3, 3), (5, 5), groups=groups)
    problem = make_problem(layer_case, dtype)
    small = rounded(0.9 * HALF_ROUNDOFF[dtype] * np.eye(9), dtype)
    problem.arrays["depthwise_weight"] = np.tile(small, (16, 1, 1))
    kernel = adapter.composed_kernel(built(adapter, layer_case, problem, dtype)[0])[0]
    arrays = in_double(problem)
    exact = compose(arrays["weight"], arrays["depthwise_weight"], layer_case.spec)
    # Half the distance of neighbouring numbers is what one rounding may be off by.
    half_spacing = HALF_ROUNDOFF[dtype] * 2.0 ** np.floor(np.log2(np.abs(exact)))
    # The product with D may be rounded as well: in its own last place, or where float16 ends.
    underflow = 2.0**-25 if dtype == "float16" else 0.0
    assert (np.abs(kernel - exact) <= 1.02 * half_spacing + underflow).all()
