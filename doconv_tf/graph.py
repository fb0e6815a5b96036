"""How the layers of functional and sequential Keras models are connected, nested ones too.

Inside a subclassed model or layer nothing is known: what its `call` does cannot be seen, nor how it
calls the models inside it. A call is one of Keras' nodes.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import keras

from doconv_core.maths.geometry import Extra
from doconv_core.models.view import Flow
from doconv_tf.ordinary import first_occurrences
from doconv_tf.private import (
    OF_KERAS,
    children,
    follows_graph,
    graph_of,
    is_operation,
    maker_of,
    nodes_of,
    own_variables,
    position_of,
)

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
_FRAMEWORKS = ("keras", "tensorflow", "jax", "torch", "numpy", "doconv_tf")

UNKNOWN = "what it follows is known only where functional and sequential models alone hold it"


@dataclass
class Seen(Flow):
    """Who follows whom, as the graphs tell.

    times: how often a layer is called, by its id; once more where several layers hold it, since
    what else they do with it is not known. training: the ids of layers that are asked to train,
    whatever the model does. read: those of the layers that a function holds, such as a Lambda's,
    which may read anything of them.
    """

    times: Counter[int] = field(default_factory=Counter)
    training: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)

    def add(self, function: keras.Function) -> None:
        """Add the calls of a graph."""
        nodes = nodes_of(function)
        made = {id(tensor): node.operation for node in nodes for tensor in node.outputs}
        takers: dict[int, list[Any]] = {id(tensor): [None] for tensor in function.outputs}
        for node in nodes:
            for tensor in node.input_tensors:
                takers.setdefault(id(tensor), []).append(node.operation)
        for node in nodes:
            key, others = id(node.operation), node.input_tensors[1:]
            before = [made.get(id(tensor)) for tensor in node.input_tensors]
            self.before.setdefault(key, []).extend([*before, None] if others else before)
            after = [taker for tensor in node.outputs for taker in takers.get(id(tensor), [])]
            self.after.setdefault(key, []).extend(after)
            self.times[key] += 1
            if node.arguments.kwargs.get("training") not in (None, False):  # 1 is meant so, too
                self.training.add(key)


class Graph:
    """The calls in all graphs of a model: who gave a layer its input, and who takes its output.

    Where a graph is nested in another, what is asked for is looked up through its border.
    """

    def __init__(self, model: keras.Layer) -> None:
        self._calls: dict[int, list[Any]] = {}
        self._consumers: dict[int, list[Any]] = {}
        self._fed_by: dict[int, list[Any]] = {}
        self.layers = [layer for _, layer in first_occurrences(model)]
        # Layers that say themselves what comes before their parts, by the parts' ids.
        self._parts_of: dict[int, Any] = {
            id(part): layer
            for layer in self.layers
            if hasattr(layer, "zeros_before")
            for part in children(layer)
        }
        for function in filter(None, map(graph_of, self.layers)):
            for node in nodes_of(function):
                self._add(node)

    def _add(self, node: Any) -> None:
        self._calls.setdefault(id(node.operation), []).append(node)
        for tensor in node.input_tensors:
            self._consumers.setdefault(id(tensor), []).append(node)
        inner = graph_of(node.operation)
        if inner is not None and len(inner.inputs) == len(node.input_tensors):
            for inside, outside in zip(inner.inputs, node.input_tensors, strict=True):
                self._fed_by.setdefault(id(maker_of(inside)), []).append(outside)

    def calls(self, layer: keras.Layer) -> list[Any]:
        """Return the calls of a layer in the model's graphs; none of one that is in no graph."""
        return self._calls.get(id(layer), [])

    def makers(self, tensor: Any) -> list[Any]:
        """Return the calls that may have made a tensor; more than one in a graph called twice."""
        node = maker_of(tensor)
        inner = graph_of(node.operation)
        if inner is not None:
            return self.makers(inner.outputs[position_of(tensor)])
        outside = self._fed_by.get(id(node), [])
        return [maker for each in outside for maker in self.makers(each)] or [node]

    def consumers(self, tensor: Any) -> list[Any]:
        """Return the calls that take a tensor, in its own graph."""
        return self._consumers.get(id(tensor), [])

    def zeros_before(self, layer: keras.Layer) -> set[Extra]:
        """Return the zero padding that comes directly before a layer, for each of its calls."""
        whole = self._parts_of.get(id(layer))
        if whole is not None:
            known: set[Extra] = whole.zeros_before(layer.name, self.zeros_before(whole))
            return known
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
            for more in self._zeros(maker.input_tensors[0]):
                both = zip(own, more or [(0, 0)] * len(own), strict=True)
                found.add(tuple((b + before, a + after) for (b, a), (before, after) in both))
        return found

    def flow(self) -> Seen:
        """Return who follows whom, where a graph alone says how its layers are called."""
        seen, opaque = Seen(), self._opaque()
        for layer in self.layers:
            function = graph_of(layer)
            if function is not None and follows_graph(layer) and id(layer) not in opaque:
                seen.add(function)
        held = Counter(id(child) for layer in self.layers for child in children(layer))
        for key, count in held.items():
            if count > 1 and seen.times[key]:
                seen.times[key] += 1
        for layer in self.layers:
            if id(layer) in seen.training:
                seen.training |= {id(inner) for _, inner in first_occurrences(layer)}
        seen.read = {id(each) for layer in self.layers for each in read_by(layer)}
        seen.unseen = {id(layer): UNKNOWN for layer in self.layers if not seen.times[id(layer)]}
        return seen

    def _opaque(self) -> set[int]:
        """Return the ids of the layers that are called, at any depth, by a `call` in no structure.

        It may train a model inside it, whatever itself is asked for, or take a single layer out of
        it. `TimeDistributed` calls what it holds plainly, and passes `training` on.
        """
        opaque: set[int] = set()
        for layer in self.layers:
            seen = graph_of(layer) is not None and follows_graph(layer)
            plain = type(layer) is _layers.TimeDistributed and "call" not in vars(layer)
            if not (seen or plain):
                opaque |= {id(inner) for _, inner in first_occurrences(layer)[1:]}
        return opaque


