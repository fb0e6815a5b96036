"""The layers of PyTorch that are branches with batch norms; and how models get them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from doconv_core.kinds.bsconv import WEIGHT_BOUND, batch_norm_options
from doconv_core.kinds.normed import (
    KINDS,
    PASSING,
    SUM_NORM,
    TRAINED,
    ZERO,
    BranchedSpec,
    Conv,
    Mean,
    Norm,
    Pairs,
    Piece,
)
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.separable import Folded
from doconv_core.maths.spec import ConvSpec, as_tuple
from doconv_core.models.normed import NormedLayers
from doconv_core.models.report import REPLACED, SUBCLASS
from doconv_torch.affine import BATCHNORMS
from doconv_torch.arguments import StandIn, as_places, pads_of
from doconv_torch.batchnorm import ATTRIBUTES
from doconv_torch.bsconv import BN_OPTIONS, Parts, as_array, as_tensor, memory_format
from doconv_torch.composed import Ordinary, check_ordinary
from doconv_torch.ordinary import is_bound, is_replaced, spec_of
from doconv_torch.surgery import become, ordinary_tensors

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

_MEANS = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


class _Branched(StandIn, nn.Module, Generic[Ordinary]):
    """What the layers of every rank share.

    Parts are ordinary layers, named as `spec.parts` says. Each rank names the ordinary layer it
    stands in for, and batch norm.
    """

    ordinary: type[Ordinary]
    norm_type: type[_BatchNorm]
    rank: int
    spec: BranchedSpec

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rule: str = "repvgg",
        bn_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        rank, factory = self.rank, {"device": device, "dtype": dtype}
        conv = ConvSpec(
            in_channels, out_channels, as_tuple("kernel_size", kernel_size, rank), groups
        )
        stride, padding, dilation = as_places(rank, stride, padding, dilation)
        geometry = _geometry(conv.kernel_size, stride, padding, dilation, padding_mode)
        norms = batch_norm_options(True, bn_options, BN_OPTIONS)
        spec = BranchedSpec(conv, geometry, rule, **options)
        super().__init__()
        self.spec = spec
        for name, part in spec.parts.items():
            made: nn.Module
            if isinstance(part, Norm):
                made = self.norm_type(part.channels, **norms, **factory)
            else:
                own = bias and name == next(iter(spec.parts))
                made = self._conv(part, bias=own, padding_mode=padding_mode, **factory)
            self.add_module(name, made)

    def _conv(self, part: Conv, **options: Any) -> nn.Module:
        ordinary: Any = self.ordinary
        padding = tuple(before for before, _ in part.padding)
        made: nn.Module = ordinary(
            part.in_channels, part.out_channels, part.kernel_size, part.stride, padding,
            part.dilation, part.groups, **options,
        )  # fmt: skip
        return made

    @property
    def rule(self) -> str:
        """The rule by which the branches are made."""
        return self.spec.rule

    def extra_repr(self) -> str:
        """Return the rule."""
        return f"rule={self.rule!r}"

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of what the branches make of `input`, `(B, I, *spatial)`."""
        made = [self._branch(pieces, input) for pieces in self.spec.pieces.values()]
        y, norm = reduce(torch.add, made), self._modules.get(SUM_NORM)
        return y if norm is None else norm(y)

    def _branch(self, pieces: tuple[Piece, ...], x: Tensor) -> Tensor:
        zero = None
        for piece in pieces:
            if isinstance(piece, Norm):
                norm: Any = self._modules[piece.name]
                zero = _zero(norm) if piece.inner else None  # before the batch is in its statistics
                x = norm(x)
                continue
            x = _around(x, piece.around, zero)
            if isinstance(piece, Mean):
                x = _MEANS[self.rank - 1](x, piece.kernel_size, piece.stride)
            else:
                x = self._modules[piece.name](x)  # type: ignore[misc]
        return x

    def fold(self) -> Ordinary:
        """Return a new ordinary convolution, with bias, of the same function in evaluation mode.

        Device, dtype and mode are kept. Hooks are not carried over. Parts that are DO layers are
        folded too. Computed in float64 and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact: batch norms in training
        mode, too.
        """
        with ordinary_tensors():
            folded: Ordinary = LAYERS[self.rule].folded(self).train(self.training)
            return folded

    @classmethod
    def from_conv(cls, conv: Ordinary, norm: _BatchNorm, *, rule: str, **options: Any) -> Self:
        """Return a new layer to take the place of a trained convolution and its batch norm.

        conv: an `ordinary` layer of PyTorch's own, exactly; norm: the batch norm behind it, with
        running statistics. Their values are copied. In evaluation mode the layer computes what they
        do: batch norms that end other branches begin with gamma = 0. rule, options: as the layer
        takes them.
        Raises TypeError for other layers, ValueError for a convolution that the rule leaves.
        """
        check_ordinary(cls, conv)
        weight = conv.weight
        layer: Any = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode, weight.device,
            weight.dtype, rule=rule, bn_options={"eps": norm.eps, "momentum": norm.momentum},
            **options,
        )  # fmt: skip
        if isinstance(norm, nn.SyncBatchNorm):
            layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer, norm.process_group)
        layer.requires_grad_(weight.requires_grad)
        layer._start_from(conv, norm)
        made: Self = layer.to(memory_format=memory_format(weight)).train(conv.training)
        made._modules[made.spec.trained_norm].train(norm.training)  # type: ignore[union-attr]
        return made

    @torch.no_grad()
    def _start_from(self, conv: Any, norm: Any) -> None:
        """Take a trained convolution and batch norm, and let all else add nothing to them."""
        mean, variance = norm.running_mean, norm.running_var
        for name, role in self.spec.roles.items():
            part: Any = self._modules[name]
            if isinstance(self.spec.parts[name], Norm):
                part.to(mean.device, mean.dtype)
            if role == ZERO:
                nn.init.zeros_(part.weight)
            elif role == PASSING:
                _put(part, running_mean=mean, running_var=variance)
                _put(part, weight=(variance + part.eps).sqrt(), bias=mean)
            elif name == self.spec.trained_norm:
                part._parameters = {n: _cloned(p) for n, p in norm._parameters.items()}
                part._buffers = {n: b if b is None else b.clone() for n, b in norm._buffers.items()}
                part.affine = norm.affine
            elif role == TRAINED:
                start = self.spec.start(as_array(conv.weight))
                part.weight.copy_(as_tensor(start, conv.weight))
                part._parameters["bias"] = _cloned(conv.bias)


