"""Dynamic group convolutions in MXNet Gluon."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, cast

from mxnet import autograd, init
from mxnet.gluon import Block, HybridBlock, nn

from doconv_core.kinds.dgc import LASSO, DGConvSpec, as_lasso, skipping_pays
from doconv_core.maths.spec import as_tuple
from doconv_core.models.dynamic import DynamicLayers
from doconv_core.models.parted import HOOKED
from doconv_core.models.report import REPLACED
from doconv_mx.ordinary import require_values
from doconv_mx.private import forget_graph, is_hooked
from doconv_mx.tree import check_model, is_replaced, walk

# The lassos of the layers that the running `WithLasso` has called; None where none is running.
_told: ContextVar[list[Any] | None] = ContextVar("told", default=None)


class DynamicHeads2D(HybridBlock):
    """The heads of a `DGConv2D`, which takes the same arguments: they see its normalized input."""

    _op_name = "Convolution"  # as an ordinary one says how its weight lies
    dropped: int | None = None  # of a layer that skips: so many channels

    def __init__(
        self, in_channels: int, channels: int, kernel_size: Any, strides: Any = 1, padding: Any = 0,
        dilation: Any = 1, *, lasso: float = LASSO, prefix: str | None = None, params: Any = None,
        **sizes: Any,
    ) -> None:  # fmt: skip
        size = as_tuple("kernel_size", kernel_size, 2)
        spec = DGConvSpec(in_channels, channels, size, **sizes)
        self.strides = as_tuple("strides", strides, 2)
        options = {"kernel": size, "stride": self.strides, "layout": "NCHW"}
        options["dilate"] = as_tuple("dilation", dilation, 2)
        options["pad"] = as_tuple("padding", padding, 2, least=0)
        super().__init__(prefix=prefix, params=params)
        self.spec, self._kwargs, self.lasso = spec, options, as_lasso("lasso", lasso)
        starts: dict[str, Any] = {
            "squeeze_weight": init.Normal((2 / spec.in_channels) ** 0.5),
            "saliency_weight": init.Normal((2 / spec.squeezed) ** 0.5),
            "saliency_bias": init.One(),
        }
        # Arrays have at least one axis here.
        shapes = {**spec.shapes, "weight": spec.kernel_shape, "inactive": (1,)}
        with self.name_scope():
            for name, shape in shapes.items():
                setattr(self, name, self.params.get(name, shape=shape, init=starts.get(name)))
            self.inactive.grad_req, self.inactive.init = "null", init.Zero()

    def cast(self, dtype: Any) -> None:
        """Cast to another dtype, but for the counter, which half precision may not hold."""
        super().cast(dtype)
        self.inactive.cast("float32")

    def hybrid_forward(
        self, F: Any, z: Any, weight: Any, squeeze_weight: Any, saliency_weight: Any,
        saliency_bias: Any, inactive: Any,
    ) -> Any:  # fmt: skip
        """Return `(B, O, H', W')` of `z` `(B, C, H, W)`.

        Of one tap, the saliencies go into a kernel for each image, else into a map for each head.
        """
        spec: Any = self.spec
        options = self._kwargs
        saliency = self.saliency(F, z, squeeze_weight, saliency_weight, saliency_bias)
        gate = F.broadcast_mul(saliency, 1 - self._dropped(F, F.BlockGrad(saliency), inactive))
        if self.lasso:  # before it skips, as a hybridized block trains by the graph it has
            gate = F.broadcast_add(gate, self._lasso(F, saliency))
        if self.skips():
            return self._skip(F, z, weight, gate)
        if spec.conv.taps == 1 and not any(options["pad"]):
            return self._by_image(F, z, weight, gate)
        gated = F.broadcast_mul(F.expand_dims(z, axis=1), F.reshape(gate, shape=(0, 0, 0, 1, 1)))
        y = F.Convolution(
            F.reshape(gated, shape=(0, -3, 0, 0)), weight, no_bias=True, num_group=spec.heads,
            num_filter=spec.out_channels, **options,
        )  # fmt: skip
        by_head = F.reshape(y, shape=(0, -4, spec.heads, -1, 0, 0))
        return F.reshape(F.swapaxes(by_head, 1, 2), shape=(0, -3, 0, 0))

    def saliency(self, F: Any, z: Any, squeeze: Any, rate: Any, bias: Any) -> Any:
        """Return how each head rates the channels of each image, `(B, h, C)`."""
        heads, squeezed = self.spec.heads, self.spec.squeezed
        features = F.FullyConnected(
            F.mean(z, axis=(2, 3)), F.reshape(squeeze, shape=(-3, 0)), no_bias=True,
            num_hidden=heads * squeezed,
        )  # fmt: skip
        by_head = F.reshape(F.relu(features), shape=(0, heads, -1)).swapaxes(0, 1)
        rated = F.batch_dot(by_head, rate, transpose_b=True).swapaxes(0, 1)
        return F.relu(F.broadcast_add(rated, F.expand_dims(bias, axis=0)))

    def _dropped(self, F: Any, saliency: Any, inactive: Any) -> Any:
        """Return 1 for the `inactive` least saliencies of each head and their equals, else 0."""
        below = F.slice_axis(saliency, axis=2, begin=0, end=1) * 0 - 1
        ordered = F.concat(below, F.sort(saliency, axis=2), dim=2)
        return F.broadcast_lesser_equal(saliency, F.take(ordered, inactive, axis=2))

    def _lasso(self, F: Any, saliency: Any) -> Any:
        """Return zeros, whose gradient is that of each image's lasso, whatever comes back to it."""
        each = F.sum(F.mean(saliency, axis=2), axis=1, keepdims=True)
        each = F.MakeLoss(each, grad_scale=self.lasso)
        told = _told.get()
        if told is not None:
            told.append(F.BlockGrad(each) * self.lasso)
        return F.expand_dims(each, axis=2) * 0

    def skips(self) -> bool:
        """Return whether to multiply only what is kept, as `skipping_pays`."""
        if self.dropped is None or autograd.is_training():
            return False
        return skipping_pays(self.spec, self.dropped)

    def _skip(self, F: Any, z: Any, weight: Any, gate: Any) -> Any:
        """Gather the maps and kernels of the channels that are kept, and multiply those."""
        spec: Any = self.spec
        options: dict[str, Any] = self._kwargs
        heads, channels, each = spec.heads, spec.in_channels, spec.out_channels // spec.heads
        kept = max(1, channels - cast(int, self.dropped))
        gate, index = F.topk(gate, axis=2, k=kept, ret_typ="both", dtype="int32")  # (B, h, K)
        by_output = F.slice_axis(F.reshape(weight, shape=(0, -1)), axis=1, begin=0, end=1)
        outputs = F.contrib.arange_like(F.cast(by_output, "int32"), axis=0) * channels
        outputs = F.reshape(outputs, shape=(1, heads, each, 1))
        rows = F.broadcast_add(outputs, F.expand_dims(index, axis=2))  # (B, h, O/h, K)
        kernels = F.take(F.reshape(weight, shape=(-3, -1)), rows)  # (B, h, O/h, K, M)
        kernels = F.broadcast_mul(kernels, F.reshape(gate, shape=(0, 0, 1, kept, 1)))
        images = F.reshape(F.contrib.arange_like(index, axis=0), shape=(-1, 1, 1)) * channels
        maps = F.take(F.reshape(z, shape=(-3, 0, 0)), F.broadcast_add(index, images))
        maps = F.reshape(maps, shape=(-3, 0, 0, 0))  # (B·h, K, H, W)
        reach = [1 + d * (k - 1) for k, d in zip(options["kernel"], options["dilate"], strict=True)]
        columns = F.im2col(
            maps, **{name: options[name] for name in ("kernel", "stride", "dilate", "pad")}
        )
        y = F.batch_dot(F.reshape(kernels, shape=(-3, 0, -3)), columns)  # (B·h, O/h, H'·W')
        y = F.reshape(F.reshape(y, shape=(-4, -1, heads, 0, 0)).swapaxes(1, 2), shape=(0, -3, 0))
        down, right = options["pad"]  # which pooling has no more of than its kernel is large
        like = F.Pooling(
            F.pad(
                F.slice_axis(z, axis=1, begin=0, end=1), mode="constant",
                pad_width=(0, 0, 0, 0, down, down, right, right),
            ),
            kernel=reach, stride=options["stride"],
        )  # fmt: skip
        return F.reshape_like(y, like, lhs_begin=2, lhs_end=3, rhs_begin=2, rhs_end=4)

    def _by_image(self, F: Any, z: Any, weight: Any, gate: Any) -> Any:
        rows, columns = self.strides
        if rows > 1 or columns > 1:
            nothing = (None,) * 4
            z = F.slice(z, begin=nothing, end=nothing, step=(1, 1, rows, columns))
        sizes = (1, self.spec.heads, -1, self.spec.in_channels)
        by_channel = F.swapaxes(F.reshape(weight, shape=sizes), 1, 2)  # (1, O/h, h, C)
        kernel = F.broadcast_mul(by_channel, F.expand_dims(gate, axis=1))
        kernel = F.reshape(kernel, shape=(0, -3, 0))
        y = F.batch_dot(kernel, F.reshape(z, shape=(0, 0, -3)))
        return F.reshape_like(y, z, lhs_begin=2, lhs_end=3, rhs_begin=2, rhs_end=4)


