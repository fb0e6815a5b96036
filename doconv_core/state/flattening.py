"""What is behind a flattened image, whose numbers frameworks with channels last order otherwise.

Channels come first in PyTorch and Gluon, and last in Keras, so that a flattened image has its
numbers in another order. Where a model tells what feeds what, as Keras' configs and graphs do, each
tensor is followed from layer to layer: `KERAS_LAYERS` and `KERAS_OPERATIONS` tell the kind of each,
and `RULES` what a kind does to the order of numbers. Where only the order of layers is known, their
sizes make one way or another likely: see `doconv_core.state.chain.Chain`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from doconv_core.maths.numeric import Array as Array

Shape: TypeAlias = "tuple[int | None, ...]"
Size: TypeAlias = "tuple[int, ...]"
Config: TypeAlias = Mapping[str, Any]

SAME: Final = "same"  # as elsewhere
LAST: Final = "channels_last"  # an image with its channels last, which elsewhere are first
FIRST: Final = "channels_first"  # an image, and as elsewhere
PURE: Final = "pure"  # the last axis has features; what its axes are elsewhere is not known
FLAT: Final = "flat"  # an image whose channels were last, flattened
OPEN: Final = "open"


class Value(NamedTuple):
    """A tensor. order: one of the words above. shape: without the batch; None where not known.

    image: of a flat one, the image's channels and size, channels first. makers: the groups of the
    Dense layers whose outputs it has, one by one.
    """

    order: str = OPEN
    shape: Shape | None = None
    image: Shape = ()
    makers: frozenset[str] = frozenset()

    @property
    def several(self) -> bool:
        """Whether more than one axis has more than one entry, as far as is known."""
        return self.shape is None or sum(n != 1 for n in self.shape) > 1

    @property
    def is_vector(self) -> bool:
        """Whether it is known to have one axis."""
        return self.shape is not None and len(self.shape) == 1


Values: TypeAlias = Sequence[Value]
Rule: TypeAlias = Callable[[Config, Values], Value]


def shape_of(value: Any) -> Shape | None:
    """Return a shape in a config without its batch; None where it is none."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if not all(n is None or type(n) is int for n in value):
        return None
    return tuple(value[1:])


def given(config: Config) -> Value:
    """Return what an input layer gives: nothing tells which axis has the channels, but of one."""
    shape = shape_of(config.get("batch_shape", config.get("batch_input_shape")))  # as in Keras 2
    if shape is None:
        return Value()
    if len(shape) == 1:
        return Value(SAME, shape)
    return Value(LAST if len(shape) > 2 and shape[-1] == 1 else PURE, shape)


def kind_of(name: str, module: str) -> str:
    """Return what kind of layer or operation one of Keras' classes is, a key of `RULES`, or "".

    name: of the class, of an over-parameterized layer that of the ordinary one; module: its place.
    """
    table = KERAS_OPERATIONS if module.startswith("keras.src.ops") else KERAS_LAYERS
    return table.get(name, "")


def result(kind: str, config: Config, values: Values) -> Value:
    """Return what a layer gives, or an operation; open where it is not known here.

    kind: as `kind_of` has it. config: the layer's. values: what it is given.
    """
    rule = RULES.get(kind)
    return rule(config, values) if rule is not None and values else Value()


def _elementwise(config: Config, values: Values) -> Value:
    # A function of one's own, as which an activation may be given, may do anything.
    return values[0] if isinstance(config.get("activation", ""), str) else Value()


def _merged(config: Config, values: Values) -> Value:
    """Return a sum or the like; what is one number for each channel is spread over an image."""
    wide = [value for value in values if value.several]
    narrow = [value for value in values if not value.several]
    if wide and any(value.order in (FLAT, OPEN) for value in narrow):
        return Value()
    wide = wide or narrow
    if len({(value.order, value.shape, value.image) for value in wide}) > 1:
        return Value()
    return wide[0]._replace(makers=frozenset().union(*(value.makers for value in wide)))


def _concatenated(config: Config, values: Values) -> Value:
    orders = {value.order for value in values}
    makers = frozenset[str]().union(*(value.makers for value in values))
    return (
        Value(orders.pop(), makers=makers) if len(orders) == 1 and FLAT not in orders else Value()
    )


