"""What a layer is, as far as its state is concerned: its kind, sizes and entries.

A kind is one entry in `KINDS`: the spec that holds its sizes, and the arrays that they imply. Each
backend has a table of its own from layer types to forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from doconv_core.kinds.base import ComposedKind, kind_named
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.spec import ConvSpec, as_integer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LinearSpec:
    """The sizes of a linear (dense) layer. Its weight is `(out_features, in_features)`.

    >>> LayerForm(LinearSpec(in_features=3, out_features=2)).shapes
    {'weight': (2, 3), 'bias': (2,)}
    """

    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        """Validate both sizes."""
        _integers(self, "in_features", "out_features")


@dataclass(frozen=True)
class TransposedConvSpec:
    """The sizes of a transposed convolution. Its weight is `(I, O/g, M)`.

    Fields and errors as in `ConvSpec`; there is no over-parameterized one.

    >>> LayerForm(TransposedConvSpec(8, 16, (3, 3))).shapes
    {'weight': (8, 16, 9), 'bias': (16,)}
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        """Validate every field, as those of an ordinary convolution."""
        sizes = ConvSpec(self.in_channels, self.out_channels, self.kernel_size, self.groups)
        for name in ("in_channels", "out_channels", "kernel_size", "groups"):
            object.__setattr__(self, name, getattr(sizes, name))

    @property
    def kernel_shape(self) -> Shape:
        """Shape of the kernel with its spatial axes, `(I, O/g, *kernel_size)`."""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)


@dataclass(frozen=True)
class BatchNormSpec:
    """A batch norm: its channels, what it adds to the variance, and how fast its statistics move.

    momentum: the weight of the new batch in the running statistics, as in PyTorch.

    >>> LayerForm(BatchNormSpec(8, epsilon=1e-5, momentum=0.1), scale=False).shapes
    {'beta': (8,), 'running_mean': (8,), 'running_var': (8,)}
    """

    features: int
    epsilon: float
    momentum: float

    def __post_init__(self) -> None:
        """Validate every field."""
        _integers(self, "features")
        _numbers(self, "epsilon", "momentum")


@dataclass(frozen=True)
class LayerNormSpec:
    """A layer norm over one axis: its entries, and what it adds to the variance.

    >>> LayerForm(LayerNormSpec(8, epsilon=1e-5)).shapes
    {'gamma': (8,), 'beta': (8,)}
    """

    features: int
    epsilon: float

    def __post_init__(self) -> None:
        """Validate both."""
        _integers(self, "features")
        _numbers(self, "epsilon")


@dataclass(frozen=True)
class GroupNormSpec:
    """A group norm: channels, groups, and what it adds to the variance.

    An instance norm is one with as many groups as channels.

    >>> GroupNormSpec(8, groups=3, epsilon=1e-5)
    Traceback (most recent call last):
        ...
    ValueError: features must be divisible by groups; received features=8, groups=3.
    """

    features: int
    groups: int
    epsilon: float

    def __post_init__(self) -> None:
        """Validate every field."""
        _integers(self, "features", "groups")
        _numbers(self, "epsilon")
        if self.features % self.groups:
            raise ValueError(
                f"features must be divisible by groups; received features={self.features}, "
                f"groups={self.groups}."
            )


@dataclass(frozen=True)
class PReLUSpec:
    """A PReLU: how many slopes it has, one or one for each channel.

    >>> LayerForm(PReLUSpec(8)).shapes
    {'alpha': (8,)}
    """

    features: int

    def __post_init__(self) -> None:
        """Validate the number."""
        _integers(self, "features")


@dataclass(frozen=True)
class EmbeddingSpec:
    """An embedding. Its weight is `(entries, features)`: one row for each index.

    >>> LayerForm(EmbeddingSpec(entries=100, features=8)).shapes
    {'weight': (100, 8)}
    """

    entries: int
    features: int

    def __post_init__(self) -> None:
        """Validate both sizes."""
        _integers(self, "entries", "features")


