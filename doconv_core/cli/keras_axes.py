"""How Keras' layers put the numbers that they are given, by what a config tells of each.

Of a tensor, what matters is in which order its numbers are elsewhere: channels come first in
PyTorch and Gluon, and last in Keras, so that a flattened image has its numbers in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

Shape: TypeAlias = "tuple[int | None, ...]"
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
    if not isinstance(value, list) or not value:
        return None
    if not all(n is None or type(n) is int for n in value):
        return None
    return tuple(value[1:])


def given(config: Config) -> Value:
    """Return what an input layer gives: nothing tells which axis has the channels, but of one."""
    shape = shape_of(config.get("batch_shape"))
    if shape is None:
        return Value()
    if len(shape) == 1:
        return Value(SAME, shape)
    return Value(LAST if len(shape) > 2 and shape[-1] == 1 else PURE, shape)


def result(node: Config, values: Values) -> Value:
    """Return what a layer gives, or an operation; open where it is not known here."""
    module = str(node.get("module") or "")
    rules = _LAYERS if module.startswith(("keras.layers", "doconv_tf")) else {}
    if module.startswith("keras.src.ops"):
        rules = _OPERATIONS
    rule = rules.get(node["class_name"])
    return rule(node["config"], values) if rule is not None and values else Value()


def _elementwise(config: Config, values: Values) -> Value:
    # A function of one's own, as which an activation may be given, may do anything.
    return values[0] if isinstance(config.get("activation", ""), str) else Value()


def _merged(config: Config, values: Values) -> Value:
    """Return a sum or the like; what is one number for each channel is spread over an image."""
    wide = [value for value in values if value.several] or values
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
    format_ = config.get("data_format")
    return Value(format_) if format_ in (LAST, FIRST) else Value()


def _spatial(config: Config, values: Values) -> Value:
    return values[0]._replace(shape=None)


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


def makes_an_image(node: Config, value: Value) -> bool:
    """Return whether a layer makes a vector an image, so that the vector's order matters."""
    target = _target(node["config"]) if node["class_name"] == "Reshape" else []
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


_DIMENSIONS = ("1D", "2D", "3D")
_NAMES: dict[Rule, str] = {
    _elementwise: "Activation ActivityRegularization AlphaDropout BatchNormalization Dropout ELU "
    "GaussianDropout GaussianNoise GroupNormalization Identity LayerNormalization LeakyReLU PReLU "
    "ReLU Rescaling Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D",
    _merged: "Add Average Maximum Minimum Multiply Subtract",
    _concatenated: "Concatenate",
    _features_last: "Embedding LSTM GRU SimpleRNN",
    _attention: "MultiHeadAttention",
    _dense: "Dense",
    _flatten: "Flatten",
    _reshape: "Reshape",
    _permute: "Permute",
}
_RANKED: dict[Rule, str] = {
    _convolution: "Conv{} DepthwiseConv{} SeparableConv{} Conv{}Transpose DOConv{} "
    "DODepthwiseConv{} DOSeparableConv{}",
    _spatial: "AveragePooling{} MaxPooling{} Cropping{} UpSampling{} ZeroPadding{}",
    _global_pooling: "GlobalAveragePooling{} GlobalMaxPooling{}",
}
_LAYERS = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_LAYERS |= {
    name.format(d): rule
    for rule, names in _RANKED.items()
    for name in names.split()
    for d in _DIMENSIONS
}
_OF_OPERATIONS: dict[Rule, str] = {
    _elementwise: "Relu Relu6 Sigmoid Silu Tanh Gelu Softplus Elu",
    _merged: "Add Subtract Multiply Maximum Minimum",
    _reshape: "Reshape",
}
_OPERATIONS = {name: rule for rule, names in _OF_OPERATIONS.items() for name in names.split()}