def variables_read(model: keras.Layer) -> set[int]:
    """Return the ids of the variables that operations of graphs and functions of layers hold.

    They go on with the very variable, whatever becomes of the layer that it is of.
    """
    found: list[Any] = []
    for _, layer in first_occurrences(model):
        own, function = {id(variable) for variable in own_variables(layer)}, graph_of(layer)
        found += [each for each in read_by(layer) if id(each) not in own]
        for node in nodes_of(function) if function is not None else ():
            found += keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    return {id(each) for each in found if isinstance(each, keras.Variable)}


def read_by(layer: keras.Layer) -> list[Any]:
    """Return the layers that the functions which a layer has for itself hold, and those inside.

    And the variables that these functions hold.
    """
    found: list[Any] = []
    seen: set[int] = set()
    todo = [value for name, value in vars(layer).items() if name not in OF_KERAS]
    todo = [value for value in todo if not isinstance(value, keras.Layer)]
    todo.append(type(layer).call)  # which may read a layer or variable by a global name
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, keras.Layer):
            found += [each for _, each in first_occurrences(value)]
        elif isinstance(value, keras.Variable):
            found.append(value)
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            todo += [value.__func__, *([] if value.__self__ is layer else [value.__self__])]
        elif _is_own(value):
            names = inspect.getclosurevars(value)
            todo += [*names.nonlocals.values(), *names.globals.values()]
            todo += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return found


def _is_own(value: Any) -> bool:
    """Return whether this is a function, and none of a framework's."""
    module = str(getattr(value, "__module__", ""))
    return isinstance(value, types.FunctionType) and module.partition(".")[0] not in _FRAMEWORKS


def _keeps_zeros(operation: Any) -> bool:
    """Return whether this acts on each position alone and keeps a zero."""
    if type(operation) is _layers.Activation:
        return operation.activation in _ZERO_AT_ZERO
    if type(operation) is _layers.ReLU:
        return not operation.threshold
    return type(operation) in _KEEP_ZEROS or is_operation(operation, _OPERATIONS)


def ordered_children(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that this layer holds; those of a functional model as data meets them.

    That is depth first: from the outputs, through the inputs of each layer in their order. (Keras'
    own order goes by the distance from the outputs, which mixes parallel branches.)
    """
    held = children(layer)
    if not isinstance(layer, keras.Function):
        return held
    place = {id(node.operation): n for n, node in reversed(list(enumerate(calls_in_order(layer))))}
    return sorted(held, key=lambda child: place.get(id(child), len(place)))


def calls_in_order(function: keras.Function) -> list[Any]:
    """Return a graph's calls, depth first from its outputs, each after those that it depends on."""
    inside, done, order = {id(node) for node in nodes_of(function)}, set(), []
    stack = [(maker_of(tensor), False) for tensor in reversed(function.outputs)]
    while stack:
        node, expanded = stack.pop()
        if id(node) in done or id(node) not in inside:
            continue
        if expanded:
            done.add(id(node))
            order.append(node)
            continue
        stack.append((node, True))
        stack += [(maker_of(tensor), False) for tensor in reversed(node.input_tensors)]
    return order
