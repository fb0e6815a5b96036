"""The layers of Keras that are branches with batch norms; and how models get them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import reduce
from itertools import product
from operator import add
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from doconv_core.kinds.bsconv import batch_norm_options
from doconv_core.kinds.normed import (
    BRANCHES,
    KINDS,
    PASSING,
    SMALL,
    SUM_NORM,
    SUMMED,
    TRAINED,
    ZERO,
    BranchedSpec,
    Conv,
    Mean,
    Norm,
    Pairs,
    Piece,
    check_options,
)
from doconv_core.maths.geometry import SAME, Extra, Geometry, same
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.separable import Folded
from doconv_core.maths.spec import ConvSpec, check_choice
from doconv_core.models.normed import NormedLayers
from doconv_core.models.view import ModelView
from doconv_tf.arguments import StandIn
from doconv_tf.batchnorm import norm_obstacle
from doconv_tf.bsconv import BN_OPTIONS, CONSTRAINED, Parts, as_array
from doconv_tf.ordinary import DEPTHWISE_CONVS, check_ordinary, like, pads, policy_of, put, spec_of
from doconv_tf.surgery import become

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

_layers = keras.layers
_OWN = ("rule", "branches", "small", "bn_options")
# Why a convolution is left, of what Keras alone has.
NO_DILATED = "with which Keras has no dilated convolution, as its branches would be"
STRIDED = f"it has strides, {NO_DILATED}"
NORM_BOUND = "a regularizer or a constraint of its would be given up"


class _Branched(StandIn, keras.layers.Layer):
    """What the layers of every rank share.

    Parts are ordinary layers, named as `spec.parts` says, made when the number of input channels is
    known. Each rank names the ordinary layer it stands in for.
    """

    spec: Any = None  # a BranchedSpec, once it is built

    def __init__(self, *args: Any, **options: Any) -> None:
        """Validate the arguments, and keep them as an ordinary layer does."""
        given, own = self._taken(args, {"use_bias": False, **options})
        check_choice("rule", own["rule"], [kind.name for kind in KINDS])
        check_options({"branches": own["branches"], "small": own["small"]})
        norms = batch_norm_options(True, own["bn_options"], BN_OPTIONS)
        conv = self.ordinary(**{**given, "name": "conv"})
        if conv.activation is not keras.activations.linear:
            raise ValueError(
                f"{type(self).__name__} takes no activation, which would stand before its batch "
                f"norms; received activation={given['activation']!r}. Put a layer behind it."
            )
        if _has_dilated(own["rule"]) and max(conv.strides) > 1:
            raise ValueError(
                f"rule={own['rule']!r} takes no strides, {NO_DILATED}; received "
                f"strides={conv.strides}."
            )
        super().__init__(
            name=given.get("name"), trainable=conv.trainable, dtype=conv.dtype_policy,
            autocast=conv.autocast,
        )  # fmt: skip
        for name in self._arguments():
            setattr(self, name, getattr(conv, name))
        self.rule, self.branches, self.small = own["rule"], own["branches"], own["small"]
        self.bn_options = norms
        self.input_spec = keras.InputSpec(ndim=self.rank + 2)

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        defaults = ("repvgg", BRANCHES, SMALL, None)
        return dict(zip(_OWN, defaults, strict=True))

    @classmethod
    def _arguments(cls) -> list[str]:
        """Return the names of the ordinary layer's arguments."""
        parameters = inspect.signature(cls.ordinary.__init__).parameters.values()
        usual = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return [name for name in usual if name != "self"]

    @property
    def bias(self) -> Any:
        """The bias of the first branch's convolution; None where it has none."""
        return self._part(next(iter(self.spec.parts))).bias

    def _part(self, name: str) -> Any:
        return getattr(self, name)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the parts for inputs of this shape, which includes the batch."""
        axis = self._channel_axis()
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                f"layer {self.name!r}: the number of input channels must be known; received the "
                f"input shape {tuple(input_shape)}."
            )
        depthwise = issubclass(self.ordinary, DEPTHWISE_CONVS)
        groups = channels if depthwise else self.groups
        outputs = channels * self.depth_multiplier if depthwise else self.filters
        geometry = _geometry(self)
        conv = ConvSpec(channels, outputs, self.kernel_size, groups)
        self.spec = BranchedSpec(conv, geometry, self.rule, self.branches, self.small)
        self.input_spec = keras.InputSpec(ndim=self.rank + 2, axes={axis: channels})
        for name, part in self.spec.parts.items():
            made = self._norm(part) if isinstance(part, Norm) else self._conv(part)
            setattr(self, name, made)
            before = part.channels if isinstance(part, Norm) else part.in_channels
            made.build(self._any_size(before))

    def _channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    def _any_size(self, channels: int) -> tuple[int | None, ...]:
        """Return the shape of images of any size."""
        sizes = (None,) * self.rank
        last = self._channel_axis() == -1
        return (None, *sizes, channels) if last else (None, channels, *sizes)

    def _norm(self, part: Norm) -> keras.Layer:
        options = {"dtype": self.dtype_policy, **self.bn_options}
        return _layers.BatchNormalization(self._channel_axis(), name=part.name, **options)

    def _conv(self, part: Conv) -> keras.Layer:
        names = set(self._arguments())
        options = {
            name: getattr(self, name)
            for name in names
            if name.endswith(("_initializer", "_regularizer", "_constraint"))
            and not name.startswith("activity")
        }
        for name, each in options.items():
            if hasattr(each, "clone"):  # which draws other numbers, unless its seed was given
                options[name] = each.clone()
        first = part.name == next(iter(self.spec.parts))
        options |= {
            "kernel_size": part.kernel_size, "strides": part.stride,
            "dilation_rate": part.dilation, "data_format": self.data_format,
            "padding": "same" if _is_same(part) else "valid",
            "use_bias": self.use_bias and first, "name": part.name, "dtype": self.dtype_policy,
            "autocast": self.autocast,
        }  # fmt: skip
        if "filters" in names:
            options |= {"filters": part.out_channels, "groups": part.groups}
        else:
            options["depth_multiplier"] = part.out_channels // part.in_channels
        return self.ordinary(**options)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the sum of what the branches make of a batch, in the layer's data format."""
        zeros = self._zeros_of_same(inputs)
        x = inputs if zeros is None else ops.pad(inputs, zeros)
        made = []
        for pieces in self.spec.pieces.values():
            inner = any(isinstance(piece, Norm) and piece.inner for piece in pieces)
            given = (inputs, zeros) if inner else (x, None)
            made.append(self._branch(pieces, *given, training))
        y = reduce(add, made)
        if SUM_NORM in self.spec.parts:
            y = self._part(SUM_NORM)(y, training=training)
        return y

    def _zeros_of_same(self, x: Any) -> list[tuple[Any, Any]] | None:
        """Return the zeros that "same" gives an input of this size where it has strides, or None.

        All branches see these, as those of a layer before, each its own part; around what an inner
        norm makes, they are what it makes of zero.
        """
        if SAME not in pads(self):
            return None
        zeros, first = [(0, 0)] * (self.rank + 2), 1 if self._channel_axis() == -1 else 2
        for axis, pad in enumerate(pads(self), first):
            if pad == SAME:
                size = x.shape[axis]
                zeros[axis] = self._zeros(
                    axis - first, ops.shape(x)[axis] if size is None else size
                )
        return zeros

    def _zeros(self, axis: int, size: Any) -> Any:
        """Return how many zeros "same" adds before and after. size: of this dimension."""
        extent = (self.kernel_size[axis] - 1) * self.dilation_rate[axis]
        largest = max if isinstance(size, int) else ops.maximum
        total = largest(extent - (size - 1) % self.strides[axis], 0)
        return total // 2, total - total // 2

    def _branch(
        self, pieces: tuple[Piece, ...], x: Any, zeros: list[Any] | None, training: bool | None
    ) -> Any:
        """Return what a branch makes of a value. zeros: around what its inner norm makes of it."""
        zero = None
        for piece in pieces:
            if isinstance(piece, Norm):
                norm = self._part(piece.name)
                zero = _zero(norm) if piece.inner else None  # before the batch is in its statistics
                x = norm(x, training=training)
                continue
            x = self._around(x, piece.around, zero)
            if zeros is not None and zero is not None:
                x = self._pad(x, zeros, zero)
            if isinstance(piece, Mean):
                x = self._mean(x, piece)
            else:
                if not _is_same(piece):
                    x = self._around(x, piece.padding, None)
                x = self._part(piece.name)(x)
        return x

    def _mean(self, x: Any, piece: Mean) -> Any:
        """Return the means of windows, of any dtype and data format, as no pooling of Keras' does.

        One axis after the other, each as a sum of what its taps see.
        """
        first = 1 if self._channel_axis() == -1 else 2
        for axis, (size, stride) in enumerate(
            zip(piece.kernel_size, piece.stride, strict=True), first
        ):
            before = (slice(None),) * axis
            taps = (slice(n, n + 1 - size or None, stride) for n in range(size))
            x = reduce(add, (x[(*before, tap)] for tap in taps)) / size
        return x

    def _around(self, x: Any, pairs: Pairs, zero: Any) -> Any:
        """Return a value with more positions around, of these values, or zeros; or with fewer."""
        if not any(map(any, pairs)):
            return x
        first = 1 if self._channel_axis() == -1 else 2
        cut = [slice(None)] * first
        cut += [slice(max(-b, 0), min(a, 0) or None) for b, a in pairs]
        x = x[tuple(cut)]
        zeros = [[0, 0]] * (self.rank + 2)
        zeros[first : first + self.rank] = [[max(b, 0), max(a, 0)] for b, a in pairs]
        return self._pad(x, zeros, zero)

    def _pad(self, x: Any, zeros: list[Any], zero: Any) -> Any:
        """Return a value with what an inner norm makes of zero around it, or with zeros."""
        if zero is None:
            return ops.pad(x, zeros)
        shape = [1] * (self.rank + 2)
        shape[self._channel_axis()] = -1
        zero = ops.cast(ops.reshape(zero, shape), x.dtype)
        return ops.pad(x - zero, zeros) + zero

    def zeros_before(self, part: str, around: set[Extra]) -> set[Extra]:
        """Return the zeros that come before a convolution of a branch, for each use of the layer.

        around: those before the layer. They are as of one that pads by itself; but not where that
        one would have its input among the branches, of which states tell nothing else.
        """
        made, none = self.spec.parts[part], ((0, 0),) * self.rank
        conv = self.spec.conv
        keeps_size = conv.in_channels == conv.out_channels and max(self.spec.geometry.stride) == 1
        if self.rule in SUMMED and keeps_size:
            around = set()
        branches = self.spec.pieces.values()
        seeing = ([each for each in row if not isinstance(each, Norm)] for row in branches)
        if not isinstance(made, Conv) or [made] not in seeing:  # alone in its branch
            return set()
        own = none if _is_same(made) else made.padding
        found = set()
        # Where they are for the input's size, those for each of the sizes that differ in them.
        sized = [
            [self._zeros(n, size) if pad == SAME else (0, 0) for n, pad in enumerate(pads(self))]
            for size in range(1, max(self.strides) + 1)
        ]
        for zeros, more in product(around or {()}, sized):
            every = zip(zeros or none, own, made.around, more, strict=True)
            pairs = [tuple(map(sum, zip(*each, strict=True))) for each in every]
            found.add(tuple((max(b, 0), max(a, 0)) for b, a in pairs))
        return found

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output, that of the ordinary layer's."""
        found: tuple[int | None, ...] = self._ordinary().compute_output_shape(input_shape)
        return found

    def _ordinary(self) -> Any:
        """Return an ordinary layer, not built, with the same arguments."""
        return self.ordinary(
            **{name: getattr(self, name) for name in self._arguments()}, name=self.name,
            trainable=self.trainable, dtype=self.dtype_policy, autocast=self.autocast,
        )  # fmt: skip

    def get_config(self) -> dict[str, Any]:
        """Return the ordinary layer's configuration, and the layer's own arguments."""
        own = {name: getattr(self, name) for name in _OWN}
        own["bn_options"] = dict(self.bn_options) or None
        return {**self._ordinary().get_config(), **own}

    def get_build_config(self) -> dict[str, Any] | None:
        """Return the shape that `build_from_config` builds it for again."""
        return {"input_shape": self._any_size(self.spec.conv.in_channels)} if self.built else None

    def own_names(self) -> frozenset[str]:
        """Return the names of the attributes that this layer or the ordinary one has alone."""
        parts = () if self.spec is None else self.spec.parts
        own = ("spec", "_kernel", "bias", *_OWN)
        return frozenset({*vars(self._ordinary()), *self._arguments(), *own, *parts})

    def fold(self) -> Any:
        """Return a new ordinary convolution, built, with bias, of the same function in inference.

        Name, dtype policy and configuration are kept. Parts that are DO layers are folded too.
        Computed in float64 and rounded once.
        Raises NotFoldable, with the reason, for what would not be exact, ValueError if it is not
        built.
        """
        self._require_built()
        return LAYERS[self.rule].folded(self)

    @classmethod
    def from_conv(cls, conv: Any, norm: Any, *, rule: str, **options: Any) -> Self:
        """Return a new layer, built, to take the place of a trained convolution and its batch norm.

        conv: an `ordinary` layer of Keras' own, exactly, built, without activation; norm: the batch
        norm behind it. Their values are copied. In inference the layer computes what they do: batch
        norms that end other branches begin with gamma = 0. A batch norm without gamma or beta gets
        one that is not trained. rule, options: as the layer takes them.
        Raises TypeError for other layers, ValueError for a convolution that the rule leaves, and
        if it is not built.
        """
        check_ordinary(cls, conv)
        names = [name for name in cls._arguments() if name.endswith("_initializer")]
        options |= {name: getattr(conv, name) for name in names}
        norms = {
            "momentum": norm.momentum, "epsilon": norm.epsilon, "synchronized": norm.synchronized,
        }  # fmt: skip
        layer: Self = like(conv, cls, {**options, "rule": rule, "bn_options": norms})
        layer._start_from(conv, norm)
        return layer

    def _start_from(self, conv: Any, norm: Any) -> None:
        """Take a trained convolution and batch norm, and let all else add nothing to them."""
        for name, role in self.spec.roles.items():
            part, made = self._part(name), self.spec.parts[name]
            for variable in part.trainable_variables:
                variable.trainable = conv.kernel.trainable
            if isinstance(made, Norm):
                mean, variance = norm.moving_mean, norm.moving_variance
                if role == ZERO:
                    part.gamma.assign(ops.zeros(part.gamma.shape))
                elif role == PASSING:
                    _put(part, moving_mean=mean, moving_variance=variance, beta=mean)
                    part.gamma.assign(ops.sqrt(variance + norm.epsilon))
                elif role == TRAINED:
                    _put(part, moving_mean=mean, moving_variance=variance)
                    _put(part, gamma=norm.gamma, beta=norm.beta)
                    part.trainable = norm.trainable
            elif role == ZERO:
                part.kernel.assign(ops.zeros(part.kernel.shape))
            elif role == TRAINED:
                start = self.spec.start(as_array(conv.kernel, _layout(conv)))
                _put_kernel(part, start, made.groups)


