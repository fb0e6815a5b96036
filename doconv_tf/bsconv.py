"""The BSConv layers of Keras, blueprint separable convolutions; and how models get them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np
from keras import ops

from doconv_core.kinds.base import PartNorm
from doconv_core.kinds.bsconv import (
    GROUPED,
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
from doconv_core.maths.orthonormal import as_weight
from doconv_core.maths.separable import Folded, Normalization, Pointwise
from doconv_core.maths.spec import as_tuple
from doconv_core.models.parted import PartedLayers
from doconv_core.models.separable import SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_core.networks.nodes import BatchNorm
from doconv_tf import ordinary
from doconv_tf.arguments import StandIn
from doconv_tf.batchnorm import axis_obstacle, norm_obstacle
from doconv_tf.composed import ComposedConv
from doconv_tf.copying import copied
from doconv_tf.ordinary import (
    CONVS,
    DEPTHWISE_CONVS,
    SEPARABLE_CONVS,
    check_ordinary,
    like,
    name_scopes,
    pads,
    policy_of,
    spec_of,
)
from doconv_tf.orthonormal import Orthonormality, unmark, wide
from doconv_tf.surgery import become, keep_parts

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

_layers = keras.layers
DEPTHWISE = dict(enumerate(DEPTHWISE_CONVS, 1))  # by the rank
ZERO_PADDING = {1: _layers.ZeroPadding1D, 2: _layers.ZeroPadding2D, 3: _layers.ZeroPadding3D}
PADDING = "zero_padding"  # the name of the part that `around` makes
NORM = BatchNorm()  # of networks; its defaults are not Keras'
# Why a convolution does not become a BSConv, of what Keras alone has.
SEPARABLE = "it is separable already; a BSConv takes the place of an ordinary convolution"
BN_OPTIONS = ("momentum", "epsilon", "center", "scale", "synchronized")
# The arguments of an ordinary convolution that the layer has as attributes.
ARGUMENTS = (
    "filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "activation",
    "use_bias", "kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer",
    "activity_regularizer", "kernel_constraint", "bias_constraint",
)  # fmt: skip
_SIZES = ("p", "min_mid_channels", "with_bn")  # the arguments of its own that its spec takes
_OF_EVERY_LAYER = {"name": None, "trainable": True, "dtype": None, "autocast": True}
_LINEAR = (None, keras.activations.linear)


def _part(name: str) -> property:
    """Return the property that is the part of this name."""
    return property(lambda layer: layer.get_layer(name), doc=f"The part named {name!r}.")


# Why a convolution is left: of each part, a sign or a norm is not that of the kernel.
CONSTRAINED = "its kernel_constraint would hold for each part's kernel, not for that of the layer"


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
    depthwise = _part("depthwise")

    def __init__(self, *args: Any, **options: Any) -> None:
        """Validate the arguments, and keep them as an ordinary layer does."""
        kind, rank = type(self).__name__, self.rank
        given, own = self._taken(args, options)
        unknown = given.keys() - _OF_EVERY_LAYER.keys() - {*ARGUMENTS, "groups"}
        if unknown:
            raise TypeError(f"{kind} takes no {', '.join(sorted(unknown))}.")
        sizes = {name: own[name] for name in own.keys() & set(_SIZES)}
        spec = BSConvSpec(1, given["filters"], given["kernel_size"], self.variant, **sizes)
        check_groups(kind, given.get("groups", 1))
        around = as_tuple("around", own["around"], rank, least=0)
        norms = batch_norm_options(spec.with_bn, own["bn_options"], BN_OPTIONS)
        conv = self.ordinary(**{**_OF_EVERY_LAYER, **given, "name": "conv"})
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
            setattr(self, name, getattr(spec, name))
        self.around, self.bn_options, self._outline = around, norms, spec
        self.input_spec = keras.InputSpec(min_ndim=rank + 2)

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        return {"around": 0, "with_bn": False, "bn_options": None}

    @property
    def bias(self) -> Any:
        """The depthwise convolution's bias; None where it has none."""
        return self.depthwise.bias

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
            self.spec = replace(self._outline, in_channels=channels)
            self.input_spec = keras.InputSpec(min_ndim=self.rank + 2, axes={axis: channels})
            for each in _new_parts(self):
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
        kernels, dtype = (dw, *(each.kernel for each in pointwise)), dw.dtype
        dw, *weights = (ops.cast(kernel, wide(dtype)) for kernel in kernels)
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
    ) -> Self:
        """Return a new layer, built, to take a trained ordinary convolution's place.

        conv: an `ordinary` layer of Keras' own, exactly, built, with groups=1. start: "weights" for
        the BSConv that is nearest to its kernel, as `doconv_core.blueprints` finds it; its
        `explained` says how near. "random" for new weights. The bias is copied. Batch norms are
        new: in inference the identity, up to their epsilon. sizes: `p`, `min_mid_channels` and
        `orthonormality`, of BSConv-S.
        Raises TypeError for any other layer, ValueError for groups, for a constraint of the kernel,
        if it is not built, and for a kernel that is not finite.
        """
        check_ordinary(cls, conv)
        if conv.kernel_constraint is not None:
            raise ValueError(f"{cls.__name__}.from_conv: layer {conv.name!r}: {CONSTRAINED}.")
        as_choice("start", start, STARTS)
        options = {"with_bn": with_bn, "bn_options": bn_options, **sizes}
        for name in ("kernel_initializer", "bias_initializer"):
            options[name] = getattr(conv, name)
        layer: Self = like(conv, cls, options)
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
        own = ("_outline", "spec", "explained", "_penalty", "_kernel", "bias")
        return frozenset({*vars(empty), *ARGUMENTS, *own, *self.own_arguments()})


