"""Which layers of a Keras model have the features of a flattened image, and in which order.

A flattened image of `(H, W, C)` has its features in another order than one of `(C, H, W)`, so that
the weights of the layer behind it do not mean the same. In functional and sequential models the
flattening can be seen, and the order is known; elsewhere it can only be suspected.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, TypeAlias

import keras

from doconv_core.state.layers import OWN
from doconv_tf.graph import Graph
from doconv_tf.private import is_operation

_layers = keras.layers
Flattening: TypeAlias = "tuple[int, ...] | str | None"

# What gives each feature on without mixing it with others.
_ELEMENTWISE = (
    _layers.Activation, _layers.ActivityRegularization, _layers.AlphaDropout,
    _layers.BatchNormalization, _layers.Dropout, _layers.ELU, _layers.GaussianDropout,
    _layers.GaussianNoise, _layers.Identity, _layers.LayerNormalization, _layers.LeakyReLU,
    _layers.Masking, _layers.PReLU, _layers.ReLU, _layers.Rescaling, _layers.Softmax,
    _layers.SpatialDropout1D, _layers.SpatialDropout2D, _layers.SpatialDropout3D,
    _layers.UnitNormalization,
)  # fmt: skip
_ELEMENTWISE_OPERATIONS = ("Relu", "Relu6", "Sigmoid", "Silu", "Tanh", "Gelu", "Softplus", "Elu")
_MERGES = (
    _layers.Add, _layers.Average, _layers.Maximum, _layers.Minimum, _layers.Multiply,
    _layers.Subtract,
)  # fmt: skip
_MERGING_OPERATIONS = ("Add", "Subtract", "Multiply", "Maximum", "Minimum")
# What has its features on the last axis in every framework.
_FEATURES_LAST = (
    _layers.Dense, _layers.EinsumDense, _layers.Embedding, _layers.RNN, _layers.Bidirectional,
    _layers.MultiHeadAttention, _layers.TimeDistributed,
)  # fmt: skip
_MIXING = (_layers.Dense, _layers.EinsumDense)
# What takes positions together, or adds or leaves out some, and keeps the channels.
_SPATIAL = tuple(
    getattr(_layers, f"{name}{rank}D")
    for name in (
        "AveragePooling", "MaxPooling", "GlobalAveragePooling", "GlobalMaxPooling", "Cropping",
        "UpSampling", "ZeroPadding",
    )
    for rank in (1, 2, 3)
)  # fmt: skip


class Flattenings:
    """What is known of the features of a model's layers."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._unseen = [
            layer
            for layer in graph.layers
            if isinstance(layer, (_layers.Flatten, _layers.Reshape)) and not graph.calls(layer)
        ]

    def of(self, layer: keras.Layer, features: int) -> Flattening:
        """Return the size of the image whose flattening is the layer's input, without channels.

        None where it is none, or of one position or one channel, so that the order is the same
        everywhere; `OWN` where that cannot be told. features: of the layer's input.
        """
        calls = self._graph.calls(layer)
        if not calls:
            # Convolutions behind a reshaping are seldom of mixed channels: those are not suspected.
            suspect = not hasattr(layer, "kernel_size")
            return OWN if suspect and any(_may_give(e, features) for e in self._unseen) else None
        found = {self._of_tensor(call.input_tensors[0]) for call in calls}
        if isinstance(layer, _MIXING):
            found |= {OWN for call in calls if self._becomes_an_image(call.outputs[0])}
        return found.pop() if len(found) == 1 else OWN

    def _of_tensor(self, tensor: Any) -> Flattening:
        if len(tensor.shape) == 2:
            return self._image(tensor)
        return OWN if self._is_mixed(tensor) else None

    def _is_mixed(self, tensor: Any) -> bool:
        """Return whether the last axis may have an image's channels mixed with its positions."""
        stack, seen = [tensor], set()
        while stack:
            image = stack.pop()
            if id(image) in seen:
                continue
            seen.add(id(image))
            for maker in self._graph.makers(image):
                operation, output = maker.operation, maker.outputs[0]
                if isinstance(operation, _FEATURES_LAST):
                    continue
                vectors = [each for each in maker.input_tensors if len(each.shape) == 2]
                images = [each for each in maker.input_tensors if len(each.shape) > 2]
                # An image that is flattened and becomes the same again is what it was.
                again = tuple(output.shape[1:-1]) if _reshapes(operation) else None
                unmixed = (None, again)
                if any(self._image(vector) not in unmixed for vector in vectors):
                    return True
                if _reshapes(operation) and any(self._mixes(each, output) for each in images):
                    return True
                if _reshapes(operation) or _keeps_channels(operation):
                    stack += images
        return False

    def _mixes(self, image: Any, output: Any) -> bool:
        """Return whether to reshape an image so puts channels and positions on the last axis."""
        shape = image.shape[1:]
        format_ = self.format_of(image)
        if sum(n != 1 for n in shape) < 2 or format_ in (None, "channels_first"):
            return False
        channels, last = shape[-1], output.shape[-1]
        if channels == 1 and format_ == "channels_last":
            return False
        return channels is None or last is None or channels % last != 0

    def _image(self, tensor: Any) -> Flattening:
        """Return the same for a tensor; None where it is no vector."""
        found: set[Flattening] = set()
        for maker, kept in self._behind(tensor):
            flattening = self._made_by(maker)
            found.add(flattening if kept or flattening is None else OWN)
        return found.pop() if len(found) == 1 else OWN

    def _behind(self, tensor: Any) -> Iterator[tuple[Any, bool]]:
        """Yield the calls that gave a vector its features, and whether their order was kept since.

        That is through what keeps a vector's length; what it does to the order may be unknown.
        """
        stack, seen = [(tensor, True)], set()
        while stack:
            vector, kept = stack.pop()
            if (id(vector), kept) in seen:
                continue
            seen.add((id(vector), kept))
            for maker in self._graph.makers(vector):
                vectors = [each for each in maker.input_tensors if len(each.shape) == 2]
                mixing = isinstance(maker.operation, _MIXING)
                if mixing or not vectors or len(vectors) < len(maker.input_tensors):
                    yield maker, kept
                else:
                    kept_here = kept and _keeps_order(maker.operation)
                    stack += [(each, kept_here) for each in vectors]

    def _made_by(self, maker: Any) -> Flattening:
        operation, output = maker.operation, maker.outputs[0]
        images = [each for each in maker.input_tensors if len(each.shape) > 2]
        if not images or len(output.shape) != 2 or isinstance(operation, _MIXING):
            return None
        if _reshapes(operation):
            return self._flattened(operation, images[0])
        shapes = [[n or 1 for n in each.shape[1:]] for each in images]
        several = any(prod(shape) == output.shape[1] != max(shape) for shape in shapes)
        return OWN if several or any(map(self._is_mixed, images)) else None

    def _flattened(self, operation: Any, tensor: Any) -> Flattening:
        shape = tensor.shape[1:]
        if sum(n != 1 for n in shape) < 2:
            return None
        format_, first = self.format_of(tensor), _puts_channels_first(operation)
        if self._is_turned(tensor) and not first:
            return None
        if format_ in (None, OWN):
            return format_ if not first else OWN
        if format_ == "channels_first" and not first:
            return None
        if (format_ == "channels_first") != first:
            return OWN
        positions = shape[1:] if first else shape[:-1]
        return positions if prod(positions) > 1 and prod(positions) < prod(shape) else None

    def _is_turned(self, tensor: Any) -> bool:
        """Return whether a `Permute` has put an image's last axis, its channels, first."""

        def turned(maker: Any) -> bool:
            operation, given = maker.operation, maker.input_tensors
            if type(operation) is not _layers.Permute:
                return False
            rank = len(operation.dims)
            to_first = tuple(operation.dims) == (rank, *range(1, rank))
            return to_first and self.format_of(given[0]) == "channels_last"

        return all(map(turned, self._graph.makers(tensor)))

    def format_of(self, tensor: Any) -> str | None:
        """Return a tensor's image format; None for what is no image, `OWN` where it is unknown."""
        found: set[str | None] = set()
        stack, seen = [tensor], set()
        while stack:
            image = stack.pop()
            if id(image) in seen:
                continue
            seen.add(id(image))
            for maker in self._graph.makers(image):
                operation = maker.operation
                if maker.input_tensors and _keeps_format(operation):
                    stack += maker.input_tensors
                else:
                    found.add(_format_of(maker))
        return found.pop() if len(found) == 1 else OWN

    def _becomes_an_image(self, tensor: Any) -> bool:
        """Return whether the features of a vector are made the positions of an image later on."""
        stack, seen = [tensor], set()
        while stack:
            vector = stack.pop()
            if id(vector) in seen:
                continue
            seen.add(id(vector))
            for node in self._graph.consumers(vector):
                output = node.outputs[0]
                if _reshapes(node.operation) and sum(n != 1 for n in output.shape[1:]) > 1:
                    return True
                if _keeps_order(node.operation):
                    stack.append(output)
        return False