class DGConv2D(HybridBlock):
    """A dynamic group convolution: a batch norm, ReLU, and heads that choose their channels.

    Takes the place of a norm, a ReLU and a convolution without bias. Each of the `heads` convolves
    the input channels that it finds more salient in an image, multiplied by their saliency, to its
    share of the output channels. `set_progress` says how many it keeps: all at the start, from
    three quarters of the training on `gate_factor` of them.

    in_channels, channels, kernel_size, strides, padding, dilation: integers or pairs. heads,
    squeeze_rate, gate_factor: those of `DGConvSpec`. lasso: what the loss of each image, an entry
    of a loss of Gluon's, has in it of that image's saliencies, their means over channels summed
    over heads; their gradient comes with each backward pass through the layer, hybridized or not,
    and is in no number that is printed. Input `(B, C, H, W)`, output `(B, O, H', W')`.
    Raises TypeError or ValueError for sizes that give no layer.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> layer = DGConv2D(32, 64, 3, padding=1)
    >>> layer.initialize()
    >>> layer(mx.nd.zeros((2, 32, 8, 8))).shape
    (2, 64, 8, 8)
    """

    def __init__(self, in_channels: int, *args: Any, **options: Any) -> None:
        scope = {name: options.pop(name) for name in ("prefix", "params") if name in options}
        super().__init__(**scope)
        with self.name_scope():
            heads = DynamicHeads2D(in_channels, *args, **options, prefix="heads_")
            self.norm = nn.BatchNorm(in_channels=heads.spec.in_channels, prefix="norm_")
            self.relu = nn.Activation("relu", prefix="relu_")
            self.heads = heads  # in a state behind the norm, as everywhere

    @classmethod
    def of(cls, prefix: str | None = None) -> DGConv2D:
        """Return a layer without its parts, which are still to be set: norm, relu and heads."""
        layer = cls.__new__(cls)
        HybridBlock.__init__(layer, prefix=prefix)
        return layer

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return `(B, O, H', W')` of `x` `(B, C, H, W)`."""
        return self.heads(self.relu(self.norm(x)))


class SkippingDGConv2D(DGConv2D):
    """A dynamic group convolution that multiplies only what it keeps, as `fold` makes it.

    It has a `DGConv2D`'s parts and, up to rounding, output; in `autograd.train_mode()` it is one.
    What belongs to the kept channels is gathered for each image and head and multiplied, where
    `doconv_core.kinds.dgc.skipping_pays`; as many as when it was folded.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> layer = DGConv2D(64, 64, 3, padding=1)
    >>> layer.initialize()
    >>> set_progress(layer, 1)
    >>> skips = fold(layer).model
    >>> skips(mx.nd.ones((1, 64, 14, 14))).shape
    (1, 64, 14, 14)
    """


class WithLasso(HybridBlock):
    """A model that also returns each image's lasso, `(B, 1)`, which else is in no number.

    Hybridized as the model is, or both are not.
    """

    def __init__(self, model: HybridBlock) -> None:
        super().__init__()
        self.model = model

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the model's output, and the lassos of its layers, added up."""
        token = _told.set([])
        try:
            y = self.model(x)
            return y, F.add_n(*(_told.get() or ()))
        finally:
            _told.reset(token)


