"""The BSConv layers of Keras: blueprint separable convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from doconv_core.kinds.bsconv import (
    MIN_MID_CHANNELS,
    STARTS,
    BSConvSpec,
    P,
    as_choice,
    batch_norm_options,
    check_groups,
    check_kernel,
)
from doconv_core.kinds.bsconv_init import blueprints
from doconv_core.kinds.orthonormal import as_weight
from doconv_core.maths.spec import as_tuple
from doconv_tf.arguments import StandIn
from doconv_tf.bsconv_kind import BSConvLayers, as_array, put_kernel
from doconv_tf.bsconv_parts import make_parts
from doconv_tf.composed import ComposedConv
from doconv_tf.ordinary import check_ordinary, like
from doconv_tf.orthonormal import Orthonormality

BN_OPTIONS = ("momentum", "epsilon", "center", "scale", "synchronized")
# The arguments of an ordinary convolution that the layer has as attributes.
ARGUMENTS = (
    "filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "activation",
    "use_bias", "kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer",
    "activity_regularizer", "kernel_constraint", "bias_constraint",
)  # fmt: skip
_SIZES = ("p", "min_mid_channels", "with_bn")  # the arguments of its own that its spec takes
_OPTIONS = {"name": None, "trainable": True, "dtype": None, "autocast": True}


def part(name: str) -> property:
    """Return the property that is the part of this name."""
    return property(lambda layer: layer.get_layer(name), doc=f"The part named {name!r}.")


class _BSConv(StandIn, keras.Sequential):
    """What the layers of every rank and variant share.

    A sequence of ordinary layers, named as `spec.names` says, made when the number of input
    channels is known; strides, padding, dilation rate, bias and activation are the depthwise one's.
    Each rank names the ordinary layer it stands in for.
    """

    variant: str
    groups = 1
    explained: float | None = None  # of the kernel that the layer was started from
    spec: Any = None  # a BSConvSpec, once it is built
    _penalty: Any = None  # of orthonormality
    depthwise = part("depthwise")

    def __init__(self, *args: Any, **options: Any) -> None:
        """Validate the arguments, and keep them as an ordinary layer does."""
        kind, rank = type(self).__name__, self.rank
        given, own = self._taken(args, options)
        unknown = given.keys() - _OPTIONS.keys() - {*ARGUMENTS, "groups"}
        if unknown:
            raise TypeError(f"{kind} takes no {', '.join(sorted(unknown))}.")
        sizes = {name: own[name] for name in own.keys() & set(_SIZES)}
        spec = BSConvSpec(1, given["filters"], given["kernel_size"], self.variant, **sizes)
        check_groups(kind, given.get("groups", 1))
        around = as_tuple("around", own["around"], rank, least=0)
        norms = batch_norm_options(spec.with_bn, own["bn_options"], BN_OPTIONS)
        conv = self.ordinary(**{**_OPTIONS, **given, "name": "conv"})
        if any(around) and conv.padding != "valid":
            raise ValueError(
                "around, zeros on every side, goes with padding='valid' alone; received "
                f"around={around}, padding={conv.padding!r}."
            )
        keras.Sequential.__init__(self, trainable=conv.trainable, name=given.get("name"))
        self.dtype_policy, self.autocast = conv.dtype_policy, conv.autocast
        for name in ARGUMENTS:
            setattr(self, name, getattr(conv, name))
        for name in sizes:
            setattr(self, name, own[name])
        self.around, self.with_bn, self.bn_options = around, spec.with_bn, norms
        self.input_spec = keras.InputSpec(min_ndim=rank + 2)

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        return {"around": 0, "with_bn": False, "bn_options": None}

    @property
    def bias(self) -> Any:
        """The depthwise convolution's bias; None where it has none."""
        return self.depthwise.bias

    def _spec(self, in_channels: int) -> BSConvSpec:
        sizes = {name: getattr(self, name) for name in self.own_arguments().keys() & set(_SIZES)}
        return BSConvSpec(in_channels, self.filters, self.kernel_size, self.variant, **sizes)

    def regularizer_of(self, name: str) -> Any:
        """Return the kernel regularizer of a pointwise part, which BSConv-S has for its first."""
        return self._penalty if name == "pointwise1" else self.kernel_regularizer

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the parts for inputs of this shape, which includes the batch."""
        if not self.layers:
            axis = -1 if self.data_format == "channels_last" else 1
            channels = input_shape[axis]
            if channels is None:
                raise ValueError(
                    f"layer {self.name!r}: the number of input channels must be known; received "
                    f"the input shape {tuple(input_shape)}."
                )
            self.compute_output_shape(input_shape)  # raises where nothing would be left
            self.spec = self._spec(channels)
            self.input_spec = keras.InputSpec(min_ndim=self.rank + 2, axes={axis: channels})
            for each in make_parts(self):
                self.add(each, rebuild=False)
        super().build(self._any_size())

    def _any_size(self) -> tuple[int | None, ...]:
        """Return the shape of images of any size."""
        sizes, channels = (None,) * self.rank, self.spec.in_channels
        last = self.data_format == "channels_last"
        return (None, *sizes, channels) if last else (None, channels, *sizes)

    @property
    def input_shape(self) -> Any:
        """Refuse: as of any layer, the images may be of any size, and `keras.Sequential` asks."""
        raise AttributeError(f"layer {self.name!r} takes images of any size.")

    def get_build_config(self) -> dict[str, Any] | None:
        """Return the shape that `build_from_config` builds it for again."""
        return {"input_shape": self._any_size()} if self.built else None

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the layer; not as models are, of which Keras hides the errors."""
        keras.Layer.build_from_config(self, config)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output, that of the ordinary layer's."""
        first = 1 if self.data_format == "channels_last" else 2
        shape = list[Any](input_shape)
        for axis, zeros in enumerate(self.around, first):
            shape[axis] = None if shape[axis] is None else shape[axis] + 2 * zeros
        found: tuple[int | None, ...] = self._ordinary().compute_output_shape(tuple(shape))
        return found

    def _ordinary(self) -> keras.Layer:
        """Return an ordinary layer, not built, with the same arguments."""
        return self.ordinary(
            **{name: getattr(self, name) for name in ARGUMENTS}, name=self.name,
            trainable=self.trainable, dtype=self.dtype_policy, autocast=self.autocast,
        )  # fmt: skip

    def get_config(self) -> dict[str, Any]:
        """Return the ordinary layer's configuration, and the layer's own arguments."""
        own = {name: getattr(self, name) for name in self.own_arguments()}
        own["bn_options"] = dict(self.bn_options) or None
        return {**self._ordinary().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Return the layer of a configuration; not as a `Sequential`, whose has layers."""
        with keras.saving.custom_object_scope(custom_objects or {}):
            return super(keras.Model, cls).from_config(config)

    def composed_kernel(self) -> Any:
        """Return the kernel of the ordinary convolution of the same function, differentiable.

        In Keras' layout, `(*kernel_size, I, O)`, in the variables' dtype; half types are composed
        in float32.
        Raises ValueError if the layer is not built, NotFoldable for a layer with batch norms, which
        is no mere kernel: `fold` it.
        """
        self._require_built()
        check_kernel(type(self).__name__, self.spec)
        *pointwise, depthwise = (each for each in self.layers if each.weights)
        composed = isinstance(depthwise, ComposedConv)
        dw = depthwise.composed_kernel() if composed else depthwise.kernel
        dtype = keras.backend.standardize_dtype(dw.dtype)
        wide = "float32" if dtype in ("float16", "bfloat16") else dtype
        dw, *weights = (ops.cast(k, wide) for k in (dw, *(each.kernel for each in pointwise)))
        weights = [ops.reshape(weight, weight.shape[-2:]) for weight in weights]
        # The operator, because ops.matmul turns float64 into float32 where Keras runs on PyTorch.
        pw = weights[0] if len(weights) == 1 else weights[0] @ weights[1]
        return ops.cast(pw * ops.reshape(dw, (*self.kernel_size, 1, self.filters)), dtype)

    def fold(self, *, form: str = "keep") -> Any:
        """Return new ordinary layers, built, with the same function.

        form: "keep", a `keras.Sequential` of the same parts; "merge", one of a pointwise and a
        depthwise convolution, with the batch norms in the former; "dense", one convolution, and
        where `around` is not 0 a `keras.Sequential` of zero padding and that.
        Name, dtype policy and configuration are kept. A depthwise part that is a DO layer is folded
        too. Variables are computed in float64 and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact, ValueError for another
        form and if the layer is not built.
        """
        self._require_built()
        return BSCONVS.folded(self, form)

    @classmethod
    def from_conv(
        cls,
        conv: keras.Layer,
        *,
        with_bn: bool = False,
        bn_options: Mapping[str, Any] | None = None,
        start: str = "weights",
        **sizes: Any,
    ) -> Any:
        """Return a new layer, built, to take a trained ordinary convolution's place.

        conv: an `ordinary` layer of Keras' own, exactly, built, with groups=1. start: "weights" for
        the BSConv that is nearest to its kernel, as `doconv_core.blueprints` finds it; its
        `explained` says how near. "random" for new weights. The bias is copied. Batch norms are
        new: in inference the identity, up to their epsilon. sizes: `p`, `min_mid_channels` and
        `orthonormality`, of BSConv-S.
        Raises TypeError for any other layer, ValueError for groups, if it is not built, and for a
        kernel that is not finite.
        """
        check_ordinary(cls, conv)
        as_choice("start", start, STARTS)
        options = {"with_bn": with_bn, "bn_options": bn_options, **sizes}
        for name in ("kernel_initializer", "bias_initializer"):
            options[name] = getattr(conv, name)
        layer = like(conv, cls, options)
        if start == "weights":
            layer._start_from(conv.kernel)
        for variable in layer.trainable_variables:
            if variable is not layer.bias:
                variable.trainable = conv.kernel.trainable
        return layer

    def _start_from(self, kernel: Any) -> None:
        """Take the blueprints of a trained kernel."""
        found = blueprints(as_array(kernel, "*IO"), self.spec)
        *pointwise, depthwise = (each for each in self.layers if hasattr(each, "kernel"))
        for each, values in zip(pointwise, found.pointwise, strict=True):
            put_kernel(each, values)
        put_kernel(depthwise, found.depthwise)
        self.explained = found.explained

    def own_names(self) -> frozenset[str]:
        """Return the names of the attributes that this layer or the ordinary one has alone."""
        empty = self._ordinary()
        own = ("spec", "explained", "_penalty", "_kernel", "bias", *self.own_arguments())
        return frozenset({*vars(empty), *ARGUMENTS, *own})


class _BSConvU(_BSConv):
    """BSConv-U: `pointwise`, [`batch_norm`], `depthwise`."""

    variant = "u"
    pointwise, batch_norm = part("pointwise"), part("batch_norm")


class _BSConvS(_BSConv):
    """BSConv-S: `pointwise1`, [`batch_norm1`], `pointwise2`, [`batch_norm2`], `depthwise`."""

    variant = "s"
    pointwise1, batch_norm1 = part("pointwise1"), part("batch_norm1")
    pointwise2, batch_norm2 = part("pointwise2"), part("batch_norm2")

    def __init__(self, *args: Any, **options: Any) -> None:
        alpha = as_weight("orthonormality", options.get("orthonormality", 0.0))
        penalty = Orthonormality(alpha)
        super().__init__(*args, **options)
        penalty.other = self.kernel_regularizer
        self._penalty = penalty

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        sizes = {"p": P, "min_mid_channels": MIN_MID_CHANNELS, "orthonormality": 0.0}
        return {**sizes, **super().own_arguments()}

    @property
    def orthonormality(self) -> float:
        """The weight of the orthonormality loss in the model's losses."""
        return float(self._penalty.alpha)


@keras.saving.register_keras_serializable(package="doconv")
class BSConvU2D(_BSConvU):
    """An unconstrained blueprint separable convolution, in the place of a `keras.layers.Conv2D`.

    Takes `keras.layers.Conv2D`'s arguments, with groups=1. Those about the kernel go for each
    part's; the others for the depthwise part. By keyword only: `with_bn`, a batch norm behind the
    pointwise convolution; `bn_options`, a dict of the batch norm's arguments; `around`, zeros that
    are added on every side between the two, with padding="valid".
    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)`
    becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: BSConv, arXiv 2003.13549.

    >>> layer = BSConvU2D(8, 3, padding="same", with_bn=True)
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 10, 10, 8)
    >>> [part.name for part in layer.layers]
    ['pointwise', 'batch_norm', 'depthwise']
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class BSConvU1D(_BSConvU):
    """As `BSConvU2D`, in the place of a `keras.layers.Conv1D`.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.

    >>> layer = BSConvU1D(8, 3, padding="causal")
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 10, 8)
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class BSConvU3D(_BSConvU):
    """As `BSConvU2D`, in the place of a `keras.layers.Conv3D`.

    `(B, D, H, W, I)` becomes `(B, D', H', W', O)`, or with channels first as it is there.

    >>> layer = BSConvU3D(8, 3)
    >>> tuple(layer(keras.ops.ones((1, 6, 6, 6, 4))).shape)
    (1, 4, 4, 4, 8)
    """

    ordinary, rank = keras.layers.Conv3D, 3


