"""Copying a Keras model of any kind.

`clone_model` and saving go through configurations, which a subclassed model may lack, and which
leave out what was set afterwards. Here the objects are copied: layers, variables, and the nodes and
symbolic tensors of a functional model's graph. Each is copied once, so that what was shared stays
shared.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import types
from collections import OrderedDict
from typing import Any

import keras

from doconv_tf.ordinary import first_occurrences
from doconv_tf.private import (
    BOUND,
    NODES,
    OF_A_CALL,
    compiled_parts,
    has_maker,
    is_strategy,
    is_tracked,
    list_parameters,
    maker_of,
    own_variables,
    recount,
    set_keys,
    set_maker,
    strategy_scope,
)
from doconv_tf.surgery import uncompile_all

# What is not copied: what cannot change. Nor are functions, unless they hold what is copied.
_ATOMIC = (
    bool, int, float, complex, str, bytes, type, enum.Enum, inspect.Signature, frozenset,
    types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
_CONTAINERS = (list, dict, set, OrderedDict)
# How objects are copied by default, and Keras' way, which is to save and load them.
_NOTHING_SPECIAL = {
    None, object.__reduce__, object.__reduce_ex__, getattr(object, "__getstate__", None),
    keras.Layer.__reduce__,
}  # fmt: skip


def copied(model: keras.Layer) -> keras.Layer:
    """Return a copy of the model, not compiled, that shares no variable with it.

    Raises TypeError where the model holds what cannot be copied.
    """
    with strategy_scope(model):
        new = _Copier().copy(model)
    ids = {id(variable) for variable in new.weights}
    shared = [variable.path for variable in model.weights if id(variable) in ids]
    if shared:
        raise _not_copied(model, f"the copy would share the variable {shared[0]!r}")
    return new


class _Copier:
    """Copies objects that hold each other, each once."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}  # the copies, by the original's id
        self._alive: list[Any] = []  # an original that is gone might leave its id to another
        self._todo: list[tuple[Any, Any]] = []
        self._done: list[tuple[Any, Any]] = []
        self._own: set[int] = set()  # the ids of the model's layers and variables

    def copy(self, model: keras.Layer) -> keras.Layer:
        """Return the copy of the model, and of all that it holds."""
        for _, layer in first_occurrences(model):
            for part in compiled_parts(layer) if isinstance(layer, keras.Model) else ():
                self._memo[id(part)] = part  # the copy is not compiled, see the end
            self._own |= {id(layer), *map(id, own_variables(layer))}
        copied_model = self._copy(model)
        while self._todo:  # not by recursion: a graph is deeper than Python's stack
            old, new = self._todo.pop()
            self._fill(old, new)
            self._done.append((old, new))
        self._connect()
        for _, new in reversed(self._done):
            if isinstance(new, keras.Layer) and new.built:
                list_parameters(new)
        uncompile_all(copied_model)
        return copied_model

    def _copy(self, value: Any) -> Any:
        """Return the copy of a value. That of an object with attributes is filled later."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if value is None or isinstance(value, _ATOMIC) or is_strategy(value):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        self._alive.append(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._copy(value.__self__))
        if isinstance(value, keras.Optimizer):  # its state belongs to the variables of then
            new = self._memo[id(value)] = type(value).from_config(value.get_config())
            return new
        if isinstance(value, tuple):
            items = [self._copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) in _CONTAINERS or is_tracked(value):
            return self._container(type(value)(), value)
        if _is_plain(value):
            new = _empty(value)
            self._todo.append((value, new))
        else:
            if isinstance(value, (list, dict, set)):  # of another class: their items come first
                for item in (*value, *value.values()) if isinstance(value, dict) else value:
                    self._copy(item)
            new = copy.deepcopy(value, self._memo)
        self._memo[id(value)] = new
        return new

    def _function(self, function: Any) -> Any:
        """Return a function that holds the copies where this one holds layers or variables."""
        closure = {n: c.cell_contents for n, c in enumerate(function.__closure__ or ()) if _full(c)}
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if self._own.isdisjoint(map(id, (*closure.values(), *defaults))):
            return function
        if id(function) in self._memo:
            return self._memo[id(function)]

        def own(value: Any) -> Any:
            return self._copy(value) if id(value) in self._own else value

        cells = tuple(
            types.CellType(own(closure[n])) if id(closure.get(n)) in self._own else cell
            for n, cell in enumerate(function.__closure__ or ())
        )
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells
        )
        for name in functools.WRAPPER_ASSIGNMENTS:
            setattr(new, name, getattr(function, name))
        vars(new).update(vars(function))
        new.__defaults__ = function.__defaults__ and tuple(map(own, function.__defaults__))
        keywords = function.__kwdefaults__ or {}
        new.__kwdefaults__ = {name: own(value) for name, value in keywords.items()} or None
        self._alive.append(function)
        self._memo[id(function)] = new
        return new

    def _container(self, new: Any, old: Any) -> Any:
        self._memo[id(old)] = new
        if isinstance(old, dict):
            for key, item in old.items():
                new[self._copy(key)] = self._copy(item)
        else:
            put = new.add if isinstance(old, set) else new.append
            for item in old:
                put(self._copy(item))
        if is_tracked(old):
            new.tracker = self._copy(old.tracker)
        return new

    def _fill(self, old: Any, new: Any) -> None:
        layer = isinstance(old, keras.Layer)
        for name, value in _slots(old).items():
            object.__setattr__(new, name, self._copy(value))
        for name, value in getattr(old, "__dict__", {}).items():
            if isinstance(old, keras.Operation) and name in NODES:
                continue  # these lead to other models, too
            if layer and name in BOUND and name in vars(new):
                continue
            if layer and name in OF_A_CALL:
                vars(new)[name] = OF_A_CALL[name]()
                continue
            try:
                vars(new)[name] = self._copy(value)
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                raise _not_copied(old, f"its attribute {name!r}: {error}") from error
        if has_maker(old):
            self._copy(maker_of(old))

    def _connect(self) -> None:
        """Give operations their copied nodes, tensors their origins, functions their nodes' keys.

        And each tracker the ids of what it tracks.
        """
        for old, new in self._done:
            recount(new)
            if isinstance(old, keras.Operation):
                for name in NODES:
                    nodes = [self._memo.get(id(node)) for node in getattr(old, name)]
                    vars(new)[name] = [node for node in nodes if node is not None]
        for old, new in self._done:  # by the place among those nodes
            if has_maker(old):
                set_maker(new, old, self._memo[id(maker_of(old))])
            if isinstance(new, keras.Function):
                set_keys(new)


def _full(cell: Any) -> bool:
    """Return whether a variable of a closure has a value, as one that is assigned later has not."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_plain(value: Any) -> bool:
    """Return whether the value is nothing but its attributes, as Keras' own objects are."""
    kind = type(value)
    special = [
        getattr(kind, name, None)
        for name in ("__reduce__", "__reduce_ex__", "__deepcopy__", "__getstate__", "__setstate__")
    ]
    has_attributes = hasattr(value, "__dict__") or bool(_slots(value))
    return (
        has_attributes
        and not isinstance(value, (list, dict, set))
        and (
            isinstance(value, (keras.Variable, keras.Operation))
            or not set(special).difference(_NOTHING_SPECIAL)
        )
    )


def _slots(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that its class keeps outside of its dictionary."""
    found = {}
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _empty(value: Any) -> Any:
    bases = (base for base in (keras.Layer, keras.Operation) if isinstance(value, base))
    return next(bases, object).__new__(type(value))


def _not_copied(holder: Any, problem: str) -> TypeError:
    return TypeError(
        f"{type(holder).__name__} {getattr(holder, 'name', '')!r} cannot be copied: {problem}. "
        "With inplace=True the model itself is changed, and nothing is copied."
    )
