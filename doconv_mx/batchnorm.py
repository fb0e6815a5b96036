"""Folding batch norms into the layers beside them, for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, Parameter, nn

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.numeric import Array
from doconv_core.models.report import (
    AXIS,
    HOOKED,
    NOT_DIRECT,
    NOT_FINITE,
    NOT_PLAIN,
    PADDED,
    REPLACED,
    SHARED,
    SUBCLASS,
    behind,
)
from doconv_mx import graph
from doconv_mx.graph import SAME_NAME
from doconv_mx.ordinary import TRANSPOSES, is_channels_last, obstacle
from doconv_mx.parameter import put
from doconv_mx.private import (
    has_values,
    is_dense,
    is_hooked,
    options_of,
    pass_on,
    registered,
    setting,
    settings,
    without_hooks,
)
from doconv_mx.surgery import remove_parameter, set_parameter
from doconv_mx.tree import is_replaced

NO_VALUES = "it or its convolution has no values yet"
SETTINGS = {"axis", "eps", "fix_gamma"}
DENSE_AXIS = "it may normalize another axis than the dense layer's units"


def norm_obstacle(norm: Any) -> str | None:
    """Return why a batch norm cannot be fused, wherever it stands; None where it can."""
    if is_replaced(norm):
        return REPLACED
    return None if _is_plain(norm) else SUBCLASS


def _is_plain(norm: Any) -> bool:
    """Return whether a batch norm's code is seen to call MXNet's operator, and to do no more."""
    with without_hooks([norm]):
        symbol = graph.trace(norm)
    if symbol is None:
        return False
    operators = graph.Operators(symbol)
    calls = [node for node in operators.nodes if node["op"] != "null"][:-1]  # then the output
    own = (norm.gamma, norm.beta, norm.running_mean, norm.running_var)
    names = [parameter.var().name for parameter in own]  # which may be its name of before
    attributes = calls[0].get("attrs", {}) if calls else {}
    asked = SETTINGS & settings(norm).keys()
    return (
        len(calls) == 1
        and calls[0]["op"] in graph.NORMS
        and [operators.variable(calls[0], n) for n in range(1, 5)] == names
        and operators.variable(calls[0], 0) not in (None, *names)
        and operators.nodes[-1]["inputs"][0][1] == 0
        and all(attributes.get(name) == str(settings(norm)[name]) for name in asked)
    )


def source_obstacle(layer: Any) -> str | None:
    """Return why a batch norm behind this layer cannot be part of it; None where it can."""
    if isinstance(layer, nn.Dense):
        if type(layer) is not nn.Dense:
            return SUBCLASS
    elif type(layer) not in TRANSPOSES or is_channels_last(layer):
        return obstacle(layer)
    plain = type(layer.weight) is Parameter and is_dense(layer.weight)
    return REPLACED if is_replaced(layer) else None if plain else NOT_PLAIN


def pair_obstacle(
    conv: Any, norm: Any, owned: Mapping[int, Sequence[Block]], names: Mapping[Any, int]
) -> str | None:
    """Return why this layer and the batch norm beside it cannot be fused.

    owned: the blocks that own each parameter, by its id. names: how many parameters have each.
    """
    reason = source_obstacle(conv)
    if reason is not None:
        return behind(reason)
    pair = (norm, conv)
    if any(is_hooked(block) for block in pair):
        return HOOKED
    own = [p for block in pair for p in registered(block).values()]
    if any(len(owned.get(id(p), ())) > 1 for p in own):
        return SHARED
    if any(names[p.name] > 1 for p in own):
        return SAME_NAME
    if not all(map(has_values, own)) or len({tuple(p.list_ctx()) for p in own}) > 1:
        return NO_VALUES
    axis = settings(norm).get("axis", 1)
    if isinstance(conv, nn.Dense):
        flat = setting(conv, "flatten")
        return None if axis == -1 or (flat and axis == 1) else DENSE_AXIS
    layout = settings(conv)["layout"]
    return None if axis % len(layout) == layout.find("C") else AXIS


def fuse(conv: Any, norm: Any) -> str | None:
    """Fuse a batch norm into the layer before it, in place; or return why that cannot be."""
    return _become(conv, norm, _fused)


def fuse_ahead(norm: Any, conv: Any) -> str | None:
    """Fuse a batch norm into the convolution behind it, in place; or return why that cannot be.

    Zeros around a convolution's input are not what the batch norm makes of zeros.
    """
    if obstacle(conv) is not None:
        return NOT_DIRECT
    return PADDED if any(settings(conv)["pad"]) else _become(conv, norm, _fused_ahead)


Fused = Callable[[Any, Any, mx.Context], tuple[Array, Array]]


def _become(conv: Any, norm: Any, fused_in: Fused) -> str | None:
    """Give a layer the kernel and bias that `fused_in` says for each context.

    Each has its own statistics. A fused batch norm becomes an `nn.Dropout` of rate 0, which passes
    on its input. (The contrib package's Identity, hybridized by itself, is a graph without an
    operator, at which MXNet's autograd stops.)
    """
    with np.errstate(all="ignore"):  # what is not finite is refused below
        fused = {context: fused_in(conv, norm, context) for context in conv.weight.list_ctx()}
    if not all(np.isfinite(array).all() for pair in fused.values() for array in pair):
        return NOT_FINITE
    old, bias = conv.weight, conv.bias
    weight = Parameter(old.name, shape=old.shape, **options_of(old))
    if bias is None:
        name, options = f"{conv.params.prefix}bias", {**options_of(old), "init": "zeros"}
    else:
        name, options = bias.name, options_of(bias)
    channels = next(iter(fused.values()))[1].shape
    bias = Parameter(name, shape=channels, **options)
    put(weight, {context: kernel for context, (kernel, _) in fused.items()})
    put(bias, {context: offset for context, (_, offset) in fused.items()})
    set_parameter(conv, "weight", weight)
    set_parameter(conv, "bias", bias)
    if "no_bias" in settings(conv):
        settings(conv)["no_bias"] = False
    for name in list(registered(norm)):
        remove_parameter(norm, name)
    pass_on(norm)
    return None


def _values(parameter: Parameter | None, context: mx.Context) -> Any:
    return None if parameter is None else parameter.data(context).asnumpy()


def _norm(norm: Any, context: mx.Context) -> dict[str, Any]:
    """Return what the core asks of a batch norm."""
    return {
        "mean": _values(norm.running_mean, context),
        "variance": _values(norm.running_var, context),
        "epsilon": settings(norm)["eps"],
        "scale": None if settings(norm)["fix_gamma"] else _values(norm.gamma, context),
        "offset": _values(norm.beta, context),
    }


def _fused(conv: Any, norm: Any, context: mx.Context) -> tuple[Array, Array]:
    kernel, bias = _values(conv.weight, context), _values(conv.bias, context)
    if type(conv) not in TRANSPOSES:
        return fuse_batchnorm(kernel, bias, **_norm(norm, context))
    groups, (inputs, outputs, *taps) = settings(conv)["num_group"], kernel.shape
    # (I, O/g, *taps) -> (O, I/g, *taps), and back
    by_output = kernel.reshape(groups, inputs // groups, outputs, *taps).swapaxes(1, 2)
    folded = by_output.reshape(-1, inputs // groups, *taps)
    fused, offset = fuse_batchnorm(folded, bias, **_norm(norm, context))
    return fused.reshape(by_output.shape).swapaxes(1, 2).reshape(kernel.shape), offset


def _fused_ahead(conv: Any, norm: Any, context: mx.Context) -> tuple[Array, Array]:
    kernel, bias = _values(conv.weight, context), _values(conv.bias, context)
    given = _norm(norm, context)
    ones = np.ones((len(given["mean"]), 1))
    scale, offset = fuse_batchnorm(ones, None, **given)  # in float64
    last = is_channels_last(conv)
    wide = np.moveaxis(kernel, -1, 1) if last else kernel
    groups, (outputs, inputs, *taps) = settings(conv)["num_group"], wide.shape
    parts = wide.astype(np.float64).reshape(groups, outputs // groups, inputs, *taps)
    by_input = (groups, 1, inputs, *(1,) * len(taps))
    fused = (parts * scale.reshape(by_input)).reshape(wide.shape)
    shift = (parts * offset.reshape(by_input)).reshape(outputs, -1).sum(1)
    fused = np.moveaxis(fused, 1, -1) if last else fused
    shift = shift if bias is None else shift + bias
    return fused.astype(kernel.dtype), shift.astype(kernel.dtype)
