"""The BSConv layers of PyTorch: blueprint separable convolutions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.kinds.bsconv import (
    MIN_MID_CHANNELS,
    STARTS,
    BSConvSpec,
    P,
    as_choice,
    batch_norm_options,
    check_groups,
    check_kernel,
)
from doconv_core.kinds.bsconv_init import blueprints
from doconv_core.maths.spec import as_tuple
from doconv_torch.arguments import StandIn
from doconv_torch.bsconv_kind import BSConvLayers, as_array, as_tensor
from doconv_torch.composed import ComposedConv, check_ordinary
from doconv_torch.surgery import ordinary_tensors

BN_OPTIONS = ("eps", "momentum", "affine", "track_running_stats")
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "bias")


def _of_depthwise(name: str) -> property:
    return property(
        lambda layer: getattr(layer.depthwise, name), doc=f"`{name}` of the depthwise convolution."
    )


class _BSConv(StandIn, nn.Sequential):
    """What the layers of every rank and variant share.

    A sequence of ordinary layers, named as `spec.names` says; stride, padding, dilation and bias
    are the depthwise one's. Each rank names the ordinary layer it stands in for, and batch norm.
    """

    ordinary: type[_ConvNd]
    norm: type[_BatchNorm]
    rank: int
    variant: str

    groups = 1
    explained: float | None = None  # of the kernel that the layer was started from
    stride, padding, dilation, padding_mode, bias = map(_of_depthwise, _GEOMETRY)
    # TorchScript is not to compile them.
    __jit_unused_properties__ = (*_GEOMETRY, "in_channels", "out_channels", "kernel_size")

    @classmethod
    def _spec(cls, in_channels: int, out_channels: int, kernel_size: Any, **own: Any) -> BSConvSpec:
        kernel_size = as_tuple("kernel_size", kernel_size, cls.rank)
        return BSConvSpec(in_channels, out_channels, kernel_size, cls.variant, **own)

    def _make(
        self,
        spec: BSConvSpec,
        geometry: tuple[Any, Any, Any],
        groups: int,
        bias: bool,
        padding_mode: str,
        factory: dict[str, Any],
        bn_options: Mapping[str, Any] | None,
    ) -> None:
        """Validate the arguments, and create the parts in the order of their use."""
        rank = self.rank
        check_groups(type(self).__name__, groups)
        stride, padding, dilation = geometry
        as_tuple("stride", stride, rank)
        as_tuple("dilation", dilation, rank)
        if not isinstance(padding, str):
            as_tuple("padding", padding, rank, least=0)
        options = batch_norm_options(spec.with_bn, bn_options, BN_OPTIONS)
        ordinary: Any = self.ordinary
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        shapes = iter(spec.pointwise_shapes)
        for name in spec.names:
            if name == "depthwise":
                channels = spec.out_channels
                parts[name] = ordinary(
                    channels, channels, spec.kernel_size, stride, padding, dilation, channels, bias,
                    padding_mode, **factory,
                )  # fmt: skip
            elif name.startswith("pointwise"):
                after, before = next(shapes)
                parts[name] = ordinary(before, after, 1, bias=False, **factory)
            else:
                parts[name] = self.norm(after, **options, **factory)
        nn.Sequential.__init__(self, parts)
        self.spec = spec

    @property
    def in_channels(self) -> int:
        """Input channels, `I`."""
        return self.spec.in_channels

    @property
    def out_channels(self) -> int:
        """Output channels, `O`."""
        return self.spec.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The depthwise convolution's kernel size."""
        return self.spec.kernel_size

    def __getitem__(self, index: Any) -> Any:
        """Return a part by its position; of a slice, a `torch.nn.Sequential` of them."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def composed_kernel(self) -> Tensor:
        """Return the kernel of the ordinary convolution of the same function, differentiable.

        `(O, I, *kernel_size)`, in the parameters' dtype; half types are composed in float32.
        Raises NotFoldable for a layer with batch norms, which is no mere kernel: `fold` it.
        """
        check_kernel(type(self).__name__, self.spec)
        parts: list[Any] = list(self.children())
        *pointwise, last = parts
        dw = last.composed_kernel() if isinstance(last, ComposedConv) else last.weight
        weights = [part.weight.flatten(1) for part in pointwise]
        if dw.dtype.itemsize < 4:
            weights = [weight.float() for weight in weights]
        pw = weights[0] if len(weights) == 1 else weights[1] @ weights[0]
        kernel: Tensor = (pw.reshape(*pw.shape, *(1,) * self.rank) * dw).to(dw.dtype)
        return kernel

    def fold(self, *, form: str = "keep") -> nn.Module:
        """Return new ordinary layers with the same function.

        form: "keep", a `torch.nn.Sequential` of the same parts; "merge", one of a pointwise and a
        depthwise convolution, with the batch norms in the former; "dense", one convolution.
        Device, dtype and mode are kept. Hooks are not carried over. A depthwise part that is a DO
        layer is folded too. Parameters are computed in float64 and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact, ValueError for another
        form.
        """
        with ordinary_tensors():
            folded: nn.Module = BSCONVS.folded(self, form).train(self.training)
            return folded

    @classmethod
    def from_conv(
        cls,
        conv: _ConvNd,
        *,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
        start: str = "weights",
        **sizes: Any,
    ) -> _BSConv:
        """Return a new layer to take a trained ordinary convolution's place.

        conv: an `ordinary` layer of PyTorch's own, exactly, with groups=1. start: "weights" for the
        BSConv that is nearest to its kernel, as `doconv_core.blueprints` finds it; its `explained`
        says how near. "random" for new weights. The bias is copied. Batch norms are new: in
        evaluation mode the identity, up to their epsilon. sizes: `p` and `min_mid_channels`, of
        BSConv-S.
        Raises TypeError for any other layer, ValueError for groups and for a kernel that is not
        finite.
        """
        check_ordinary(cls, conv)
        as_choice("start", start, STARTS)
        arguments = (
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode,
        )  # fmt: skip
        weight = conv.weight
        # On the meta device no random number is drawn for what is overwritten.
        device = "meta" if start == "weights" else weight.device
        options = {"with_bn": with_bn, "bn_options": bn_options, **sizes}
        layer: Any = cls(*arguments, device, weight.dtype, **options)  # type: ignore[call-overload]
        if start == "weights":
            layer.to_empty(device=weight.device)
            layer._start_from(weight)
        if conv.bias is not None:
            bias = nn.Parameter(conv.bias.detach().clone())
            layer.depthwise.bias = bias.requires_grad_(conv.bias.requires_grad)
        for name, parameter in layer.named_parameters():
            if name != "depthwise.bias":
                parameter.requires_grad_(weight.requires_grad)
        made: _BSConv = layer.to(memory_format=_memory_format(weight)).train(conv.training)
        return made

    @torch.no_grad()
    def _start_from(self, kernel: Tensor) -> None:
        """Take the blueprints of a trained kernel."""
        found = blueprints(as_array(kernel), self.spec)
        values = iter((*found.pointwise, found.depthwise))
        parts: list[Any] = list(self.children())
        for part in parts:
            if isinstance(part, _BatchNorm):
                part.reset_parameters()
            else:
                part.weight.copy_(as_tensor(next(values), part.weight).reshape(part.weight.shape))
        self.explained = found.explained


def _memory_format(weight: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last and weight.is_contiguous(memory_format=last) and not weight.is_contiguous():
        return last
    return torch.preserve_format


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
        spec = self._spec(in_channels, out_channels, kernel_size, with_bn=with_bn)
        geometry, factory = (stride, padding, dilation), {"device": device, "dtype": dtype}
        self._make(spec, geometry, groups, bias, padding_mode, factory, bn_options)


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
        own = {"p": p, "min_mid_channels": min_mid_channels, "with_bn": with_bn}
        spec = self._spec(in_channels, out_channels, kernel_size, **own)
        geometry, factory = (stride, padding, dilation), {"device": device, "dtype": dtype}
        self._make(spec, geometry, groups, bias, padding_mode, factory, bn_options)


class BSConvU1d(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `torch.nn.Conv1d`.

    Takes `torch.nn.Conv1d`'s arguments, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.

    >>> layer = BSConvU1d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 4, 8])
    >>> layer.fold(form="dense")
    Conv1d(3, 4, kernel_size=(3,), stride=(1,), padding=(1,))
    """

    ordinary, norm, rank = nn.Conv1d, nn.BatchNorm1d, 1


