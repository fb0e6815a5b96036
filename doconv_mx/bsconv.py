"""The BSConv layers of MXNet Gluon, blueprint separable convolutions; and how models get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter, nn
from mxnet.ndarray import NDArray

from doconv_core.kinds.base import PartNorm
from doconv_core.kinds.bsconv import (
    MIN_MID_CHANNELS,
    STARTS,
    BSConvSpec,
    P,
    as_choice,
    batch_norm_options,
    blueprints,
    check_groups,
    check_kernel,
    obstacle,
)
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.maths.separable import Folded, Normalization, Pointwise
from doconv_core.models.parted import HOOKED, PartedLayers
from doconv_core.models.report import AXIS
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_mx import ordinary, private, tree
from doconv_mx.arguments import StandIn
from doconv_mx.batchnorm import norm_obstacle
from doconv_mx.composed import ComposedConv, check_foldable
from doconv_mx.ordinary import (
    channels_per_group,
    check_ordinary,
    contexts,
    is_channels_last,
    outline,
    require_values,
)
from doconv_mx.parameter import fill, native, put
from doconv_mx.surgery import become, copied, fold_layers, remove_parameter, set_parameter
from doconv_mx.symbols import node_of

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

# Why a convolution does not become a BSConv, of what Gluon alone has.
IN_A_SYMBOL = "an operator of a symbol, not a layer"
BN_OPTIONS = (
    "momentum", "epsilon", "center", "scale", "use_global_stats", "beta_initializer",
    "gamma_initializer", "running_mean_initializer", "running_variance_initializer",
)  # fmt: skip


class _BSConv(StandIn, nn.HybridSequential):
    """What the layers of every rank and variant share.

    A sequence of ordinary layers, named as `spec.names` says; strides, padding, dilation,
    activation and bias are the depthwise one's.
    """

    variant: str
    explained: float | None = None  # of the kernel that the layer was started from

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        sizes = {"p": P, "min_mid_channels": MIN_MID_CHANNELS} if cls.variant == "s" else {}
        return {**sizes, "with_bn": False, "bn_options": None}

    def _make(self, given: SimpleNamespace, own: dict[str, Any]) -> None:
        """Create the parts in the order of their use, after everything has been validated."""
        kind, in_channels = type(self).__name__, given.in_channels
        if not in_channels and self.variant == "s":
            raise ValueError(
                f"in_channels of a {kind} must be given: the channels between its pointwise "
                "convolutions follow from them; received in_channels=0."
            )
        bn_options, sizes = own.pop("bn_options"), (given.channels, given.kernel_size)
        outline = BSConvSpec(in_channels or 1, *sizes, self.variant, **own)
        check_groups(kind, given.groups)
        norms = batch_norm_options(outline.with_bn, bn_options, BN_OPTIONS)
        nn.HybridSequential.__init__(self, **given.scope)
        self._outline, self._deferred, self._layout = outline, not in_channels, given.layout
        norms |= {"axis": given.layout.find("C")}
        with self.name_scope():
            for part in outline.parts:
                if isinstance(part, PartNorm):
                    made = nn.BatchNorm(in_channels=in_channels, prefix=f"{part.name}_", **norms)
                elif part.depthwise:
                    made = self._depthwise(given)
                else:
                    made = self._pointwise(given, part.name, in_channels, part.channels)
                    in_channels = part.channels
                setattr(self, part.name, made)

    def _pointwise(self, given: SimpleNamespace, name: str, before: int, after: int) -> Any:
        return self.ordinary(
            after, (1,) * self.rank, layout=given.layout, in_channels=before, use_bias=False,
            weight_initializer=given.weight_initializer, prefix=f"{name}_",
        )  # fmt: skip

    def _depthwise(self, given: SimpleNamespace) -> Any:
        return self.ordinary(
            given.channels, given.kernel_size, given.strides, given.padding, given.dilation,
            given.channels, given.layout, given.activation, given.use_bias,
            given.weight_initializer, given.bias_initializer, in_channels=given.channels,
            prefix="depthwise_",
        )  # fmt: skip

    @property
    def bias(self) -> Parameter | None:
        """The bias of the depthwise convolution, or None."""
        return self.depthwise.bias

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return what the parts make of `x`, one after the other."""
        for part in private.children(self).values():
            guarded = self.rank != 2 and isinstance(part, private.BatchNorm)
            x = reordered(F, part(reordered(F, x))) if guarded else part(x)
        return x

    def __getitem__(self, key: Any) -> Any:
        """Return a part by its position; of a slice, an `nn.HybridSequential` of them."""
        if not isinstance(key, slice):
            return super().__getitem__(key)
        with private.no_name_scope():
            parts = nn.HybridSequential(prefix=self.prefix)
        for name, part in list(private.children(self).items())[key]:
            setattr(parts, name, part)
        return parts

    def composed_kernel(self, ctx: mx.Context | None = None) -> NDArray:
        """Return the kernel of the ordinary convolution of the same function, differentiable while
        autograd records: `(O, I, *kernel_size)`, or `(O, *kernel_size, I)` in a channels-last
        layout.

        ctx: which of the layer's contexts, as in `Parameter.data`. The kernel is in the parameters'
        dtype; float16 is composed in float32 and rounded once.
        Raises NotFoldable for a layer with batch norms, which is no mere kernel: `fold` it.
        ValueError for a layer that has no values yet.
        """
        check_kernel(type(self).__name__, self._outline)
        parts = list(private.children(self).values())
        for part in parts:
            contexts(part, f"{type(self).__name__}.composed_kernel")
        *weights, dw = (_kernel(part, ctx) for part in parts)
        dtype = dw.dtype
        if np.dtype(dtype).itemsize < 4:
            *weights, dw = (array.astype("float32") for array in (*weights, dw))
        matrices = [weight.reshape((weight.shape[0], -1)) for weight in weights]
        pw = matrices[0] if len(matrices) == 1 else mx.nd.dot(matrices[1], matrices[0])
        ones, last = (1,) * self.rank, self._layout.endswith("C")
        pw = pw.reshape((pw.shape[0], *ones, -1) if last else (*pw.shape, *ones))
        return native(mx.nd.broadcast_mul(pw, dw).astype(dtype, copy=False))

    def fold(self, *, form: str = "keep") -> HybridBlock:
        """Return new ordinary layers with the same function.

        form: "keep", an `nn.HybridSequential` of the same parts; "merge", one of a pointwise and
        a depthwise convolution, with the batch norms in the former, for inference; "dense", one
        convolution.
        Contexts, dtype, names, activation and hybridization are kept. Hooks are not carried over.
        A depthwise part that is a DO-Conv layer is folded too. Parameters are computed in float64
        and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact, ValueError for another
        form, and for a layer without values that are to be computed with.
        """
        folded: HybridBlock = BSCONVS.folded(self, form)
        return folded

    @classmethod
    def from_conv(
        cls,
        conv: private.Conv,
        *,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
        start: str = "weights",
        **sizes: Any,
    ) -> Self:
        """Return a new layer to take a trained ordinary convolution's place.

        conv: an `ordinary` layer of Gluon's own, exactly, with groups=1. start: "weights" for the
        BSConv that is nearest to its kernel, as `doconv_core.blueprints` finds it; its `explained`
        says how near. "random" for new weights. Of several contexts the first is read. The bias is
        copied. Batch norms are new: in inference the identity, up to their epsilon. sizes: `p` and
        `min_mid_channels`, of BSConv-S.
        Raises TypeError for any other layer; ValueError for groups, for a kernel that is not
        finite, and with "weights" for a layer that has no values yet.
        """
        check_ordinary(cls, conv)
        as_choice("start", start, STARTS)
        if start == "weights":
            contexts(conv, f"{cls.__name__}.from_conv")
        options, groups = private.settings(conv), private.settings(conv)["num_group"]
        with private.no_name_scope():
            layer = cls(
                channels_per_group(conv) * groups, options["num_filter"], tuple(options["kernel"]),
                options["stride"], options["pad"], options["dilate"], groups, options["layout"],
                private.activation(conv), conv.bias is not None, conv.weight.init,
                "zeros" if conv.bias is None else conv.bias.init, conv.prefix,
                with_bn=with_bn, bn_options=bn_options, **sizes,
            )  # fmt: skip
        layer._start_from(conv, start)
        return private.hybridize_like(layer, conv)

    def _start_from(self, conv: private.Conv, start: str) -> None:
        """Take dtype, contexts, `grad_req`, multipliers and values from an ordinary layer.

        start: as `from_conv` takes it. A layer without values yet passes on how it is to be
        initialized.
        """
        weight, bias = conv.weight, self.depthwise.bias
        self.cast(weight.dtype)
        for parameter in tree.parameters(self):
            old = conv.bias if parameter is bias else weight
            if parameter.grad_req != "null":  # as a running mean's is
                parameter.grad_req = old.grad_req
            parameter.lr_mult, parameter.wd_mult = old.lr_mult, old.wd_mult
        if start == "weights":
            self._take_blueprints(conv)
        if bias is not None:
            fill(bias, conv.bias, lambda values: values)
        for parameter in tree.parameters(self):
            if not private.has_values(parameter) and parameter is not bias:
                initialize(parameter, weight)

    def _take_blueprints(self, conv: private.Conv) -> None:
        """Take the blueprints of a trained kernel."""
        held, dtype = conv.weight.list_ctx(), np.dtype(conv.weight.dtype)
        kernel = to_canonical(as_array(conv.weight, held[0]), layout_of(conv))
        found = blueprints(kernel, self.spec)
        values = iter((*found.pointwise, found.depthwise))
        for part in private.children(self).values():
            if isinstance(part, private.Conv):
                array = next(values).reshape(part.weight.shape).astype(dtype)
                put(part.weight, dict.fromkeys(held, array))
        self.explained = found.explained

    def inferred_in_channels(self) -> int:
        """Return the number of input channels, 0 where it is unknown."""
        return channels_per_group(self.pointwise) if self._deferred else self._outline.in_channels


