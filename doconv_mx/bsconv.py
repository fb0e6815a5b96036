"""The BSConv layers of MXNet Gluon: blueprint separable convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock, Parameter, nn
from mxnet.ndarray import NDArray

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
)
from doconv_core.maths.layout import to_canonical
from doconv_mx import private
from doconv_mx.arguments import StandIn
from doconv_mx.bsconv_kind import BSConvLayers
from doconv_mx.composed import ComposedConv
from doconv_mx.ordinary import (
    channels_per_group,
    check_ordinary,
    contexts,
    is_channels_last,
)
from doconv_mx.parameter import fill, native, put
from doconv_mx.tree import parameters

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
        before, after = in_channels, iter(shape[0] for shape in outline.pointwise_shapes)
        with self.name_scope():
            for name in outline.names:
                if name == "depthwise":
                    part = self._depthwise(given)
                elif name.startswith("pointwise"):
                    part = self._pointwise(given, name, before, next(after))
                    before = private.settings(part)["num_filter"]
                else:
                    part = nn.BatchNorm(in_channels=before, prefix=f"{name}_", **norms)
                setattr(self, name, part)

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
            x = _reordered(F, part(_reordered(F, x))) if guarded else part(x)
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
    ) -> _BSConv:
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
        layer.explained = _start(layer, conv, start)
        return private.hybridize_like(layer, conv)

    def inferred_in_channels(self) -> int:
        """Return the number of input channels, 0 where it is unknown."""
        return channels_per_group(self.pointwise) if self._deferred else self._outline.in_channels


def _kernel(part: private.Conv, ctx: mx.Context | None) -> NDArray:
    """Return what a part convolves with, in one context."""
    kernel = part.composed_kernel(ctx) if isinstance(part, ComposedConv) else part.weight.data(ctx)
    return kernel.as_nd_ndarray()


def _reordered(F: Any, x: Any) -> Any:
    """Return `x` as it is, in the usual memory layout, and so its gradient.

    On the CPU, MXNet 1.9 cannot read the gradients of a convolution of one or three dimensions and
    8, 16, ... channels where oneDNN's batch norm is before or behind it.
    """
    return native(F.slice_axis(x.as_nd_ndarray(), axis=0, begin=0, end=None))


def _start(layer: Any, conv: private.Conv, start: str) -> float | None:
    """Give a new BSConv layer dtype, contexts, `grad_req`, multipliers and values.

    conv: the ordinary layer that it stands in for. start: as `from_conv` takes it. Returns how
    much of the kernel's squared norm it has; None of a random start. A layer without values yet
    passes on how it is to be initialized.
    """
    weight, bias = conv.weight, layer.depthwise.bias
    layer.cast(weight.dtype)
    for parameter in parameters(layer):
        _follow(parameter, conv.bias if parameter is bias else weight)
    explained = None
    if start == "weights":
        explained = _put_blueprints(layer, conv)
    if bias is not None:
        fill(bias, conv.bias, lambda values: values)
    for parameter in parameters(layer):
        if not private.has_values(parameter) and parameter is not bias:
            _initialize(parameter, weight)
    return explained


def _follow(parameter: Parameter, old: Parameter) -> None:
    if parameter.grad_req != "null":  # as a running mean's is
        parameter.grad_req = old.grad_req
    parameter.lr_mult, parameter.wd_mult = old.lr_mult, old.wd_mult


def _put_blueprints(layer: Any, conv: private.Conv) -> float:
    """Take the blueprints of a trained kernel; return how much of it they explain."""
    weight = conv.weight
    kernel = weight.list_data()[0].asnumpy().astype(np.float64)
    kernel = to_canonical(kernel, "O*I" if is_channels_last(conv) else "OI*")
    found = blueprints(kernel, layer.spec)
    values = iter((*found.pointwise, found.depthwise))
    for name, part in private.children(layer).items():
        if not name.startswith("batch_norm"):
            array = next(values).reshape(part.weight.shape).astype(np.dtype(weight.dtype))
            put(part.weight, dict.fromkeys(weight.list_ctx(), array))
    return found.explained


def _initialize(parameter: Parameter, old: Parameter) -> None:
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


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2D, BSConvS2D

BSCONVS = BSConvLayers(_BSConv, BSConvU1D, BSConvU2D, BSConvU3D, BSConvS1D, BSConvS2D, BSConvS3D)
