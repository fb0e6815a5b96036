"""Computing a part of a graph in another dtype than that of its layers."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from doconv_tf.batchnorm import as_array, passes_on
from doconv_tf.graph import Seen
from doconv_tf.private import graph_of, maker_of

_Norm = keras.layers.BatchNormalization


def computed(end: Any, begin: Any, value: Any, seen: Seen, dtype: str) -> Any:
    """Return the array that a graph's tensor is, where another one before it has this value.

    The layers of the calls between are copied; they are of Keras' own types, or batch norms.
    """
    known = {id(begin): ops.convert_to_tensor(value, dtype)}
    return as_array(_Run(seen, dtype).value(end, known))


def applied(layers: list[Any], value: Any, dtype: str) -> Any:
    """Return the array that layers of this dtype make of one, one after the other."""
    result = ops.convert_to_tensor(value, dtype)
    for layer in layers:
        result = layer(result)
    return as_array(result)


class _Run:
    def __init__(self, seen: Seen, dtype: str) -> None:
        self._seen, self._dtype = seen, dtype

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
        copy = _copied(called, shapes if len(shapes) > 1 else shapes[0], self._dtype)
        options = {k: v for k, v in options.items() if k not in ("training", "mask")}
        return copy(*args, **options)


def _copied(layer: Any, shape: Any, dtype: str) -> Any:
    """Return a built copy of a layer."""
    config = layer.get_config()
    cls = type(layer)
    if isinstance(layer, _Norm):  # of a subclass, maybe, whose constructor is another
        cls = _Norm
        config = {name: getattr(layer, name) for name in ("axis", "epsilon", "center", "scale")}
    for name in config:
        if name.endswith("_initializer"):  # which would draw random numbers
            config[name] = "zeros"
    copy = cls.from_config({**config, "dtype": dtype, "name": layer.name})
    copy.build(shape)
    for new, old in zip(copy.weights, layer.weights, strict=True):
        new.assign(as_array(old))
    return copy