class _BSConvU(_BSConv):
    """BSConv-U: `pointwise`, [`batch_norm`], `depthwise`."""

    variant = "u"
    pointwise, batch_norm = _part("pointwise"), _part("batch_norm")


class _BSConvS(_BSConv):
    """BSConv-S: `pointwise1`, [`batch_norm1`], `pointwise2`, [`batch_norm2`], `depthwise`."""

    variant = "s"
    pointwise1, batch_norm1 = _part("pointwise1"), _part("batch_norm1")
    pointwise2, batch_norm2 = _part("pointwise2"), _part("batch_norm2")

    def __init__(self, *args: Any, **options: Any) -> None:
        alpha = as_weight("orthonormality", options.get("orthonormality", 0.0))
        super().__init__(*args, **options)
        self._penalty = Orthonormality(alpha, self.kernel_regularizer)

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        sizes = {"p": P, "min_mid_channels": MIN_MID_CHANNELS, "orthonormality": 0.0}
        return {**sizes, **super().own_arguments()}

    @property
    def orthonormality(self) -> float:
        """The weight of the orthonormality loss in the model's losses."""
        return float(self._penalty.alpha)


def _new_parts(layer: Any) -> Iterator[keras.Layer]:
    """Yield new parts, in the order of their use, of the sizes of the layer's `spec`."""
    for part in layer.spec.parts:
        if isinstance(part, PartNorm):
            axis = -1 if layer.data_format == "channels_last" else 1
            norms = {**layer.bn_options, **_options(layer)}
            yield _layers.BatchNormalization(axis, name=part.name, **norms)
        elif part.depthwise:
            if any(layer.around):
                around = layer.around if layer.rank > 1 else layer.around[0]
                options = {"data_format": layer.data_format, **_options(layer)}
                yield ZERO_PADDING[layer.rank](around, name=PADDING, **options)
            yield _depthwise(layer)
        else:
            yield _pointwise(layer, part.name, part.channels)


