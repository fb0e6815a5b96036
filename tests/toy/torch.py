"""The toy kind in PyTorch."""

from __future__ import annotations

from torch import nn

from doconv_torch.composed import ComposedConv, ComposedLayers
from doconv_torch.kinds import register
from toy.core import SCALED


class _ScaledConv(ComposedConv):
    kind = SCALED

    def composed_kernel(self):
        return self.weight * self.scale.reshape(-1, 1, *(1,) * self.rank)


class ScaledConv1d(_ScaledConv, nn.Conv1d):
    ordinary, rank = nn.Conv1d, 1


class ScaledConv2d(_ScaledConv, nn.Conv2d):
    ordinary, rank = nn.Conv2d, 2


class ScaledConv3d(_ScaledConv, nn.Conv3d):
    ordinary, rank = nn.Conv3d, 3


register(ComposedLayers(ScaledConv1d, ScaledConv2d, ScaledConv3d))
