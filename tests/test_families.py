"""Every family of networks by name: the frameworks compute what the core does, and build its cost.

The same state and the same input; outputs and gradients, in training and in inference.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import numpy as np
import pytest
from frameworks import BACKENDS, need

from doconv_core import State, count, difference
from doconv_core.networks.evaluate import evaluate, gradients
from doconv_core.networks.families import FAMILIES
from doconv_core.networks.initialize import initialize
from doconv_core.networks.names import LISTED, describe
from doconv_core.networks.nodes import Dropout, Sequence

# Relative to the largest entry of the float64 result.
TOLERANCE = 1e-4
CLASSES, BATCH = 5, 4
# Every family, at sizes that leave the last layers more than a point: with one alone, batch norms
# would amplify every rounding. And a seed of an input of which no activation comes near a kink,
# such as that of ReLU at 0, and no two entries of a pool near each other: there a gradient jumps.
# With these seeds all gradients stay within the tolerance when every entry of the state and of the
# input changes by 5e-7 of itself, at random, and not by the at most 6e-8 of rounding to float32.
LARGE, SMALL, DIGITS = (3, 64, 64), (3, 16, 16), (1, 28, 28)
CASES = {
    "resnet10_bsconvs_p1d4": (LARGE, 18),
    "cifar_resnet20": (SMALL, 1),
    "cifar_preresnet20_bsconvu": (SMALL, 0),
    "cifar_wrn16_1_doconv": (SMALL, 0),
    "cifar_wrn16_1_bsconvs_p1d4": (SMALL, 0),
    "cifar_mobilenetv1_w1d4_bsconvu": (SMALL, 4),
    "cifar_mobilenetv2_w1d4_bsconvs_p1d6": (SMALL, 32),
    "cifar_mobilenetv3_small_w7d20_bsconvs_p1d6": (SMALL, 4),
    "cifar_mobilenetv3_large_w7d20_doconv": (SMALL, 4),
    "plain18": (LARGE, 2),
    "resnet18_v1b": (LARGE, 5),
    "resnet18_v2": (LARGE, 8),
    "mobilenet0.25_doconv": (LARGE, 1),
    "mobilenetv2_0.25": (LARGE, 27),
    "mobilenetv3_small": (LARGE, 0),
    "tutorial_pt_doconv": (DIGITS, 0),
    "tutorial_tf": (DIGITS, 0),
    "tutorial_gluon_doconv": (DIGITS, 0),
}
# Built without values, which takes no time: every family in every kind, and more of the blocks.
EMPTY = [
    family.usual[0] + kind
    for family in FAMILIES
    for kind in ("", "_doconv", *LISTED[family.variants])
]
EMPTY += ["resnet50_v1b", "resnet50_v2_doconv", "resnext50_32x4d_doconv", "mobilenetv3_large"]
EMPTY += ["tutorial_tf", "tutorial_gluon_doconv", "resnet18_bsconvs_p1d6", "mobilenetv2_w3d4"]


def backend_of(name):
    need(name)
    return importlib.import_module(f"built.{name}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return backend_of(request.param)


def described(name):
    """Return the network for the size of its case, without dropout, which is random."""
    network = describe(name, num_classes=CLASSES)
    children = tuple(
        (child, Dropout(0.0) if isinstance(node, Dropout) else node)
        for child, node in network.body.children
    )
    return replace(network, body=Sequence(children), input_shape=CASES[name][0])


def trained(network):
    """Return a state with values as after training: nothing in it is zero, or one, for all.

    Batch norms shift by about one of their standard deviations, which leaves ReLU most of its
    input: with half of it, each layer would amplify the rounding of the ones before, by thousands
    in all. A convolution's outputs have about twice the variance of its inputs, by Kaiming's rule.
    """
    state, rng = initialize(network), np.random.default_rng(3)
    arrays = {}
    for name, array in state.arrays.items():
        spread = np.abs(array).mean() if name.endswith(".weight") else 1
        values = array + 0.1 * spread * rng.standard_normal(array.shape)
        if name.endswith(".beta"):
            values += 1
        if name.endswith(".running_var"):
            values = 2 * np.abs(values) + 0.2
        arrays[name] = values.astype("f4")
    return State(state.layers, arrays)


@pytest.fixture(scope="module", params=CASES)
def problem(request):
    """Return a network, its state, and for each mode what the core computes, in float64."""
    network = described(request.param)
    state, rng = trained(network), np.random.default_rng(CASES[request.param][1])
    x = rng.standard_normal((BATCH, *network.input_shape)).astype("f4")
    dy = rng.standard_normal((BATCH, CLASSES)).astype("f4")
    exact = x.astype("f8"), dy.astype("f8")
    answers = {
        training: (
            evaluate(network, state, exact[0], training=training),
            gradients(network, state, *exact, training=training).parameters,
        )
        for training in (False, True)
    }
    return network, state, x, dy, answers


def test_every_family_and_every_kind_of_convolution_is_here():
    bases = {name: re.sub("_(doconv|bsconv.*)$", "", name) for name in CASES}
    for family in FAMILIES:
        # A family's networks for CIFAR differ from those for ImageNet in their strides alone.
        pattern = f"(cifar_)?{family.pattern.removeprefix('cifar_')}"
        assert any(re.fullmatch(pattern, base) for base in bases.values()), pattern
    kinds = {name.removeprefix(base) for name, base in bases.items()}
    assert kinds == {"", "_doconv", *(kind for kinds in LISTED.values() for kind in kinds)}


def test_outputs_and_gradients_are_the_cores(problem, backend):
    network, state, x, dy, answers = problem
    model = backend.made(network)
    assert backend.trainable(model) == count(network, None).training_parameters
    for training, (expected, exact) in answers.items():
        backend.package.load_state(model, state)
        output, found = backend.gradients(model, x, dy, training=training)
        assert expected.std() > 1e-3
        assert difference(output, expected).relative < TOLERANCE
        largest = max(np.abs(gradient).max() for gradient in exact.values())
        for entry, gradient in exact.items():
            # What a batch norm takes out again has no gradient but roundoff.
            none = np.abs(gradient).max() < 1e-12 * largest
            size = largest if none else np.abs(gradient).max()
            assert np.abs(found[entry] - gradient).max() / size < TOLERANCE, (entry, training)


@pytest.mark.parametrize("name", EMPTY)
def test_models_have_exactly_the_parameters_that_the_core_counts(backend, name):
    network = describe(name)
    assert backend.trainable(backend.empty(network)) == count(network, None).training_parameters
