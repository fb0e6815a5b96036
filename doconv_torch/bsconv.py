"""The BSConv layers of PyTorch, blueprint separable convolutions; and how models get them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.kinds.base import PartNorm
from doconv_core.kinds.bsconv import (
    BIAS_COMPUTED,
    MIN_MID_CHANNELS,
    STARTS,
    WEIGHT_BOUND,
    BSConvSpec,
    P,
    as_choice,
    batch_norm_options,
    blueprints,
    check_groups,
    check_kernel,
    obstacle,
)
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.separable import Folded, Normalization, Pointwise
from doconv_core.maths.spec import as_tuple
from doconv_core.models.parted import HOOKED, PartedLayers
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_torch import ordinary
from doconv_torch.arguments import StandIn, as_places, pads_of
from doconv_torch.batchnorm import norm_obstacle
from doconv_torch.composed import ComposedConv, Ordinary, check_ordinary
from doconv_torch.ordinary import HOOKS, is_bound, kind_of, spec_of
from doconv_torch.surgery import become, ordinary_tensors

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

BN_OPTIONS = ("eps", "momentum", "affine", "track_running_stats")
_SIZES = ("in_channels", "out_channels", "kernel_size")
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "bias")


def _of(owner: str, name: str) -> property:
    return property(
        lambda layer: getattr(getattr(layer, owner), name), doc=f"The {owner}'s {name}."
    )


class _BSConv(StandIn, nn.Sequential, Generic[Ordinary]):
    """What the layers of every rank and variant share.

    A sequence of ordinary layers, named as `spec.names` says; stride, padding, dilation and bias
    are the depthwise one's. Each rank names the ordinary layer it stands in for, and batch norm.
    """

    ordinary: type[Ordinary]
    norm: type[_BatchNorm]
    rank: int
    variant: str

    groups = 1
    explained: float | None = None  # of the kernel that the layer was started from
    in_channels, out_channels, kernel_size = (_of("spec", name) for name in _SIZES)
    stride, padding, dilation, padding_mode, bias = (_of("depthwise", name) for name in _GEOMETRY)
    __jit_unused_properties__ = (*_SIZES, *_GEOMETRY)  # TorchScript is not to compile them

    def _make(
        self, conv: tuple[Any, ...], bn_options: Mapping[str, Any] | None, **own: Any
    ) -> None:
        """Validate the arguments, and create the parts in the order of their use.

        conv: the ordinary layer's arguments. own: those that the spec takes beside its sizes.
        """
        before, after, size, stride, padding, dilation, groups, bias, mode, device, dtype = conv
        rank, factory = self.rank, {"device": device, "dtype": dtype}
        spec = BSConvSpec(before, after, as_tuple("kernel_size", size, rank), self.variant, **own)
        check_groups(type(self).__name__, groups)
        as_places(rank, stride, padding, dilation)
        options = batch_norm_options(spec.with_bn, bn_options, BN_OPTIONS)
        ordinary: Any = self.ordinary
        channels = spec.in_channels
        made: OrderedDict[str, nn.Module] = OrderedDict()
        for part in spec.parts:
            if isinstance(part, PartNorm):
                made[part.name] = self.norm(channels, **options, **factory)
            elif part.depthwise:
                made[part.name] = ordinary(
                    channels, channels, spec.kernel_size, stride, padding, dilation, channels, bias,
                    mode, **factory,
                )  # fmt: skip
            else:
                made[part.name] = ordinary(channels, part.channels, 1, bias=False, **factory)
                channels = part.channels
        nn.Sequential.__init__(self, made)
        self.spec = spec

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

    @overload
    def fold(self, *, form: Literal["keep", "merge"] = "keep") -> nn.Sequential: ...
    @overload
    def fold(self, *, form: Literal["dense"]) -> Ordinary: ...
    @overload
    def fold(self, *, form: str) -> nn.Module: ...
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
        conv: Ordinary,
        *,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
        start: str = "weights",
        **sizes: Any,
    ) -> Self:
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
        made: Self = layer.to(memory_format=memory_format(weight)).train(conv.training)
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


def memory_format(weight: Tensor) -> torch.memory_format:
    """Return the memory format of a weight, as `to` takes it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last and weight.is_contiguous(memory_format=last) and not weight.is_contiguous():
        return last
    return torch.preserve_format


