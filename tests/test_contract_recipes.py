"""Training by each recipe agrees in every framework with the core's in float64, step by step."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import compare_recipes
import numpy as np
import pytest
from compare_problem import TRAINED
from frameworks import BACKENDS, need

from doconv_core import Recipe, difference, recipe, recipes
from doconv_core.training.optimizer import trained

ROOT = Path(__file__).parents[1]
TRAINERS = [name for name in BACKENDS if (ROOT / f"doconv_{name}" / "train.py").exists()]
# What no recipe of a name has: each of the fields that an engine looks at is in one of these.
OWN = {
    "adamw": recipe(
        "tutorial_tf", learning_rate=0.01, weight_decay=0.1, schedule="cosine", warmup_epochs=1,
        decay_exempt=("norms", "biases", "depthwise"), clip_norm=1.0, label_smoothing=0.1,
        average=0.9,
    ),
    "parts": recipe(
        "bsconv_cifar", accumulate=3, clip_norm=0.5, average=0.8, weight_decay=0.01,
        decay_exempt=("norms",),
    ),
    "parts_dynamic": recipe("dgc_cifar", accumulate=4, lasso=0.01, decay_exempt=("biases",)),
    "kernels": recipe(
        "gluoncv_cifar", average=0.9, average_of="kernels", weight_decay=0.05,
        decay_exempt=("depthwise",),
    ),
}  # fmt: skip
STEPS = [10, pytest.param(compare_recipes.STEPS, marks=pytest.mark.exhaustive)]


@lru_cache
def solved(name: str | Recipe, steps: int):
    """Return a recipe's problem, and what the core's training comes to."""
    problem = compare_recipes.make_problem(name, steps)
    return problem, compare_recipes.core(problem)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [*recipes(), *OWN])
@pytest.mark.parametrize("backend", TRAINERS)
def test_losses_and_the_last_state_are_the_cores(backend, name, steps):
    need(backend)
    problem, core = solved(OWN.get(name, name), steps)
    losses, state = compare_recipes.framework(backend, problem)
    assert losses.shape == core.losses.shape
    off = np.abs(losses - core.losses) / core.losses
    assert off.max() <= TRAINED, f"at step {off.argmax()}"
    found, expected = kernels(state), kernels(core.averaged)
    assert found.keys() == expected.keys()
    for entry, array in expected.items():
        assert difference(found[entry], array).relative <= TRAINED, entry


def kernels(state):
    """Return what is trained, in float64, with kernels in place of what they are composed of."""
    found = {name: array.astype(np.float64) for name, array in state.arrays.items()}
    for path, form in state.layers.items():
        if form.composed is not None:
            own = {name: found.pop(f"{path}.{name}") for name in form.composed.entries(form.spec)}
            kernel = form.composed.compose(own, form.spec)
            found[f"{path}.weight"] = kernel.reshape(*kernel.shape[:2], -1)
    return {name: array for name, array in found.items() if trained(name)}


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
    kinds = {name: solved(name, 10)[0].network.body for name in recipes()}
    dynamic = [name for name, body in kinds.items() if "DynamicHeads" in repr(body)]
    separable = [name for name, body in kinds.items() if "bsconvs" in repr(body)]
    assert dynamic == ["dgc_cifar", "dgc_imagenet"]
    assert separable == ["bsconv_cifar", "bsconv_finegrained"]
    for name, body in kinds.items():
        assert "doconv" in repr(body), name
