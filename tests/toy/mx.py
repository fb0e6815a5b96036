"""The toy kind in Gluon."""

from __future__ import annotations

from mxnet.gluon import nn

from doconv_mx.composed import ComposedConv, ComposedLayers
from doconv_mx.kinds import register
from toy.core import SCALED


class _ScaledConv(ComposedConv):
    kind = SCALED

    def compose(self, F, entries):
        scale = F.reshape(entries["scale"], shape=(-1, 1, *(1,) * self.rank))
        return F.broadcast_mul(entries["weight"], scale)


class ScaledConv1D(_ScaledConv, nn.Conv1D):
    ordinary, rank = nn.Conv1D, 1


class ScaledConv2D(_ScaledConv, nn.Conv2D):
    ordinary, rank = nn.Conv2D, 2


class ScaledConv3D(_ScaledConv, nn.Conv3D):
    ordinary, rank = nn.Conv3D, 3


register(ComposedLayers(ScaledConv1D, ScaledConv2D, ScaledConv3D))
