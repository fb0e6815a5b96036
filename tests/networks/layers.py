"""One layer of every kind that a state holds, in every framework that has it.

Import after `need` of all three. A case is a shape of input, `(C, …)`, and for each framework a
function that makes the layers; None where the framework has no such layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# Before MXNet, which it makes importable.
import doconv_mx

# isort: split
import keras
import mxnet as mx
from mxnet.gluon import nn as gluon
from torch import nn

import doconv_tf
import doconv_torch

layers = keras.layers


class Case(NamedTuple):
    """torch, tf, mx: functions that return a layer, or several in their order."""

    shape: tuple[int, ...]
    torch: Callable[[], Any] | None
    tf: Callable[[], Any] | None
    mx: Callable[[], Any] | None
    tokens: bool = False


CASES = {
    "conv1d": Case(
        (4, 9),
        lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2),
        lambda: layers.Conv1D(6, 3, padding="same", dilation_rate=2),
        lambda: gluon.Conv1D(6, 3, padding=2, dilation=2, in_channels=4),
    ),
    "causal": Case(
        (4, 9),
        lambda: (nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(4, 6, 3, dilation=2)),
        lambda: layers.Conv1D(6, 3, padding="causal", dilation_rate=2),
        None,
    ),
    "conv2d": Case(
        (4, 8, 9),
        lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2),
        lambda: (
            layers.ZeroPadding2D((1, 2)),
            layers.Conv2D(6, (3, 5), strides=(2, 1), groups=2),
        ),
        lambda: gluon.Conv2D(6, (3, 5), (2, 1), (1, 2), groups=2, in_channels=4),
    ),
    "an even kernel, same": Case(
        (4, 8, 9),
        lambda: nn.Conv2d(4, 6, (2, 4), padding="same"),
        lambda: layers.Conv2D(6, (2, 4), padding="same"),
        None,
    ),
    "conv3d": Case(
        (4, 4, 5, 6),
        lambda: nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 0), bias=False),
        lambda: (layers.ZeroPadding3D((0, 1, 0)), layers.Conv3D(6, (1, 3, 2), use_bias=False)),
        lambda: gluon.Conv3D(6, (1, 3, 2), padding=(0, 1, 0), use_bias=False, in_channels=4),
    ),
    "depthwise1d": Case(
        (4, 9),
        lambda: nn.Conv1d(4, 8, 3, groups=4),
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        lambda: gluon.Conv1D(8, 3, groups=4, in_channels=4),
    ),
    "depthwise2d": Case(
        (4, 8, 9),
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        lambda: gluon.Conv2D(8, 3, groups=4, in_channels=4),
    ),
    "DO-Conv": Case(
        (4, 8, 9),
        lambda: doconv_torch.DOConv2d(4, 6, 3, padding=1, groups=2, depth_multiplier=12),
        lambda: doconv_tf.DOConv2D(6, 3, padding="same", groups=2, depth_multiplier=12),
        lambda: doconv_mx.DOConv2D(4, 6, 3, padding=1, groups=2, depth_multiplier=12),
    ),
    "DO-Conv, depthwise": Case(
        (4, 8, 9),
        lambda: doconv_torch.DOConv2d(4, 8, 3, padding=1, groups=4),
        lambda: doconv_tf.DODepthwiseConv2D(3, padding="same", depth_multiplier=2),
        lambda: doconv_mx.DOConv2D(4, 8, 3, padding=1, groups=4),
    ),
    "separable": Case(
        (4, 8, 9),
        lambda: (nn.Conv2d(4, 8, 3, 2, groups=4, bias=False), nn.Conv2d(8, 5, 1)),
        lambda: layers.SeparableConv2D(5, 3, strides=2, depth_multiplier=2),
        lambda: (
            gluon.Conv2D(8, 3, 2, groups=4, use_bias=False, in_channels=4),
            gluon.Conv2D(5, 1, in_channels=8),
        ),
    ),
    "DO-Conv, separable": Case(
        (4, 9),
        lambda: (
            doconv_torch.DOConv1d(4, 8, 3, groups=4, bias=False, depth_multiplier=4),
            nn.Conv1d(8, 5, 1),
        ),
        lambda: doconv_tf.DOSeparableConv1D(5, 3, depth_multiplier=2, d_multiplier=4),
        lambda: (
            doconv_mx.DOConv1D(4, 8, 3, groups=4, use_bias=False, depth_multiplier=4),
            gluon.Conv1D(5, 1, in_channels=8),
        ),
    ),
    "transposed1d": Case(
        (4, 7),
        lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1),
        lambda: layers.Conv1DTranspose(6, 4, strides=2, padding="same"),
        lambda: gluon.Conv1DTranspose(6, 4, 2, 1, in_channels=4),
    ),
    "transposed2d": Case(
        (4, 5, 6),
        lambda: nn.ConvTranspose2d(
            4, 6, (2, 3), stride=(3, 1), padding=(0, 1), output_padding=(1, 0)
        ),
        None,
        lambda: gluon.Conv2DTranspose(6, (2, 3), (3, 1), (0, 1), (1, 0), in_channels=4),
    ),
    "transposed2d, same": Case(
        (4, 5, 6),
        lambda: nn.ConvTranspose2d(4, 6, (4, 3), stride=(2, 1), padding=1, bias=False),
        lambda: layers.Conv2DTranspose(6, (4, 3), strides=(2, 1), padding="same", use_bias=False),
        lambda: gluon.Conv2DTranspose(6, (4, 3), (2, 1), (1, 1), use_bias=False, in_channels=4),
    ),
    "transposed2d, dilated": Case(
        (4, 5, 6),
        lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2),
        lambda: layers.Conv2DTranspose(6, 3, dilation_rate=2),
        lambda: gluon.Conv2DTranspose(6, 3, dilation=2, in_channels=4),
    ),
    "transposed2d, apart": Case(
        (4, 5, 6),
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=3, output_padding=1),
        lambda: layers.Conv2DTranspose(6, 2, strides=3),
        lambda: gluon.Conv2DTranspose(6, 2, 3, output_padding=1, in_channels=4),
    ),
    "transposed2d, grouped": Case(
        (4, 5, 6),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        None,
        lambda: gluon.Conv2DTranspose(6, 3, groups=2, in_channels=4),
    ),
    "transposed3d": Case(
        (4, 3, 4, 5),
        lambda: nn.ConvTranspose3d(4, 6, 2, stride=2),
        lambda: layers.Conv3DTranspose(6, 2, strides=2),
        lambda: gluon.Conv3DTranspose(6, 2, 2, in_channels=4),
    ),
    "linear": Case(
        (5,),
        lambda: nn.Linear(5, 3),
        lambda: layers.Dense(3),
        lambda: gluon.Dense(3, in_units=5),
    ),
    "batch norm of vectors": Case(
        (5,),
        lambda: nn.BatchNorm1d(5, 1e-3, 0.25),
        lambda: layers.BatchNormalization(epsilon=1e-3, momentum=0.75),
        lambda: gluon.BatchNorm(epsilon=1e-3, momentum=0.75, in_channels=5),
    ),
    "batch norm of images": Case(
        (4, 5, 6),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: layers.BatchNormalization(epsilon=1e-5, momentum=0.9, scale=False, center=False),
        None,
    ),
    "batch norm without a scale": Case(
        (4, 5, 6),
        None,
        lambda: layers.BatchNormalization(epsilon=1e-5, momentum=0.9, scale=False),
        lambda: gluon.BatchNorm(scale=False, in_channels=4),
    ),
    "batch norm of volumes": Case(
        (4, 3, 4, 5),
        lambda: nn.BatchNorm3d(4),
        lambda: layers.BatchNormalization(epsilon=1e-5, momentum=0.9),
        lambda: gluon.BatchNorm(in_channels=4),
    ),
    "layer norm": Case(
        (5,),
        lambda: nn.LayerNorm(5),
        lambda: layers.LayerNormalization(epsilon=1e-5),
        lambda: gluon.LayerNorm(in_channels=5),
    ),
    "group norm": Case(
        (6, 4, 5),
        lambda: nn.GroupNorm(3, 6),
        lambda: layers.GroupNormalization(3, epsilon=1e-5),
        None,
    ),
    "instance norm": Case(
        (6, 4, 5),
        lambda: nn.InstanceNorm2d(6, affine=True),
        lambda: layers.GroupNormalization(-1, epsilon=1e-5),
        lambda: gluon.InstanceNorm(in_channels=6),
    ),
    "prelu, one slope": Case(
        (4, 5, 6),
        lambda: nn.PReLU(),
        lambda: layers.PReLU(shared_axes=[1, 2, 3]),
        lambda: gluon.PReLU(),
    ),
    "prelu, a slope for each channel": Case(
        (4, 5, 6),
        lambda: nn.PReLU(4),
        lambda: layers.PReLU(shared_axes=[1, 2]),
        lambda: gluon.PReLU(in_channels=4),
    ),
    "embedding": Case(
        (6,),
        lambda: nn.Embedding(10, 5),
        lambda: layers.Embedding(10, 5),
        lambda: gluon.Embedding(10, 5),
        tokens=True,
    ),
}


def model_of(backend: str, case: Case) -> Any:
    """Return a built model of the case's layers alone."""
    made = getattr(case, backend)()
    made = made if isinstance(made, tuple) else (made,)
    if backend == "torch":
        return nn.Sequential(*made).eval()
    if backend == "tf":
        shape = case.shape if case.tokens else (*case.shape[1:], case.shape[0])
        return keras.Sequential([keras.Input(shape, dtype="int32" if case.tokens else None), *made])
    net = gluon.HybridSequential()
    net.add(*made)
    net.initialize(mx.init.Normal(0.2))
    return net