def _format_of(maker: Any) -> str | None:
    """Return the image format of what a call gives, as far as the layer called tells it."""
    operation = maker.operation
    if hasattr(operation, "data_format") and not isinstance(operation, _layers.Flatten):
        return str(operation.data_format)
    if maker.input_tensors:
        return None if isinstance(operation, _FEATURES_LAST) else OWN
    shape = maker.outputs[0].shape
    if len(shape) < 4:  # which has no axis for channels
        return None
    formats = {"channels_last": shape[-1], "channels_first": shape[1]}
    return next((name for name, channels in formats.items() if channels == 1), OWN)


def _puts_channels_first(operation: Any) -> bool:
    """Return whether this flattens an image of channels first as one of channels last."""
    return isinstance(operation, _layers.Flatten) and operation.data_format == "channels_first"


def _reshapes(operation: Any) -> bool:
    return isinstance(operation, (_layers.Flatten, _layers.Reshape)) or is_operation(
        operation, ("Reshape",)
    )


def _keeps_order(operation: Any) -> bool:
    return isinstance(operation, (*_ELEMENTWISE, *_MERGES)) or is_operation(
        operation, (*_ELEMENTWISE_OPERATIONS, *_MERGING_OPERATIONS)
    )


def _keeps_format(operation: Any) -> bool:
    return (
        _keeps_order(operation)
        or isinstance(operation, _layers.Concatenate)
        or is_operation(operation, ("Concatenate",))
    )


def _keeps_channels(operation: Any) -> bool:
    """Return whether the last axis of what a layer gives is that of what it is given."""
    return _keeps_format(operation) or isinstance(operation, _SPATIAL)


def _may_give(layer: keras.Layer, features: int) -> bool:
    """Return whether a flattening outside of any graph may give a layer its features."""
    shape = (layer.get_build_config() or {}).get("input_shape")
    if not shape or any(n is None for n in shape[1:]):
        return True
    return bool(prod(shape[1:]) == features) and sum(n != 1 for n in shape[1:]) > 1
