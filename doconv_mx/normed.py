"""The layers of MXNet Gluon that are branches with batch norms; and how models get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock, nn

from doconv_core.kinds.bsconv import batch_norm_options
from doconv_core.kinds.normed import (
    BRANCHES,
    KINDS,
    PASSING,
    SMALL,
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
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.maths.separable import Folded, Pointwise
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.normed import NormedLayers
from doconv_core.models.report import SUBCLASS
from doconv_core.models.view import ModelView
from doconv_mx import private, tree
from doconv_mx.arguments import StandIn
from doconv_mx.batchnorm import norm_obstacle
from doconv_mx.bsconv import (
    BN_OPTIONS,
    IN_A_SYMBOL,
    Parts,
    as_array,
    initialize,
    layout_of,
    reordered,
)
from doconv_mx.ordinary import (
    channels_per_group,
    check_ordinary,
    contexts,
    is_channels_last,
    require_values,
    spec_of,
)
from doconv_mx.parameter import native, put
from doconv_mx.surgery import become, remove_parameter, set_parameter
from doconv_mx.symbols import node_of

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

NORM_ENTRIES = ("gamma", "beta", "running_mean", "running_var")
# Why a convolution is left, of what Gluon alone has.
LAST = "its layout has the channels last, with which MXNet pads nothing"


class _Branched(StandIn, HybridBlock):
    """What the layers of every rank share.

    Parts are ordinary layers, named as `spec.parts` says. Each rank names the ordinary layer it
    stands in for.
    """

    spec: Any = None  # a BranchedSpec

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        return {"rule": "repvgg", "branches": BRANCHES, "small": SMALL, "bn_options": None}

    def _make(self, given: SimpleNamespace, own: dict[str, Any]) -> None:
        """Create the parts, after everything has been validated."""
        kind = type(self).__name__
        if not given.in_channels:
            raise ValueError(
                f"in_channels of a {kind} must be given: which branches it has follows from them; "
                "received in_channels=0."
            )
        if given.activation is not None:
            raise ValueError(
                f"{kind} takes no activation, which would stand before its batch norms; received "
                f"activation={given.activation!r}. Put a block behind it."
            )
        norms = batch_norm_options(True, own.pop("bn_options"), BN_OPTIONS)
        conv = ConvSpec(given.in_channels, given.channels, given.kernel_size, given.groups)
        geometry = Geometry(given.strides, given.dilation, symmetric(given.padding))
        spec = BranchedSpec(conv, geometry, **own)
        HybridBlock.__init__(self, **given.scope)
        self.spec, self._layout = spec, given.layout
        norms |= {"axis": given.layout.find("C")}
        with self.name_scope():
            for name, part in spec.parts.items():
                if isinstance(part, Norm):
                    made = nn.BatchNorm(in_channels=part.channels, prefix=f"{name}_", **norms)
                else:
                    use_bias = given.use_bias and name == next(iter(spec.parts))
                    made = self._conv(given, part, use_bias)
                setattr(self, name, made)

    def _conv(self, given: SimpleNamespace, part: Conv, use_bias: bool) -> Any:
        pads = tuple(before for before, _ in part.padding)
        return self.ordinary(
            part.out_channels, part.kernel_size, part.stride, pads, part.dilation, part.groups,
            given.layout, None, use_bias, given.weight_initializer, given.bias_initializer,
            in_channels=part.in_channels, prefix=f"{part.name}_",
        )  # fmt: skip

    @property
    def rule(self) -> str:
        """The rule by which the branches are made."""
        return str(self.spec.rule)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the sum of what the branches make of `x`."""
        y = reduce(add, [self._branch(F, each, x) for each in self.spec.pieces.values()])
        return self._normed(F, private.children(self)[SUM_NORM], y) if self._is_summed() else y

    def _is_summed(self) -> bool:
        return SUM_NORM in self.spec.parts

    def _branch(self, F: Any, pieces: tuple[Piece, ...], x: Any) -> Any:
        zero = None
        for piece in pieces:
            if isinstance(piece, Norm):
                norm = private.children(self)[piece.name]
                zero = _zero(F, norm, x) if piece.inner else None  # of the batches before this one
                x = self._normed(F, norm, x)
                continue
            x = self._around(F, x, piece.around, zero)
            if isinstance(piece, Mean):
                sizes = {"kernel": piece.kernel_size, "stride": piece.stride, "pool_type": "avg"}
                x = native(F.Pooling(x.as_nd_ndarray(), **sizes))
            else:
                x = private.children(self)[piece.name](x)
        return x

    def _normed(self, F: Any, norm: Any, x: Any) -> Any:
        guarded = self.rank != 2 and isinstance(norm, private.BatchNorm)
        return reordered(F, norm(reordered(F, x))) if guarded else norm(x)

    def _around(self, F: Any, x: Any, pairs: Pairs, zero: Any) -> Any:
        """Return a value with more positions around, of these values; or with fewer."""
        if not any(map(any, pairs)):
            return x
        x = x.as_nd_ndarray()
        if zero is None:
            for axis, (before, after) in enumerate(pairs, self._layout.find("W") + 1 - self.rank):
                x = F.slice_axis(x, axis=axis, begin=-before, end=after or None)
            return native(x)
        zero = zero.reshape((1, -1, *(1,) * self.rank))
        x = F.broadcast_sub(x, zero)
        flat = [number for pair in pairs for number in pair]
        if self.rank == 1:  # MXNet pads no fewer than two dimensions
            flat, x = [0, 0, *flat], F.expand_dims(x, axis=2)
        x = F.pad(x, mode="constant", pad_width=(0, 0, 0, 0, *flat), constant_value=0)
        x = F.squeeze(x, axis=2) if self.rank == 1 else x
        return native(F.broadcast_add(x, zero))

    def fold(self) -> HybridBlock:
        """Return a new ordinary convolution, with bias, of the same function in inference.

        Contexts, dtype, names and hybridization are kept. Hooks are not carried over. Parts that
        are DO-Conv layers are folded too. Computed in float64 and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact, ValueError for a layer
        without values.
        """
        folded: HybridBlock = LAYERS[self.rule].folded(self)
        return folded

    @classmethod
    def from_conv(cls, conv: private.Conv, norm: Any, *, rule: str, **options: Any) -> Self:
        """Return a new layer to take the place of a trained convolution and its batch norm.

        conv: an `ordinary` layer of Gluon's own, exactly, without activation; norm: the
        `nn.BatchNorm` behind it. Their values are copied. In inference the layer computes what they
        do: batch norms that end other branches begin with gamma = 0. rule, options: as the layer
        takes them.
        Raises TypeError for other layers, ValueError for a convolution that the rule leaves, and
        for layers that have no values yet.
        """
        check_ordinary(cls, conv)
        for block in (conv, norm):
            require_values(private.registered(block).values(), f"{cls.__name__}.from_conv")
        own, norms = private.settings(conv), private.settings(norm)
        with private.no_name_scope():
            layer = cls(
                channels_per_group(conv) * own["num_group"], own["num_filter"],
                tuple(own["kernel"]), own["stride"], own["pad"], own["dilate"], own["num_group"],
                own["layout"], private.activation(conv), conv.bias is not None, conv.weight.init,
                "zeros" if conv.bias is None else conv.bias.init, conv.prefix, rule=rule,
                bn_options={"momentum": norms["momentum"], "epsilon": norms["eps"]}, **options,
            )  # fmt: skip
        layer._start_from(conv, norm)
        return private.hybridize_like(layer, conv)

    def _start_from(self, conv: private.Conv, norm: Any) -> None:
        """Take a trained convolution and batch norm, and let all else add nothing to them."""
        weight, held = conv.weight, contexts(conv, f"{type(self).__name__}.from_conv")
        self.cast(weight.dtype)
        for parameter in tree.parameters(self):
            if parameter.grad_req != "null":  # as a running mean's is
                parameter.grad_req = weight.grad_req
            parameter.lr_mult, parameter.wd_mult = weight.lr_mult, weight.wd_mult
        for name, role in self.spec.roles.items():
            part, is_norm = private.children(self)[name], isinstance(self.spec.parts[name], Norm)
            if role == ZERO:
                entry = part.gamma if is_norm else part.weight
                put(entry, dict.fromkeys(held, np.zeros(entry.shape, np.dtype(entry.dtype))))
            elif role == PASSING:
                _copy(part.running_mean, norm.running_mean)
                _copy(part.running_var, norm.running_var)
                _copy(part.beta, norm.running_mean)
                _copy(part.gamma, norm.running_var, private.settings(norm)["eps"])
            elif role == TRAINED and is_norm:
                private.settings(part).update(private.settings(norm))
                for entry in NORM_ENTRIES:
                    _copy(getattr(part, entry), getattr(norm, entry))
                    getattr(part, entry).grad_req = getattr(norm, entry).grad_req
            elif role == TRAINED:
                _put_kernel(part, {c: self.spec.start(_kernel(conv, c)) for c in held})
                if conv.bias is not None:
                    _copy(part.bias, conv.bias)
        for parameter in tree.parameters(self):
            if not private.has_values(parameter):
                initialize(parameter, weight)


