"""The BSConv layers of MXNet Gluon: blueprint separable convolutions.

With DO-Conv they compose in one way: the depthwise part may be a DO-Conv layer, which
`over_parameterize` makes it, and folds with the rest. The pointwise parts have one tap and nothing
to over-parameterize; a DO-Conv layer does not become a BSConv before it is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxnet.gluon import Block, ParameterDict, nn

from doconv_core.kinds.bsconv import MIN_MID_CHANNELS, P
from doconv_mx.bsconv_layer import _BSConv
from doconv_mx.view import overridden


class _BSConvU(_BSConv):
    """BSConv-U: `pointwise`, [`batch_norm`], `depthwise`."""

    variant = "u"

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        layout: str | None = None,
        activation: str | None = None,
        use_bias: bool = True,
        weight_initializer: Any = None,
        bias_initializer: Any = "zeros",
        prefix: str | None = None,
        params: ParameterDict | None = None,
        *,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "channels": channels,
            "kernel_size": kernel_size,
            "with_bn": with_bn,
        }
        geometry = (strides, padding, dilation)
        ending = {
            "activation": activation,
            "use_bias": use_bias,
            "bias_initializer": bias_initializer,
        }
        self._make(
            sizes, geometry, groups, layout, ending, weight_initializer, bn_options, prefix, params
        )


class _BSConvS(_BSConv):
    """BSConv-S: `pointwise1`, [`batch_norm1`], `pointwise2`, [`batch_norm2`], `depthwise`."""

    variant = "s"

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        layout: str | None = None,
        activation: str | None = None,
        use_bias: bool = True,
        weight_initializer: Any = None,
        bias_initializer: Any = "zeros",
        prefix: str | None = None,
        params: ParameterDict | None = None,
        *,
        p: float = P,
        min_mid_channels: int = MIN_MID_CHANNELS,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "channels": channels,
            "kernel_size": kernel_size,
            "p": p,
            "min_mid_channels": min_mid_channels,
            "with_bn": with_bn,
        }
        geometry = (strides, padding, dilation)
        ending = {
            "activation": activation,
            "use_bias": use_bias,
            "bias_initializer": bias_initializer,
        }
        self._make(
            sizes, geometry, groups, layout, ending, weight_initializer, bn_options, prefix, params
        )


class BSConvU1D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv1D`.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv1D`'s
    arguments in their order, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, W)` becomes `(B, O, W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = nn.Conv1D, 1


class BSConvU2D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv2D`.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv2D`'s
    arguments in their order, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = nn.Conv2D, 2


class BSConvU3D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv3D`.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv3D`'s
    arguments in their order, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = nn.Conv3D, 3


class BSConvS1D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv1D`.

    Takes `in_channels`, which cannot be inferred, then `mxnet.gluon.nn.Conv1D`'s
    arguments in their order, with groups=1; `p` and `min_mid_channels`, which give the channels
    between its pointwise convolutions; `with_bn`, a batch norm behind each of these; and
    `bn_options`, a dict of the batch norm's arguments.
    `(B, I, W)` becomes `(B, O, W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = nn.Conv1D, 1


class BSConvS2D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv2D`.

    Takes `in_channels`, which cannot be inferred, then `mxnet.gluon.nn.Conv2D`'s
    arguments in their order, with groups=1; `p` and `min_mid_channels`, which give the channels
    between its pointwise convolutions; `with_bn`, a batch norm behind each of these; and
    `bn_options`, a dict of the batch norm's arguments.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = nn.Conv2D, 2


class BSConvS3D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv3D`.

    Takes `in_channels`, which cannot be inferred, then `mxnet.gluon.nn.Conv3D`'s
    arguments in their order, with groups=1; `p` and `min_mid_channels`, which give the channels
    between its pointwise convolutions; `with_bn`, a batch norm behind each of these; and
    `bn_options`, a dict of the batch norm's arguments.
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.
    """

    ordinary, rank = nn.Conv3D, 3


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2D, BSConvS2D

LAYERS = {
    (cls.variant, cls.ordinary): cls
    for cls in (BSConvU1D, BSConvU2D, BSConvU3D, BSConvS1D, BSConvS2D, BSConvS3D)
}


def is_own(layer: Block) -> bool:
    """Return whether a layer is one of these, exactly, with the forward of its type."""
    return type(layer) in LAYERS.values() and not overridden(layer)
