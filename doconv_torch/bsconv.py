"""The BSConv layers of PyTorch: blueprint separable convolutions.

With DO-Conv they compose in one way: the depthwise part may be a DO layer, which
`over_parameterize` makes it, and folds with the rest. The pointwise parts have one tap and nothing
to over-parameterize; a DO layer does not become a BSConv before it is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from doconv_core.kinds.bsconv import MIN_MID_CHANNELS, P
from doconv_torch.bsconv_layer import _BSConv


class _BSConvU(_BSConv):
    """BSConv-U: `pointwise`, [`batch_norm`], `depthwise`."""

    variant = "u"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "with_bn": with_bn,
        }
        geometry, factory = (stride, padding, dilation), {"device": device, "dtype": dtype}
        self._make(sizes, geometry, groups, bias, padding_mode, factory, bn_options)


class _BSConvS(_BSConv):
    """BSConv-S: `pointwise1`, [`batch_norm1`], `pointwise2`, [`batch_norm2`], `depthwise`."""

    variant = "s"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        p: float = P,
        min_mid_channels: int = MIN_MID_CHANNELS,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "p": p,
            "min_mid_channels": min_mid_channels,
            "with_bn": with_bn,
        }
        geometry, factory = (stride, padding, dilation), {"device": device, "dtype": dtype}
        self._make(sizes, geometry, groups, bias, padding_mode, factory, bn_options)


class BSConvU1d(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `torch.nn.Conv1d`.

    Takes `torch.nn.Conv1d`'s arguments, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, norm, rank = nn.Conv1d, nn.BatchNorm1d, 1


class BSConvU2d(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `torch.nn.Conv2d`.

    Takes `torch.nn.Conv2d`'s arguments, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, norm, rank = nn.Conv2d, nn.BatchNorm2d, 2


class BSConvU3d(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `torch.nn.Conv3d`.

    Takes `torch.nn.Conv3d`'s arguments, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, norm, rank = nn.Conv3d, nn.BatchNorm3d, 3


class BSConvS1d(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `torch.nn.Conv1d`.

    Takes `torch.nn.Conv1d`'s arguments, with groups=1; `p` and `min_mid_channels`, which give the
    channels between its pointwise convolutions; `with_bn`, a batch norm behind each of these;
    and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, norm, rank = nn.Conv1d, nn.BatchNorm1d, 1


class BSConvS2d(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `torch.nn.Conv2d`.

    Takes `torch.nn.Conv2d`'s arguments, with groups=1; `p` and `min_mid_channels`, which give the
    channels between its pointwise convolutions; `with_bn`, a batch norm behind each of these;
    and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, norm, rank = nn.Conv2d, nn.BatchNorm2d, 2


class BSConvS3d(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `torch.nn.Conv3d`.

    Takes `torch.nn.Conv3d`'s arguments, with groups=1; `p` and `min_mid_channels`, which give the
    channels between its pointwise convolutions; `with_bn`, a batch norm behind each of these;
    and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, norm, rank = nn.Conv3d, nn.BatchNorm3d, 3


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2d, BSConvS2d
LAYERS = {
    (cls.variant, cls.ordinary): cls
    for cls in (BSConvU1d, BSConvU2d, BSConvU3d, BSConvS1d, BSConvS2d, BSConvS3d)
}


def is_own(layer: nn.Module) -> bool:
    """Return whether a layer is one of these, exactly, with the forward of its type."""
    return type(layer) in LAYERS.values() and "forward" not in vars(layer)
