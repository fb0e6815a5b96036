"""Fusing batch norms into the convolutions that they follow, in Gluon."""

from __future__ import annotations

import numpy as np
import pytest
from equal import close
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import fold, over_parameterize  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import image  # noqa: E402
from gluon_models import (  # noqa: E402
    HYBRIDIZED,
    built,
    chain,
    moved,
    outputs,
    square,
    step,
)
from mxnet.gluon import HybridBlock, nn  # noqa: E402
from mxnet.gluon.contrib.nn import Identity, SyncBatchNorm  # noqa: E402

from doconv_core import difference  # noqa: E402


def fused(model, **options):
    return fold(model, fuse_batchnorm=True, **options)


def test_what_a_batch_norm_and_its_convolution_have_become():
    target = fused(moved(over_parameterize(built()).model)).model
    assert type(target.norm) is nn.Dropout
    assert target.conv1.bias.name == f"{target.conv1.prefix}bias"
    assert target.conv1._kwargs["no_bias"] is False
    assert target.conv1.bias.grad_req == "write"


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
    assert close(step(target), expected)
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
    assert close(outputs(target), outputs(model))


class Renamed(nn.BatchNorm):
    """A batch norm whose code says another operator's options, and computes the same."""

    def hybrid_forward(self, F, x, gamma, beta, running_mean, running_var):
        return F.BatchNorm(
            x, gamma, beta, running_mean, running_var, cudnn_off=True, **self._kwargs
        )


@pytest.mark.parametrize(
    ("layers", "into"),
    [
        (lambda: [nn.Dense(5), nn.BatchNorm()], "Dense"),
        (lambda: [nn.Dense(5, flatten=False, use_bias=False), nn.BatchNorm(axis=-1)], "Dense"),
        (
            lambda: [nn.Conv2DTranspose(6, 3, groups=2, in_channels=4), nn.BatchNorm()],
            "Conv2DTranspose",
        ),
        (lambda: [square(), nn.Dropout(0.5), Identity(), Renamed()], "Conv2D"),
        (lambda: [nn.BatchNorm(), nn.Conv2D(6, 3, groups=2, in_channels=4)], "Conv2D"),
        (lambda: [nn.BatchNorm(), nn.Conv2D(6, 3, use_bias=False)], "Conv2D"),
    ],
)
@pytest.mark.parametrize("container", [nn.Sequential, nn.HybridSequential])
def test_layers_beside_a_batch_norm_that_take_it(container, layers, into):
    """In a graph, and in order where there is none."""
    unseen = nn.Lambda(lambda x: 2 * x) if container is nn.Sequential else nn.Activation("relu")
    model = container()
    model.add(*layers(), unseen)
    model = built(model, hybridized=container is nn.HybridSequential)
    target, report = fused(model)
    assert [(change.after, report.left) for change in report.changed] == [
        (f"fused into {into}", ())
    ]
    assert close(outputs(target), outputs(model))
    assert not [name for name in target.collect_params() if "running" in name]


def test_each_context_is_fused_with_its_own_statistics():
    contexts = [mx.cpu(0), mx.cpu(1)]
    model = built(ctx=contexts)
    model.norm.running_mean.data(contexts[1])[:] += 1
    target = fused(model).model
    for context in contexts:
        x = image().as_in_context(context)
        assert close(outputs(target, x), outputs(model, x))


def test_half_precision_is_fused_with_the_wide_statistics():
    model = built(chain(square(), nn.BatchNorm()))
    expected = outputs(fused(model).model)
    model.cast("float16")
    target, report = fused(model)
    assert report.left == ()
    assert target[0].weight.data().dtype == target[0].bias.data().dtype == np.float16
    target.cast("float32")  # MXNet has no half-precision convolution on the CPU
    assert difference(outputs(target)[0], expected[0]).relative < 5e-3


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
