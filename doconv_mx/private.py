"""MXNet's private parts that this package cannot do without, each with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mxnet.gluon import Block, Parameter, ParameterDict
from mxnet.gluon.block import _BlockScope

# What the running load has loaded so far; None where none is running.
_loaded: ContextVar[list[Parameter] | None] = ContextVar("loaded", default=None)


@contextmanager
def no_name_scope() -> Iterator[None]:
    """Let a block's prefix be the one it is given, in whichever block's `name_scope()` this is.

    Gluon prepends the scope's prefix to every name, given or not, and has no way around that.
    """
    scope = getattr(_BlockScope._current, "value", None)
    _BlockScope._current.value = None
    try:
        yield
    finally:
        _BlockScope._current.value = scope


def loading() -> list[Parameter] | None:
    """Return what the running load has loaded, to be added to; None where none is running."""
    return _loaded.get()


def tell_of_loads() -> None:
    """Let parameters know, once a file has been loaded, what else was in it.

    Gluon loads a file one parameter after the other, by the `_load_init` of each, and tells it
    nothing of the rest. So its two functions that load are wrapped, once: a parameter adds itself
    to `loading()`, and has its `settle` called with all that did so, when the load ends.
    """
    for cls, name in ((Block, "load_parameters"), (ParameterDict, "load_dict")):
        if not hasattr(getattr(cls, name), "__wrapped__"):
            setattr(cls, name, _telling(getattr(cls, name)))


def _telling(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def told(*args: Any, **kwargs: Any) -> Any:
        if loading() is not None:  # of one function by the other
            return load(*args, **kwargs)
        loaded: list[Any] = []
        token = _loaded.set(loaded)
        try:
            return load(*args, **kwargs)
        finally:
            _loaded.reset(token)
            for parameter in loaded:
                parameter.settle(loaded)

    return told
