"""W as a Gluon parameter, which knows what to do with the kernel of an ordinary layer's file.

And how one parameter is made like another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import HybridBlock, Parameter
from mxnet.ndarray import NDArray

from doconv_mx.compose import as_w, native
from doconv_mx.ordinary import is_channels_last


class Weight(Parameter):
    """The parameter W of a DO-Conv layer; wherever W is loaded without D, D becomes zero.

    So the layer computes what was loaded, be it alone or deep in a network. MXNet loads one
    parameter after the other, in the order of the file, by the `_load_init` of each.
    """

    def __init__(self, name: str, layer: HybridBlock, **options: Any) -> None:
        super().__init__(name, **options)
        self._layer = layer

    def _load_init(self, data: NDArray, *args: Any, **options: Any) -> None:
        layer, depthwise = self._layer, self._layer.depthwise_weight
        if depthwise is None:
            super()._load_init(data, *args, **options)
            return
        alone = not _loads(sys._getframe(1), depthwise, self)
        last, in_channels = is_channels_last(layer), layer._inferred_in_channels()
        super()._load_init(as_w(data, layer._outline, last, in_channels), *args, **options)
        if alone:
            zeros = native(mx.nd.zeros(layer.spec.depthwise_shape, dtype=self.dtype))
            depthwise._load_init(zeros, self.list_ctx(), True, "saved")


def _loads(call: FrameType, parameter: Parameter, weight: Parameter) -> bool:
    """Whether the running `call`, which loads `weight`, loads `parameter` as well.

    MXNet tells a parameter nothing about the call that loads it, and what a layer might remember
    of one call would be wrong in the next. So this looks into the call itself: the two functions
    through which MXNet 1.9.1, its last release, loads every file. Raises RuntimeError for others.
    """
    route = call.f_globals.get("__name__"), call.f_code.co_name
    if route == ("mxnet.gluon.block", "load_parameters"):
        names, parameters = call.f_locals["loaded"], call.f_locals["params"]
    elif route == ("mxnet.gluon.parameter", "load_dict"):
        names, parameters = call.f_locals["arg_dict"], call.f_locals["self"]._params
    else:
        raise RuntimeError(
            f"{weight.name!r} is being loaded by {'.'.join(map(str, route))}, of which doconv_mx "
            f"cannot tell whether it loads {parameter.name!r} as well; use the model's "
            "load_parameters(), or load() or load_dict() of its collect_params()."
        )
    return any(parameters.get(name) is parameter for name in names)


def options_of(parameter: Parameter) -> dict[str, Any]:
    """Return the arguments with which another parameter like this one is made, save its shape."""
    return {
        "grad_req": parameter.grad_req,
        "dtype": parameter.dtype,
        "lr_mult": parameter.lr_mult,
        "wd_mult": parameter.wd_mult,
        "init": parameter.init,
        "allow_deferred_init": parameter._allow_deferred_init,
        "differentiable": parameter._differentiable,
    }


def fill(new: Parameter, old: Parameter, values: Callable[[NDArray], NDArray]) -> None:
    """Give a new parameter what `values` makes of the old one's, in each context.

    An old one that has yet to be initialized passes that on: how, where, and with which data.
    """
    if old._data is not None:
        contexts = old.list_ctx()
        put(new, {c: values(old.data(c)) for c in contexts})
    elif old._deferred_init:
        *how, data = old._deferred_init
        new._deferred_init = (*how, None if data is None else values(data))


def put(parameter: Parameter, arrays: dict[mx.Context, Any]) -> None:
    """Initialize a new parameter with an array for each context; no random number is drawn."""
    parameter.initialize(init=mx.init.Zero(), ctx=list(arrays))
    with autograd.pause():
        for context, array in arrays.items():
            parameter.data(context)[:] = array
