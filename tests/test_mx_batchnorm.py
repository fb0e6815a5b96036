"""Fusing batch norms into the convolutions that they follow, in Gluon."""

from __future__ import annotations

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
from mxnet.gluon import HybridBlock, nn  # noqa: E402
from mxnet.gluon.contrib.nn import SyncBatchNorm  # noqa: E402

from doconv_core import difference  # noqa: E402


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
