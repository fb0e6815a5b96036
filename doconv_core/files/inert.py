"""What may lie beside a model in a pickle, as it does nothing when it is made again.

PyTorch reads tensors and plain containers. Trainers also write their arguments, paths, numbers of
NumPy's and dates. What is made of these by a pickle from a stranger is made here, of checked parts:
NumPy's own functions would take types with pointers in them, and sizes of any number of bytes.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from doconv_core.files.entries import Allowed, AllowError
from doconv_core.files.pytorch import attributes, walk

PLAIN = (
    argparse.Namespace, types.SimpleNamespace, pathlib.PurePosixPath, pathlib.PureWindowsPath,
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone,
    slice, list, dict, tuple, int, float, bool,
)  # fmt: skip
KINDS = "biufc"  # of NumPy's types whose values are numbers
TEXTS = "SU"
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2


OWN = (dict, list, collections.deque)  # whose subclasses PyTorch's reader makes, and does not fill
FILLED = (dict, list, OrderedDict, collections.Counter)


class NotReadError(ValueError):
    """What a pickle has is not made of it, as it may do or hold anything."""


class Inert:
    """What a pickle may name beside tensors, for the reading of one file.

    allow: more classes, or their names as in "package.module.Class", which whoever reads the file
    trusts. Raises AllowError for what is none that can be imported.
    """

    def __init__(self, allow: Allowed = ()) -> None:
        self._made: dict[int, tuple[Any, Callable[[], Any]]] = {}
        given = [_allowed(each) for each in allow]
        self._given = [(self._standing(kind), name) for kind, name in given]

    def names(self) -> list[tuple[Callable[..., Any], str]]:
        """Return what makes an object, by each name in a pickle that is for it."""
        found: list[tuple[Callable[..., Any], str]] = [(c, _name(c)) for c in PLAIN]
        for name in ("PosixPath", "WindowsPath"):
            path = _path_type(name)
            found += [(path, f"pathlib.{name}"), (path, f"pathlib._local.{name}")]
        found += [(c, f"pathlib._local.{c.__name__}") for c in PLAIN if c.__module__ == "pathlib"]
        found += [(self._defaultdict, "collections.defaultdict"), (_Dtype, "numpy.dtype")]
        found += [(_Array, "numpy.ndarray"), (_no_bytes, "builtins.bytes")]
        for module in MULTIARRAY:
            found += [(_scalar, f"{module}.scalar"), (_array, f"{module}._reconstruct")]
        return found + self._given

    def settled(self, content: Any) -> Any:
        """Return what was read, with the objects in place of what stood for them meanwhile."""
        stand = any(hasattr(kind, "stands_for") for kind, _ in self._given)
        if not (stand or self._made or any(isinstance(x, (_Array, _Dtype)) for x in walk(content))):
            return content
        return _Settling(self._made).settled(content)

    def _defaultdict(self, factory: Any = None) -> Any:
        """Return what stands for a defaultdict; PyTorch's reader puts nothing into another dict."""
        factory = getattr(factory, "stands_for", factory)
        return self._stand(OrderedDict(), partial(collections.defaultdict, factory))

    def _stand(self, meanwhile: Any, make: Callable[[], Any]) -> Any:
        """Return a dict or list that stands for the one that is made, and filled, later."""
        self._made[id(meanwhile)] = meanwhile, make
        return meanwhile

    def _standing(self, kind: type[Any]) -> type[Any]:
        """Return what stands for an allowed class: itself, but for dicts and lists of its own."""
        if not issubclass(kind, OWN) or kind in FILLED:
            return kind
        stand = self._stand
        meanwhile: Callable[[], Any] = OrderedDict if issubclass(kind, dict) else list

        make: Callable[..., Any] = kind

        class Called(type):
            def __call__(cls, *given: Any) -> Any:
                return stand(meanwhile(), partial(make, *given))

        class Standing(metaclass=Called):
            stands_for = kind

            def __new__(cls, *given: Any) -> Any:
                return stand(meanwhile(), partial(kind.__new__, kind, *given))

        return Standing