def _zero(F: Any, norm: Any, x: Any) -> Any:
    """Return what a batch norm makes of zero in inference, `(C,)`.

    A block's own parameters alone are handed to its forward: these are another's.
    """

    def value(name: str) -> Any:
        parameter = getattr(norm, name)
        found = parameter.var() if F is mx.sym else parameter.data(x.context)
        return found.as_nd_ndarray()

    factor = F.rsqrt(value("running_var") + private.settings(norm)["eps"])
    factor = factor if private.settings(norm)["fix_gamma"] else factor * value("gamma")
    # The operator that copies: autograd keeps the array, of which the batch changes the values.
    return value("beta") - F.BlockGrad(value("running_mean")) * factor


def _copy(new: Any, old: Any, epsilon: float | None = None) -> None:
    """Give a parameter another one's values in each context; with `epsilon`, of its variance the
    root.
    """
    values = {c: as_array(old, c) for c in old.list_ctx()}
    if epsilon is not None:
        values = {c: np.sqrt(v + epsilon) for c, v in values.items()}
    put(new, {c: v.astype(np.dtype(new.dtype)) for c, v in values.items()})


def _kernel(conv: Any, context: mx.Context) -> Any:
    """Return a convolution's kernel in one context, canonical, in float64."""
    return to_canonical(as_array(conv.weight, context), layout_of(conv))


