"""Training by each recipe agrees in every framework with the core's in float64, step by step."""

from __future__ import annotations

from functools import lru_cache

import compare_recipes
import numpy as np
import pytest
from compare_problem import TRAINED
from contract_train import TRAINED as TRAINERS
from frameworks import need

from doconv_core import difference, recipes
from doconv_core.training.optimizer import trained

# Each optimizer, schedule and loss of a kind in its first steps, and all recipes over all steps.
CASES = [
    *(
        pytest.param(name, 10, marks=pytest.mark.brief)
        for name in ("bsconv_cifar", "gluoncv_imagenet", "dgc_cifar", "tutorial_tf")
    ),
    *(pytest.param(n, compare_recipes.STEPS, marks=pytest.mark.exhaustive) for n in recipes()),
]


@lru_cache
def solved(name: str, steps: int):
    """Return a recipe's problem, and what the core's training comes to."""
    problem = compare_recipes.make_problem(name, steps)
    return problem, compare_recipes.core(problem)


@pytest.mark.parametrize(("name", "steps"), CASES)
@pytest.mark.parametrize("backend", TRAINERS)
def test_losses_and_the_last_state_are_the_cores(backend, name, steps):
    need(backend)
    problem, core = solved(name, steps)
    losses, state = compare_recipes.framework(backend, problem)
    assert losses.shape == core.losses.shape
    off = np.abs(losses - core.losses) / core.losses
    assert off.max() <= TRAINED, f"at step {off.argmax()}"
    for entry, array in core.state.arrays.items():
        if trained(entry):
            assert difference(state.arrays[entry], array).relative <= TRAINED, entry


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", recipes())
def test_the_problems_are_worth_solving(name):
    problem, core = solved(name, compare_recipes.STEPS)
    assert len(core.losses) == 100
    assert core.losses[-10:].mean() < 0.8 * core.losses[0]
    for entry, array in problem.state.arrays.items():
        if trained(entry):
            assert difference(core.state.arrays[entry], array).absolute > 1e-3, entry


def test_the_networks_have_the_layers_that_recipes_are_about():
    kinds = {name: compare_recipes.make_problem(name, 1).network.body for name in recipes()}
    dynamic = [name for name, body in kinds.items() if "DynamicHeads" in repr(body)]
    separable = [name for name, body in kinds.items() if "bsconvs" in repr(body)]
    assert dynamic == ["dgc_cifar", "dgc_imagenet"]
    assert separable == ["bsconv_cifar", "bsconv_finegrained"]
    for name, body in kinds.items():
        assert "doconv" in repr(body), name
