"""Computing a part of a graph of layers in float64, whatever they are."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from doconv_tf.batchnorm import as_array, passes_on
from doconv_tf.graph import Seen
from doconv_tf.private import float64, graph_of, maker_of

_Norm = keras.layers.BatchNormalization
DTYPE = "float64"


def computed(end: Any, begin: Any, value: Any, seen: Seen) -> Any:
    """Return the array that a graph's tensor is, where another one before it has this value.

    The layers of the calls between are copied; they are of Keras' own types, or batch norms.
    """
    with float64():
        return as_array(_Run(seen).value(end, {id(begin): ops.convert_to_tensor(value, DTYPE)}))


def applied(layers: list[Any], value: Any) -> Any:
    """Return the array that layers of float64 make of one, one after the other."""
    with float64():
        result = ops.convert_to_tensor(value, DTYPE)
        for layer in layers:
            result = layer(result, training=False)
        return as_array(result)


class _Run:
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def value(self, tensor: Any, values: dict[int, Any]) -> Any:
        """Return what a tensor is. values: of those that are known, by their ids."""
        if id(tensor) not in values:
            node = maker_of(tensor)
            for each in node.input_tensors:
                self.value(each, values)
            values[id(tensor)] = self._called(node, values)
        return values[id(tensor)]

    def _called(self, node: Any, values: dict[int, Any]) -> Any:
        called, inner = node.operation, graph_of(node.operation)
        given = [values[id(tensor)] for tensor in node.input_tensors]
        if inner is not None:
            inside = dict(zip(map(id, inner.inputs), given, strict=True))
            return self.value(inner.outputs[0], inside)
        if isinstance(called, keras.Layer) and passes_on(called, self._seen):
            return given[0]
        args, options = node.arguments.fill_in(values)
        if not isinstance(called, keras.Layer):
            return called(*args, **options)
        shapes = [tuple(each.shape) for each in given]
        copy = _copied(called, shapes if len(shapes) > 1 else shapes[0])
        options = {k: v for k, v in options.items() if k not in ("training", "mask")}
        return copy(*args, **options)


def _copied(layer: Any, shape: Any) -> Any:
    """Return a copy of a layer that computes in float64."""
    config = layer.get_config()
    cls = type(layer)
    if isinstance(layer, _Norm):  # of a subclass, maybe, whose constructor is another
        cls = _Norm
        config = {name: getattr(layer, name) for name in ("axis", "epsilon", "center", "scale")}
    for name in config:
        if name.endswith("_initializer"):  # which would draw random numbers
            config[name] = "zeros"
    copy = cls.from_config({**config, "dtype": DTYPE, "name": layer.name})
    copy.build(shape)
    for new, old in zip(copy.weights, layer.weights, strict=True):
        new.assign(as_array(old))
    return copy