def _convolution(config: Config, values: Values) -> Value:
    format_, filters, size = (config.get(x) for x in ("data_format", "filters", "kernel_size"))
    if format_ not in (LAST, FIRST):
        return Value()
    if type(filters) is not int or not isinstance(size, list):
        return Value(format_)
    return Value(format_, _image_of(format_, filters, len(size)))


def _image_of(order: str, channels: int | None, dimensions: int) -> Shape:
    """Return the shape of an image of which the channels are known."""
    positions = (None,) * dimensions
    return (*positions, channels) if order == LAST else (channels, *positions)


def _spatial(config: Config, values: Values) -> Value:
    order, shape = values[0].order, values[0].shape
    if order not in (LAST, FIRST) or not shape:
        return values[0]._replace(shape=None)
    channels = shape[-1 if order == LAST else 0]
    return values[0]._replace(shape=_image_of(order, channels, len(shape) - 1))


def _global_pooling(config: Config, values: Values) -> Value:
    order, last = values[0].order, config.get("data_format") != FIRST
    return Value(SAME) if (order in (LAST, PURE, SAME) if last else order == FIRST) else Value()


def _dense(config: Config, values: Values) -> Value:
    """Return what a dense layer gives; its caller adds that this layer has made it."""
    value = values[0]
    if value.is_vector or value.order == SAME:
        return Value(SAME)
    return Value(PURE)


def _features_last(config: Config, values: Values) -> Value:
    return Value(SAME)


def _attention(config: Config, values: Values) -> Value:
    return Value(SAME if values[0].order == SAME else PURE)


def _flatten(config: Config, values: Values) -> Value:
    """Return an image flattened. From channels-first ones Keras moves the channels on request."""
    value, last = values[0], config.get("data_format") != FIRST
    if value.is_vector or value.order == SAME:
        return value if value.is_vector else Value(SAME, makers=value.makers)
    if not value.several:
        return Value(SAME, makers=value.makers)
    if value.shape is None or value.order not in (LAST, FIRST):
        return Value()
    if value.order == FIRST and last:
        return Value(SAME)
    if value.order == LAST and last:
        return _flat((value.shape[-1], *value.shape[:-1]))
    return _flat(value.shape) if value.order == FIRST else Value()


def _flat(image: Shape) -> Value:
    one = image[0] == 1 or all(n == 1 for n in image[1:])
    return Value(SAME) if one else Value(FLAT, image=image)


def _reshape(config: Config, values: Values) -> Value:
    value, target = values[0], _target(config)
    if not target:
        return Value()
    if len(target) == 1:
        return _flatten({}, values)
    single = sum(n != 1 for n in target) < 2
    if single and not value.several:
        return value if value.order == FLAT else Value(SAME, makers=value.makers)
    kept = value.shape and value.shape[-1] == target[-1]
    return Value(PURE) if kept and value.order in (LAST, PURE, SAME) else Value()


def makes_an_image(kind: str, config: Config, value: Value) -> bool:
    """Return whether a layer makes a vector an image, so that the vector's order matters."""
    target = _target(config) if kind == "reshape" else []
    # One channel, or one position, is in the same order everywhere.
    return not value.several and sum(n != 1 for n in target) > 1 and target[-1] != 1


def _target(config: Config) -> list[Any]:
    """Return the shape that is made, without the batch, which an operation's config has, too."""
    found, whole = config.get("target_shape"), config.get("newshape")
    if isinstance(found, list):
        return found
    return whole[1:] if isinstance(whole, list) else []


def _permute(config: Config, values: Values) -> Value:
    value, dims = values[0], config.get("dims")
    if not isinstance(dims, list) or not dims:
        return Value()
    axes = list(range(1, len(dims) + 1))
    if value.order == LAST and dims == [axes[-1], *axes[:-1]]:
        return Value(FIRST)
    return Value(LAST) if value.order == FIRST and dims == [*axes[1:], 1] else Value()