def _kernel(part: private.Conv, ctx: mx.Context | None) -> NDArray:
    """Return what a part convolves with, in one context."""
    kernel = part.composed_kernel(ctx) if isinstance(part, ComposedConv) else part.weight.data(ctx)
    return kernel.as_nd_ndarray()


def reordered(F: Any, x: Any) -> Any:
    """Return `x` as it is, in the usual memory layout, and so its gradient.

    On the CPU, MXNet 1.9 cannot read the gradients of a convolution of one or three dimensions and
    8, 16, ... channels where oneDNN's batch norm is before or behind it.
    """
    return native(F.slice_axis(x.as_nd_ndarray(), axis=0, begin=0, end=None))


def initialize(parameter: Parameter, old: Parameter) -> None:
    """Initialize a parameter where the old one is, or as the old one is going to be."""
    if private.has_values(old):
        parameter.initialize(ctx=old.list_ctx())
    elif private.waiting(old):
        _, ctx, default, _ = private.waiting(old)
        parameter.initialize(ctx=ctx, default_init=default)


class _BSConvU(_BSConv):
    """BSConv-U: `pointwise`, [`batch_norm`], `depthwise`."""

    variant = "u"


class _BSConvS(_BSConv):
    """BSConv-S: `pointwise1`, [`batch_norm1`], `pointwise2`, [`batch_norm2`], `depthwise`."""

    variant = "s"