def _zero(norm: Any) -> Any:
    """Return what a batch norm makes of zero in inference, `(C,)`."""
    mean = ops.copy(norm.moving_mean)  # on PyTorch the next batch changes the values themselves
    factor = ops.rsqrt(ops.convert_to_tensor(norm.moving_variance) + norm.epsilon)
    factor = factor if norm.gamma is None else factor * norm.gamma
    return -mean * factor if norm.beta is None else norm.beta - mean * factor


def _put(part: Any, **values: Any) -> None:
    """Give a batch norm values; what there is none of stays, and is not trained."""
    for name, value in values.items():
        if value is None:
            getattr(part, name).trainable = False
        else:
            put(getattr(part, name), value)


def _put_kernel(conv: Any, kernel: Any, groups: int) -> None:
    """Give a convolution a canonical kernel, rounded once."""
    value = from_canonical(
        kernel.reshape(len(kernel), -1, *conv.kernel_size), _layout(conv), groups
    )
    conv.kernel.assign(ops.cast(value, keras.backend.standardize_dtype(conv.kernel.dtype)))


def _layout(conv: Any) -> str:
    return "*CN" if isinstance(conv, DEPTHWISE_CONVS) else "*IO"


def _geometry(layer: Any) -> Geometry:
    """Return where the taps of a layer meet its input, with those zeros that are for its size."""
    around = tuple((0, 0) if pad == SAME else pad for pad in pads(layer))
    return Geometry(layer.strides, layer.dilation_rate, around)