def _put_kernel(conv: Any, kernels: Mapping[mx.Context, Any]) -> None:
    """Give a convolution canonical kernels, each rounded once."""
    dtype, layout = np.dtype(conv.weight.dtype), layout_of(conv)
    put(conv.weight, {c: from_canonical(k, layout).astype(dtype) for c, k in kernels.items()})


class NormedConv1D(_Branched):
    """As `NormedConv2D`, in the place of a `mxnet.gluon.nn.Conv1D` and its batch norm.

    `(B, I, W)` becomes `(B, O, W')`.

    >>> layer = NormedConv1D(4, 8, 3, rule="mobileone", branches=2)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6))).shape
    (1, 8, 4)
    """

    ordinary, rank = nn.Conv1D, 1


class NormedConv2D(_Branched):
    """Parallel branches with batch norms, in the place of a `mxnet.gluon.nn.Conv2D` and its norm.

    Takes `in_channels`, which cannot be inferred, then `mxnet.gluon.nn.Conv2D`'s arguments in their
    order, without activation; `rule`, "repvgg", "mobileone", "acnet", "dbb", "qarepvgg", "replknet"
    or "unireplknet"; `bn_options`, a dict of the batch norms' arguments; `branches` of MobileOne,
    how many kernels of its size it has, and `small` of RepLKNet, the smaller kernel's size. Parts
    are ordinary layers, named after their branch.
    `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: RepVGG, arXiv 2101.03697; the others are in `doconv_core.kinds.normed`.

    >>> layer = NormedConv2D(4, 4, 3, padding=1, rule="repvgg")
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6, 6))).shape
    (1, 4, 6, 6)
    >>> layer.fold()
    Conv2D(4 -> 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    ordinary, rank = nn.Conv2D, 2


class NormedConv3D(_Branched):
    """As `NormedConv2D`, in the place of a `mxnet.gluon.nn.Conv3D` and its batch norm.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.

    >>> layer = NormedConv3D(4, 8, 3, rule="acnet")
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6, 6, 6))).shape
    (1, 8, 4, 4, 4)
    """

    ordinary, rank = nn.Conv3D, 3


class BranchedLayers(Parts, NormedLayers):
    """The layers of one rule in Gluon."""

    base = _Branched
    types = {cls.ordinary: cls for cls in (NormedConv1D, NormedConv2D, NormedConv3D)}  # noqa: RUF012

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution is left that nothing else keeps from being replaced."""
        if node_of(layer) is not None:
            return IN_A_SYMBOL
        return super().obstacle(view, layer, options)

    def _norm_options(self, epsilon: float, momentum: float) -> dict[str, Any]:
        return {"epsilon": epsilon, "momentum": 1 - momentum}

    def _geometry(self, conv: Any) -> Geometry:
        options = private.settings(conv)
        return Geometry(options["stride"], options["dilate"], symmetric(options["pad"]))

    def _taken_obstacle(self, conv: Any, norm: Any) -> str | None:
        if self.kind.name == "dbb" and is_channels_last(conv):
            return LAST
        return SUBCLASS if type(norm) is not nn.BatchNorm else norm_obstacle(norm)

    def _take(self, conv: Any, norm: Any, new: Any) -> None:
        for name, role in new.spec.roles.items():
            part = private.children(new)[name]
            if role != TRAINED:
                continue
            if isinstance(part, private.BatchNorm):
                taken = {entry: getattr(norm, entry) for entry in NORM_ENTRIES}
            else:
                taken = {} if conv.bias is None else {"bias": conv.bias}
                taken |= {"weight": conv.weight} if new.spec.keeps_kernel else {}
            for entry, parameter in taken.items():
                remove_parameter(part, entry)
                set_parameter(part, entry, parameter)
        become(conv, new)
        for name in list(private.registered(norm)):
            remove_parameter(norm, name)
        private.pass_on(norm)

    def _become(self, layer: Any, new: Any) -> None:
        become(layer, new)

    def _contexts(self, layer: Any) -> Sequence[Any]:
        require_values(tree.parameters(layer), f"{type(layer).__name__}.fold")
        first = next(iter(private.children(layer).values()))
        held: list[mx.Context] = first.weight.list_ctx()
        return held

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        return Pointwise(_kernel(conv, context), as_array(conv.bias, context))

    def _is_as_made(self, conv: Any, made: Conv) -> bool:
        options = private.settings(conv)
        pads = tuple(before for before, _ in made.padding)
        return spec_of(conv) == made.spec and conv.act is None and (
            tuple(options["stride"]), tuple(options["pad"]), tuple(options["dilate"]),
        ) == (made.stride, pads, made.dilation)  # fmt: skip

    def _convolution(self, layer: Any, values: Mapping[Any, Folded]) -> HybridBlock:
        spec, like = layer.spec, next(iter(private.children(layer).values())).weight
        pads = tuple(before for before, _ in spec.geometry.padding)
        with private.no_name_scope():
            conv = layer.ordinary(
                spec.conv.out_channels, spec.conv.kernel_size, spec.geometry.stride, pads,
                spec.geometry.dilation, spec.conv.groups, layer._layout,
                in_channels=spec.conv.in_channels, prefix=layer.prefix,
            )  # fmt: skip
        conv.cast(like.dtype)
        request = next((p.grad_req for p in tree.parameters(layer) if p.grad_req != "null"), "null")
        for parameter in (conv.weight, conv.bias):
            parameter.grad_req = request
            parameter.lr_mult, parameter.wd_mult = like.lr_mult, like.wd_mult
        _put_kernel(conv, {context: value.kernel for context, value in values.items()})
        put(conv.bias, {c: np.asarray(v.bias, np.dtype(like.dtype)) for c, v in values.items()})
        return private.hybridize_like(conv, layer)


LAYERS: dict[str, BranchedLayers] = {kind.name: BranchedLayers(kind) for kind in KINDS}