class DGConvs(DynamicLayers):
    """The dynamic group convolutions of Gluon."""

    def changed(self, layer: Any) -> str | None:
        """Return whether a part has been exchanged, or has hooks."""
        parts = (layer.norm, layer.relu, layer.heads)
        if any(map(is_replaced, (layer, *parts))):
            return REPLACED
        return HOOKED if any(map(is_hooked, parts)) else None

    def skip(self, layer: Any) -> None:
        """Note what is dropped."""
        layer.heads.dropped = int(layer.heads.inactive.list_data()[0].asscalar())
        forget_graph(layer)


DG_CONVS = DGConvs(DGConv2D, DynamicHeads2D, SkippingDGConv2D)


def set_progress(model: Block, progress: float) -> None:
    """Let a model's dynamic group convolutions drop as many channels as at this point of training.

    progress: the share of the training that is done, 0 to 1; give it before each step. Their number
    follows by `doconv_core.kinds.dgc.inactive_channels`, and is in the model's parameters. Raises
    ValueError for a model without such layers and for another progress, TypeError for no number.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> layer = DGConv2D(64, 64, 3)
    >>> layer.initialize()
    >>> set_progress(layer, 1)
    >>> layer.heads.inactive.data().asscalar()
    48.0
    """

    def put(heads: DynamicHeads2D, inactive: int) -> None:
        with autograd.pause():
            heads.inactive.set_data(heads.inactive.list_data()[0] * 0 + inactive)

    found = _heads(model)
    require_values((heads.inactive for heads in found), "set_progress")
    DG_CONVS.set_progress(found, progress, put)


def add_saliency_lasso(model: Block, weight: float = LASSO) -> None:
    """Let the gradients of a model have those of all saliencies' lasso with this weight.

    As `lasso=` of each `DGConv2D`, where it is 1e-5 from the start; 0 takes it out; PyTorch's is
    `saliency_lasso`.
    Raises ValueError for a model without such layers and for a weight below 0, TypeError for no
    number. Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> layer = DGConv2D(16, 8, 1)
    >>> add_saliency_lasso(layer, 1e-4)
    >>> layer.heads.lasso
    0.0001
    """
    weight = as_lasso("weight", weight)
    for heads in _heads(model):
        heads.lasso = weight
    for _, block in walk(model):
        forget_graph(block)


def _heads(model: Block) -> list[Any]:
    check_model(model)
    return DG_CONVS.heads(block for _, block in walk(model))
