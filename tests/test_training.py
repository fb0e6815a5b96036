"""Training agrees in every framework with the core's in float64: some steps, or all 100."""

from __future__ import annotations

import importlib

import compare_core
import compare_problem
import numpy as np
import pytest
from frameworks import BACKENDS, need

from doconv_core import difference

MODULES = {"torch": "compare_pt", "tf": "compare_tf", "mx": "compare_mx"}
# Relative: of the loss step by step, and of the folded kernels at the end.
ALLOWED = compare_problem.TRAINED


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(20, marks=pytest.mark.brief),
        pytest.param(compare_problem.STEPS, marks=pytest.mark.exhaustive),
    ],
)
def problem(request):
    """The problem in its first steps, in which any other arithmetic shows, or in all of them."""
    return compare_problem.make_problem(request.param)


@pytest.fixture(scope="module")
def core(problem):
    return compare_core.run(problem)


def test_the_problem_is_worth_solving(problem, core):
    assert len(core.losses) == len(problem.labels)
    assert (compare_problem.STEPS, ALLOWED) == (100, 1e-3)
    share = 0.1 if len(core.losses) == 100 else 0.5
    assert np.mean(core.losses[-10:]) < share * core.losses[0]
    for name, array in core.trained.items():
        assert difference(array, problem.state.arrays[name]).absolute > 1e-3, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_curves_and_folded_kernels_agree(backend, problem, core, capsys):
    need(backend)
    answer = importlib.import_module(MODULES[backend]).run(problem)
    curve = np.abs(answer.losses - core.losses) / np.abs(core.losses)
    kernels = {name: difference(answer.folded[name], core.folded[name]) for name in core.folded}
    worst = max(kernels.values(), key=lambda off: off.relative)
    with capsys.disabled():
        print(
            f"\n{backend}: loss within {curve.max():.1e} relative of the core's at each of "
            f"{len(curve)} steps, folded network within {worst.relative:.1e}"
        )
    assert answer.losses.shape == core.losses.shape
    assert curve.max() <= ALLOWED
    assert answer.folded.keys() == core.folded.keys()
    assert worst.relative <= ALLOWED


def test_the_cores_gradients_are_those_of_its_loss(problem):
    values = {name: a.astype(np.float64) for name, a in problem.state.arrays.items()}
    x, labels = problem.images[0].astype(np.float64), problem.labels[0]
    _, gradients, dx = compare_core.loss_and_gradients(values, x, labels)
    rng, h = np.random.default_rng(0), 1e-5
    for name, gradient in {**gradients, "x": dx}.items():
        step = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = {**values, "x": x}
            moved[name] = moved[name] + sign * h * step
            ends.append(compare_core.loss_and_gradients(moved, moved["x"], labels)[0])
        slope = (ends[0] - ends[1]) / (2 * h)
        assert slope == pytest.approx((gradient * step).sum(), rel=1e-5, abs=1e-8), name