class BSConvU1D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv1D`.

    `(B, I, W)` becomes `(B, O, W')`; all else is as of `BSConvU2D`.

    >>> layer = BSConvU1D(4, 8, 3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6))).shape
    (1, 8, 4)
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

    >>> layer = BSConvU2D(4, 8, 3, padding=1)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6, 6))).shape, len(layer)  # a pointwise part, then a depthwise
    ((1, 8, 6, 6), 2)
    """

    ordinary, rank = nn.Conv2D, 2


class BSConvU3D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv3D`.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`; all else is as of `BSConvU2D`.

    >>> layer = BSConvU3D(4, 8, 3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6, 6, 6))).shape
    (1, 8, 4, 4, 4)
    """

    ordinary, rank = nn.Conv3D, 3


class BSConvS1D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv1D`.

    `(B, I, W)` becomes `(B, O, W')`; all else is as of `BSConvS2D`.

    >>> layer = BSConvS1D(4, 8, 3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6))).shape
    (1, 8, 4)
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

    >>> layer = BSConvS2D(16, 8, 3, p=0.5)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 16, 6, 6))).shape, layer.spec.mid_channels
    ((1, 8, 4, 4), 8)
    """

    ordinary, rank = nn.Conv2D, 2


class BSConvS3D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `mxnet.gluon.nn.Conv3D`.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`; all else is as of `BSConvS2D`.

    >>> layer = BSConvS3D(4, 8, 3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6, 6, 6))).shape
    (1, 8, 4, 4, 4)
    """

    ordinary, rank = nn.Conv3D, 3