def _has_dilated(rule: str) -> bool:
    return rule == "unireplknet"


def _is_same(part: Conv) -> bool:
    """Return whether a part's own zeros are those of "same"."""
    return part.padding == same(part.kernel_size, part.stride, part.dilation)


@keras.saving.register_keras_serializable(package="doconv")
class NormedConv2D(_Branched):
    """Parallel branches with batch norms, in the place of a `keras.layers.Conv2D` and its norm.

    Takes `keras.layers.Conv2D`'s arguments, without bias where not asked for and without
    activation. Those about the kernel go for each part's. By keyword only: `rule`, "repvgg",
    "mobileone", "acnet", "dbb", "qarepvgg", "replknet" or "unireplknet"; `bn_options`, a dict of
    the batch norms' arguments; `branches` of MobileOne, how many kernels of its size it has, and
    `small` of RepLKNet, the smaller kernel's size.
    `(B, H, W, I)` becomes `(B, H', W', O)`, or with channels first `(B, I, H, W)`
    becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer.
    Source: RepVGG, arXiv 2101.03697; the others are in `doconv_core.kinds.normed`.

    >>> layer = NormedConv2D(4, 3, padding="same", rule="repvgg")
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 10, 10, 4)
    >>> list(layer.spec.parts)
    ['dense_conv', 'dense_norm', 'pointwise_conv', 'pointwise_norm', 'identity_norm']
    """

    ordinary, rank = keras.layers.Conv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class NormedConv1D(_Branched):
    """As `NormedConv2D`, in the place of a `keras.layers.Conv1D` and its batch norm.

    `(B, L, I)` becomes `(B, L', O)`, or with channels first `(B, I, L)` becomes `(B, O, L')`.

    >>> layer = NormedConv1D(8, 3, rule="mobileone", branches=2)
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 8, 8)
    """

    ordinary, rank = keras.layers.Conv1D, 1


