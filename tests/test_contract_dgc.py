"""The contract of dynamic group convolutions: every backend that has them, against the core."""

from __future__ import annotations

import numpy as np
import pytest
from contract import check, check_refused, put, say, snapshot
from contract_dgc import CASES, WEIGHT, gap, make_problem, solve
from equal import assert_close, assert_same
from frameworks import BACKENDS, adapter_of

from doconv_core import StateError, read_state, write_state
from doconv_core.kinds.dgc import inactive_channels


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def built(adapter, case, problem=None):
    layer = adapter.dynamic(case)
    return layer if problem is None else put(adapter, layer, problem.arrays)


def inactive_of(adapter, layer):
    return int(snapshot(adapter.package, layer).arrays["heads.inactive"])


def test_the_table_covers_what_it_promises():
    folds = {case.spec.out_channels * case.spec.conv.taps < case.spec.heads * np.prod(case.size)
             for case in CASES}  # fmt: skip
    assert folds == {True, False}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_is_the_cores(adapter, case, tmp_path):
    """Its numbers, its passes in training and evaluation, and what it is saved as."""
    problem, spec = make_problem(case), case.spec
    layer = built(adapter, case, problem)
    adapter.package.set_progress(layer, case.progress)
    inactive = inactive_channels(spec.in_channels, spec.gate_factor, case.progress)
    assert inactive_of(adapter, layer) == inactive

    expected = solve(case, problem, inactive, training=False)
    assert not inactive or gap(expected.heads) > 1e-4
    assert_close(adapter.forward(layer, problem.x), expected.heads.output)
    state = snapshot(adapter.package, layer)
    assert [*state.layers] == ["norm", "heads"]
    unset = {"heads.inactive": np.array(inactive, "f4")}
    assert_same(state.arrays, {**problem.arrays, **unset})

    expected = solve(case, problem, inactive)
    assert not inactive or gap(expected.heads) > 1e-4
    found = adapter.gradients(layer, problem.x, problem.dy, training=True, lasso=WEIGHT)
    check(found._replace(arrays={name: found.arrays[name] for name in expected.results.arrays}),
          expected.results, 1e-5)  # fmt: skip
    mean = snapshot(adapter.package, layer).arrays["norm.running_mean"]
    assert_close(mean, expected.running_mean)
    assert_close(adapter.lasso(layer, problem.x, WEIGHT), WEIGHT * expected.heads.lasso)

    state = snapshot(adapter.package, layer)
    write_state(state, tmp_path / "state.safetensors")
    loaded = read_state(tmp_path / "state.safetensors")
    assert_same(loaded.arrays, state.arrays)
    kept = adapter.round_trip(layer, built(adapter, case), problem.x, tmp_path)
    assert_same(snapshot(adapter.package, kept).arrays, state.arrays)
    output = adapter.forward(layer, problem.x)
    assert_same(adapter.forward(kept, problem.x), output)
    for other in map(adapter_of, BACKENDS):
        there = built(other, case)
        other.package.load_state(there, loaded)
        assert_same(snapshot(other.package, there).arrays, state.arrays)
        assert_close(other.forward(there, problem.x), output)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folded_layer_skips_what_it_drops(adapter, case, tmp_path):
    problem = make_problem(case)
    layer = built(adapter, case, problem)
    adapter.package.set_progress(layer, case.progress)
    output = adapter.forward(layer, problem.x)
    folded, report = adapter.package.fold(layer)
    (change,) = report.changed
    assert change.after == f"Skipping{change.before}"
    assert_close(adapter.forward(folded, problem.x), output)
    assert_same(adapter.forward(layer, problem.x), output)
    assert_close(adapter.forward(folded, problem.x[:1]), adapter.forward(layer, problem.x[:1]))
    state = snapshot(adapter.package, layer)
    assert_same(snapshot(adapter.package, folded).arrays, state.arrays)
    (left,) = adapter.package.fold(folded).report.left
    assert "multiplies only the channels that it keeps already" in left.reason

    new = built(adapter, case)
    adapter.package.set_progress(new, case.progress)
    adapter.forward(new, problem.x)  # in evaluation mode, as what is folded should be
    new = adapter.round_trip(folded, adapter.package.fold(new).model, problem.x, tmp_path)
    assert_same(adapter.forward(new, problem.x), adapter.forward(folded, problem.x))
    found, expected = (
        adapter.gradients(each, problem.x, problem.dy, training=True, lasso=WEIGHT)
        for each in (folded, layer)
    )
    check(found, expected, 1e-5)


def test_a_finished_layer_begins_where_its_progress_is_set(adapter):
    layer = built(adapter, CASES[0])
    for progress, expected in ((1, 12), (0.05, 0), (0.5, 8)):
        adapter.package.set_progress(layer, progress)
        assert inactive_of(adapter, layer) == expected


def test_a_folded_layer_takes_a_state_of_another_progress_or_refuses_it(adapter):
    case = CASES[0]
    problem = make_problem(case)
    layer = built(adapter, case, problem)
    adapter.package.set_progress(layer, 1)
    adapter.forward(layer, problem.x)  # in evaluation mode, as what is folded should be
    folded = adapter.package.fold(layer).model
    adapter.package.set_progress(layer, 0.5)
    state = adapter.package.export_state(layer)
    if adapter.package.__name__ == "doconv_torch":
        adapter.package.load_state(folded, state)
        assert folded.heads.dropped == 8  # for what is exported
        assert_close(adapter.forward(folded, problem.x), adapter.forward(layer, problem.x))
        return
    message = "'heads' was folded to drop 12 channels; received a state in which it drops 8: load"
    before = snapshot(adapter.package, folded).arrays
    with pytest.raises(StateError, match=message):
        adapter.package.load_state(folded, state)
    assert_same(snapshot(adapter.package, folded).arrays, before)


def test_what_gives_no_layer_is_refused(adapter):
    package, layer = adapter.package, built(adapter, CASES[0])

    def dynamic(**changes):
        spec = CASES[0].spec
        sizes = {"in_channels": 16, "out_channels": 8, **CASES[0].sizes, **changes}
        made = object.__new__(type(spec))
        for name, value in {"kernel_size": (1, 1), **sizes}.items():
            object.__setattr__(made, name, value)
        return lambda: adapter.dynamic(CASES[0]._replace(spec=made))

    check_refused(
        (dynamic(in_channels=18), ValueError, "in_channels must be divisible by heads; rec.*=18"),
        (dynamic(out_channels=9), ValueError, "must be divisible by heads; rec.*=9, heads=4"),
        (dynamic(gate_factor=0), ValueError, "above 0 and at most 1; received gate_factor=0"),
        (dynamic(heads="4"), TypeError, "heads must be an integer; received heads='4'"),
        (dynamic(squeeze_rate=40), ValueError, "squeeze_rate must be at most 33 for 16 channels"),
        (lambda: package.set_progress(layer, 1.5), ValueError, "0 to 1; received progress=1.5"),
        (lambda: package.set_progress(layer, "1"), TypeError, "progress must be a"),
        (lambda: package.set_progress(1, 1), TypeError, say(adapter, "{module}")),
        (
            lambda: package.set_progress(adapter.make("conv", 4, 4, 1), 1),
            ValueError, f"no dynamic group convolution, such as {type(layer).__name__}.$",
        ),
        (
            lambda: adapter.lasso(layer, make_problem(CASES[0]).x, -1),
            ValueError, "make all channels more salient; received weight=-1",
        ),
    )  # fmt: skip
    assert inactive_of(adapter, layer) == 0
