"""How the parameters of a new BSConv layer begin, in the place of an ordinary layer's."""

from __future__ import annotations

from typing import Any

import numpy as np
from mxnet.gluon import Parameter
from mxnet.gluon.nn.conv_layers import _Conv

from doconv_core.kinds.bsconv_init import blueprints
from doconv_core.maths.layout import to_canonical
from doconv_mx.ordinary import has_values, is_channels_last
from doconv_mx.parameter import fill, put
from doconv_mx.view import parameters


def start_like(layer: Any, conv: _Conv, start: str) -> float | None:
    """Give a new BSConv layer dtype, contexts, `grad_req`, multipliers and values.

    conv: the ordinary layer that it stands in for. start: as `from_conv` takes it. Returns how
    much of the kernel's squared norm it has; None of a random start. A layer without values yet
    passes on how it is to be initialized.
    """
    weight, bias = conv.weight, layer.depthwise.bias
    layer.cast(weight.dtype)
    for parameter in parameters(layer):
        _follow(parameter, conv.bias if parameter is bias else weight)
    explained = None
    if start == "weights":
        explained = _put_blueprints(layer, conv)
    if bias is not None:
        fill(bias, conv.bias, lambda values: values)
    for parameter in parameters(layer):
        if not has_values(parameter) and parameter is not bias:
            _initialize(parameter, weight)
    return explained


def _follow(parameter: Parameter, old: Parameter) -> None:
    if parameter.grad_req != "null":  # as a running mean's is
        parameter.grad_req = old.grad_req
    parameter.lr_mult, parameter.wd_mult = old.lr_mult, old.wd_mult


def _put_blueprints(layer: Any, conv: _Conv) -> float:
    """Take the blueprints of a trained kernel; return how much of it they explain."""
    weight = conv.weight
    kernel = weight.list_data()[0].asnumpy().astype(np.float64)
    kernel = to_canonical(kernel, "O*I" if is_channels_last(conv) else "OI*")
    found = blueprints(kernel, layer.spec)
    values = iter((*found.pointwise, found.depthwise))
    for name, part in layer._children.items():
        if not name.startswith("batch_norm"):
            array = next(values).reshape(part.weight.shape).astype(np.dtype(weight.dtype))
            put(part.weight, dict.fromkeys(weight.list_ctx(), array))
    return found.explained


def _initialize(parameter: Parameter, old: Parameter) -> None:
    """Initialize a parameter where the old one is, or as the old one is going to be."""
    if has_values(old):
        parameter.initialize(ctx=old.list_ctx())
    elif old._deferred_init:
        _, ctx, default, _ = old._deferred_init
        parameter.initialize(ctx=ctx, default_init=default)
