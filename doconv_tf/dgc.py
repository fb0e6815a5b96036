"""Dynamic group convolutions in Keras."""

from __future__ import annotations

import math
from typing import Any, cast

import keras
from keras import ops

from doconv_core.kinds.dgc import (
    GATE_FACTOR,
    HEADS,
    LASSO,
    SQUEEZE_RATE,
    DGConvSpec,
    as_lasso,
    skipping_pays,
)  # fmt: skip
from doconv_core.maths.spec import as_integer, as_tuple
from doconv_core.models.dynamic import DynamicLayers
from doconv_core.models.received import no_model
from doconv_core.models.report import REPLACED
from doconv_core.networks.nodes import BatchNorm
from doconv_tf.ordinary import first_occurrences, is_replaced
from doconv_tf.orthonormal import wide

NORM = BatchNorm()  # of networks; its defaults are not Keras'
# The arguments of an ordinary convolution that the heads have as attributes.
ARGUMENTS = (
    "filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate",
    "kernel_initializer", "kernel_regularizer", "kernel_constraint",
)  # fmt: skip
SELECTOR = ("squeeze_weight", "saliency_weight", "saliency_bias")
OWN = ("heads", "squeeze_rate", "gate_factor", "lasso", "around")
_OF_EVERY_LAYER = {"name", "trainable", "dtype"}