def _integers(spec: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(spec, name, as_integer(name, getattr(spec, name)))


def _numbers(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number; received {name}={value!r}.")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative; received {name}={value!r}.")
        object.__setattr__(spec, name, float(value))


class Kind(NamedTuple):
    """A kind of layer. spec: the type of its sizes. shapes: of all entries that it may have."""

    spec: type[Any]
    shapes: Callable[[Any], dict[str, Shape]]


def _conv_shapes(spec: ConvSpec) -> dict[str, Shape]:
    return {"weight": spec.weight_shape, "bias": (spec.out_channels,)}


def _transposed_shapes(spec: TransposedConvSpec) -> dict[str, Shape]:
    weight = (*spec.kernel_shape[:2], prod(spec.kernel_size))
    return {"weight": weight, "bias": (spec.out_channels,)}


def _linear_shapes(spec: LinearSpec) -> dict[str, Shape]:
    return {"weight": (spec.out_features, spec.in_features), "bias": (spec.out_features,)}


def _vectors(*names: str) -> Callable[[Any], dict[str, Shape]]:
    return lambda spec: dict.fromkeys(names, (spec.features,))


KINDS = {
    "convolution": Kind(ConvSpec, _conv_shapes),
    "transposed_convolution": Kind(TransposedConvSpec, _transposed_shapes),
    "linear": Kind(LinearSpec, _linear_shapes),
    "batch_norm": Kind(BatchNormSpec, _vectors("gamma", "beta", "running_mean", "running_var")),
    "layer_norm": Kind(LayerNormSpec, _vectors("gamma", "beta")),
    "group_norm": Kind(GroupNormSpec, _vectors("gamma", "beta")),
    "prelu": Kind(PReLUSpec, _vectors("alpha")),
    "embedding": Kind(EmbeddingSpec, lambda spec: {"weight": (spec.entries, spec.features)}),
}
_NAMES = {kind.spec: name for name, kind in KINDS.items()}
HELD = (
    "convolutions, transposed ones, DO-Conv layers, linear (dense) layers, batch, layer, group and "
    "instance norms, PReLUs and embeddings"
)

# What is known of the order of a layer's features, where a flattened image gave them.
CHANNELS_FIRST = "channels first"  # seen, and put in the canonical order
OWN = "own"  # perhaps one, in the order of the framework that the layer comes from
UNRECORDED = "unrecorded"  # of a file that does not say
_FLATTENINGS = (None, CHANNELS_FIRST, OWN, UNRECORDED)


@dataclass(frozen=True)
class LayerForm:
    """What one layer of a model is, as far as its state is concerned.

    spec: its sizes, of one of the types in `KINDS`, or of a kind's that composes its kernel.
    over_parameterized: the name of that kind, True for "doconv"; False for what has nothing to
    compose, such as one tap, whatever was asked for. bias: whether
    it has `bias`, or of a norm `beta`. scale: whether a norm has `gamma`. geometry: a
    convolution's, or None where it is not known and not to be compared. flattening: None where the
    layer's features are no flattened image, as far as is known; else one of this module's words.
    Raises TypeError or ValueError for anything else.

    >>> LayerForm(ConvSpec(3, 8, (3, 3)), "doconv", bias=False).shapes
    {'weight': (8, 3, 9), 'depthwise_weight': (3, 9, 9)}
    """

    spec: Any
    over_parameterized: bool | str = False
    bias: bool = True
    scale: bool = True
    geometry: Geometry | None = None
    flattening: str | None = None

    def __post_init__(self) -> None:
        """Check the types; what a layer of the kind cannot have, it has not."""
        put = object.__setattr__
        put(self, "over_parameterized", self._checked_composition())
        if type(self.spec) not in _NAMES and not self.over_parameterized:
            raise TypeError(
                f"spec must be one of {', '.join(k.spec.__name__ for k in KINDS.values())}; "
                f"received {self.spec!r}."
            )
        for name in ("bias", "scale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; received {getattr(self, name)!r}.")
        possible = self._possible()
        if isinstance(self.spec, ConvSpec) and not self.over_parameterized:
            _check_ordinary(self.spec)
        put(self, "bias", self.bias and not possible.keys().isdisjoint({"bias", "beta"}))
        put(self, "scale", self.scale and "gamma" in possible)
        self._check_geometry()
        if self.flattening not in _FLATTENINGS:
            raise ValueError(
                f"flattening must be one of {', '.join(map(repr, _FLATTENINGS))}; received "
                f"{self.flattening!r}."
            )

    def _checked_composition(self) -> bool | str:
        """Return the field as it is kept: False, True of DO-Conv, or another kind's name."""
        told = self.over_parameterized
        if not isinstance(told, (bool, str)):
            raise TypeError(f"over_parameterized must be True or False; received {told!r}.")
        kind = composed_kind(told)
        if kind is None:
            return False
        if not isinstance(self.spec, kind.spec_type):
            return False
        if kind.obstacle(kind.conv(self.spec)) is not None:
            return False
        return True if kind is DO_CONV else kind.name

    def _possible(self) -> dict[str, Shape]:
        """Return the shapes of all entries that such a layer may have."""
        kind = self.composed
        if kind is None:
            return KINDS[self.kind].shapes(self.spec)
        return {**kind.entries(self.spec), "bias": (kind.conv(self.spec).out_channels,)}

    def _check_geometry(self) -> None:
        if self.geometry is None:
            return
        if not isinstance(self.geometry, Geometry):
            raise TypeError(f"geometry must be a Geometry or None; received {self.geometry!r}.")
        if self.composed is None and not isinstance(self.spec, (ConvSpec, TransposedConvSpec)):
            raise TypeError(f"geometry must be None for a {type(self.spec).__name__}.")
        object.__setattr__(self, "geometry", self.geometry.for_kernel(self.spec.kernel_size))

    @property
    def kind(self) -> str:
        """The name of the layer's type in `KINDS`; of a composed layer, of what it folds to."""
        return _NAMES[ConvSpec if self.over_parameterized else type(self.spec)]

    @property
    def composed(self) -> ComposedKind | None:
        """The kind that composes the layer's kernel; None for an ordinary layer."""
        return composed_kind(self.over_parameterized)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each of the layer's entries, by its name within the layer."""
        absent = set()
        if not self.bias:
            absent |= {"bias", "beta"}
        if not self.scale:
            absent.add("gamma")
        shapes = self._possible()
        return {name: shape for name, shape in shapes.items() if name not in absent}


def composed_kind(name: bool | str) -> ComposedKind | None:
    """Return the kind of this name that composes a kernel; True is DO-Conv's, False of none.

    Raises ValueError for a name of no such kind.
    """
    if isinstance(name, bool):
        return DO_CONV if name else None
    kind = kind_named(name)
    if not isinstance(kind, ComposedKind):
        raise ValueError(f"kind {name!r} is no layer with a composed kernel, but ordinary ones.")
    return kind


def _check_ordinary(spec: ConvSpec) -> None:
    if spec.depth_multiplier != spec.taps:
        raise ValueError(
            f"an ordinary convolution of {spec.taps} taps has no other depth_multiplier; received "
            f"depth_multiplier={spec.depth_multiplier}."
        )


def suspect_flattening(
    layers: Mapping[str, LayerForm], unseen: Collection[str]
) -> dict[str, LayerForm]:
    """Return the forms, with `OWN` for linear layers that may stand behind a flattened image.

    For models that flatten channels last where it cannot be seen. layers: in the model's order.
    unseen: the paths of those whose input cannot be. One is suspected that has a multiple of the
    features of the convolution or norm before it: as many, it would seem, as there are positions.
    """
    found, channels = {}, 0
    for path, form in layers.items():
        spec, features = form.spec, 0
        if isinstance(spec, LinearSpec):
            several = channels and spec.in_features > channels and spec.in_features % channels == 0
            if several and path in unseen and form.flattening is None:
                form = replace(form, flattening=OWN)
        elif isinstance(spec, (ConvSpec, TransposedConvSpec)):
            features = spec.out_channels
        elif isinstance(spec, (BatchNormSpec, GroupNormSpec)):
            features = spec.features
        found[path], channels = form, features or (channels if form.kind == "prelu" else 0)
    return found
