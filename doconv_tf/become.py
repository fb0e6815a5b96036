"""Making a layer of a Keras model another kind of layer, where it stands."""

from __future__ import annotations

import functools
import types
from typing import Any

import keras

from doconv_tf.view import children

# What a layer keeps when it becomes another: its place in functional models, and what it was told.
_KEPT = (
    "_inbound_nodes", "_outbound_nodes", "_called", "_supports_masking", "_remat_mode",
)  # fmt: skip


def become(layer: keras.Layer, new: keras.Layer, forgotten: frozenset[str]) -> None:
    """Make `layer` what `new` is: its class, variables and attributes. `new` is then used up.

    It stays the same object, so that wherever it is used or kept, that holds on. Attributes that
    `new` does not have, such as a user's own, stay, but those in `forgotten`.
    """
    _take_activation(layer, new)
    state = vars(new)
    for name, value in vars(layer).items():
        if name in _KEPT or (name not in state and name not in forgotten):
            state[name] = value
    for name, value in state.items():
        if isinstance(value, types.FunctionType):
            state[name] = _rebound(value, new, layer)
    state = dict(state)
    vars(layer).clear()
    layer.__class__ = type(new)
    vars(layer).update(state)


def _take_activation(layer: keras.Layer, new: keras.Layer) -> None:
    """Give `new` the very activation of `layer`, where it has a clone of that: it may be shared."""
    old, clone = getattr(layer, "activation", None), getattr(new, "activation", None)
    if not (isinstance(old, keras.Layer) and isinstance(clone, keras.Layer)) or old is clone:
        return
    for each in (new, *children(new)):  # a part of it has the activation, perhaps
        if getattr(each, "activation", None) is clone:
            each._tracker.unlock()
            each._tracker.untrack(clone)
            each.activation = old
            each._tracker.lock()


def _rebound(function: Any, old: Any, new: Any) -> Any:
    """Return a function that holds `new` where this one holds `old`, or a method of it."""
    if not function.__closure__:
        return function

    def cell(value: Any) -> Any:
        if isinstance(value, types.MethodType) and value.__self__ is old:
            value = types.MethodType(value.__func__, new)
        return types.CellType(new if value is old else value)

    cells = tuple(cell(each.cell_contents) for each in function.__closure__)
    rebound = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(rebound, function)


def keep_parts(layer: keras.Sequential, forgotten: frozenset[str]) -> None:
    """Make a layer that is a kind of `keras.Sequential` just that, of the same layers.

    It loses the attributes in `forgotten`, but those that every `Sequential` has.
    """
    if layer.activity_regularizer is not None:
        layer.layers[-1].activity_regularizer = layer.activity_regularizer
        layer.activity_regularizer = None
    layer.input_spec = None
    plain = keras.Sequential(name=layer.name)
    for name in vars(layer).keys() & forgotten - vars(plain).keys():
        delattr(layer, name)
    layer.__class__ = keras.Sequential
    for name, value in vars(plain).items():
        if isinstance(value, types.FunctionType):
            vars(layer)[name] = _rebound(value, plain, layer)
