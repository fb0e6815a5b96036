"""The contract of BSConv layers: every backend that has them, against the core in float64."""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from contract import FLOAT32_TOLERANCE
from contract_bsconv import CASES, make_problem, solve
from frameworks import BACKENDS, need

from doconv_core import NotFoldable, difference, pad, pad_gradient

WITH_BSCONV = [name for name in BACKENDS if find_spec(f"adapters.{name}_bsconv")]


@pytest.fixture(params=WITH_BSCONV)
def adapter(request):
    need(request.param)
    return importlib.import_module(f"adapters.{request.param}_bsconv")


def built(adapter, case, problem):
    """Return the layer with the problem's state, and the input that it takes."""
    native = adapter.pads(case)
    layer = adapter.build(case if native else case.padded_outside())
    state = adapter.package.export_state(layer)
    adapter.package.load_state(layer, replace(state, arrays=problem.arrays))
    return layer, problem.x if native else pad(problem.x, case.padding, case.padding_mode)


def test_the_table_covers_what_it_promises():
    assert len(set(map(str, CASES))) == len(CASES) >= 50
    for variant in "us":
        cases = [case for case in CASES if case.spec.variant == variant]
        assert {case.spec.rank for case in cases} == {1, 2, 3}
        assert {case.spec.with_bn for case in cases} == {True, False}
        assert {case.dense for case in cases if case.spec.with_bn} == {True, False}
        assert {case.padding_mode for case in cases} == {
            "zeros", "reflect", "replicate", "circular",
        }  # fmt: skip


def test_backends_have_it():
    assert WITH_BSCONV


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_agree_with_the_core(adapter, case):
    problem = make_problem(case)
    expected = solve(case, problem)
    found = adapter.gradients(*built(adapter, case, problem), problem.dy)
    assert difference(found.output, expected.output).relative <= FLOAT32_TOLERANCE
    dx = found.x
    if dx.shape != problem.x.shape:
        dx = pad_gradient(dx, case.size, case.padding, case.padding_mode)
    assert difference(dx, expected.x).relative <= FLOAT32_TOLERANCE
    assert found.arrays.keys() == expected.arrays.keys()
    for name, gradient in expected.arrays.items():
        assert difference(found.arrays[name], gradient).relative <= FLOAT32_TOLERANCE, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_comes_back_bit_for_bit(adapter, case):
    problem = make_problem(case)
    arrays = adapter.package.export_state(built(adapter, case, problem)[0]).arrays
    assert arrays.keys() == problem.arrays.keys()
    for name, values in problem.arrays.items():
        np.testing.assert_array_equal(arrays[name], values)


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_folded_layers_agree_with_the_core(adapter, case, form):
    problem = make_problem(case)
    layer, x = built(adapter, case, problem)
    if form == "dense" and not case.dense:
        with pytest.raises(NotFoldable, match="meets zero padding"):
            layer.fold(form=form)
        return
    folded = layer.fold(form=form)
    assert adapter.is_ordinary(folded, form)
    found, expected = adapter.forward(folded, x), solve(case, problem).output
    assert difference(found, expected).relative <= FLOAT32_TOLERANCE
    if form == "keep":
        np.testing.assert_array_equal(found, adapter.forward(layer, x))
