"""Parameters that a model's code reads other than by calling the block that they are of.

A forward that does `self.conv.weight.data()` goes on with that very parameter, whatever becomes of
the layer. Blocks are called with symbols, once, as far as their code does with them; what they read
of others is a symbol meanwhile, which the graph shows to be used, or not.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mxnet as mx
from mxnet.gluon import Block, HybridBlock, Parameter
from mxnet.util import is_np_array

from doconv_mx import private
from doconv_mx.graph import trace
from doconv_mx.tree import own_parameters, parameters, walk


class _Watch:
    """What is being watched: blocks that run, innermost last, and the symbols that were read."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.running: list[Block] = []
        self.read: dict[str, Parameter] = {}
        self.asked: set[str] = set()  # symbols of which the shape was asked, and the like

    def symbol(self, parameter: Parameter) -> Any:
        """Return what stands for the values of a parameter that a block reads of another."""
        name = f"doconv_read{len(self.read)}"
        self.read[name] = parameter
        made = mx.sym.var(name)
        if is_np_array():
            made = made.as_np_ndarray()
        made.__class__ = _NumPyRead if is_np_array() else _Read
        return made

    def is_own(self, parameter: Parameter) -> bool:
        """Return whether a parameter is one of the block that runs, or nothing runs."""
        return not self.running or any(p is parameter for p in own_parameters(self.running[-1]))


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


def _asked(answer: Callable[[Parameter], Any]) -> Any:
    """Return a property that says of an array what is no value of it."""

    def ask(symbol: Any) -> Any:
        watch = _watch.get()
        assert watch is not None  # as there are none of these symbols otherwise
        watch.asked.add(symbol.name)
        return answer(watch.read[symbol.name])

    return property(ask)


class _Asked:
    """What an array has, and a symbol lacks."""

    __slots__ = ()
    shape, dtype = _asked(private.shape_of), _asked(lambda p: p.dtype)
    context = ctx = device = _asked(lambda p: p.list_ctx()[0])
    ndim, stype = _asked(lambda p: len(private.shape_of(p))), _asked(lambda p: "default")


class _Read(_Asked, mx.sym.Symbol):
    __slots__ = ()


class _NumPyRead(_Asked, mx.sym.numpy._Symbol):
    __slots__ = ()


@contextmanager
def by(block: Block) -> Iterator[None]:
    """Take what is read in here as read by this block itself."""
    watch = _watch.get()
    running = [] if watch is None else watch.running
    running.append(block)
    try:
        yield
    finally:
        running.pop()


def read_elsewhere(model: Block) -> set[int]:
    """Return the ids of the parameters that a block is seen to read which are another's.

    What runs is a copy of the blocks, as a forward may change them, without hooks; the parameters
    are the very ones. Nothing is seen of a model that cannot be copied.
    """
    blocks, owned = [block for _, block in walk(model)], parameters(model)
    memo = {**private.apart(blocks, ()), **{id(p): p for p in owned}}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception:  # whatever the model holds raises
        return set()
    found: set[int] = set()
    met: set[int] = set()

    def visit(block: Block) -> None:
        if id(block) in met:
            return
        met.add(id(block))
        with _watching() as watch:
            graph = trace(block)
        used = watch.read.keys() - watch.asked if graph is None else graph.list_inputs()
        found.update(id(watch.read[name]) for name in used if name in watch.read)
        for child in private.children(block).values() if graph is None else ():
            visit(child)

    with private.without_hooks(block for _, block in walk(copied)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        visit(copied)
    return found


@contextmanager
def _watching() -> Iterator[_Watch]:
    """Let blocks tell when they run, and parameters who reads them; in this thread alone."""
    watch = _Watch()
    token = _watch.set(watch)
    kept = [
        (cls, name, vars(cls)[name], change)
        for change, places in _WATCHED.items()
        for cls, name in places
    ]
    for cls, name, method, change in kept:
        setattr(cls, name, change(method, watch))
    try:
        yield watch
    finally:
        for cls, name, method, _ in kept:
            setattr(cls, name, method)
        _watch.reset(token)


def _running(method: Any, watch: _Watch) -> Any:
    @functools.wraps(method)
    def run(block: Block, *args: Any, **options: Any) -> Any:
        if threading.get_ident() != watch.thread:
            return method(block, *args, **options)
        with by(block):
            return method(block, *args, **options)

    return run


def _reading(method: Any, watch: _Watch) -> Any:
    @functools.wraps(method)
    def read(parameter: Parameter, *args: Any, **options: Any) -> Any:
        if threading.get_ident() != watch.thread or watch.is_own(parameter):
            return method(parameter, *args, **options)
        return watch.symbol(parameter)

    return read


def _reading_all(method: Any, watch: _Watch) -> Any:
    read = _reading(method, watch)

    @functools.wraps(method)
    def read_all(parameter: Parameter) -> Any:
        found = read(parameter)
        return found if isinstance(found, list) else [found]

    return read_all


_WATCHED = {
    _running: ((Block, "__call__"), (HybridBlock, "forward")),
    _reading: ((Parameter, "data"), (Parameter, "var")),
    _reading_all: ((Parameter, "list_data"),),
}