class _Dtype:
    """What stands for a type of NumPy's: one of numbers or of texts."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or code[:1] not in KINDS + TEXTS or not code[1:].isdecimal():
            raise NotReadError(f"NumPy's type {code!r} is neither one of numbers nor of texts")
        if len(code) > 9:
            raise NotReadError(f"NumPy's type {code!r} is too long")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, sub, names, fields, *_ = state
        if order not in ("<", ">", "=", "|") or (sub, names, fields) != (None, None, None):
            raise NotReadError("a type of NumPy's has parts, which is not read")
        self.dtype = self.dtype.newbyteorder(order) if order in "<>" else self.dtype


class _Array:
    """What stands for an array of NumPy's."""

    array: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, data = state
        self.array = _filled(kind, shape, data, "F" if by_columns else "C")


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    """Return what stands for an array, whose shape and values are told later."""
    if kind is not _Array or shape != (0,):
        raise NotReadError("an array of NumPy's is made otherwise than NumPy writes it")
    return _Array()


def _filled(kind: Any, shape: Any, data: Any, order: Any = "C") -> Any:
    """Return an array of these bytes, which must be as many as it has."""
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
        raise NotReadError("an array of NumPy's holds objects, which are not read")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise NotReadError(f"an array of NumPy's has the shape {shape}")
    if prod(shape) * kind.dtype.itemsize != len(data):
        raise NotReadError(f"an array of NumPy's, {kind.dtype} {shape}, has {len(data)} bytes")
    if not data:
        return np.empty(shape, kind.dtype)
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order).copy(order)


def _no_bytes() -> bytes:
    """Return the bytes of an empty array, which are pickled so."""
    return b""


def _scalar(kind: Any, data: Any) -> Any:
    """Return a number or text of NumPy's."""
    return _filled(kind, (), data)[()]


class _Settling:
    """What puts objects in the place of what stood for them. made: what makes them, by the id."""

    def __init__(self, made: Mapping[int, tuple[Any, Callable[[], Any]]]) -> None:
        self._made = made
        self._done: dict[int, Any] = {}
        self._keep: list[Any] = []  # so that no number is another object's later

    def settled(self, value: Any) -> Any:
        """Return `value`, in which each object that stood for another is that one."""
        if isinstance(value, _Array):
            return value.array
        if isinstance(value, _Dtype):
            return value.dtype
        if isinstance(value, type):
            return getattr(value, "stands_for", value)
        if id(value) in self._done:
            return self._done[id(value)]
        self._keep.append(value)
        stood = id(value) in self._made
        new = self._done[id(value)] = self._made[id(value)][1]() if stood else value
        if isinstance(value, tuple):
            inner = [self.settled(item) for item in value]
            if any(new is not old for new, old in zip(inner, value, strict=True)):
                self._done[id(value)] = tuple(inner)
        elif isinstance(value, list):
            items = [self.settled(item) for item in value]
            if stood:
                new.extend(items)
            else:
                value[:] = items
        elif isinstance(value, dict):
            self._settle_dict(value, new)
        state = {key: self.settled(item) for key, item in attributes(value).items()}
        if state and stood and hasattr(type(new), "__setstate__"):
            new.__setstate__(state)
        elif state:
            new.__dict__.update(state)
        return self._done[id(value)]

    def _settle_dict(self, value: dict[Any, Any], new: Any) -> None:
        """Put what is in a dict into the one for which it stood, which may be the same."""
        for key, item in list(dict.items(value)):
            if isinstance(key, (_Array, _Dtype)):
                raise NotReadError("an object of NumPy's is a key of a dict, which is not read")
            if new is value:
                dict.__setitem__(new, key, self.settled(item))
            else:
                new[key] = self.settled(item)


class _WindowsPath(pathlib.PureWindowsPath):
    """A path of Windows', which elsewhere can be had, kept and written, and not gone to."""

    def __reduce__(self) -> Any:
        """Return how Windows' own path is made."""
        return pathlib.WindowsPath, self.parts


class _PosixPath(pathlib.PurePosixPath):
    """A path of another system's on Windows, likewise."""

    def __reduce__(self) -> Any:
        """Return how the path is made there."""
        return pathlib.PosixPath, self.parts


def _path_type(name: str) -> type[Any]:
    """Return what a path of a system is here."""
    own = type(pathlib.Path())
    foreign: dict[str, type[Any]] = {"PosixPath": _PosixPath, "WindowsPath": _WindowsPath}
    return own if own.__name__ == name else foreign[name]


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _allowed(given: str | type[Any]) -> tuple[type[Any], str]:
    """Return a class, and the name by which pickles know it."""
    if isinstance(given, type):
        return given, _name(given)
    problem = ""
    parts = given.split(".") if isinstance(given, str) else []
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:
            problem = problem or f": {error}"
            continue
        if isinstance(found, type):
            return found, given
        problem = ", but something else"
        break
    raise AllowError(
        f"allow must name classes that can be imported, such as 'package.module.Class'; {given!r} "
        f"is none{problem}."
    )
