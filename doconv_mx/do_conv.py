"""The DO-Conv layers of MXNet Gluon."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mxnet as mx
from mxnet.gluon import HybridBlock, Parameter, ParameterDict, nn
from mxnet.gluon.nn.conv_layers import _Conv
from mxnet.ndarray import NDArray
from mxnet.util import is_np_array

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec, as_integer, as_tuple
from doconv_mx.compose import as_w, compose, grouped, native, tied
from doconv_mx.ordinary import (
    channels_per_group,
    contexts,
    filled,
    is_channels_last,
    require_ordinary,
    spec_of,
)
from doconv_mx.parameter import Weight
from doconv_mx.view import overridden

_LAYOUTS = {1: ("NCW",), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}


def as_layout(layout: str | None, rank: int) -> str:
    """Return the layout of a layer of `rank` spatial dimensions, channels-first where not given.

    Raises ValueError for one that a layer cannot have.
    """
    layout = _LAYOUTS[rank][0] if layout is None else layout
    if layout not in _LAYOUTS[rank]:
        raise ValueError(
            f"layout must be {' or '.join(map(repr, _LAYOUTS[rank]))}; received layout={layout!r}."
        )
    return layout


class _DOConv(_Conv):
    """What the layers of every rank share; each names the ordinary layer it stands in for.

    Parameters: `weight`, W, in the ordinary kernel's shape where `S == M`, else `(O, I/g, S)`, and
    `(O, S, I/g)` in a channels-last layout; `depthwise_weight`, D, `(I, M, S)`, zero at first, or
    None for a kernel of one tap; `bias`.
    """

    ordinary: type[_Conv]
    rank: int
    _in_batches = False  # whether a graph was made that composes so

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
        depth_multiplier: int | None = None,
    ) -> None:
        rank = self.rank
        in_channels = as_integer("in_channels", in_channels, least=0)
        kernel_size = as_tuple("kernel_size", kernel_size, rank)
        channels, groups = as_integer("channels", channels), as_integer("groups", groups)
        # Where the input channels are to be inferred, a number that suits the groups stands for
        # them, so that everything else is validated here and now.
        sizes = (in_channels or groups, channels, kernel_size, groups, depth_multiplier)
        try:
            outline = ConvSpec(*sizes)
        except ValueError as error:  # Gluon's name for what the core calls out_channels
            raise ValueError(str(error).replace("out_channels", "channels")) from None
        layout = as_layout(layout, rank)
        options = {
            "kernel": kernel_size,
            "stride": as_tuple("strides", strides, rank),
            "dilate": as_tuple("dilation", dilation, rank),
            "pad": as_tuple("padding", padding, rank, least=0),
            "num_filter": outline.out_channels,
            "num_group": outline.groups,
            "no_bias": not use_bias,
            "layout": layout,
        }
        # The ordinary layer's own __init__ is passed over, and its attributes are set here: it
        # would ask `params` for a weight of the ordinary shape, which one shared by another DO-Conv
        # layer need not have.
        HybridBlock.__init__(self, prefix=prefix, params=params)
        self._outline = outline
        self._channels, self._in_channels = outline.out_channels, in_channels
        self._op_name = "convolution" if is_np_array() else "Convolution"
        self._kwargs = options
        self._refuse_an_ordinary_weight()
        with self.name_scope():
            self.act = self.bias = self.depthwise_weight = None
            if activation is not None:
                self.act = nn.Activation(activation, prefix=f"{activation}_")
            weight_shape, depthwise_shape = self._shapes(in_channels)
            self.weight = self._weight(weight_shape, weight_initializer)
            deferred = {"allow_deferred_init": True}
            if use_bias:
                self.bias = self.params.get(
                    "bias", shape=(outline.out_channels,), init=bias_initializer, **deferred
                )
            if outline.over_parameterized:
                self.depthwise_weight = self.params.get(
                    "depthwise_weight", shape=depthwise_shape, init="zeros", **deferred
                )

    @property
    def spec(self) -> ConvSpec:
        """The layer's sizes. Raises ValueError while `in_channels` has not been inferred yet."""
        in_channels = self._inferred_in_channels()
        if not in_channels:
            raise ValueError(
                f"in_channels of layer {self.name!r} is not known yet; pass it, or run the layer "
                "once."
            )
        return replace(self._outline, in_channels=in_channels)

    def hybrid_forward(
        self, F: Any, x: Any, weight: Any, bias: Any = None, depthwise_weight: Any = None
    ) -> Any:
        """Return the convolution of `x`, in the layer's layout, with the composed kernel."""
        if depthwise_weight is not None:
            if not self._inferred_in_channels():
                channel = self._kwargs["layout"].find("C")
                weight, depthwise_weight = tied(
                    F, x, weight, depthwise_weight, self._outline, channel
                )
            weight = self._compose(F, weight, depthwise_weight)
        return super().hybrid_forward(F, x, weight, bias)

    def hybridize(self, *args: Any, **kwargs: Any) -> None:
        """Do as any block does: a graph that is made anew may compose in another form."""
        self._in_batches = False
        super().hybridize(*args, **kwargs)

    def composed_kernel(self, ctx: mx.Context | None = None) -> NDArray:
        """Return the kernel that the layer convolves with: `(O, I/g, *kernel_size)`, or
        `(O, *kernel_size, I/g)` in a channels-last layout.

        ctx: which of the layer's contexts, as in `Parameter.data`. The kernel is in the parameters'
        dtype (float16 is composed in float32 and rounded once), and differentiable while autograd
        records. A kernel of one tap is W itself. Raises ValueError for a layer that has no values
        yet.
        """
        contexts(self, f"{type(self).__name__}.composed_kernel")
        weight = self.weight.data(ctx)
        if self.depthwise_weight is None:
            return weight
        return self._compose(mx.nd, weight, self.depthwise_weight.data(ctx))

    def fold(self) -> _Conv:
        """Return a new ordinary convolution with the same function.

        It keeps contexts, dtype, names, learning-rate and weight-decay multipliers, activation and
        hybridization. Its weight is trainable where W or D is. Hooks are not carried over.
        Raises NotFoldable for a subclass that computes something else, ValueError for a layer that
        has no values yet.
        """
        self.require_foldable()
        ctx = contexts(self, f"{type(self).__name__}.fold")
        kernels = [self.composed_kernel(c) for c in ctx]
        requests = [p.grad_req for p in (self.weight, self.depthwise_weight) if p is not None]
        trainable = next((r for r in requests if r != "null"), "null")
        return filled(self.ordinary, self, {}, weight=(kernels, trainable))

    def require_foldable(self) -> None:
        """Raise NotFoldable for a layer that may compute something else than the plain one."""
        cls, methods = type(self), ("__call__", "forward", "hybrid_forward")
        if overridden(self) or any(getattr(cls, m) is not getattr(_DOConv, m) for m in methods):
            raise NotFoldable(
                f"{cls.__module__}.{cls.__qualname__} has a forward of its own, so the convolution "
                "it would be folded to might compute something else; fold() is for the plain layer."
            )

    @classmethod
    def from_conv(cls, conv: _Conv, *, depth_multiplier: int | None = None) -> _DOConv:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of Gluon's own, exactly; its parameters are copied. D is zero.
        Raises TypeError for any other layer: a subclass may compute something else. Raises
        ValueError for a layer that has no values yet.
        """
        require_ordinary(cls, conv)
        ctx = contexts(conv, f"{cls.__name__}.from_conv")
        spec = spec_of(conv, depth_multiplier)
        last, request, dtype = is_channels_last(conv), conv.weight.grad_req, conv.weight.dtype
        weights = [as_w(w, spec, last, spec.in_channels) for w in conv.weight.list_data()]
        parameters = {"weight": (weights, request)}
        if spec.depthwise_shape is not None:
            zeros = [native(mx.nd.zeros(spec.depthwise_shape, c, dtype)) for c in ctx]
            parameters["depthwise_weight"] = (zeros, request)
        options = {"depth_multiplier": spec.depth_multiplier}
        return filled(cls, conv, options, **parameters)

    def infer_shape(self, x: Any, *_: Any) -> None:
        """Take the number of input channels from the shape of `x`."""
        in_channels = x.shape[self._kwargs["layout"].find("C")]
        spec = replace(self._outline, in_channels=in_channels)  # validated
        self.weight.shape, depthwise_shape = self._shapes(spec.in_channels)
        if self.depthwise_weight is not None:
            self.depthwise_weight.shape = depthwise_shape

    def __repr__(self) -> str:
        """Return the ordinary layer's description, with all input channels and S."""
        arguments = super().__repr__().split(", kernel_size=", 1)[1]
        if self.depthwise_weight is not None:
            arguments = f"{arguments[:-1]}, depth_multiplier={self._outline.depth_multiplier})"
        mapping = f"{self._inferred_in_channels() or None} -> {self._channels}"
        return f"{type(self).__name__}({mapping}, kernel_size={arguments}"

    def _inferred_in_channels(self) -> int:
        """Return the number of input channels, 0 where it is unknown."""
        return channels_per_group(self) * self._outline.groups

    def _shapes(self, in_channels: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
        """Return the shapes of the parameters W and D; in_channels may be 0, for unknown."""
        spec, per_group = self._outline, in_channels // self._outline.groups
        body = spec.parameter_shape[2:]
        weight = (*body, per_group) if is_channels_last(self) else (per_group, *body)
        return (spec.out_channels, *weight), (in_channels, spec.taps, spec.depth_multiplier)

    def _refuse_an_ordinary_weight(self) -> None:
        """Raise TypeError where `params` shares a weight that, loaded alone, would not reset D."""
        shared = self.params._get_impl(f"{self.params.prefix}weight")
        if self._outline.over_parameterized and not isinstance(shared, Weight | None):
            raise TypeError(
                f"params must be those of another DO-Conv layer; received {shared.name!r} of an "
                "ordinary layer, whose weight is trained and loaded without D. Use "
                f"{type(self).__name__}.from_conv(conv), which copies them."
            )

    def _weight(self, shape: tuple[int, ...], init: Any) -> Parameter:
        """Return the parameter W that `params` shares with the layer, or else a new one."""
        name = f"{self.params.prefix}weight"
        if self.params._get_impl(name) is None:
            options = {"shape": shape, "init": init, "allow_deferred_init": True}
            self.params.update({name: Weight(name, self, **options)})
        return self.params.get("weight", shape=shape, init=init)

    def _compose(self, F: Any, weight: Any, depthwise: Any) -> Any:
        spec, last, dtype = self._outline, is_channels_last(self), self.weight.dtype
        channels = 0
        if not self._in_batches:
            channels = grouped(self.weight, spec, self._inferred_in_channels())
        if F is mx.sym and not channels:
            # From now on everywhere, so that graph, folded kernel and eager calls round alike.
            self._in_batches = True
        return compose(F, weight, depthwise, spec, last, dtype, channels)


class DOConv1D(_DOConv, nn.Conv1D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv1D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv1D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, W)` becomes `(B, O, W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = nn.Conv1D, 1


class DOConv2D(_DOConv, nn.Conv2D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv2D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv2D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, H, W)` becomes `(B, O, H', W')`, or the like for `layout="NHWC"`,
    which MXNet computes on GPUs only.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = nn.Conv2D, 2


class DOConv3D(_DOConv, nn.Conv3D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv3D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv3D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, D, H, W)` becomes `(B, O, D', H', W')`, or the like for
    `layout="NDHWC"`, which MXNet computes on GPUs only.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = nn.Conv3D, 3