class _BSConvU(_BSConv[Ordinary]):
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
        conv = (
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._make(conv, bn_options, with_bn=with_bn)


class _BSConvS(_BSConv[Ordinary]):
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
        conv = (
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._make(conv, bn_options, p=p, min_mid_channels=min_mid_channels, with_bn=with_bn)


class BSConvU1d(_BSConvU[nn.Conv1d]):
    """As `BSConvU2d`, in the place of a `torch.nn.Conv1d`.

    `(B, I, L)` becomes `(B, O, L')`.

    >>> layer = BSConvU1d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 4, 8])
    >>> layer.fold(form="dense")
    Conv1d(3, 4, kernel_size=(3,), stride=(1,), padding=(1,))
    """

    ordinary, norm, rank = nn.Conv1d, nn.BatchNorm1d, 1


class BSConvU2d(_BSConvU[nn.Conv2d]):
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


class BSConvU3d(_BSConvU[nn.Conv3d]):
    """As `BSConvU2d`, in the place of a `torch.nn.Conv3d`.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.

    >>> layer = BSConvU3d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8, 8, 8)).shape
    torch.Size([2, 4, 8, 8, 8])
    >>> layer.fold(form="dense")
    Conv3d(3, 4, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1))
    """

    ordinary, norm, rank = nn.Conv3d, nn.BatchNorm3d, 3


class BSConvS1d(_BSConvS[nn.Conv1d]):
    """As `BSConvS2d`, in the place of a `torch.nn.Conv1d`.

    `(B, I, L)` becomes `(B, O, L')`.

    >>> layer = BSConvS1d(8, 16, 3, p=0.5, padding=1)
    >>> layer(torch.zeros(2, 8, 8)).shape
    torch.Size([2, 16, 8])
    >>> layer.pointwise1
    Conv1d(8, 4, kernel_size=(1,), stride=(1,), bias=False)
    """

    ordinary, norm, rank = nn.Conv1d, nn.BatchNorm1d, 1


class BSConvS2d(_BSConvS[nn.Conv2d]):
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


class BSConvS3d(_BSConvS[nn.Conv3d]):
    """As `BSConvS2d`, in the place of a `torch.nn.Conv3d`.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.

    >>> layer = BSConvS3d(8, 16, 3, p=0.5, padding=1)
    >>> layer(torch.zeros(2, 8, 8, 8, 8)).shape
    torch.Size([2, 16, 8, 8, 8])
    >>> layer.pointwise1
    Conv3d(8, 4, kernel_size=(1, 1, 1), stride=(1, 1, 1), bias=False)
    """

    ordinary, norm, rank = nn.Conv3d, nn.BatchNorm3d, 3


class Parts(PartedLayers):
    """How parts of layers, ordinary layers of PyTorch, are read."""

    composed, batch_norm = ComposedConv, _BatchNorm
    is_replaced = staticmethod(ordinary.is_replaced)

    def _parts(self, layer: nn.Module) -> dict[str, nn.Module]:
        return dict(layer.named_children())

    def _watcher(self, part: nn.Module) -> str | None:
        return HOOKED if any(getattr(part, hooks) for hooks in HOOKS) else None

    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        reason = norm_obstacle(norm)
        return f"{reason}; call model.eval() first" if reason and norm.training else reason

    def _conv_obstacle(self, layer: Any, name: str, part: nn.Module) -> str | None:
        kind = layer.ordinary
        reason = ordinary.obstacle(part) if type(part) is kind else f"it is a {kind_of(part)}"
        if reason is None and "bias" in vars(part):
            reason = "its bias is computed before each call"
        return reason and f"{reason}; expected a torch.nn.{kind.__name__}"

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        weight = as_array(conv.weight).reshape(conv.out_channels, -1)
        return Pointwise(weight, as_array(conv.bias))

    def _normalization(self, norm: Any, context: Any) -> Normalization:
        values = norm.running_mean, norm.running_var, norm.weight, norm.bias
        mean, variance, scale, offset = map(as_array, values)
        return Normalization(mean, variance, norm.eps, scale, offset)

    def _ordinary(self, part: nn.Module) -> nn.Module:
        return part.fold() if isinstance(part, ComposedConv) else copy.deepcopy(part)


class BSConvLayers(Parts, SeparableLayers):
    """The BSConv layers of PyTorch."""

    sequence = nn.Sequential

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason is None and "bias" in vars(layer):
            return BIAS_COMPUTED
        return reason or (WEIGHT_BOUND if is_bound(layer.weight) else None)

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                new.depthwise.bias = site.layer.bias
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            layer = site.layer
            if new is None:
                new = nn.Sequential(OrderedDict(layer.named_children()))
            elif isinstance(new, nn.Sequential):
                new.depthwise = layer.depthwise
            become(layer, new)

    def _strides(self, layer: Any) -> Sequence[int] | None:
        found = isinstance(layer._modules.get("depthwise"), _ConvNd)
        return layer.stride if found else None

    def _passes_on(self, part: nn.Module) -> bool:
        return type(part) is nn.Identity

    def _is_pointwise(self, conv: Any) -> bool:
        padded = not isinstance(conv.padding, str) and any(conv.padding)
        taps = conv.weight[0].numel()
        return taps == conv.in_channels and set(conv.stride) == {1} and not padded

    def _is_depthwise(self, conv: Any) -> bool:
        return bool(conv.groups == conv.in_channels == conv.out_channels)

    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        stride, dilation = depthwise.stride, depthwise.dilation
        pads = pads_of(depthwise.kernel_size, stride, depthwise.padding, dilation)
        return Geometry(stride, dilation, pads, depthwise.padding_mode)

    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any = None
    ) -> nn.Module:
        (kernel, bias), like = values[None], depthwise or layer[0]
        conv: nn.Module = layer.ordinary(
            kernel.shape[1], len(kernel), tuple(like.weight.shape[2:]), like.stride, like.padding,
            like.dilation, 1, bias is not None, like.padding_mode, "meta", like.weight.dtype,
        )  # fmt: skip
        trainable = any(parameter.requires_grad for parameter in layer.parameters())
        for name, value in (("weight", kernel), ("bias", bias)):
            if value is not None:
                tensor = as_tensor(value, like.weight).reshape(getattr(conv, name).shape)
                setattr(conv, name, nn.Parameter(tensor, requires_grad=trainable))
        return conv

    def _sequenced(self, layer: Any, parts: Mapping[str, nn.Module]) -> nn.Module:
        return nn.Sequential(OrderedDict(parts))


def as_array(tensor: Tensor | None) -> Any:
    """Return a tensor's values in float64, None as None; zeros for what is on the meta device."""
    if tensor is None:
        return None
    if tensor.is_meta:
        return np.zeros(tuple(tensor.shape))
    return tensor.detach().cpu().double().numpy()


def as_tensor(values: Any, like: Tensor) -> Tensor:
    """Return an array as a tensor of the dtype and on the device of `like`, rounded once."""
    return torch.from_numpy(np.array(values)).to(like.dtype).to(like.device)


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2d, BSConvS2d
BSCONVS = BSConvLayers(_BSConv, BSConvU1d, BSConvU2d, BSConvU3d, BSConvS1d, BSConvS2d, BSConvS3d)
