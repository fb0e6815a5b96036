"""The DO-Conv layers of MXNet Gluon."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import HybridBlock, Parameter, ParameterDict, nn
from mxnet.gluon.nn.conv_layers import _Conv
from mxnet.ndarray import NDArray
from mxnet.util import is_np_array

from doconv_core.spec import ConvSpec, as_integer, as_tuple
from doconv_mx.compose import as_w, compose, native, tied
from doconv_mx.ordinary import contexts, filled, is_channels_last, spec_of

_LAYOUTS = {1: ("NCW",), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}


class _DOConv(_Conv):
    """What the layers of every rank share; each names the ordinary layer it stands in for.

    Parameters: `weight`, W, in the ordinary kernel's shape where `S == M`, else `(O, I/g, S)`, and
    `(O, S, I/g)` in a channels-last layout; `depthwise_weight`, D, `(I, M, S)`, zero at first, or
    None for a kernel of one tap; `bias`.
    """

    ordinary: type[_Conv]

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
        rank = self._rank()
        in_channels = as_integer("in_channels", in_channels, least=0)
        kernel_size = as_tuple("kernel_size", kernel_size, rank)
        # Where the input channels are to be inferred, a number that suits the groups stands for
        # them, so that everything else is validated here and now.
        instead = in_channels or as_integer("groups", groups)
        outline = ConvSpec(instead, channels, kernel_size, groups, depth_multiplier)
        layout = _LAYOUTS[rank][0] if layout is None else layout
        if layout not in _LAYOUTS[rank]:
            raise ValueError(
                f"layout must be {' or '.join(map(repr, _LAYOUTS[rank]))}; received "
                f"layout={layout!r}."
            )
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
        self._loaded_alone: str | None = None
        with self.name_scope():
            self.act = self.bias = self.depthwise_weight = None
            if activation is not None:
                self.act = nn.Activation(activation, prefix=f"{activation}_")
            weight_shape, depthwise_shape = self._shapes(in_channels)
            self.weight = self._parameter("weight", weight_shape, weight_initializer)
            if use_bias:
                self.bias = self._parameter("bias", (outline.out_channels,), bias_initializer)
            if outline.over_parameterized:
                self.depthwise_weight = self._parameter(
                    "depthwise_weight", depthwise_shape, "zeros"
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

    def composed_kernel(self, ctx: mx.Context | None = None) -> NDArray:
        """Return the kernel that the layer convolves with: `(O, I/g, *kernel_size)`, or
        `(O, *kernel_size, I/g)` in a channels-last layout.

        ctx: which of the layer's contexts, as in `Parameter.data`. The kernel is in the parameters'
        dtype (float16 is composed in float32 and rounded once), and differentiable while autograd
        records. A kernel of one tap is W itself.
        """
        weight = self.weight.data(ctx)
        if self.depthwise_weight is None:
            return weight
        return self._compose(mx.nd, weight, self.depthwise_weight.data(ctx))

    def fold(self) -> _Conv:
        """Return a new ordinary convolution with the same function.

        It keeps contexts, dtype, names, learning-rate and weight-decay multipliers, activation and
        hybridization. Its weight is trainable where W or D is.
        Raises ValueError for a layer that has no values yet.
        """
        ctx = contexts(self, f"{type(self).__name__}.fold")
        with autograd.pause():
            kernels = [self.composed_kernel(c) for c in ctx]
        requests = [p.grad_req for p in (self.weight, self.depthwise_weight) if p is not None]
        trainable = next((r for r in requests if r != "null"), "null")
        return filled(self.ordinary, self, {}, weight=(kernels, trainable))

    @classmethod
    def from_conv(cls, conv: _Conv, *, depth_multiplier: int | None = None) -> _DOConv:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of Gluon's own, exactly; its parameters are copied. D is zero.
        Raises TypeError for any other layer: a subclass may compute something else. Raises
        ValueError for a layer that has no values yet.
        """
        if type(conv) is not cls.ordinary:
            raise TypeError(
                f"{cls.__name__}.from_conv takes over a mxnet.gluon.nn.{cls.ordinary.__name__}, "
                f"exactly; received {type(conv).__module__}.{type(conv).__qualname__}."
            )
        ctx = contexts(conv, f"{cls.__name__}.from_conv")
        spec = spec_of(conv, depth_multiplier)
        last, request, dtype = is_channels_last(conv), conv.weight.grad_req, conv.weight.dtype
        parameters = {"weight": ([as_w(w, spec, last) for w in conv.weight.list_data()], request)}
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

    @classmethod
    def _rank(cls) -> int:
        return int(cls.ordinary.__name__[-2])

    def _inferred_in_channels(self) -> int:
        """Return the number of input channels, 0 where it is unknown."""
        per_group = self.weight.shape[-1 if is_channels_last(self) else 1]
        return max(per_group, 0) * self._outline.groups  # unknown is 0, or -1 with mx.npx.set_np

    def _shapes(self, in_channels: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
        """Return the shapes of the parameters W and D; in_channels may be 0, for unknown."""
        spec, per_group = self._outline, in_channels // self._outline.groups
        body = spec.parameter_shape[2:]
        weight = (*body, per_group) if is_channels_last(self) else (per_group, *body)
        return (spec.out_channels, *weight), (in_channels, spec.taps, spec.depth_multiplier)

    def _parameter(self, name: str, shape: tuple[int, ...], init: Any) -> Parameter:
        """Return the parameter that `params` shares with the layer, or else a new one of it."""
        full = self.params.prefix + name
        if self.params._get_impl(full) is None:
            options = {"shape": shape, "init": init, "allow_deferred_init": True}
            self.params.update({full: _DOParameter(full, self, **options)})
        return self.params.get(name, shape=shape, init=init)

    def _compose(self, F: Any, weight: Any, depthwise: Any) -> Any:
        last, dtype = is_channels_last(self), self.weight.dtype
        return compose(F, weight, depthwise, self._outline, last, dtype)

    def _collect_params_with_prefix(self, prefix: str = "") -> dict[str, Parameter]:
        """Return the layer's parameters by path, as every loading from a file begins."""
        self._loaded_alone = None
        return super()._collect_params_with_prefix(prefix)

    def _loaded(self, parameter: Parameter) -> None:
        """Set D to zero where a file holds W alone, so that the layer computes what was loaded.

        MXNet loads one parameter after the other in the file's order, so D may come before W.
        """
        alone, depthwise = self._loaded_alone, self.depthwise_weight
        if parameter is depthwise:
            self._loaded_alone = None if alone == "weight" else "depthwise_weight"
        elif parameter is self.weight and depthwise is not None:
            self._loaded_alone = None if alone == "depthwise_weight" else "weight"
            if self._loaded_alone:
                zeros = native(mx.nd.zeros(self.spec.depthwise_shape, dtype=parameter.dtype))
                Parameter._load_init(depthwise, zeros, parameter.list_ctx(), True, "saved")


class _DOParameter(Parameter):
    """A parameter that takes over an ordinary layer's, and tells its layer of having been loaded.

    Every way of loading a file ends in `_load_init`, be the layer alone or deep in a network.
    """

    def __init__(self, name: str, layer: _DOConv, **options: Any) -> None:
        super().__init__(name, **options)
        self._layer = layer

    def _load_init(self, data: NDArray, *args: Any, **options: Any) -> None:
        layer = self._layer
        if self is layer.weight:
            data = as_w(data, layer._outline, is_channels_last(layer))
        super()._load_init(data, *args, **options)
        layer._loaded(self)


class DOConv1D(_DOConv, nn.Conv1D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv1D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv1D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, W)` becomes `(B, O, W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary = nn.Conv1D


class DOConv2D(_DOConv, nn.Conv2D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv2D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv2D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, H, W)` becomes `(B, O, H', W')`, or the like for `layout="NHWC"`,
    which MXNet computes on GPUs only.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary = nn.Conv2D


class DOConv3D(_DOConv, nn.Conv3D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv3D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv3D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, D, H, W)` becomes `(B, O, D', H', W')`, or the like for
    `layout="NDHWC"`, which MXNet computes on GPUs only.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary = nn.Conv3D