def _pointwise(layer: Any, name: str, channels: int, *, use_bias: bool = False) -> keras.Layer:
    """Return a new pointwise convolution for this layer, to so many channels."""
    options = {**_of_kernel(layer, "kernel"), **_options(layer)}
    if name == "pointwise1":
        options["kernel_regularizer"] = layer._penalty  # around the layer's own
    return layer.ordinary(
        channels, 1, data_format=layer.data_format, use_bias=use_bias, name=name, **options
    )


def _depthwise(layer: Any) -> keras.Layer:
    sizes = {
        name: getattr(layer, name)
        for name in (
            "strides", "padding", "data_format", "dilation_rate", "activation", "use_bias",
            "bias_initializer", "bias_regularizer", "bias_constraint",
        )
    }  # fmt: skip
    options = {"name": "depthwise", **sizes, **_options(layer)}
    # What Keras' depthwise convolutions have not: three dimensions, "causal", unequal strides.
    if layer.rank == 3 or layer.padding == "causal" or len(set(layer.strides)) > 1:
        return layer.ordinary(
            layer.filters, layer.kernel_size, groups=layer.filters, **_of_kernel(layer, "kernel"),
            **options,
        )  # fmt: skip
    return DEPTHWISE[layer.rank](layer.kernel_size, **_of_kernel(layer, "depthwise"), **options)


def _of_kernel(layer: Any, prefix: str) -> dict[str, Any]:
    """Return the arguments about the kernel, by the names that begin with `prefix`."""
    initializer = layer.kernel_initializer
    # A clone draws other numbers, unless its seed was given.
    clone = initializer.clone() if hasattr(initializer, "clone") else initializer
    return {
        f"{prefix}_initializer": clone,
        f"{prefix}_regularizer": layer.kernel_regularizer,
        f"{prefix}_constraint": layer.kernel_constraint,
    }


def _options(layer: Any) -> dict[str, Any]:
    return {
        "dtype": layer.dtype_policy, "trainable": layer.trainable, "autocast": layer.autocast,
    }  # fmt: skip


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


class Parts(PartedLayers):
    """How parts of layers, ordinary layers of Keras, are read."""

    composed, batch_norm = ComposedConv, keras.layers.BatchNormalization
    methods = ("call",)
    is_replaced = staticmethod(ordinary.is_replaced)

    def _watcher(self, part: keras.Layer) -> str | None:
        if part.activity_regularizer is None or part.name == "depthwise":
            return None
        return "an activity regularizer, which would see other values; remove it first"

    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        return norm_obstacle(norm) or axis_obstacle(layer, norm)

    def _conv_obstacle(self, layer: Any, name: str, part: keras.Layer) -> str | None:
        known = [layer.ordinary]
        if name == "depthwise" and layer.rank in DEPTHWISE:
            known.append(DEPTHWISE[layer.rank])
        if type(part) in known:
            reason = ordinary.obstacle(part)
        else:
            reason = f"it is a {type(part).__name__}"
        names = " or a ".join(f"keras.layers.{cls.__name__}" for cls in known)
        return reason and f"{reason}; expected a {names}"

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        kernel = as_array(conv.kernel, _layout(conv))
        return Pointwise(kernel.reshape(len(kernel), -1), as_array(conv.bias))

    def _normalization(self, norm: Any, context: Any) -> Normalization:
        variables = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
        mean, variance, scale, offset = map(as_array, variables)
        return Normalization(mean, variance, norm.epsilon, scale, offset)

    def _ordinary(self, part: keras.Layer) -> keras.Layer:
        new = part.fold() if isinstance(part, ComposedConv) else copied(part)
        unmark(new)
        return new


