"""Which layers of a Keras model have the features of a flattened image, and in which order.

A flattened image of `(H, W, C)` has its features in another order than one of `(C, H, W)`, so that
the weights of the layer behind it do not mean the same. In functional and sequential models tensors
are followed by the core's rules, and the order is known; elsewhere it can only be suspected.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import keras

from doconv_core.state.flattening import (
    FIRST,
    FLAT,
    LAST,
    OPEN,
    PURE,
    SAME,
    Trace,
    Value,
    image_size,
    is_same,
    kind_of,
)
from doconv_core.state.layers import OWN
from doconv_tf.graph import Graph

_layers = keras.layers
Flattening: TypeAlias = "tuple[int, ...] | str | None"

# What the core's rules ask of a layer or an operation.
_TOLD = ("data_format", "dims", "newshape", "target_shape")


class Flattenings:
    """What is known of the features of a model's layers."""

    def __init__(self, graph: Graph) -> None:
        self._trace = Trace()
        self._orders: dict[int, set[tuple[str, int]]] = {}
        self._unseen = [
            layer
            for layer in graph.layers
            if isinstance(layer, (_layers.Flatten, _layers.Reshape))
            and id(layer) not in graph.called
        ]
        graph.follow(_given, self._call)
        self._fed = self._trace.fed()

    def of(self, layer: keras.Layer, features: int) -> Flattening:
        """Return the size of the image whose flattening is the layer's input, without channels.

        None where it is none, or of one position or one channel, so that the order is the same
        everywhere; `OWN` where that cannot be told. features: of the layer's input.
        """
        fed = self._fed.get(str(id(layer)))
        if fed is None:
            # Convolutions behind a reshaping are seldom of mixed channels: those are not suspected.
            suspect = not hasattr(layer, "kernel_size")
            return OWN if suspect and any(_may_give(e, features) for e in self._unseen) else None
        size = image_size(fed, features)
        if size is None or fed.outward:
            return OWN
        return None if is_same(size) else size[1:]

    def orders_of(self, layer: keras.Layer) -> set[tuple[str, int]]:
        """Return the orders of what a layer is given, words of the core's, each with its rank."""
        return self._orders.get(id(layer), set())

    def _call(self, operation: Any, given: Sequence[Value], output: Any) -> Value:
        """Note what a layer or an operation is given, and return what it gives."""
        # Where several axes have the numbers of a flattened image, the last one has but some.
        values = [v if v.order != FLAT or v.is_vector else v._replace(order=OPEN) for v in given]
        told = {name: getattr(operation, name) for name in _TOLD if hasattr(operation, name)}
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
        names = ((cls.__name__, cls.__module__) for cls in type(operation).__mro__)
        kinds = [kind_of(*name) for name in names if name[1].startswith("keras.")]
        kind = next(filter(None, kinds), "convolution" if "data_format" in told else "")
        layer = str(id(operation)) if isinstance(operation, keras.Layer) else ""
        first = (values[0].order, len(values[0].shape or ()))
        self._orders.setdefault(id(operation), set()).add(first)
        found, shape = self._trace.call(layer, kind, config, values), output.shape[1:]
        return (found if kind else _unknown(values, shape))._replace(shape=shape)


def _given(tensor: Any) -> Value:
    """Return what an input is: without an axis for channels, or with a single one on it."""
    shape = tensor.shape[1:]
    if len(shape) < 3:
        return Value(SAME, shape)
    return Value(LAST if shape[-1] == 1 else FIRST if shape[0] == 1 else PURE, shape)


def _unknown(values: Sequence[Value], shape: tuple[Any, ...]) -> Value:
    """Return what is given by a layer of which nothing is known but the shapes."""
    if any(value.order in (FLAT, OPEN) for value in values):
        return Value()
    if len(shape) > 1:
        return Value(PURE)
    # As many numbers as are in a whole image may be that image; fewer are its channels.
    images = [[n or 1 for n in value.shape or ()] for value in values if not value.is_vector]
    return Value() if any(prod(n) == shape[0] != max(n) for n in images) else Value(SAME)


def _may_give(layer: keras.Layer, features: int) -> bool:
    """Return whether a flattening outside of any graph may give a layer its features."""
    shape = (layer.get_build_config() or {}).get("input_shape")
    if not shape or any(n is None for n in shape[1:]):
        return True
    return bool(prod(shape[1:]) == features) and sum(n != 1 for n in shape[1:]) > 1
