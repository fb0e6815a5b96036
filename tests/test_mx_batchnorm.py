"""Fusing batch norms into the convolutions that they follow, in Gluon."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import fold, over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import image  # noqa: E402
from gluon_models import (  # noqa: E402
    HYBRIDIZED,
    INPLACE,
    alike,
    built,
    chain,
    moved,
    outputs,
    same,
    square,
    step,
    trained_statistics,
)
from mxnet.gluon import Block, HybridBlock, Parameter, nn  # noqa: E402
from mxnet.gluon.contrib.nn import SyncBatchNorm  # noqa: E402

from doconv_core import difference  # noqa: E402
from doconv_core.model import (  # noqa: E402
    AXIS,
    HOOKED,
    NOT_DIRECT,
    NOT_FINITE,
    NOT_PLAIN,
    OUTPUT,
    REPLACED,
    SEVERAL,
    SHARED,
    SUBCLASS,
    TRANSPOSED,
    behind,
)
from doconv_mx.batchnorm import HIDDEN, NO_VALUES, SAME_NAME  # noqa: E402


def fused(model, **options):
    return fold(model, fuse_batchnorm=True, **options)


@HYBRIDIZED
@INPLACE
@pytest.mark.parametrize("over", [False, True], ids=["ordinary", "over-parameterized"])
def test_batch_norms_become_part_of_their_convolutions(hybridized, inplace, over):
    model, twin = built(hybridized=hybridized), built(hybridized=hybridized)
    if over:
        model, twin = (moved(over_parameterize(m).model) for m in (model, twin))
    target, report = fused(model, inplace=inplace)
    assert alike(outputs(target), outputs(twin))
    assert report.left == ()
    assert [c for c in report.changed if "Conv" not in c.before] == [
        ("norm", "BatchNorm", "fused into Conv2D"),
        ("body.2", "BatchNorm", "fused into Conv2D"),
    ]
    assert type(target.norm) is nn.Dropout
    assert not [n for n in target.collect_params() if "batchnorm" in n]
    assert target.conv1.bias.name == f"{target.conv1.prefix}bias"
    assert target.conv1._kwargs["no_bias"] is False
    assert target.conv1.bias.grad_req == "write"
    again, report = fused(target)
    assert not report.changed
    assert same(outputs(again), outputs(target))


@HYBRIDIZED
@pytest.mark.parametrize("container", [nn.Sequential, nn.HybridSequential])
def test_gradients_pass_through_what_a_batch_norm_has_become(hybridized, container):
    """Also where every layer is a graph by itself, as in a plain sequential block."""
    model = container()
    unseen = nn.Lambda(lambda x: 2 * x) if container is nn.Sequential else nn.Activation("relu")
    model.add(square(), nn.BatchNorm(), nn.Conv2D(3, 3), unseen)
    model = built(model)
    model[1]._kwargs["use_global_stats"] = True  # so that training computes what inference does
    expected = step(model)
    target = fused(model).model
    target.hybridize(hybridized)
    assert alike(step(target), expected)
    assert target[0].weight.grad().asnumpy().any()


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (nn.BatchNorm, {"scale": False}),
        (nn.BatchNorm, {"center": False}),
        (nn.BatchNorm, {"epsilon": 0.1}),
        (nn.BatchNorm, {"axis": -3}),
        (nn.BatchNorm, {"use_global_stats": True}),
        (SyncBatchNorm, {"num_devices": 1}),
    ],
    ids=["scale", "center", "epsilon", "axis", "global", "synchronized"],
)
def test_every_setting_of_a_batch_norm(norm, options):
    model = built(chain(square(), norm(**options)))
    target, report = fused(model)
    assert report.left == ()
    assert alike(outputs(target), outputs(model))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("conv", [nn.Conv1D, nn.Conv2D, nn.Conv3D])
def test_every_rank_and_grouping(conv, groups, use_bias):
    x = image(2, 4, *[5] * int(conv.__name__[-2]))
    model = chain(conv(8, 2, groups=groups, use_bias=use_bias), nn.BatchNorm())
    model.initialize(mx.init.Normal(0.3))
    outputs(model, x)
    trained_statistics(model)
    target, report = fused(model)
    assert report.left == ()
    assert alike(outputs(target, x), outputs(model, x))


def test_each_context_is_fused_with_its_own_statistics():
    contexts = [mx.cpu(0), mx.cpu(1)]
    model = built(ctx=contexts)
    model.norm.running_mean.data(contexts[1])[:] += 1
    target = fused(model).model
    for context in contexts:
        x = image().as_in_context(context)
        assert alike(outputs(target, x), outputs(model, x))


def test_half_precision_is_fused_with_the_wide_statistics():
    model = built(chain(square(), nn.BatchNorm()))
    expected = outputs(fused(model).model)
    model.cast("float16")
    target, report = fused(model)
    assert report.left == ()
    assert target[0].weight.data().dtype == target[0].bias.data().dtype == np.float16
    target.cast("float32")  # MXNet has no half-precision convolution on the CPU
    assert difference(outputs(target)[0], expected[0]).relative < 5e-3


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
    assert alike(outputs(target), outputs(model))


class Branching(HybridBlock):
    """A block whose layers do not simply follow each other. kind: how."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.other = square(), nn.BatchNorm(), square()

    def hybrid_forward(self, F, x):
        if self.kind == "output used twice":
            y = self.conv(x)
            return self.norm(y) + self.other(y)
        if self.kind == "output returned":
            y = self.conv(x)
            return self.norm(y), self.other(y), y
        if self.kind == "two convolutions":
            return self.norm(self.conv(x)) + self.norm(self.other(x))
        if self.kind == "activation between":
            return self.other(self.norm(F.relu(self.conv(x))))
        if self.kind == "convolution used again":
            return self.conv(self.norm(self.conv(x)) + self.other(x))
        return self.conv(self.norm(self.other(x) + x))


