"""Every family of networks by name: the frameworks compute what the core does, at its cost."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import cache

import pytest
from contract_bsconv import adapter_of
from contract_networks import check_network, problem_of
from frameworks import BACKENDS

from doconv_core import count
from doconv_core.networks.families import FAMILIES
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
    "cifar_dydensenet86": (SMALL, 0),
    "cifar_densenet86": (SMALL, 0),
    "plain18": (LARGE, 2),
    "cifar_dyresnet18": (SMALL, 41),
    "resnet18_v1b": (LARGE, 5),
    "resnet18_v2": (LARGE, 8),
    "mobilenet0.25_doconv": (LARGE, 1),
    "mobilenetv2_0.25": (LARGE, 27),
    "mobilenetv3_small": (LARGE, 0),
    "tutorial_pt_doconv": (DIGITS, 0),
    "tutorial_tf": (DIGITS, 0),
    "tutorial_gluon_doconv": (DIGITS, 0),
}
FEW = {"stages": (2, 2), "growth": (8, 12)}
OPTIONS = {"cifar_dydensenet86": FEW, "cifar_densenet86": FEW}
# The others have blocks and strides that these have, too, and take the more of the time.
QUICK = (
    "cifar_dydensenet",
    "cifar_wrn",
    "cifar_mobilenetv1",
    "cifar_mobilenetv2",
    "cifar_mobilenetv3_small",
)
OFTEN = [name for name in CASES if name.startswith((*QUICK, "tutorial", "plain"))]
MORE = ["resnet50_v1b", "resnet50_v2_doconv", "resnext50_32x4d_doconv", "mobilenetv3_large"]
MORE += ["tutorial_tf", "tutorial_gluon_doconv", "resnet18_bsconvs_p1d6", "mobilenetv2_w3d4"]


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def turns():
    """Return each case with each framework, or of the long tail with one of them, by turns.

    What is of a family alone is its description, which all three build of the same nodes.
    """
    found = []
    for number, name in enumerate(CASES):
        often = name in OFTEN
        for backend in BACKENDS if often else [[*BACKENDS][number % len(BACKENDS)]]:
            marks = () if often else pytest.mark.exhaustive
            found.append(pytest.param(name, backend, id=f"{name}-{backend}", marks=marks))
    return found


@cache
def problem_of_case(name):
    """Return the problem of a case, of its network without dropout, which is random."""
    shape, seed = CASES[name]
    network = describe(name, num_classes=CLASSES, **OPTIONS.get(name, {}))
    children = tuple(
        (child, Dropout(0.0) if isinstance(node, Dropout) else node)
        for child, node in network.body.children
    )
    network = replace(network, body=Sequence(children), input_shape=shape)
    return problem_of(network, BATCH, seed)


def test_every_family_and_every_kind_of_convolution_is_here():
    bases = {name: re.sub("_(doconv|bsconv.*)$", "", name) for name in CASES}
    for family in FAMILIES:
        # A family's networks for CIFAR differ from those for ImageNet in their strides alone.
        pattern = f"(cifar_)?{family.pattern.removeprefix('cifar_')}"
        assert any(re.fullmatch(pattern, base) for base in bases.values()), pattern
    kinds = {name.removeprefix(base) for name, base in bases.items()}
    assert kinds == {"", "_doconv", *(kind for kinds in LISTED.values() for kind in kinds)}


@pytest.mark.parametrize(("name", "backend"), turns())
def test_outputs_and_gradients_are_the_cores(name, backend):
    check_network(adapter_of(backend), problem_of_case(name), TOLERANCE)


def check_parameters(adapter, names):
    """Assert that networks, built without values, have the parameters that the core counts."""
    wrong = {}
    for name in names:
        network = describe(name)
        found = adapter.trainable(adapter.empty(network))
        if found != (expected := count(network, None).training_parameters):
            wrong[name] = found, expected
    assert not wrong


def kinds_of_families():
    """Return each family with each kind of convolution and each framework.

    But in Keras, which takes ten times as long, with one of the kinds, by turns.
    """
    found = []
    for number, family in enumerate(FAMILIES):
        kinds = {"ordinary": [""], "doconv": ["_doconv"], "listed": LISTED[family.variants]}
        for backend, (n, kind) in itertools.product(BACKENDS, enumerate(kinds)):
            if backend == "tf" and n != number % len(kinds):
                continue
            marks = () if kind == "ordinary" else pytest.mark.exhaustive
            names = [family.usual[0] + each for each in kinds[kind]]
            name = f"{backend}-{family.usual[0]}-{kind}"
            found.append(pytest.param(backend, names, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("backend", "names"), kinds_of_families())
def test_models_have_exactly_the_parameters_that_the_core_counts(backend, names):
    check_parameters(adapter_of(backend), names)


@pytest.mark.exhaustive
def test_more_of_the_blocks_have_exactly_these_parameters(adapter):
    check_parameters(adapter, MORE)
