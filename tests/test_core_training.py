"""The numbers of a step: schedules against formulas, updates and losses by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_close

from doconv_core import recipe
from doconv_core.training.loss import cross_entropy, cross_entropy_gradient, mixed, targets
from doconv_core.training.optimizer import (
    Moments,
    averaged,
    clipped,
    decay,
    role,
    trained,
    update,
)
from doconv_core.training.schedule import learning_rate, parts, progress, steps_per_epoch

EXACT = 1e-15  # a few roundings of float64


@one_test
@pytest.mark.parametrize(
    ("batch", "drop", "images", "steps"),
    [(32, False, 64, 2), (32, False, 65, 3), (32, True, 65, 2), (128, False, 50_000, 391)],
)
def test_a_short_batch_is_a_step_unless_it_is_left_out(batch, drop, images, steps):
    assert steps_per_epoch(recipe("digits", batch_size=batch, drop_last=drop), images) == steps


# Epoch, iteration in it and rate, as DGC's implementation computes them: of CIFAR with 300 epochs
# of 782 steps, of ImageNet with 120 of 5005.
DGC_RATES = [
    ("dgc_cifar", "cosine", 0, 0, 0.1),
    ("dgc_cifar", "cosine", 1, 0, 0.09999725846827562),
    ("dgc_cifar", "cosine", 29, 781, 0.09755303271704113),
    ("dgc_cifar", "cosine", 224, 0, 0.015016832974331724),
    ("dgc_imagenet", "cosine", 0, 2502, 0.09999571809024171),
    ("dgc_imagenet", "cosine", 90, 0, 0.014644660940672627),
    ("dgc_cifar", "steps", 1, 391, 0.1),
    ("dgc_cifar", "steps", 225, 391, 0.001),
    ("dgc_imagenet", "steps", 1, 5004, 0.1),
    ("dgc_imagenet", "steps", 119, 5004, 0.0001),
]


@one_test
@pytest.mark.parametrize(("name", "schedule", "epoch", "iteration", "rate"), DGC_RATES)
def test_rates_are_those_of_dgcs_implementation(name, schedule, epoch, iteration, rate):
    cifar = name == "dgc_cifar"
    milestones = (150, 225) if cifar else (30, 60, 90)
    made, steps = recipe(name, schedule=schedule, milestones=milestones), 782 if cifar else 5005
    step = epoch * steps + iteration
    assert learning_rate(made, step, steps) == pytest.approx(rate, rel=EXACT)
    assert progress(made, step, steps) == step / (made.epochs * steps)


@one_test
@pytest.mark.parametrize("epoch", [0, 99, 100, 149, 150, 179, 180, 199])
def test_steps_begin_with_their_epoch(epoch):
    times = sum(epoch >= milestone for milestone in (100, 150, 180))
    for step in (0, 390):
        rate = learning_rate(recipe("bsconv_cifar"), 391 * epoch + step, 391)
        assert rate == pytest.approx(0.1 * 0.1**times, rel=EXACT)


def test_a_warm_up_rises_from_zero_and_the_cosine_begins_behind_it():
    made, steps = recipe("gluoncv_imagenet"), 10  # 5 epochs of 120
    rates = [learning_rate(made, step, steps) for step in range(1200)]
    assert_close(rates[:50], 0.4 * np.arange(50) / 50, EXACT)
    cosine = 0.4 * (1 + np.cos(np.pi * np.arange(1150) / 1150)) / 2
    assert_close(rates[50:], cosine, EXACT)
    part = recipe("digits", warmup_epochs=0.25, schedule="constant")
    assert [learning_rate(part, step, 8) for step in range(4)] == [0, 0.05, 0.1, 0.1]


def test_a_cosine_may_change_with_the_epoch_alone():
    made = recipe("digits", per="epoch", warmup_epochs=0.5)
    rates = np.reshape([learning_rate(made, step, 4) for step in range(32)], (8, 4))
    assert_close(rates[0], [0, 0.05, 0.1, 0.1], EXACT)
    expected = [0.05 * (1 + math.cos(math.pi * (epoch - 0.5) / 7.5)) for epoch in range(1, 8)]
    assert_close(rates[1:], np.repeat(expected, 4).reshape(7, 4), EXACT)


test_steps_that_are_none_are_refused = refuses(
    lambda given: learning_rate(recipe("digits"), *given),
    ((-1, 10), ValueError, "step must be at least 0; received step=-1"),
    ((80, 10), ValueError, "step must be below 80, which is all of them; received step=80"),
    ((0, 0), ValueError, "steps_per_epoch must be at least 1"),
)


@one_test
@pytest.mark.parametrize(
    ("accumulate", "rows", "sizes"),
    [(1, 5, [5]), (3, 32, [11, 11, 10]), (4, 10, [3, 3, 3, 1]), (4, 2, [1, 1]), (2, 0, [])],
)
def test_parts_are_of_one_size_but_the_last(accumulate, rows, sizes):
    found = list(parts(recipe("digits", accumulate=accumulate), rows))
    assert [part.stop - part.start for part in found] == sizes
    assert np.concatenate([np.arange(rows)[part] for part in found] or [[]]).tolist() == [
        *range(rows)
    ]


def test_targets_are_smoothed_evenly():
    found = targets(np.array([2, 0]), 4, 0.1)
    assert found.dtype == np.float32
    assert_close(found, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], 1e-7)
    assert targets([1], 2).tolist() == [[0, 1]]
    assert targets(np.zeros(0, np.int64), 3).shape == (0, 3)


test_labels_that_are_none_are_refused = refuses(
    lambda labels: targets(labels, 10),
    ([3, 10], ValueError, "labels must be from 0 to 9; received 10"),
    ([-1], ValueError, "labels must be from 0 to 9; received -1"),
    ([1.0], ValueError, r"labels must be integers of shape \(B,\); received float64 of \(1,\)"),
    ([[1]], ValueError, r"received int64 of \(1, 1\)"),
)


def test_mixing_keeps_the_dtype():
    first, other = np.float32([[1, 0]]), np.float32([[0, 1]])
    found = mixed(first, other, 0.3)
    assert found.dtype == np.float32
    assert_close(found, [[0.3, 0.7]], 1e-7)


def test_the_cross_entropy_is_its_formula_and_the_gradient_its_slope():
    rng = np.random.default_rng(0)
    logits, wanted = 3 * rng.standard_normal((5, 4)), rng.dirichlet(np.ones(4), 5)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert_close(cross_entropy(logits, wanted), -(wanted * np.log(softmax)).sum(1), 1e-14)
    towards, h = rng.standard_normal(logits.shape), 1e-6
    up, down = (cross_entropy(logits + s * h * towards, wanted) for s in (1, -1))
    slope = (cross_entropy_gradient(logits, wanted) * towards).sum(1)
    assert_close((up - down) / (2 * h), slope, 1e-8)


def test_large_logits_do_not_overflow():
    assert cross_entropy([[1000.0, 0.0]], [[0, 1]]).tolist() == [1000]


@one_test
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bn.gamma", "norms"),
        ("beta", "norms"),
        ("fc.bias", "biases"),
        ("conv.heads.saliency_bias", "biases"),
        ("conv.depthwise_weight", "depthwise"),
        ("conv.depthwise.weight", None),
        ("fc.weight", None),
        ("act.alpha", None),
        ("heads.squeeze_weight", None),
    ],
)
def test_decay_acts_on_all_roles_that_are_not_exempt(name, expected):
    assert role(name) == expected
    for exempt in ((), ("norms",), ("biases",), ("depthwise",), ("norms", "biases", "depthwise")):
        made = recipe("dgc_cifar", decay_exempt=exempt)
        assert decay(made, name) == (0 if expected in exempt else 1e-4)


def test_running_statistics_and_counts_are_not_trained():
    names = ("a.running_mean", "a.running_var", "a.inactive", "a.gamma", "running_mean.weight")
    assert [trained(name) for name in names] == [False, False, False, True, True]


def two_steps(rates=(0.1, 0.01), **fields):
    """Return a weight of 2, whose gradients are 1 and then -3, after each step."""
    made = recipe("digits", **{"weight_decay": 0, **fields})
    weights, moments, found = {"w": np.array(2.0)}, Moments(), []
    for rate, gradient in zip(rates, (1.0, -3.0), strict=True):
        weights, moments = update(made, weights, {"w": np.array(gradient)}, moments, rate)
        found.append(float(weights["w"]))
    assert moments.steps == 2
    return found


@one_test
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # v = 1; w = 2 - 0.1·1. v = 0.9·1 - 3 = -2.1; w = 1.9 + 0.01·2.1
        ({"optimizer": "sgd"}, (1.9, 1.921)),
        ({"optimizer": "sgd", "momentum": 0}, (1.9, 1.93)),
        # w = 2 - 0.1·(1 + 0.9·1); w = 1.81 - 0.01·(-3 + 0.9·-2.1)
        ({"optimizer": "nesterov"}, (1.81, 1.8589)),
        # g = 1 + 0.5·2 = 2; w = 2 - 0.2. g = -3 + 0.5·1.8 = -2.1; v = 1.8 - 2.1 = -0.3
        ({"optimizer": "sgd", "weight_decay": 0.5}, (1.8, 1.803)),
        # m / (1 - 0.9) = 1, s / (1 - 0.999) = 1: w = 2 - 0.1·1 / 2
        # m = 0.09 - 0.3 = -0.21, over 0.19; s = 0.000999 + 0.009 = 0.009999, over 0.001999
        (
            {"optimizer": "adamw", "epsilon": 1.0},
            (1.95, 1.95 + 0.01 * (0.21 / 0.19) / (math.sqrt(0.009999 / 0.001999) + 1)),
        ),
        # before the step, w is 2 - 0.1·0.5·2 = 1.9
        ({"optimizer": "adamw", "epsilon": 1.0, "weight_decay": 0.5}, (1.85, None)),
    ],
)
def test_updates_are_pytorchs_rules(fields, expected):
    for found, by_hand in zip(two_steps(**fields), expected, strict=True):
        assert by_hand is None or found == pytest.approx(by_hand, rel=1e-12)


def test_the_rate_is_outside_of_the_velocity():
    first, _ = two_steps((0.1, 0.1), optimizer="sgd")
    assert two_steps((0.1, 1e-9), optimizer="sgd")[1] == pytest.approx(first, abs=1e-8)


def test_what_is_exempt_does_not_decay():
    made = recipe("digits", optimizer="sgd", weight_decay=0.5, decay_exempt=("biases",))
    arrays = {"fc.weight": np.ones(1), "fc.bias": np.ones(1)}
    none = {name: np.zeros(1) for name in arrays}
    found, _ = update(made, arrays, none, Moments(), 0.1)
    assert found == {"fc.weight": 0.95, "fc.bias": 1}


def test_gradients_are_clipped_together():
    gradients = {"a": np.array([3.0, 0]), "b": np.array([[4.0]])}
    for norm, expected in ((None, 5), (10, 5), (1, 1)):
        found = clipped(gradients, norm)
        length = math.sqrt(sum((each**2).sum() for each in found.values()))
        assert length == pytest.approx(expected, rel=1e-6)  # less than PyTorch's 1e-6 of 5
        assert found["a"][0] * 4 == pytest.approx(found["b"][0, 0] * 3)


def test_an_average_moves_by_the_rest_of_its_decay():
    average = {"w": np.array(1.0)}
    for value in (2.0, 3.0):
        average = averaged(average, {"w": np.array(value)}, 0.9)
    assert average["w"] == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)