class Parts(PartedLayers):
    """How parts of layers, ordinary layers of Gluon, are read."""

    composed, batch_norm = ComposedConv, private.BatchNorm
    methods = ("forward", "__call__", "hybrid_forward")
    is_replaced = staticmethod(tree.is_replaced)

    def _parts(self, layer: Block) -> dict[str, Block]:
        return private.children(layer)

    def _watcher(self, part: Block) -> str | None:
        return HOOKED if private.is_hooked(part) else None

    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        axis = private.settings(norm).get("axis", 1) % (layer.rank + 2)
        return norm_obstacle(norm) or (None if axis == layer._layout.find("C") else AXIS)

    def _conv_obstacle(self, layer: Any, name: str, part: Any) -> str | None:
        kind = layer.ordinary
        reason = ordinary.obstacle(part) if type(part) is kind else f"it is a {type(part).__name__}"
        if reason is None and private.settings(part)["layout"] != layer._layout:
            reason = f"its layout is {private.settings(part)['layout']}"
        expected = f"mxnet.gluon.nn.{kind.__name__} of layout {layer._layout}"
        return reason and f"{reason}; expected a {expected}"

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        weight = as_array(conv.weight, context)
        return Pointwise(weight.reshape(len(weight), -1), as_array(conv.bias, context))

    def _normalization(self, norm: Any, context: Any) -> Normalization:
        options = private.settings(norm)
        values = (norm.running_mean, norm.running_var, norm.gamma, norm.beta)
        mean, variance, scale, offset = (as_array(parameter, context) for parameter in values)
        scale = None if options["fix_gamma"] else scale
        return Normalization(mean, variance, options["eps"], scale, offset)

    def _ordinary(self, part: Any) -> Any:
        return part.fold() if isinstance(part, ComposedConv) else copied(part)


