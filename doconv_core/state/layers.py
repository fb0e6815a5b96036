"""What a layer is, as far as its state is concerned: its type, sizes and entries.

A type of layer is one entry in `KINDS`: its sizes, which tell the arrays that they imply. Each
backend has a table of its own from layer types to forms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, ClassVar

from doconv_core.kinds.base import ComposedKind, kind_named
from doconv_core.kinds.dgc import DGConvSpec
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.spec import ConvSpec, as_integer, check_divisible

Shape = tuple[int, ...]


class Sizes:
    """What tells a layer of one kind from others, checked: integers above 0, numbers not below it.

    vectors: the names of its arrays of one number for each feature, where that is all that it has.
    """

    vectors: ClassVar[tuple[str, ...]] = ()
    features: int

    def __post_init__(self) -> None:
        """Store plain numbers in place of what came."""
        for each in fields(self):  # type: ignore[arg-type]  # as every subclass is a dataclass
            check = _as_number if each.type == "float" else as_integer
            object.__setattr__(self, each.name, check(each.name, getattr(self, each.name)))

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of all arrays that such a layer may have, by name."""
        return dict.fromkeys(self.vectors, (self.features,))


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number; received {name}={value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative; received {name}={value!r}.")
    return float(value)


@dataclass(frozen=True)
class LinearSpec(Sizes):
    """The sizes of a linear (dense) layer. Its weight is `(out_features, in_features)`.

    >>> LayerForm(LinearSpec(in_features=3, out_features=2)).shapes
    {'weight': (2, 3), 'bias': (2,)}
    """

    in_features: int
    out_features: int

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of weight and bias."""
        return {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}


@dataclass(frozen=True)
class TransposedConvSpec(Sizes):
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
        for each in fields(self):
            object.__setattr__(self, each.name, getattr(sizes, each.name))

    @property
    def kernel_shape(self) -> Shape:
        """Shape of the kernel with its spatial axes, `(I, O/g, *kernel_size)`."""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of weight and bias."""
        inputs, outputs, *taps = self.kernel_shape
        return {"weight": (inputs, outputs, prod(taps)), "bias": (self.out_channels,)}


@dataclass(frozen=True)
class BatchNormSpec(Sizes):
    """A batch norm: its channels, what it adds to the variance, and how fast its statistics move.

    momentum: the weight of the new batch in the running statistics, as in PyTorch.

    >>> LayerForm(BatchNormSpec(8, epsilon=1e-5, momentum=0.1), scale=False).shapes
    {'beta': (8,), 'running_mean': (8,), 'running_var': (8,)}
    """

    vectors = ("gamma", "beta", "running_mean", "running_var")
    features: int
    epsilon: float
    momentum: float


@dataclass(frozen=True)
class LayerNormSpec(Sizes):
    """A layer norm over one axis: its entries, and what it adds to the variance.

    >>> LayerForm(LayerNormSpec(8, epsilon=1e-5)).shapes
    {'gamma': (8,), 'beta': (8,)}
    """

    vectors = ("gamma", "beta")
    features: int
    epsilon: float


@dataclass(frozen=True)
class GroupNormSpec(Sizes):
    """A group norm: channels, groups, and what it adds to the variance.

    An instance norm is one with as many groups as channels.

    >>> GroupNormSpec(8, groups=3, epsilon=1e-5)
    Traceback (most recent call last):
        ...
    ValueError: features must be divisible by groups; received features=8, groups=3.
    """

    vectors = ("gamma", "beta")
    features: int
    groups: int
    epsilon: float

    def __post_init__(self) -> None:
        """Validate every field."""
        super().__post_init__()
        check_divisible("features", self.features, self.groups)


@dataclass(frozen=True)
class PReLUSpec(Sizes):
    """A PReLU: how many slopes it has, one or one for each channel.

    >>> LayerForm(PReLUSpec(8)).shapes
    {'alpha': (8,)}
    """

    vectors = ("alpha",)
    features: int


@dataclass(frozen=True)
class EmbeddingSpec(Sizes):
    """An embedding. Its weight is `(entries, features)`: one row for each index.

    >>> LayerForm(EmbeddingSpec(entries=100, features=8)).shapes
    {'weight': (100, 8)}
    """

    entries: int
    features: int

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of the weight."""
        return {"weight": (self.entries, self.features)}


KINDS: dict[str, type[Any]] = {
    "convolution": ConvSpec,
    "transposed_convolution": TransposedConvSpec,
    "linear": LinearSpec,
    "batch_norm": BatchNormSpec,
    "layer_norm": LayerNormSpec,
    "group_norm": GroupNormSpec,
    "prelu": PReLUSpec,
    "dynamic_heads": DGConvSpec,
    "embedding": EmbeddingSpec,
}
_NAMES = {spec: name for name, spec in KINDS.items()}
HELD = (
    "convolutions, transposed ones, DO-Conv layers, linear (dense) layers, batch, layer, group and "
    "instance norms, PReLUs, embeddings and the heads of dynamic group convolutions"
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
            names = ", ".join(spec.__name__ for spec in KINDS.values())
            raise TypeError(f"spec must be one of {names}; received {self.spec!r}.")
        for name in ("bias", "scale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; received {getattr(self, name)!r}.")
        possible = self._possible()
        if isinstance(self.spec, ConvSpec) and not self.over_parameterized:
            taps, multiplier = self.spec.taps, self.spec.depth_multiplier
            if multiplier != taps:
                raise ValueError(
                    f"an ordinary convolution of {taps} taps has no other depth_multiplier; "
                    f"received depth_multiplier={multiplier}."
                )
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
        if kind is None or not isinstance(self.spec, kind.spec_type):
            return False
        if kind.obstacle(kind.conv(self.spec)) is not None:
            return False
        return True if kind is DO_CONV else kind.name

    def _possible(self) -> dict[str, Shape]:
        """Return the shapes of all entries that such a layer may have."""
        kind = self.composed
        if kind is None:
            shapes: dict[str, Shape] = self.spec.shapes
            return shapes
        return {**kind.entries(self.spec), "bias": (kind.conv(self.spec).out_channels,)}

    def _check_geometry(self) -> None:
        if self.geometry is None:
            return
        if not isinstance(self.geometry, Geometry):
            raise TypeError(f"geometry must be a Geometry or None; received {self.geometry!r}.")
        convolves = (ConvSpec, TransposedConvSpec, DGConvSpec)
        if self.composed is None and not isinstance(self.spec, convolves):
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
        has = {"bias": self.bias, "beta": self.bias, "gamma": self.scale}
        return {name: shape for name, shape in self._possible().items() if has.get(name, True)}


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
