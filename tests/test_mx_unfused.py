"""Gluon's batch norms that are not fused into the convolutions before them, and why."""

from __future__ import annotations

import copy

import pytest
from equal import close, same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import fold, over_parameterize  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_models import (  # noqa: E402
    INPLACE,
    built,
    chain,
    moved,
    outputs,
    square,
)
from mxnet.gluon import Block, HybridBlock, Parameter, nn  # noqa: E402

from doconv_core.models.report import (  # noqa: E402
    AXIS,
    HOOKED,
    NOT_DIRECT,
    NOT_FINITE,
    NOT_PLAIN,
    SHARED,
    SUBCLASS,
    behind,
    read_elsewhere,
)

HIDDEN = "called by a forward that cannot be traced without data"
SAME_NAME = "another parameter has the name of one of its own or of its convolution's"
NO_VALUES = "it or its convolution has no values yet"


def fused(model, **options):
    return fold(model, fuse_batchnorm=True, **options)


class Plain(Block):
    """A block of whose forward nothing can be seen."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = square(), nn.BatchNorm()
        self.body = chain(square(), nn.BatchNorm())
        self.listed = nn.Sequential()
        self.listed.add(square(), nn.BatchNorm(), square(activation="relu"), nn.BatchNorm())
        self.listed.add(nn.Lambda(lambda x: 2 * x))

    def forward(self, x):
        return self.listed(self.body(self.norm(self.conv(x))))


class Needing(HybridBlock):
    """A hybrid block that cannot be traced without data."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.body = square(), nn.BatchNorm(), chain(square(), nn.BatchNorm())

    def hybrid_forward(self, F, x):
        return self.body(self.norm(self.conv(x)).reshape(x.shape))


@pytest.mark.parametrize(
    ("cls", "seen", "left"),
    [
        (Plain, ["body.1", "listed.1"], {"norm": HIDDEN, "listed.3": NOT_DIRECT}),
        (Needing, ["body.1"], {"norm": HIDDEN}),
    ],
)
def test_what_a_forward_does_unseen_is_left(cls, seen, left):
    model = built(cls())
    target, report = fused(model)
    assert [c.path for c in report.changed] == seen
    assert {entry.path: entry.reason for entry in report.left} == left
    assert close(outputs(target), outputs(model))


class Gamma(Parameter):
    """A parameter of another kind."""


def of_gammas(conv):
    conv.weight.__class__ = Gamma
    return conv


def hooked(layer):
    layer.register_forward_hook(lambda *args: None)
    return layer


def constant_statistics():
    """Return a pair of which one channel has varied by nothing, nor will it."""
    norm = nn.BatchNorm(epsilon=0.0)
    model = built(chain(square(), norm))
    norm.running_var.set_data(mx.nd.zeros(4))
    return model


class Tied(HybridBlock):
    """Two convolutions of one weight, both before one batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = square(), nn.BatchNorm()
        self.other = square(self.conv.params)

    def hybrid_forward(self, F, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x * x))


def two_norms_of_one_weight():
    first = square()
    return built(chain(first, nn.BatchNorm(), square(first.params), nn.BatchNorm()))


class Read(HybridBlock):
    """A pair of which a parameter is also read by the block around it."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm, self.read = square(), nn.BatchNorm(), read

    def hybrid_forward(self, F, x):
        y, parameter = self.norm(self.conv(x)), self.read(self)
        return y, parameter.data() if F is mx.nd else parameter.var()


def without_values():
    model = chain(square(), nn.BatchNorm())
    model.initialize()
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: built(chain(square(), nn.BatchNormReLU())), SUBCLASS),
        (lambda: built(chain(square(activation="relu"), nn.BatchNorm())), NOT_DIRECT),
        (lambda: built(chain(of_gammas(square()), nn.BatchNorm())), behind(NOT_PLAIN)),
        (lambda: built(chain(square(), hooked(nn.BatchNorm()))), HOOKED),
        (lambda: built(chain(hooked(square()), nn.BatchNorm())), HOOKED),
        (lambda: built(chain(square(), nn.BatchNorm(axis=2))), AXIS),
        (lambda: built(chain(square(), hooked(nn.Dropout(0.5)), nn.BatchNorm())), NOT_DIRECT),
        (lambda: built(chain(nn.BatchNorm(), square())), NOT_DIRECT),
        (
            lambda: built(chain(nn.Dense(4, flatten=False), nn.BatchNorm(axis=1))),
            "it may normalize another axis than the dense layer's units",
        ),
        (lambda: built(Read(lambda b: b.norm.running_mean)), read_elsewhere(["running_mean"])),
        (lambda: built(Read(lambda b: b.conv.bias)), SHARED),
        (two_norms_of_one_weight, SHARED),
        (lambda: built(Tied()), SHARED),
        (without_values, NO_VALUES),
        (constant_statistics, NOT_FINITE),
    ],
)
def test_what_cannot_be_fused_exactly_is_left_and_reported(model, reason):
    model = model()
    target, report = fused(model)
    assert {left.reason for left in report.left} == {reason}
    assert not report.changed
    assert repr(target) == repr(model)
    if reason != NO_VALUES:
        assert same(outputs(target), outputs(model))


def pair(**options):
    return built(chain(square(**options), nn.BatchNorm(**options)))


@INPLACE
@pytest.mark.parametrize("over", [False, True], ids=["ordinary", "over-parameterized"])
def test_layers_of_equal_names_are_left(inplace, over):
    """A copy beside its original: which of the two a call in a graph is of cannot be told."""
    branch = pair()
    model = chain(branch, copy.deepcopy(branch), pair())
    branch[0].weight.set_data(0.5 * branch[0].weight.data())
    branch[1].gamma.set_data(2 * branch[1].gamma.data())
    if over:
        model = over_parameterize(model).model
        for child in model:
            moved(child)
    expected = outputs(model)
    target, report = fused(model, inplace=inplace)
    assert close(outputs(target), expected)
    assert report.left == (("0.1", "BatchNorm", SAME_NAME), ("1.1", "BatchNorm", SAME_NAME))
    assert report.changed[-1] == ("2.1", "BatchNorm", "fused into Conv2D")


@pytest.mark.parametrize("twice", ["conv", "norm"])
def test_one_equal_name_is_enough_for_being_left(twice):
    """Given by hand, and only one layer's of each pair."""
    pairs = [pair(), pair()]
    layers = [layers[twice == "norm"] for layers in pairs]
    for parameter in layers[1]._reg_params.values():
        old, new = layers[1].prefix, layers[0].prefix
        parameter.name = parameter.name.replace(old, new)
    model = chain(*pairs)
    expected = outputs(model)
    target, report = fused(model)
    assert report.left == (("0.1", "BatchNorm", SAME_NAME), ("1.1", "BatchNorm", SAME_NAME))
    assert not report.changed
    assert same(outputs(target), expected)