@HYBRIDIZED
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("output used twice", OUTPUT),
        ("output returned", OUTPUT),
        ("two convolutions", SEVERAL),
        ("activation between", NOT_DIRECT),
        ("convolution used again", OUTPUT),
        ("sum between", NOT_DIRECT),
    ],
)
def test_what_does_not_directly_follow_is_left(kind, reason, hybridized):
    model = built(Branching(kind), hybridized)
    target, report = fused(model)
    assert report.left == (("norm", "BatchNorm", reason),)
    assert not report.changed
    assert same(outputs(target), outputs(model))


class Repeated(HybridBlock):
    """A pair of convolution and batch norm that is called at two scales, with two inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = square(), nn.BatchNorm()

    def hybrid_forward(self, F, x, y, offset=None):
        return self.norm(self.conv(x)), self.norm(self.conv(F.Pooling(y, kernel=(2, 2))))


def test_a_pair_that_is_called_again_is_fused():
    model, x = Repeated(), (image(), image())
    model.initialize(mx.init.Normal(0.3))
    model(*x)
    trained_statistics(model)
    target, report = fused(model)
    assert report.left == ()
    assert verify(target, model, x).relative <= 1e-5


class Doubling(nn.BatchNorm):
    def hybrid_forward(self, F, x, *args, **kwargs):
        return 2 * super().hybrid_forward(F, x, *args, **kwargs)


class Standardised(nn.Conv2D):
    """A convolution that computes something else."""


class Gamma(Parameter):
    """A parameter of another kind."""


def of_gammas(conv):
    conv.weight.__class__ = Gamma
    return conv


def replaced(layer):
    layer.hybrid_forward = functools.partial(type(layer).hybrid_forward, layer)
    return layer


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


def without_values():
    model = chain(square(), nn.BatchNorm())
    model.initialize()
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: built(chain(square(), Doubling())), SUBCLASS),
        (lambda: built(chain(square(), nn.BatchNormReLU())), SUBCLASS),
        (lambda: built(chain(square(activation="relu"), nn.BatchNorm())), NOT_DIRECT),
        (lambda: built(chain(nn.Conv2DTranspose(4, 3), nn.BatchNorm())), behind(TRANSPOSED)),
        (lambda: built(chain(Standardised(4, 3), nn.BatchNorm())), behind(SUBCLASS)),
        (lambda: built(chain(replaced(square()), nn.BatchNorm())), behind(REPLACED)),
        (lambda: built(chain(of_gammas(square()), nn.BatchNorm())), behind(NOT_PLAIN)),
        (lambda: built(chain(square(), replaced(nn.BatchNorm()))), REPLACED),
        (lambda: built(chain(nn.BatchNorm())), NOT_DIRECT),
        (lambda: built(chain(square(), hooked(nn.BatchNorm()))), HOOKED),
        (lambda: built(chain(hooked(square()), nn.BatchNorm())), HOOKED),
        (lambda: built(chain(square(), nn.BatchNorm(axis=2))), AXIS),
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
        np.testing.assert_array_equal(outputs(target), outputs(model))


class Unnamed(HybridBlock):
    """A block that adds nothing to names, so that its operators are numbered with all others."""

    def __init__(self):
        super().__init__(prefix="")
        self.conv, self.norm = square(), nn.BatchNorm()

    def hybrid_forward(self, F, x):
        return F.relu(self.norm(self.conv(x)))


def test_looking_for_batch_norms_leaves_no_trace_in_names():
    numbers = []
    for _ in range(2):
        numbers.append(int(mx.sym.relu(mx.sym.var("data")).name.removeprefix("relu")))
        assert len(fused(built(Unnamed())).report.changed) == 1
    assert numbers[1] == numbers[0] + 1


def test_looking_for_batch_norms_does_not_run_hooks():
    model, seen = built(), []
    model.body[0].register_forward_hook(lambda *args: seen.append(args))
    model.register_forward_pre_hook(lambda *args: seen.append(args))
    fused(model)
    fused(model, inplace=True)
    assert not seen
    outputs(model)
    assert len(seen) == 2


def test_without_asking_batch_norms_are_left():
    report = fold(built()).report
    assert report.left == report.changed == ()
    model = over_parameterize(built(chain(square(), nn.BatchNorm()))).model
    assert type(fold(model).model[1]) is nn.BatchNorm


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
    assert alike(outputs(target), expected)
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
