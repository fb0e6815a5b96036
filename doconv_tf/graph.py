"""How the layers of functional and sequential Keras models are connected, nested ones too.

Inside a subclassed model or layer nothing is known: what its `call` does cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from doconv_core.maths.geometry import Extra, padded
from doconv_tf.view import children

_layers, _activations = keras.layers, keras.activations
_ZERO_PADS = (_layers.ZeroPadding1D, _layers.ZeroPadding2D, _layers.ZeroPadding3D)
# With these, zeros around go on to the next layer.
_KEEP_ZEROS = (
    _layers.ActivityRegularization, _layers.Dropout, _layers.ELU, _layers.GaussianDropout,
    _layers.Identity, _layers.LeakyReLU, _layers.PReLU, _layers.SpatialDropout1D,
    _layers.SpatialDropout2D, _layers.SpatialDropout3D,
)  # fmt: skip
_ZERO_AT_ZERO = (
    _activations.elu, _activations.gelu, _activations.leaky_relu, _activations.linear,
    _activations.relu, _activations.relu6, _activations.selu, _activations.silu,
    _activations.softsign, _activations.tanh,
)  # fmt: skip
_OPERATIONS = ("Elu", "Gelu", "Identity", "LeakyRelu", "Relu", "Relu6", "Selu", "Silu", "Tanh")


class Connections:
    """The calls in all graphs of a model: who gave a layer its input, and who takes its output.

    A call is one of Keras' nodes. Where a graph is nested in another, what is asked for is looked
    up through its border.
    """

    def __init__(self, model: keras.Layer) -> None:
        self._calls: dict[int, list[Any]] = {}
        self._consumers: dict[int, list[Any]] = {}
        self._fed_by: dict[int, list[Any]] = {}
        for function in _functions(model):
            for node in _nodes(function):
                self._add(node)

    def _add(self, node: Any) -> None:
        self._calls.setdefault(id(node.operation), []).append(node)
        for tensor in node.input_tensors:
            self._consumers.setdefault(id(tensor), []).append(node)
        inner = _function(node.operation)
        if inner is not None and len(inner.inputs) == len(node.input_tensors):
            for inside, outside in zip(inner.inputs, node.input_tensors, strict=True):
                self._fed_by.setdefault(id(_maker(inside)), []).append(outside)

    def calls(self, layer: keras.Layer) -> list[Any]:
        """Return the calls of a layer in the model's graphs; none of one that is in no graph."""
        return self._calls.get(id(layer), [])

    def makers(self, tensor: Any) -> list[Any]:
        """Return the calls that may have made a tensor; more than one in a graph called twice."""
        node = _maker(tensor)
        inner = _function(node.operation)
        if inner is not None:
            return self.makers(inner.outputs[tensor._keras_history.tensor_index])
        outside = self._fed_by.get(id(node), [])
        return [maker for each in outside for maker in self.makers(each)] or [node]

    def consumers(self, tensor: Any) -> list[Any]:
        """Return the calls that take a tensor, in its own graph."""
        return self._consumers.get(id(tensor), [])

    def zeros_before(self, layer: keras.Layer) -> set[Extra]:
        """Return the zero padding that comes directly before a layer, for each of its calls."""
        found: set[Extra] = set()
        for call in self.calls(layer):
            found |= self._zeros(call.input_tensors[0])
        return found

    def _zeros(self, tensor: Any) -> set[Extra]:
        found: set[Extra] = set()
        for maker in self.makers(tensor):
            pad = maker.operation
            if maker.input_tensors and _keeps_zeros(pad):
                found |= self._zeros(maker.input_tensors[0])
                continue
            if type(pad) not in _ZERO_PADS:
                found.add(())
                continue
            own = (pad.padding,) if isinstance(pad, _ZERO_PADS[0]) else pad.padding
            own = tuple((before, after) for before, after in own)
            found |= {padded(own, [more]) for more in self._zeros(maker.input_tensors[0])}
        return found


def _keeps_zeros(operation: Any) -> bool:
    """Return whether this acts on each position alone and keeps a zero."""
    if type(operation) is _layers.Activation:
        return operation.activation in _ZERO_AT_ZERO
    if type(operation) is _layers.ReLU:
        return not operation.threshold
    own = type(operation).__module__.startswith("keras.src.ops")
    named = own and type(operation).__name__ in _OPERATIONS
    return named or type(operation) in _KEEP_ZEROS


def ordered_children(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that this layer holds; those of a functional model as data meets them.

    That is depth first: from the outputs, through the inputs of each layer in their order. (Keras'
    own order goes by the distance from the outputs, which mixes parallel branches.)
    """
    held = children(layer)
    if not isinstance(layer, keras.Function):
        return held
    place = {id(node.operation): n for n, node in reversed(list(enumerate(_in_order(layer))))}
    return sorted(held, key=lambda child: place.get(id(child), len(place)))


def _functions(layer: keras.Layer) -> Iterator[keras.Function]:
    for each in (layer, *layer._flatten_layers(include_self=False)):
        function = _function(each)
        if function is not None:
            yield function


def _function(operation: Any) -> keras.Function | None:
    """Return the graph of a functional or sequential model; None for anything else."""
    if isinstance(operation, keras.Function):
        return operation
    if isinstance(operation, keras.Sequential):
        return operation._functional
    return None


def _nodes(function: keras.Function) -> list[Any]:
    return [node for nodes in function._nodes_by_depth.values() for node in nodes]


def _maker(tensor: Any) -> Any:
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def _in_order(function: keras.Function) -> list[Any]:
    """Return a graph's calls, depth first from its outputs, each after those that it depends on."""
    inside, done, order = {id(node) for node in _nodes(function)}, set(), []
    stack = [(_maker(tensor), False) for tensor in reversed(function.outputs)]
    while stack:
        node, expanded = stack.pop()
        if id(node) in done or id(node) not in inside:
            continue
        if expanded:
            done.add(id(node))
            order.append(node)
            continue
        stack.append((node, True))
        stack += [(_maker(tensor), False) for tensor in reversed(node.input_tensors)]
    return order