@keras.saving.register_keras_serializable(package="doconv")
class DynamicHeads2D(keras.layers.Layer):
    """The heads of a `DGConv2D`, which takes the same arguments: they see its normalized input."""

    rank = 2
    spec: Any = None  # a DGConvSpec, once it is built
    dropped: int | None = None  # of a layer that skips: so many channels

    def __init__(
        self, filters: int, kernel_size: Any, strides: Any = (1, 1), padding: str = "valid",
        data_format: str | None = None, dilation_rate: Any = (1, 1), *, heads: int = HEADS,
        squeeze_rate: int = SQUEEZE_RATE, gate_factor: float = GATE_FACTOR, lasso: float = LASSO,
        around: Any = 0, kernel_initializer: Any = "glorot_uniform", kernel_regularizer: Any = None,
        kernel_constraint: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        spec = DGConvSpec(  # of channels that fit, as they are not known yet
            as_integer("heads", heads) * as_integer("squeeze_rate", squeeze_rate), filters,
            as_tuple("kernel_size", kernel_size, 2), heads, squeeze_rate, gate_factor,
        )  # fmt: skip
        conv = keras.layers.Conv2D(
            spec.out_channels, spec.kernel_size, as_tuple("strides", strides, 2), padding,
            data_format, as_tuple("dilation_rate", dilation_rate, 2), use_bias=False,
            kernel_initializer=kernel_initializer, kernel_regularizer=kernel_regularizer,
            kernel_constraint=kernel_constraint,
        )  # fmt: skip
        zeros = as_tuple("around", around, 2, least=0)
        if any(zeros) and conv.padding != "valid":
            raise ValueError(
                "around, zeros on every side, goes with padding='valid' alone; received "
                f"around={zeros}, padding={conv.padding!r}."
            )
        super().__init__(**options)
        for names, whose in ((ARGUMENTS, conv), (OWN[:3], spec)):
            for name in names:
                setattr(self, name, getattr(whose, name))
        self.lasso, self.around = as_lasso("lasso", lasso), zeros
        self._last = self.data_format == "channels_last"
        self.input_spec = keras.InputSpec(ndim=4)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the variables for inputs of this shape, which includes the batch."""
        axis = -1 if self._last else 1
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                f"layer {self.name!r}: the number of input channels must be known; received the "
                f"input shape {tuple(input_shape)}."
            )
        self.spec = spec = DGConvSpec(
            channels, self.filters, self.kernel_size, self.heads, self.squeeze_rate,
            self.gate_factor,
        )  # fmt: skip
        self.input_spec = keras.InputSpec(ndim=4, axes={axis: channels})
        self.kernel = self.add_weight(
            (*self.kernel_size, channels, self.filters), self.kernel_initializer, name="kernel",
            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint,
        )  # fmt: skip
        squeeze, rate = (
            keras.initializers.RandomNormal(0.0, (2 / features) ** 0.5)  # as the source draws
            for features in (channels, spec.squeezed)
        )
        for name, start in zip(SELECTOR, (squeeze, rate, "ones"), strict=True):
            shape = spec.shapes[name]
            setattr(self, name, self.add_weight(shape, start, name=name, autocast=False))
        self.inactive = self.add_weight(
            (), "zeros", "int32", name="inactive", trainable=False, aggregation="only_first_replica"
        )

    def saliency(self, z: Any) -> Any:
        """Return how each head rates the channels of each image `(B, H, W, C)`, `(B, h, C)`."""
        dtype = wide(self.squeeze_weight.dtype)
        squeeze, rate, bias = (
            ops.cast(ops.convert_to_tensor(getattr(self, name)), dtype) for name in SELECTOR
        )
        pooled = ops.mean(ops.cast(z, dtype), (1, 2))
        # The operator, because ops.matmul turns float64 into float32 where Keras runs on PyTorch.
        squeezed = ops.relu(pooled @ ops.transpose(ops.reshape(squeeze, (-1, squeeze.shape[-1]))))
        squeezed = ops.reshape(squeezed, (-1, *squeeze.shape[:2]))
        rated = ops.transpose(squeezed, (1, 0, 2)) @ ops.transpose(rate, (0, 2, 1))
        return ops.relu(ops.transpose(rated + bias[:, None], (1, 0, 2)))

    def gate(self, saliency: Any) -> Any:
        """Return the saliencies, zero for the `inactive` least ones of each head and their equals.

        The number is read where the layer runs: there is nothing to wait for, or to trace anew.
        """
        ordered = ops.sort(ops.stop_gradient(saliency), -1)
        below = ops.concatenate([ops.full_like(ordered[..., :1], -1), ordered], -1)
        least = ops.take(below, ops.convert_to_tensor(self.inactive), axis=-1)
        return saliency * ops.cast(saliency > least[..., None], saliency.dtype)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return `(B, H', W', O)` of a normalized batch `(B, H, W, C)`, in the data format.

        The saliencies go into a kernel for each image where that is less than a map for each head,
        as far as the images' size is known. In training their lasso is in the layer's losses.
        """
        z = inputs if self._last else ops.transpose(inputs, (0, 2, 3, 1))
        saliency = self.saliency(z)
        if training and self.lasso:
            self.add_loss(self.lasso * ops.sum(ops.mean(saliency, (0, 2))))
        known, per_kernel = None not in z.shape[1:3], self.filters * self.spec.conv.taps
        places = math.prod(z.shape[1:3]) if known else 0
        if any(self.around):
            z = ops.pad(z, ((0, 0), *((n, n) for n in self.around), (0, 0)))
        gate = ops.cast(self.gate(saliency), z.dtype)
        positions = math.prod(z.shape[1:3]) // math.prod(self.strides) if known else 0  # padded
        dropped = None if training or not known else self.dropped
        if dropped is not None and skipping_pays(self.spec, dropped, 1, positions, columns=True):
            y = self._skip(z, gate, dropped)
        elif per_kernel < self.heads * places:
            y = self._fold(z, ops.transpose(gate, (0, 2, 1)))
        else:
            y = self._mask(z, ops.transpose(gate, (0, 2, 1)))
        return y if self._last else ops.transpose(y, (0, 3, 1, 2))

    def _skip(self, z: Any, gate: Any, dropped: int) -> Any:
        """Gather the maps and kernels of the channels that are kept, and multiply those."""
        heads, channels, taps = self.heads, self.spec.in_channels, self.spec.conv.taps
        kept, batch = max(1, channels - dropped), ops.shape(z)[0]
        gate, index = ops.top_k(gate, kept)  # (B, h, K)
        index = ops.cast(index, "int32")
        places = ops.arange(taps)[:, None] * channels + index[..., None, :]  # (B, h, M, K)
        rows = places * heads + ops.arange(heads)[:, None, None]
        kernel = ops.reshape(ops.convert_to_tensor(self.kernel), (taps * channels * heads, -1))
        kernels = ops.take(ops.cast(kernel, z.dtype), rows, 0) * gate[:, :, None, :, None]
        patches, out = self._patches(z)
        x = ops.transpose(ops.reshape(patches, (-1, math.prod(out), taps * channels)), (0, 2, 1))
        places = places + (ops.arange(batch) * taps * channels)[:, None, None, None]
        x = ops.take(ops.reshape(x, (-1, math.prod(out))), places, 0)
        x = ops.reshape(x, (-1, heads, taps * kept, math.prod(out)))
        kernels = ops.reshape(kernels, (-1, heads, taps * kept, self.filters // heads))
        y = ops.transpose(x, (0, 1, 3, 2)) @ kernels  # (B, h, H'·W', O/h)
        return ops.reshape(ops.transpose(y, (0, 2, 3, 1)), (-1, *out, self.filters))

    def _fold(self, z: Any, gate: Any) -> Any:
        """Convolve each image by kernels that its saliencies are in: with all taps side by side."""
        kernel = self._by_head()
        kernels = ops.reshape(
            ops.reshape(kernel, (-1, *kernel.shape[2:])) * gate[:, None, :, None],
            (-1, self.spec.conv.taps * self.spec.in_channels, self.filters),
        )
        patches, out = self._patches(z)
        y = ops.reshape(patches, (-1, math.prod(out), patches.shape[-1])) @ kernels
        return ops.reshape(y, (-1, *out, self.filters))

    def _patches(self, z: Any) -> tuple[Any, tuple[int, int]]:
        """Return what each place of the output sees, tap by tap `(B, H', W', M·C)`, and H', W'."""
        numbers = zip(z.shape[1:3], self.kernel_size, self.strides, self.dilation_rate, strict=True)
        pads, places = [], []
        for n, k, s, d in numbers:
            total = max(d * (k - 1) - (n - 1) % s, 0) if self.padding == "same" else 0
            pads.append((total // 2, total - total // 2))
            end = n + total - d * (k - 1)
            places.append([slice(tap * d, tap * d + end, s) for tap in range(k)])
        z = ops.pad(z, ((0, 0), *pads, (0, 0)))
        taps = [z[:, rows, columns] for rows in places[0] for columns in places[1]]
        patches = ops.concatenate(taps, -1)
        return patches, tuple(patches.shape[1:3])

    def _mask(self, z: Any, gate: Any) -> Any:
        """Convolve a copy of the images for each head, as none has a gradient in groups on CPUs."""
        maps = [
            ops.conv(
                z * gate[:, None, None, :, i], self._by_head()[..., i], self.strides, self.padding,
                "channels_last", self.dilation_rate,
            )
            for i in range(self.heads)
        ]  # fmt: skip
        y = ops.stack(maps, -1)
        return ops.reshape(y, (-1, *ops.shape(y)[1:3], self.filters))

    def _by_head(self) -> Any:
        """Return the kernel with the heads apart, `(*kernel_size, C, O/h, h)`."""
        kernel = ops.convert_to_tensor(self.kernel)
        apart = ops.reshape(kernel, (*kernel.shape[:-1], self.heads, -1))
        return ops.moveaxis(apart, -2, -1)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output, that of an ordinary convolution's."""
        pad = keras.layers.ZeroPadding2D(self.around, self.data_format)
        shape = self._conv().compute_output_shape(pad.compute_output_shape(input_shape))
        return cast("tuple[int | None, ...]", shape)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        conv = self._conv().get_config()
        own = {name: getattr(self, name) for name in OWN}
        return {**super().get_config(), **{name: conv[name] for name in ARGUMENTS}, **own}

    def _conv(self) -> keras.Layer:
        arguments = {name: getattr(self, name) for name in ARGUMENTS}
        return keras.layers.Conv2D(**arguments, use_bias=False)


@keras.saving.register_keras_serializable(package="doconv")
class DGConv2D(keras.layers.Layer):
    """A dynamic group convolution: a batch norm, ReLU, and heads that choose their channels.

    Takes the place of a norm, a ReLU and a convolution without bias. Each of the `heads` convolves
    the input channels that it finds more salient in an image, multiplied by their saliency, to its
    share of the output channels. `ProgressCallback` or `set_progress` says how many it keeps: all
    at the start, from three quarters of the training on `gate_factor` of them.

    Takes `keras.layers.Conv2D`'s arguments up to `dilation_rate`, and by keyword only those about
    the kernel and heads, squeeze_rate and gate_factor of `DGConvSpec`; lasso: the weight in the
    model's losses, and so in `fit`, of the saliencies' sum over heads of their mean, which makes
    them sparse; around: zeros that are added on every side behind the ReLU, with padding="valid".
    `(B, H, W, C)` becomes `(B, H', W', O)`, or channels are first in both.
    Raises TypeError or ValueError for sizes that give no layer.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> layer = DGConv2D(64, 3, padding="same")
    >>> tuple(layer(keras.ops.zeros((2, 8, 8, 32))).shape)
    (2, 8, 8, 64)
    """

    def __init__(self, filters: int, kernel_size: Any, *args: Any, **options: Any) -> None:
        super().__init__(**{name: options.pop(name) for name in _OF_EVERY_LAYER & options.keys()})
        dtype = self.dtype_policy
        heads = DynamicHeads2D(filters, kernel_size, *args, name="heads", dtype=dtype, **options)
        axis = -1 if heads.data_format == "channels_last" else 1
        self.norm = keras.layers.BatchNormalization(
            axis, 1 - NORM.momentum, NORM.epsilon, name="norm", dtype=dtype
        )
        self.relu = keras.layers.ReLU(name="relu", dtype=dtype)
        self.heads = heads  # in a state behind the norm, as everywhere

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the variables for inputs of this shape, which includes the batch."""
        for part in (self.heads, self.norm):
            part.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return `(B, H', W', O)` of `(B, H, W, C)`, in the data format."""
        return self.heads(self.relu(self.norm(inputs, training=training)), training=training)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output, that of an ordinary convolution's."""
        return self.heads.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {**self.heads.get_config(), **super().get_config()}


@keras.saving.register_keras_serializable(package="doconv")
class SkippingDGConv2D(DGConv2D):
    """A dynamic group convolution that multiplies only what it keeps, as `fold` makes it.

    It has a `DGConv2D`'s parts and, up to rounding, output; in training it is one. What belongs to
    the kept channels is gathered for each image and head and multiplied, where
    `doconv_core.kinds.dgc.skipping_pays`. dropped: how many channels each head drops.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> layer = SkippingDGConv2D(64, 3, padding="same", dropped=48)
    >>> tuple(layer(keras.ops.zeros((1, 14, 14, 64))).shape)
    (1, 14, 14, 64)
    """

    def __init__(self, *args: Any, dropped: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.heads.dropped = as_integer("dropped", dropped, least=0)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {**super().get_config(), "dropped": self.heads.dropped}


class DGConvs(DynamicLayers):
    """The dynamic group convolutions of Keras."""

    def changed(self, layer: Any) -> str | None:
        """Return whether a part has been exchanged."""
        parts = (layer.norm, layer.relu, layer.heads)
        return REPLACED if any(map(is_replaced, (layer, *parts))) else None

    def skip(self, layer: Any) -> None:
        """Note what is dropped."""
        layer.heads.dropped = int(ops.convert_to_numpy(layer.heads.inactive))


DG_CONVS = DGConvs(DGConv2D, DynamicHeads2D, SkippingDGConv2D)


def set_progress(model: keras.Layer, progress: float) -> None:
    """Let a model's dynamic group convolutions drop as many channels as at this point of training.

    progress: the share of the training that is done, 0 to 1. Their number follows by
    `doconv_core.kinds.dgc.inactive_channels`, and is a variable that is saved with the model and
    read anew by compiled functions. In `fit`, `ProgressCallback` does it. Raises ValueError for a
    model without such layers, one that is not built, and for another progress, TypeError for no
    number. Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> layer = DGConv2D(64, 3)
    >>> layer.build((None, 8, 8, 64))
    >>> set_progress(layer, 1)
    >>> int(layer.heads.inactive)
    48
    """
    heads = _heads(model)
    for each in heads:
        if not each.built:
            raise ValueError(f"layer {each.name!r} is not built; call the model on data first.")
    DG_CONVS.set_progress(heads, progress, lambda each, n: each.inactive.assign(n))


def add_saliency_lasso(model: keras.Layer, weight: float = LASSO) -> None:
    """Let `model.losses`, and so `fit`, have the lasso of all saliencies with this weight.

    As `lasso=` of each `DGConv2D`, where it is 1e-5 from the start; 0 takes it out; PyTorch's is
    `saliency_lasso`. A model that holds this one and was fitted before has to be compiled again.
    Raises ValueError for a model without such layers and for a weight below 0, TypeError for no
    number. Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> layer = DGConv2D(8, 1)
    >>> add_saliency_lasso(layer, 1e-4)
    >>> layer.heads.lasso
    0.0001
    """
    weight = as_lasso("weight", weight)
    for heads in _heads(model):
        heads.lasso = weight
    for _, layer in first_occurrences(model):
        if isinstance(layer, keras.Model):  # whose compiled step has the former weight
            layer.train_function = layer.test_function = None


class ProgressCallback(keras.callbacks.Callback):
    """Sets the progress of a model before each step of `fit`: the steps done of all its epochs'.

    Where the number of steps is not known, as in a generator's first epoch, it stays for an epoch.

    >>> model = keras.Sequential([keras.Input((4, 4, 16)), DGConv2D(8, 1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = keras.ops.ones((2, 4, 4, 16)), keras.ops.ones((2, 4, 4, 8))
    >>> _ = model.fit(x, y, epochs=4, verbose=0, callbacks=[ProgressCallback()])
    >>> int(model.layers[0].heads.inactive)  # of 16, after three quarters of the training
    12
    """

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keep the epoch's number."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the progress."""
        steps = self.params["steps"]
        done, steps = (self._epoch * steps + batch, steps) if steps else (self._epoch, 1)
        if done or all(heads.built for heads in _heads(self.model)):  # else it drops none yet
            set_progress(self.model, done / (self.params["epochs"] * steps))


def _heads(model: keras.Layer) -> list[Any]:
    if not isinstance(model, keras.Layer):
        raise no_model("keras.Layer", model)
    return DG_CONVS.heads(layer for _, layer in first_occurrences(model))
