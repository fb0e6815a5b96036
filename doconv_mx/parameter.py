"""The parameters of layers that compose a kernel; and how one is made like another."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Parameter
from mxnet.ndarray import NDArray
from mxnet.util import is_np_array

from doconv_mx.private import has_values, loading, tell_of_loads, wait_as, waiting

tell_of_loads()

_warned: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers, of which one layer is enough
MISSED = (
    "a Trainer takes steps that was made before over_parameterize(inplace=True), and does not have "
    "{!r}, which stays as it is: make the trainer anew, of the model's collect_params()."
)


class Entry(Parameter):
    """A parameter of a layer that composes its kernel.

    Wherever `weight` is loaded without the others, these become what they start as: so the layer
    computes what was loaded, an ordinary layer's kernel, be it alone or deep in a network.
    """

    _former: Any = None  # a reference to the trainer that knew `weight` before there were others

    def __init__(self, name: str, layer: Any, **options: Any) -> None:
        super().__init__(name, **options)
        self._layer = layer

    def _load_init(self, data: NDArray, *args: Any, **options: Any) -> None:
        loaded, others = loading(), list(self._others().values())
        if others:
            if loaded is None:
                raise RuntimeError(
                    f"{self.name!r} is being loaded by itself, so that it is not known whether "
                    f"{others[0].name!r} is loaded as well; use the model's load_parameters(), or "
                    "load() or load_dict() of its collect_params()."
                )
            data = self._layer.as_weight(data)
        super()._load_init(data, *args, **options)
        if loaded is not None:
            loaded.append(self)

    def settle(self, loaded: Sequence[Parameter]) -> None:
        """Let the others start anew if this is `weight`, which was loaded without any of them."""
        layer, others = self._layer, self._others()
        if others and not any(p is other for p in loaded for other in others.values()):
            shapes = layer.shapes(layer.inferred_in_channels())
            for name, other in others.items():
                start = mx.nd.full(shapes[name], layer.kind.constants[name], dtype=self.dtype)
                Parameter._load_init(other, native(start), self.list_ctx(), True, "saved")

    def list_grad(self) -> Any:
        """Return the gradients, of which trainers ask at every step."""
        former = None if self._former is None else self._former()
        if former is not None and former is self._trainer:
            del self._former
            others = self._others().values()
            missed = [p for p in others if p.grad_req != "null" and p._trainer is None]
            if missed and former not in _warned:
                _warned.add(former)
                warnings.warn(MISSED.format(missed[0].name), UserWarning, stacklevel=4)
        return super().list_grad()

    def _others(self) -> dict[str, Parameter]:
        """Return the layer's entries beside `weight`, by name, if this is that; else none."""
        entries: dict[str, Parameter] = self._layer.entries()
        return entries if entries.pop("weight") is self else {}


def initializer(constant: float) -> Any:
    """Return what makes a parameter one number throughout, with Gluon's word for that of zero."""
    return mx.init.Constant(constant) if constant else "zeros"


def native(array: Any) -> Any:
    """Return an `mx.nd` array or symbol as the kind in use: `mx.np`'s after `mx.npx.set_np()`."""
    return array.as_np_ndarray() if is_np_array() else array


def fill(new: Parameter, old: Parameter, values: Callable[[NDArray], NDArray]) -> None:
    """Give a new parameter what `values` makes of the old one's, in each context.

    An old one that has yet to be initialized passes that on: how, where, and with which data.
    """
    if has_values(old):
        contexts = old.list_ctx()
        put(new, {c: values(old.data(c)) for c in contexts})
    elif waiting(old):
        *how, data = waiting(old)
        wait_as(new, (*how, None if data is None else values(data)))


def put(parameter: Parameter, arrays: dict[mx.Context, Any]) -> None:
    """Initialize a new parameter with an array for each context; no random number is drawn."""
    parameter.initialize(init=mx.init.Zero(), ctx=list(arrays))
    with autograd.pause():
        for context, array in arrays.items():
            parameter.data(context)[:] = array
