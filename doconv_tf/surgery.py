"""Making a layer of a Keras model another kind of layer, where it stands, and what that asks."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import keras

from doconv_tf.ordinary import first_occurrences
from doconv_tf.private import (
    PLACE,
    UNCOMPILED,
    calls_of,
    children,
    exchange_activation,
    list_parameters,
    uncompile,
)


def become(layer: keras.Layer, new: keras.Layer, forgotten: frozenset[str] = frozenset()) -> None:
    """Make `layer` what `new` is: its class, variables and attributes. `new` is then used up.

    It stays the same object, so that wherever it is used or kept, that holds on. Attributes that
    `new` does not have, such as a user's own, stay, but those of the layers' own making, and those
    in `forgotten`.
    """
    forgotten |= _own_names(layer) | _own_names(new)
    _take_activation(layer, new)
    state = vars(new)
    for name, value in vars(layer).items():
        if name in PLACE or (name not in state and name not in forgotten):
            state[name] = value
    for name, value in state.items():
        if isinstance(value, types.FunctionType):
            state[name] = _rebound(value, new, layer)
    state = dict(state)
    vars(layer).clear()
    layer.__class__ = type(new)
    vars(layer).update(state)
    for node in calls_of(layer):  # which may have passed what the new layer does not take, a mask
        given, known = node.arguments, inspect.signature(layer.call).parameters
        kept = {name: value for name, value in given.kwargs.items() if name in known}
        node.arguments = type(given)(*given.args[: len(known)], **kept)


def _own_names(layer: Any) -> frozenset[str]:
    """Return the names of the attributes that a layer of a kind has for itself."""
    return layer.own_names() if hasattr(layer, "own_names") else frozenset()


def _take_activation(layer: keras.Layer, new: keras.Layer) -> None:
    """Give `new` the very activation of `layer`, where it has a clone of that: it may be shared."""
    old, clone = getattr(layer, "activation", None), getattr(new, "activation", None)
    if not (isinstance(old, keras.Layer) and isinstance(clone, keras.Layer)) or old is clone:
        return
    for each in (new, *children(new)):  # a part of it has the activation, perhaps
        if getattr(each, "activation", None) is clone:
            exchange_activation(each, clone, old)


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


def keep_parts(layer: Any) -> None:
    """Make a layer that is a kind of `keras.Sequential` just that, of the same layers.

    It loses the attributes of its type's making, but those that every `Sequential` has.
    """
    if layer.activity_regularizer is not None:
        layer.layers[-1].activity_regularizer = layer.activity_regularizer
        layer.activity_regularizer = None
    layer.input_spec = None
    plain = keras.Sequential(name=layer.name)
    for name in vars(layer).keys() & _own_names(layer) - vars(plain).keys():
        delattr(layer, name)
    layer.__class__ = keras.Sequential
    for name, value in vars(plain).items():
        if isinstance(value, types.FunctionType):
            vars(layer)[name] = _rebound(value, plain, layer)


def check_functions(model: keras.Layer, *, inplace: bool) -> None:
    """Raise TypeError for a function that was compiled of the model: it goes on with the former.

    One that is the class's own, as by a decorator, is compiled for each model anew; so that it is
    in the way only where the model itself is changed.
    """
    for _, layer in first_occurrences(model):
        for name in {*dir(type(layer)), *vars(layer)} - UNCOMPILED.keys():
            own = name in vars(layer)
            member = vars(layer)[name] if own else getattr(type(layer), name, None)
            if hasattr(member, "get_concrete_function") and (own or inplace):
                advice = (
                    "Delete it, and compile it anew afterwards."
                    if own
                    else "Leave inplace out, and go on with the model that is returned."
                )
                raise TypeError(
                    f"{type(layer).__name__}.{name} is a compiled function, which would go on with "
                    f"the former layers. {advice}"
                )


def uncompile_all(model: keras.Layer) -> None:
    """Make the model, and those inside it, such that were never compiled."""
    for _, layer in first_occurrences(model):
        if isinstance(layer, keras.Model):
            uncompile(layer)


def finish(model: keras.Layer) -> None:
    """Make a model in which layers were replaced one that was never compiled."""
    uncompile_all(model)
    for _, layer in reversed(first_occurrences(model)):
        if layer.built:
            list_parameters(layer)
