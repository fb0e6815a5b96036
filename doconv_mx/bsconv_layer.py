"""What the BSConv layers of every rank and variant share in MXNet Gluon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mxnet as mx
import numpy as np
from doconv_core.kinds.bsconv_model import STARTS, batch_norm_options
from mxnet.gluon import HybridBlock, Parameter, ParameterDict, nn
from mxnet.gluon.nn.basic_layers import _BatchNorm
from mxnet.gluon.nn.conv_layers import _Conv
from mxnet.ndarray import NDArray

from doconv_core.kinds.bsconv import BSConvSpec, as_choice
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import as_integer, as_tuple
from doconv_mx.bsconv_fold import check_forward, folded
from doconv_mx.bsconv_start import start_like
from doconv_mx.compose import native
from doconv_mx.do_conv import _DOConv, as_layout
from doconv_mx.ordinary import (
    channels_per_group,
    contexts,
    no_name_scope,
    require_ordinary,
)

BN_OPTIONS = (
    "momentum", "epsilon", "center", "scale", "use_global_stats", "beta_initializer",
    "gamma_initializer", "running_mean_initializer", "running_variance_initializer",
)  # fmt: skip


class _BSConv(nn.HybridSequential):
    """What the layers of every rank and variant share.

    A sequence of ordinary layers, named as `spec.names` says; strides, padding, dilation,
    activation and bias are the depthwise one's. Each rank names the ordinary layer it stands in
    for.
    """

    ordinary: type[_Conv]
    rank: int
    variant: str

    explained: float | None = None  # of the kernel that the layer was started from

    def _make(
        self,
        sizes: dict[str, Any],
        geometry: tuple[Any, Any, Any],
        groups: int,
        layout: str | None,
        ending: dict[str, Any],
        weight_initializer: Any,
        bn_options: Mapping[str, Any] | None,
        prefix: str | None,
        params: ParameterDict | None,
    ) -> None:
        """Validate the arguments, and create the parts.

        ending: what is the depthwise convolution's alone, its activation and bias.
        """
        outline, in_channels = self._validated(sizes)
        if groups != 1:
            raise ValueError(
                f"{type(self).__name__} takes groups=1 alone: its pointwise convolution reads "
                f"every channel, and its depthwise one each for itself; received groups={groups}."
            )
        strides, padding, dilation = geometry
        options = {
            "strides": as_tuple("strides", strides, self.rank),
            "padding": as_tuple("padding", padding, self.rank, least=0),
            "dilation": as_tuple("dilation", dilation, self.rank),
            **ending,
        }
        layout = as_layout(layout, self.rank)
        norms = batch_norm_options(outline.with_bn, bn_options, BN_OPTIONS)
        both = {"layout": layout, "weight_initializer": weight_initializer}
        nn.HybridSequential.__init__(self, prefix=prefix, params=params)
        self._outline, self._deferred, self._layout = outline, not in_channels, layout
        with self.name_scope():
            self._add_parts(in_channels, norms, both, options)

    def _add_parts(
        self, in_channels: int, norms: dict[str, Any], both: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Create the parts in the order of their use.

        in_channels: 0 where they are unknown. norms: arguments of the batch norms. both: of every
        convolution. options: of the depthwise one alone.
        """
        outline, before = self._outline, in_channels
        shapes, channels = iter(outline.pointwise_shapes), outline.out_channels
        for name in outline.names:
            own = {"prefix": f"{name}_"}
            if name == "depthwise":
                part = self.ordinary(
                    channels, outline.kernel_size, groups=channels, in_channels=channels,
                    **both, **options, **own,
                )  # fmt: skip
            elif name.startswith("pointwise"):
                after, ones = next(shapes)[0], (1,) * self.rank
                part = self.ordinary(after, ones, in_channels=before, use_bias=False, **both, **own)
                before = after
            else:
                axis = self._layout.find("C")
                part = nn.BatchNorm(axis, in_channels=before, **norms, **own)
            setattr(self, name, part)

    def _validated(self, sizes: dict[str, Any]) -> tuple[BSConvSpec, int]:
        """Return the layer's sizes, with 1 for input channels to be inferred, and the number of
        input channels, 0 for those.
        """
        in_channels = as_integer("in_channels", sizes["in_channels"], least=0)
        if not in_channels and self.variant == "s":
            raise ValueError(
                f"in_channels of a {type(self).__name__} must be given: the channels between its "
                "pointwise convolutions follow from them; received in_channels=0."
            )
        more = {
            "in_channels": in_channels or 1,
            "out_channels": as_integer("channels", sizes["channels"]),
            "kernel_size": as_tuple("kernel_size", sizes["kernel_size"], self.rank),
        }
        rest = {name: value for name, value in sizes.items() if name != "channels"}
        return BSConvSpec(**(rest | more), variant=self.variant), in_channels

    @property
    def spec(self) -> BSConvSpec:
        """The layer's sizes. Raises ValueError while `in_channels` has not been inferred yet."""
        in_channels = self._inferred_in_channels()
        if not in_channels:
            raise ValueError(
                f"in_channels of layer {self.name!r} is not known yet; pass it, or run the layer "
                "once."
            )
        return replace(self._outline, in_channels=in_channels)

    @property
    def bias(self) -> Parameter | None:
        """The bias of the depthwise convolution, or None."""
        return self.depthwise.bias

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return what the parts make of `x`, one after the other."""
        for part in self._children.values():
            guarded = self.rank != 2 and isinstance(part, _BatchNorm)
            x = _reordered(F, part(_reordered(F, x))) if guarded else part(x)
        return x

    def __getitem__(self, key: Any) -> Any:
        """Return a part by its position; of a slice, an `nn.HybridSequential` of them."""
        if not isinstance(key, slice):
            return super().__getitem__(key)
        with no_name_scope():
            parts = nn.HybridSequential(prefix=self.prefix)
        for name, part in list(self._children.items())[key]:
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
        if self._outline.with_bn:
            raise NotFoldable(
                f"a {type(self).__name__} with batch norms is no mere kernel; fold(bsconv='dense') "
                "gives the convolution where there is one."
            )
        parts = list(self._children.values())
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

    def fold(self, *, bsconv: str = "keep") -> HybridBlock:
        """Return new ordinary layers with the same function.

        bsconv: "keep", an `nn.HybridSequential` of the same parts; "merge", one of a pointwise and
        a depthwise convolution, with the batch norms in the former, for inference; "dense", one
        convolution.
        Contexts, dtype, names, activation and hybridization are kept. Hooks are not carried over.
        A depthwise part that is a DO-Conv layer is folded too. Parameters are computed in float64
        and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact, ValueError for another
        form, and for a layer without values that are to be computed with.
        """
        check_forward(self, _BSConv, bsconv)
        return folded(self, bsconv)

    @classmethod
    def from_conv(
        cls,
        conv: _Conv,
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
        require_ordinary(cls, conv)
        as_choice("start", start, STARTS)
        if start == "weights":
            contexts(conv, f"{cls.__name__}.from_conv")
        options, groups = conv._kwargs, conv._kwargs["num_group"]
        with no_name_scope():
            layer = cls(
                channels_per_group(conv) * groups, options["num_filter"], tuple(options["kernel"]),
                options["stride"], options["pad"], options["dilate"], groups, options["layout"],
                conv.act and conv.act._act_type, conv.bias is not None, conv.weight.init,
                "zeros" if conv.bias is None else conv.bias.init, conv.prefix,
                with_bn=with_bn, bn_options=bn_options, **sizes,
            )  # fmt: skip
        layer.explained = start_like(layer, conv, start)
        if conv._active:
            layer.hybridize(backend=conv._backend, **dict(conv._flags))
        return layer

    def _inferred_in_channels(self) -> int:
        """Return the number of input channels, 0 where it is unknown."""
        return channels_per_group(self.pointwise) if self._deferred else self._outline.in_channels


def _kernel(part: _Conv, ctx: mx.Context | None) -> NDArray:
    """Return what a part convolves with, in one context."""
    kernel = part.composed_kernel(ctx) if isinstance(part, _DOConv) else part.weight.data(ctx)
    return kernel.as_nd_ndarray()


def _reordered(F: Any, x: Any) -> Any:
    """Return `x` as it is, in the usual memory layout, and so its gradient.

    On the CPU, MXNet 1.9 cannot read the gradients of a convolution of one or three dimensions and
    8, 16, ... channels where oneDNN's batch norm is before or behind it.
    """
    return native(F.slice_axis(x.as_nd_ndarray(), axis=0, begin=0, end=None))
