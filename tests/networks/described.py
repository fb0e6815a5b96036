"""Small networks as data: together they have every kind of node, and every kind of convolution."""

from __future__ import annotations

import pytest

from doconv_core.kinds.base import recipe
from doconv_core.kinds.branches import BRANCHES
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Concat,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    Pool,
    Residual,
    Scale,
    Sequence,
    numbered,
    sequence,
)

SHAPE = (3, 10, 9)
KINDS = (
    recipe(), recipe("doconv"), recipe("bsconvu"), recipe("bsconvu", with_bn=True),
    recipe("bsconvs", 0.5), recipe("bsconvs", 0.5, 2, with_bn=True),
)  # fmt: skip


def unit(channels, kernel=3, activation="relu", **options):
    """Return a convolution, a batch norm, and an activation."""
    conv = Conv(channels, (kernel, kernel), **options)
    norm = ("bn", BatchNorm())
    return sequence(("conv", conv), norm, ("activation", Activation(activation)))


def _pooled():
    return sequence(
        ("norm", BatchNorm(affine=False)),
        ("stem", unit(6, stride=2)),
        ("pool", Pool("max", 3, 2, 1)),
        ("mean", Pool("average", 2, 1)),
        ("global", GlobalPool()),
        ("classifier", Conv(5, bias=True)),
        ("flatten", Flatten()),
    )


def _residuals():
    projection = sequence(("conv", Conv(8, stride=2)), ("bn", BatchNorm(1e-3, 0.3)))
    body = sequence(("1", unit(8, activation="relu6", stride=2)), ("2", unit(8)))
    stage = numbered([Residual(body, projection), Residual(body=unit(8, 5, "relu6"))])
    return sequence(("stem", Conv(4, (3, 3), bias=True)), ("stage1", stage), ("last", Flatten()))


def _scales():
    factors = sequence(
        ("pool", GlobalPool()),
        ("reduce", Conv(2, bias=True)),
        ("relu", Activation("relu")),
        ("shortcut", Conv(8, bias=True)),  # a name of no meaning but in a residual
        ("sigmoid", Activation("hard_sigmoid")),
    )
    return sequence(
        ("expand", unit(8, 1, "hard_swish")),
        ("depthwise", unit(8, 5, "hard_swish", stride=2, groups=0)),
        ("multiplied", Conv(16, (3, 2), groups=0)),
        ("grouped", Conv(8, (3, 3), groups=4, padding=0)),
        ("excite", Scale(factors)),
        ("project", unit(4, 1, "relu6")),
    )


def _branches():
    average = sequence(("pool", Pool("average", 3, 1, 1)), ("conv", Conv(3)))
    branches = sequence(
        ("1", Conv(4, (1, 3))),
        ("2", numbered([Conv(4, (5, 1)), Conv(2, (3, 3))])),
        ("3", average),
        ("max", Pool("max", 5, 1, 2)),
        ("input", Sequence()),
    )
    return sequence(
        ("mixed", Concat(branches)),
        ("average", Pool("average", 3, 2, 1)),
        ("even", Conv(4, (2, 4), padding=1)),
        ("relu", Activation("relu")),
    )


def _vectors():
    flat = sequence(
        ("flatten", Flatten()),
        ("linear", Linear(6)),
        ("bn", BatchNorm()),
        ("swish", Activation("hard_swish")),
    )
    wide = Concat(sequence(("flatten", Flatten()), ("pooled", flat)))
    return sequence(
        ("conv", unit(4, stride=2)),
        ("wide", wide),
        ("bn", BatchNorm()),
        ("hidden", Linear(7, bias=False)),
        ("residual", Residual(sequence(("linear", Linear(7)), ("relu", Activation("relu"))))),
        ("dropout", Dropout(0.0)),
        ("output", Linear(3)),
    )


def _kinds(stride):
    return sequence(
        ("stem", Conv(6, (3, 3))),
        *((f"{kind.name}{n}", unit(8, kind=kind, stride=stride)) for n, kind in enumerate(KINDS)),
        ("depthwise", unit(8, kind=recipe("doconv"), groups=0)),
        ("one_tap", Conv(4, kind=recipe("bsconvs"))),
        ("rectangular", Conv(4, (1, 3), bias=True, kind=recipe("bsconvu"))),
    )


def _strided_kinds():
    branches = numbered(unit(8, kind=kind, stride=2, padding=2) for kind in KINDS)
    return sequence(("stem", Conv(6, (3, 3))), ("kinds", Concat(branches)))


RULES = (
    recipe("branches", branches=BRANCHES), recipe("orepa"), recipe("expand", ratio=3),
    recipe("sesr"),
)  # fmt: skip


def _rules():
    return sequence(
        ("stem", Conv(8, (3, 3))),
        *((f"{kind.name}", unit(8, kind=kind, groups=2)) for kind in RULES),
        ("depthwise", unit(8, kind=recipe("orepa"), groups=0, stride=2)),
        ("rectangular", Conv(4, (1, 3), bias=True, kind=recipe("branches"))),
        ("wide", Conv(8, (5, 3), kind=recipe("branches", branches=BRANCHES))),
    )


NETWORKS = {
    name: Network(name, body, SHAPE)
    for name, body in {
        "pooled": _pooled(),
        "residuals": _residuals(),
        "scales": _scales(),
        "branches": _branches(),
        "vectors1.0": _vectors(),
        "kinds": _kinds(1),
        "strided_kinds": _strided_kinds(),
        "rules": _rules(),
    }.items()
}

# Together the first have every kind of node; the others are of the long tail.
OFTEN = ("scales", "branches", "vectors1.0", "kinds")
USUAL = [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in NETWORKS]
# Of what is tried in two ways, one of them is of the long tail, but for this network.
BOTH_WAYS = "branches"
ONE_WAY = [name for name in OFTEN if name != BOTH_WAYS]
OTHER_WAY = [
    n if n == BOTH_WAYS else pytest.param(n, marks=pytest.mark.exhaustive) for n in NETWORKS
]