class BSConvU2d(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `torch.nn.Conv2d`.

    Takes `torch.nn.Conv2d`'s arguments, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.

    >>> layer = BSConvU2d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    >>> layer.fold(form="dense")
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    ordinary, norm, rank = nn.Conv2d, nn.BatchNorm2d, 2


class BSConvU3d(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `torch.nn.Conv3d`.

    Takes `torch.nn.Conv3d`'s arguments, with groups=1; `with_bn`, a batch norm behind the pointwise
    convolution; and `bn_options`, a dict of the batch norm's arguments.
    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.

    >>> layer = BSConvU3d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8, 8, 8)).shape
    torch.Size([2, 4, 8, 8, 8])
    >>> layer.fold(form="dense")
    Conv3d(3, 4, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1))
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

    >>> layer = BSConvS1d(8, 16, 3, p=0.5, padding=1)
    >>> layer(torch.zeros(2, 8, 8)).shape
    torch.Size([2, 16, 8])
    >>> layer.pointwise1
    Conv1d(8, 4, kernel_size=(1,), stride=(1,), bias=False)
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

    >>> layer = BSConvS2d(8, 16, 3, p=0.5, padding=1)
    >>> layer(torch.zeros(2, 8, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    >>> layer.pointwise1
    Conv2d(8, 4, kernel_size=(1, 1), stride=(1, 1), bias=False)
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

    >>> layer = BSConvS3d(8, 16, 3, p=0.5, padding=1)
    >>> layer(torch.zeros(2, 8, 8, 8, 8)).shape
    torch.Size([2, 16, 8, 8, 8])
    >>> layer.pointwise1
    Conv3d(8, 4, kernel_size=(1, 1, 1), stride=(1, 1, 1), bias=False)
    """

    ordinary, norm, rank = nn.Conv3d, nn.BatchNorm3d, 3


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2d, BSConvS2d
BSCONVS = BSConvLayers(_BSConv, BSConvU1d, BSConvU2d, BSConvU3d, BSConvS1d, BSConvS2d, BSConvS3d)