@keras.saving.register_keras_serializable(package="doconv")
class NormedConv3D(_Branched):
    """As `NormedConv2D`, in the place of a `keras.layers.Conv3D` and its batch norm.

    `(B, D, H, W, I)` becomes `(B, D', H', W', O)`, or with channels first as it is there.

    >>> layer = NormedConv3D(8, 3, rule="acnet")
    >>> tuple(layer(keras.ops.ones((1, 6, 6, 6, 4))).shape)
    (1, 4, 4, 4, 8)
    """

    ordinary, rank = keras.layers.Conv3D, 3


@keras.saving.register_keras_serializable(package="doconv")
class NormedDepthwiseConv2D(_Branched):
    """As `NormedConv2D`, in the place of a `keras.layers.DepthwiseConv2D` and its batch norm.

    >>> layer = NormedDepthwiseConv2D(3, padding="same", rule="mobileone", branches=2)
    >>> tuple(layer(keras.ops.ones((2, 10, 10, 4))).shape)
    (2, 10, 10, 4)
    """

    ordinary, rank = keras.layers.DepthwiseConv2D, 2


@keras.saving.register_keras_serializable(package="doconv")
class NormedDepthwiseConv1D(_Branched):
    """As `NormedConv1D`, in the place of a `keras.layers.DepthwiseConv1D` and its batch norm.

    >>> layer = NormedDepthwiseConv1D(3, padding="same", rule="repvgg")
    >>> tuple(layer(keras.ops.ones((2, 10, 4))).shape)
    (2, 10, 4)
    """

    ordinary, rank = keras.layers.DepthwiseConv1D, 1