def _cloned(parameter: Any) -> Any:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _put(part: Any, **values: Tensor) -> None:
    for name, value in values.items():
        getattr(part, name).copy_(value)


def _zero(norm: Any) -> Tensor:
    """Return what a batch norm makes of zero in evaluation, `(C,)`."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    zero: Tensor = -norm.running_mean.clone() * factor  # the next batch changes the values
    return zero if norm.bias is None else zero + norm.bias


def _around(x: Tensor, pairs: Pairs, zero: Tensor | None) -> Tensor:
    """Return a value with more positions around, of these values; or with fewer."""
    if not any(map(any, pairs)):
        return x
    flat = [number for pair in reversed(pairs) for number in pair]
    if zero is None:
        return functional.pad(x, flat)
    zero = zero.to(x.dtype).reshape(-1, *(1,) * len(pairs))
    return functional.pad(x - zero, flat) + zero


def _geometry(
    size: tuple[int, ...], stride: Any, padding: Any, dilation: Any, mode: str
) -> Geometry:
    """Return where the taps of a convolution with these arguments meet its input."""
    return Geometry(stride, dilation, pads_of(size, stride, padding, dilation), mode)


class NormedConv1d(_Branched[nn.Conv1d]):
    """As `NormedConv2d`, in the place of a `torch.nn.Conv1d` and its batch norm.

    `(B, I, L)` becomes `(B, O, L')`.

    >>> layer = NormedConv1d(4, 4, 3, padding=1, rule="mobileone", branches=2)
    >>> layer(torch.zeros(2, 4, 8)).shape
    torch.Size([2, 4, 8])
    """

    ordinary, norm_type, rank = nn.Conv1d, nn.BatchNorm1d, 1


class NormedConv2d(_Branched[nn.Conv2d]):
    """Parallel branches with batch norms, in the place of a `torch.nn.Conv2d` and its batch norm.

    Takes `torch.nn.Conv2d`'s arguments, without bias where not asked for; `rule`, "repvgg",
    "mobileone", "acnet", "dbb", "qarepvgg", "replknet" or "unireplknet"; `bn_options`, a dict of
    the batch norms' arguments; `branches` of MobileOne, how many kernels of its size it has, and
    `small` of RepLKNet, the smaller kernel's size. Parts are ordinary layers, named after their
    branch. Not to be scripted: fold it first.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: RepVGG, arXiv 2101.03697; the others are in `doconv_core.kinds.normed`.

    >>> layer = NormedConv2d(4, 4, 3, padding=1, rule="repvgg")
    >>> layer(torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    >>> layer.eval().fold()
    Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    ordinary, norm_type, rank = nn.Conv2d, nn.BatchNorm2d, 2


class NormedConv3d(_Branched[nn.Conv3d]):
    """As `NormedConv2d`, in the place of a `torch.nn.Conv3d` and its batch norm.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.

    >>> layer = NormedConv3d(4, 8, 3, padding=1, rule="acnet")
    >>> layer(torch.zeros(2, 4, 8, 8, 8)).shape
    torch.Size([2, 8, 8, 8, 8])
    """

    ordinary, norm_type, rank = nn.Conv3d, nn.BatchNorm3d, 3


class BranchedLayers(Parts, NormedLayers):
    """The layers of one rule in PyTorch."""

    base = _Branched
    types = {cls.ordinary: cls for cls in (NormedConv1d, NormedConv2d, NormedConv3d)}  # noqa: RUF012

    def _norm_options(self, epsilon: float, momentum: float) -> dict[str, Any]:
        return {"eps": epsilon, "momentum": momentum}

    def _geometry(self, conv: Any) -> Geometry:
        return _geometry(
            conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode
        )

    def _taken_obstacle(self, conv: Any, norm: Any) -> str | None:
        if type(norm) not in BATCHNORMS:
            return SUBCLASS
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        return REPLACED if is_replaced(norm) else WEIGHT_BOUND if is_bound(conv.weight) else None

    def _take(self, conv: Any, norm: Any, new: Any) -> None:
        for name, role in new.spec.roles.items():
            part = new._modules[name]
            if role != TRAINED:
                continue
            if isinstance(part, _BatchNorm):
                part._parameters, part._buffers = norm._parameters, norm._buffers
                continue
            part._parameters["bias"] = conv.bias
            if new.spec.keeps_kernel:
                part._parameters["weight"] = conv.weight
        identity = nn.Identity()
        identity._parameters, identity._buffers = {}, {}
        become(conv, new)
        for name in ATTRIBUTES:
            vars(norm).pop(name, None)
        become(norm, identity)

    def _is_as_made(self, conv: Any, made: Conv) -> bool:
        padding = tuple(before for before, _ in made.padding)
        return spec_of(conv) == made.spec and (conv.stride, conv.padding, conv.dilation) == (
            made.stride, padding, made.dilation,
        )  # fmt: skip

    def _convolution(self, layer: Any, values: Mapping[Any, Folded]) -> nn.Module:
        (kernel, bias), spec, first = values[None], layer.spec, next(layer.children())
        pads = tuple(before for before, _ in spec.geometry.padding)
        conv: Any = layer.ordinary(
            spec.conv.in_channels, spec.conv.out_channels, spec.conv.kernel_size,
            spec.geometry.stride, pads, spec.geometry.dilation, spec.conv.groups, True,
            first.padding_mode, "meta", first.weight.dtype,
        )  # fmt: skip
        trainable = any(parameter.requires_grad for parameter in layer.parameters())
        for name, value in (("weight", kernel), ("bias", bias)):
            tensor = as_tensor(value, first.weight)
            setattr(conv, name, nn.Parameter(tensor, requires_grad=trainable))
        made: nn.Module = conv.to(memory_format=memory_format(first.weight))
        return made

    def _become(self, layer: Any, new: Any) -> None:
        become(layer, new)


LAYERS: dict[str, BranchedLayers] = {kind.name: BranchedLayers(kind) for kind in KINDS}