@keras.saving.register_keras_serializable(package="doconv")
class BSConvS2D(_BSConvS):
    """A subspace blueprint separable convolution, in the place of a `keras.layers.Conv2D`.

    Takes the arguments of `BSConvU2D`, with a batch norm behind each pointwise convolution. By
    keyword only: `p` and `min_mid_channels`, which give the channels between its pointwise
    convolutions; `orthonormality`, the weight with which the model's losses have its orthonormality
    loss. Shapes and errors are those of `BSConvU2D`.
    Source: BSConv, arXiv 2003.13549.

    >>> layer = BSConvS2D(8, 3, p=0.5, min_mid_channels=1)
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 8, 8, 8)
    >>> [tuple(part.kernel.shape) for part in layer.layers]
    [(1, 1, 4, 2), (1, 1, 2, 8), (3, 3, 8, 1)]
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class BSConvS1D(_BSConvS):
    """As `BSConvS2D`, in the place of a `keras.layers.Conv1D`; shapes are those of `BSConvU1D`.

    >>> layer = BSConvS1D(8, 3)
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 8, 8)
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class BSConvS3D(_BSConvS):
    """As `BSConvS2D`, in the place of a `keras.layers.Conv3D`; shapes are those of `BSConvU3D`.

    >>> layer = BSConvS3D(8, 3)
    >>> tuple(layer(keras.ops.ones((1, 6, 6, 6, 4))).shape)
    (1, 4, 4, 4, 8)
    """

    ordinary, rank = keras.layers.Conv3D, 3


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2D, BSConvS2D
BSCONVS = BSConvLayers(_BSConv, BSConvU1D, BSConvU2D, BSConvU3D, BSConvS1D, BSConvS2D, BSConvS3D)