class BSConvLayers(Parts, SeparableLayers):
    """The BSConv layers of Keras."""

    sequence = keras.Sequential
    bn_options: ClassVar[Mapping[str, Any]] = {
        "momentum": 1 - NORM.momentum,
        "epsilon": NORM.epsilon,
    }
    linear = "of stride 1 without activation"
    padding = (PADDING,)

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason in (None, GROUPED) and type(layer) not in CONVS:
            return SEPARABLE if isinstance(layer, SEPARABLE_CONVS) else GROUPED
        return CONSTRAINED if reason is None and layer.kernel_constraint is not None else reason

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs."""
        for site, new in chosen:
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs, where they stand."""
        for site, (_, new) in planned:
            if new is None:
                keep_parts(site.layer)
            else:
                become(site.layer, new)

    def _parts(self, layer: Any) -> dict[str, keras.Layer]:
        return {part.name: part for part in layer.layers}

    def _names(self, layer: Any) -> tuple[str, ...]:
        *before, depthwise = layer.spec.names
        return (*before, *(self.padding if any(layer.around) else ()), depthwise)

    def _strides(self, layer: Any) -> Sequence[int]:
        found: Sequence[int] = layer.strides
        return found

    def _passes_on(self, part: keras.Layer) -> bool:
        return type(part) is keras.layers.Identity

    def _is_pointwise(self, conv: Any) -> bool:
        sizes = {*conv.kernel_size, *conv.strides, conv.groups}
        return sizes == {1} and conv.activation in _LINEAR

    def _is_depthwise(self, conv: Any) -> bool:
        if hasattr(conv, "groups"):
            return bool(conv.filters == conv.groups)
        return bool(conv.depth_multiplier == 1)

    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        around = symmetric(layer.around) if any(layer.around) else pads(depthwise)
        return Geometry(depthwise.strides, depthwise.dilation_rate, around)

    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any = None
    ) -> keras.Layer:
        kernel, bias = values[None]
        use_bias = bias is not None
        if depthwise is not None:
            conv = like(layer, layer.ordinary, {"use_bias": use_bias})
        else:
            conv = _pointwise(layer, "pointwise", len(kernel), use_bias=use_bias)
            with name_scopes(layer), keras.name_scope(layer.name):
                conv.build(layer.get_build_config()["input_shape"])
        trainable = any(variable.trainable for variable in layer.weights)
        put_kernel(conv, kernel)
        conv.kernel.trainable = trainable
        if use_bias:
            conv.bias.assign(ops.cast(bias, keras.backend.standardize_dtype(conv.bias.dtype)))
            conv.bias.trainable = trainable
        return conv

    def _sequenced(self, layer: Any, parts: Mapping[str, keras.Layer]) -> keras.Layer:
        for name, part in parts.items():
            part.name = name  # a dense convolution behind padding has the layer's
        if layer.activity_regularizer is not None:
            part.activity_regularizer = layer.activity_regularizer
        new = keras.Sequential([*parts.values()], trainable=layer.trainable, name=layer.name)
        new.dtype_policy = policy_of(layer)
        with name_scopes(layer):
            new.build(layer.get_build_config()["input_shape"])
        return new


def put_kernel(conv: Any, values: Any) -> None:
    """Give a convolution a kernel: `(O, I)` of a pointwise, `(O, M)`, or `(O, I, M)`."""
    canonical = values.reshape(len(values), -1, *conv.kernel_size)
    kernel = from_canonical(canonical, _layout(conv), len(values))
    conv.kernel.assign(ops.cast(kernel, keras.backend.standardize_dtype(conv.kernel.dtype)))


def as_array(variable: Any, layout: str = "") -> Any:
    """Return a variable's values in float64, in canonical order of `layout`; None as None."""
    if variable is None:
        return None
    if keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
        variable = ops.cast(variable, "float32")
    array = ops.convert_to_numpy(variable).astype(np.float64)
    return to_canonical(array, layout) if layout else array


def _layout(conv: keras.Layer) -> str:
    return "*CN" if isinstance(conv, DEPTHWISE_CONVS) else "*IO"


# The names of the reference implementation.
BSConvU, BSConvS = BSConvU2D, BSConvS2D
BSCONVS = BSConvLayers(_BSConv, BSConvU1D, BSConvU2D, BSConvU3D, BSConvS1D, BSConvS2D, BSConvS3D)