RULES: dict[str, Rule] = {
    "elementwise": _elementwise,
    "merge": _merged,
    "concatenate": _concatenated,
    "convolution": _convolution,
    "spatial": _spatial,
    "global pooling": _global_pooling,
    "dense": _dense,
    "features last": _features_last,
    "attention": _attention,
    "flatten": _flatten,
    "reshape": _reshape,
    "permute": _permute,
}
_LAYERS = {
    "elementwise": "Activation ActivityRegularization AlphaDropout BatchNormalization Dropout ELU "
    "GaussianDropout GaussianNoise GroupNormalization Identity LayerNormalization LeakyReLU "
    "Masking PReLU ReLU Rescaling Softmax SpatialDropout{} UnitNormalization",
    "merge": "Add Average Maximum Minimum Multiply Subtract",
    "concatenate": "Concatenate",
    "convolution": "Conv{} DepthwiseConv{} SeparableConv{} Conv{}Transpose",
    "spatial": "AveragePooling{} MaxPooling{} Cropping{} UpSampling{} ZeroPadding{}",
    "global pooling": "GlobalAveragePooling{} GlobalMaxPooling{}",
    "dense": "Dense EinsumDense",
    "features last": "Embedding LSTM GRU SimpleRNN RNN Bidirectional",
    "attention": "MultiHeadAttention",
    "flatten": "Flatten",
    "reshape": "Reshape",
    "permute": "Permute",
}
_OPERATIONS = {
    "elementwise": "Relu Relu6 Sigmoid Silu Tanh Gelu Softplus Elu",
    "merge": "Add Subtract Multiply Maximum Minimum",
    "concatenate": "Concatenate",
    "reshape": "Reshape",
}


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    """Return the kind of each class. table: names by kind, `{}` standing for 1D, 2D and 3D."""
    return {
        name.format(dimensions): kind
        for kind, names in table.items()
        for name in names.split()
        for dimensions in ("1D", "2D", "3D")
    }


KERAS_LAYERS, KERAS_OPERATIONS = _by_name(_LAYERS), _by_name(_OPERATIONS)


class Fed(NamedTuple):
    """What a layer is given. image: channels and size, channels first, of one that is flattened.

    It is () where there is none, and None where that is not known; a size may be None. outward:
    whether what the layer gives becomes an image.
    """

    image: Shape | None = None
    outward: bool = False


class Trace:
    """What layers are given, noted call by call; a layer may have several calls."""

    def __init__(self) -> None:
        self._images: dict[str, set[Shape | None]] = {}
        self._outward: set[str] = set()

    def call(self, layer: str, kind: str, config: Config, values: Values) -> Value:
        """Note that a layer is given these tensors, and return what it gives.

        layer: what tells it from others; "" for an operation, of which nothing is noted. kind: as
        `kind_of` has it.
        """
        found = result(kind, config, values)
        if not layer:
            return found
        self._images.setdefault(layer, set()).add(_image(values[0]))
        if makes_an_image(kind, config, values[0]):
            self._outward |= values[0].makers
        return found._replace(makers=frozenset({layer})) if kind == "dense" else found

    def fed(self) -> dict[str, Fed]:
        """Return what each layer is given, as far as all of its calls agree."""
        return {
            layer: Fed(next(iter(images)) if len(images) == 1 else None, layer in self._outward)
            for layer, images in self._images.items()
        }


def _image(value: Value) -> Shape | None:
    if value.order == FLAT:
        return value.image
    # A tensor of several axes has its features on the last, unless nothing is known of it.
    return None if value.order == OPEN or (value.order != SAME and value.is_vector) else ()


def image_size(fed: Fed | None, features: int | None) -> Size | None:
    """Return the size of what is flattened before a layer of so many features; None if not known.

    () where nothing is flattened. A size that is not known but for the channels becomes one axis.
    """
    image = fed.image if fed is not None else None
    if not image or features is None:
        return None if image is None else ()
    channels, *positions = image
    if channels is None or features % channels:
        return None
    known = [n for n in positions if n is not None]
    exact = len(known) == len(positions) and channels * prod(known) == features
    return (channels, *known) if exact else (channels, features // channels)


def is_same(size: Size) -> bool:
    """Return whether an image of this size, flattened, has its numbers in one order everywhere."""
    return not size or size[0] == 1 or prod(size[1:]) == 1


def channels_last(values: Array, size: Size) -> Array:
    """Return an array with its last axis, a flattened image of channels and `size`, as in Keras."""
    return np.moveaxis(values.reshape(-1, *size), 1, -1).reshape(values.shape)


def channels_first(values: Array, size: Size) -> Array:
    """Return an array with its last axis, a flattened image as in Keras, as in PyTorch.

    size: channels and size of the image. Raises ValueError where it is another number of inputs.
    """
    if prod(size) != values.shape[-1]:
        raise ValueError(f"the layer has {values.shape[-1]} inputs; given {size}.")
    return np.moveaxis(values.reshape(-1, *size[1:], size[0]), -1, 1).reshape(values.shape)