class BSConvLayers(Parts, SeparableLayers):
    """The BSConv layers of Gluon."""

    sequence = nn.HybridSequential

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        if node_of(layer) is not None:
            return IN_A_SYMBOL
        return obstacle(outline(layer), options["kernel_sizes"])

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                remove_parameter(new.depthwise, "bias")
                set_parameter(new.depthwise, "bias", site.layer.bias)  # by the bias's own name
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            if new is None:
                _as_sequence(site.layer)
                continue
            if isinstance(new, nn.HybridSequential):
                new.depthwise = site.layer.depthwise
            become(site.layer, new)

    def _names(self, layer: Any) -> tuple[str, ...]:
        names: tuple[str, ...] = layer._outline.names
        return names

    def _contexts(self, layer: Any) -> Sequence[Any]:
        require_values(tree.parameters(layer), f"{type(layer).__name__}.fold")
        contexts: list[mx.Context] = layer.depthwise.weight.list_ctx()
        return contexts

    def _strides(self, layer: Any) -> Sequence[int] | None:
        known = isinstance(self._parts(layer).get("depthwise"), private.Conv)
        if not known or not layer.inferred_in_channels():
            return None
        found: Sequence[int] = private.settings(layer.depthwise)["stride"]
        return found

    def _passes_on(self, part: Block) -> bool:
        return type(part) is nn.Dropout and not private.setting(part, "rate")

    def _is_pointwise(self, conv: Any) -> bool:
        options = private.settings(conv)
        ones = {*options["kernel"], *options["stride"], options["num_group"]}
        return ones == {1} and not any(options["pad"]) and conv.act is None

    def _is_depthwise(self, conv: Any) -> bool:
        groups, channels = (private.settings(conv)[name] for name in ("num_group", "num_filter"))
        return bool(groups == channels == channels_per_group(conv) * groups)

    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        options = private.settings(depthwise)
        return Geometry(options["stride"], options["dilate"], symmetric(options["pad"]))

    def _kept_parts(self, layer: Any) -> HybridBlock:
        new = copied(layer)  # which may have no values yet
        private.remove_hooks(new)
        for part in self._parts(new).values():
            if isinstance(part, ComposedConv):
                check_foldable(part)
                fold_layers([part])
        _as_sequence(new)
        return new

    def _sequenced(self, layer: Any, parts: Mapping[str, Block]) -> HybridBlock:
        with private.no_name_scope():
            new = nn.HybridSequential(prefix=layer.prefix)
        for name, part in parts.items():
            setattr(new, name, part)
        return private.hybridize_like(new, layer)

    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any = None
    ) -> HybridBlock:
        """Return an ordinary convolution with these values.

        dtype and multipliers are those of the layer's first weight, and it is trainable where any
        of the layer's parameters is.
        """
        first, like = next(iter(values.values())), layer[0].weight
        channels, in_channels = first.kernel.shape[:2]
        source, prefix = depthwise, layer.prefix
        if depthwise is None:
            source, prefix = layer[0], f"{layer.prefix}pointwise_"
        options = private.settings(source)
        size = options["kernel"]
        with private.no_name_scope():
            conv = layer.ordinary(
                channels, size, options["stride"], options["pad"], options["dilate"],
                layout=layer._layout, in_channels=in_channels, use_bias=first.bias is not None,
                activation=private.activation(source), prefix=prefix,
            )  # fmt: skip
        conv.cast(like.dtype)
        request = next((p.grad_req for p in tree.parameters(layer) if p.grad_req != "null"), "null")
        for parameter in (p for p in (conv.weight, conv.bias) if p is not None):
            parameter.grad_req = request
            parameter.lr_mult, parameter.wd_mult = like.lr_mult, like.wd_mult
        dtype, layout = np.dtype(like.dtype), layout_of(conv)
        kernels = {c: v.kernel.reshape(channels, in_channels, *size) for c, v in values.items()}
        put(conv.weight, {c: from_canonical(k, layout).astype(dtype) for c, k in kernels.items()})
        biases = {c: v.bias.astype(dtype) for c, v in values.items() if v.bias is not None}
        if biases:
            put(conv.bias, biases)
        return private.hybridize_like(conv, layer)


def _as_sequence(layer: Any) -> None:
    """Make a BSConv layer, in place, the ordinary sequence of its parts."""
    for name in ("_outline", "_deferred", "_layout", "explained"):
        vars(layer).pop(name, None)
    layer.__class__ = nn.HybridSequential


def as_array(parameter: Parameter | None, ctx: mx.Context) -> Any:
    """Return a parameter's values in one context, in float64; None for none."""
    if parameter is None:
        return None
    with autograd.pause():
        return parameter.data(ctx).asnumpy().astype(np.float64)


def layout_of(conv: private.Conv) -> str:
    """Return the core's word for the layout of a convolution's weight."""
    return "O*I" if is_channels_last(conv) else "OI*"


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2D, BSConvS2D
BSCONVS = BSConvLayers(_BSConv, BSConvU1D, BSConvU2D, BSConvU3D, BSConvS1D, BSConvS2D, BSConvS3D)