class BranchedLayers(Parts, NormedLayers):
    """The layers of one rule in Keras."""

    base = _Branched
    types = {  # noqa: RUF012
        cls.ordinary: cls
        for cls in (
            NormedConv1D, NormedConv2D, NormedConv3D, NormedDepthwiseConv1D,
            NormedDepthwiseConv2D,
        )
    }  # fmt: skip

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution is left that nothing else keeps from being replaced."""
        reason = super().obstacle(view, layer, options)
        if reason is None and _has_dilated(self.kind.name) and max(layer.strides) > 1:
            return STRIDED
        return reason

    def _norm_options(self, epsilon: float, momentum: float) -> dict[str, Any]:
        return {"epsilon": epsilon, "momentum": 1 - momentum}

    def _geometry(self, conv: Any) -> Geometry:
        return _geometry(conv)

    def _taken_obstacle(self, conv: Any, norm: Any) -> str | None:
        bound = ("regularizer", "constraint")
        if any(getattr(norm, f"{name}_{kind}") for name in ("gamma", "beta") for kind in bound):
            return NORM_BOUND
        prefix = "depthwise" if isinstance(conv, DEPTHWISE_CONVS) else "kernel"
        if getattr(conv, f"{prefix}_constraint") is not None:
            return CONSTRAINED
        return norm_obstacle(norm)

    def _take(self, conv: Any, norm: Any, new: Any) -> None:
        become(conv, new)
        policy = keras.dtype_policies.serialize(policy_of(norm))  # Identity's arguments are stored
        become(norm, _layers.Identity(name=norm.name, dtype=policy), frozenset(vars(norm)))

    def _become(self, layer: Any, new: Any) -> None:
        become(layer, new)

    def _parts(self, layer: Any) -> dict[str, Any]:
        return {part.name: part for part in layer._flatten_layers(False, False)}

    def _is_as_made(self, conv: Any, made: Conv) -> bool:
        sizes = (conv.strides, conv.dilation_rate, conv.padding, conv.activation)
        padding = "same" if _is_same(made) else "valid"
        expected = (made.stride, made.dilation, padding, keras.activations.linear)
        return spec_of(conv) == made.spec and sizes == expected

    def _convolution(self, layer: Any, values: Mapping[Any, Folded]) -> Any:
        kernel, bias = values[None]
        conv = like(layer, layer.ordinary, {"use_bias": True})
        trainable = any(variable.trainable for variable in layer.weights)
        _put_kernel(conv, kernel, layer.spec.conv.groups)
        conv.bias.assign(ops.cast(bias, keras.backend.standardize_dtype(conv.bias.dtype)))
        conv.kernel.trainable = conv.bias.trainable = trainable
        return conv


LAYERS: dict[str, BranchedLayers] = {kind.name: BranchedLayers(kind) for kind in KINDS}
