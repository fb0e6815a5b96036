"""Batch norms that directly follow a convolution, fused into it."""

from __future__ import annotations

from collections import Counter

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, Parameter, SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from mxnet.gluon.nn.basic_layers import _BatchNorm
from mxnet.gluon.nn.conv_layers import _Conv

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.numeric import Array
from doconv_core.models.report import (
    AXIS,
    HOOKED,
    NOT_DIRECT,
    NOT_FINITE,
    ONE_TAP,
    OUTPUT,
    REPLACED,
    SEVERAL,
    SHARED,
    SUBCLASS,
    Change,
    Left,
    behind,
    fused_into,
)
from doconv_mx.convolutions import obstacle
from doconv_mx.graph import Calls, calls
from doconv_mx.ordinary import has_values
from doconv_mx.parameter import options_of, put
from doconv_mx.surgery import remove_parameter, set_parameter
from doconv_mx.symbols import norms
from doconv_mx.view import overridden, owners, parameters, walk, within

# Why a batch norm is left, of what Gluon alone has.
HIDDEN = "called by a forward that cannot be traced without data"
IN_A_SYMBOL = "an operator of a symbol, where convolutions alone are replaced"
SAME_NAME = "another parameter has the name of one of its own or of its convolution's"
NO_VALUES = "it or its convolution has no values yet"


def fuse_batchnorms(model: Block) -> tuple[list[Change], list[Left]]:
    """Fuse, in place, what can be fused into ordinary convolutions; return that, and what is left.

    A fused batch norm becomes an `nn.Dropout` of rate 0, which passes on its input. (The contrib
    package's Identity, hybridized by itself, is a graph without an operator, at which MXNet's
    autograd stops.) In inference the model computes the same but for rounding.
    """
    seen, owned, blocks = calls(model), owners(model), list(walk(model))
    names: Counter[str | None] = Counter(p.name for p in parameters(model))
    convolutions = {block.weight.name: block for _, block in blocks if isinstance(block, _Conv)}
    changed, left = [], []
    for path, norm in blocks:
        if isinstance(norm, SymbolBlock):
            left += [Left(within(path, name), op, IN_A_SYMBOL) for name, op in norms(norm)]
        if not isinstance(norm, _BatchNorm):
            continue
        kind = type(norm).__name__
        before = [convolutions.get(n) for n in seen.before.get(norm.gamma.name, ())]
        reason = _own_obstacle(norm, before, seen, names)
        reason = reason or _obstacle_in(seen, norm, before, owned)
        if reason is None:
            (conv,) = before
            reason = _pair_obstacle(conv, norm, owned, names) or _fuse(conv, norm)
        if reason is None:
            changed.append(Change(path, kind, fused_into(type(conv).__name__)))
        else:
            left.append(Left(path, kind, reason))
    return changed, left


def _own_obstacle(
    norm: _BatchNorm, before: list[_Conv | None], seen: Calls, names: Counter[str | None]
) -> str | None:
    """Return why it cannot be told what the batch norm computes, or what it follows.

    names: how many of the model's parameters have each name. The calls that were seen are known by
    names alone, so that those of two parameters of one name cannot be told apart.
    """
    if type(norm) not in (nn.BatchNorm, SyncBatchNorm):
        return SUBCLASS
    if overridden(norm):
        return REPLACED
    if not seen.hidden.isdisjoint(map(id, (norm, *before))):
        return HIDDEN
    near = {*seen.before.get(norm.gamma.name, ()), *(p.name for p in norm._reg_params.values())}
    return SAME_NAME if any(names[name] > 1 for name in near) else None


def _obstacle_in(
    seen: Calls, norm: _BatchNorm, before: list[_Conv | None], owned: dict[int, list[Block]]
) -> str | None:
    """Return why the batch norm cannot be fused where it stands in the model.

    before: the convolutions whose output it is called with; None for anything else.
    """
    if not before or None in before:
        return NOT_DIRECT
    if len(before) > 1:
        return SEVERAL
    (conv,) = before
    if len(owned[id(conv.weight)]) > 1:  # and what is known of one is known of the others, too
        return SHARED
    return None if seen.after[conv.weight.name] == {norm.gamma.name} else OUTPUT


def _pair_obstacle(
    conv: _Conv, norm: _BatchNorm, owned: dict[int, list[Block]], names: Counter[str | None]
) -> str | None:
    """Return why this convolution and this batch norm cannot be fused."""
    reason = obstacle(conv)
    if reason not in (None, ONE_TAP):
        return behind(reason)
    pair = (norm, conv)
    if any(block._forward_hooks or block._forward_pre_hooks for block in pair):
        return HOOKED
    own = [p for block in pair for p in block._reg_params.values()]
    if any(len(owned[id(p)]) > 1 for p in own):
        return SHARED
    if any(names[p.name] > 1 for p in own):
        return SAME_NAME
    if not all(map(has_values, own)) or len({tuple(p.list_ctx()) for p in own}) > 1:
        return NO_VALUES
    layout = conv._kwargs["layout"]
    return None if norm._kwargs.get("axis", 1) % len(layout) == layout.find("C") else AXIS


def _fuse(conv: _Conv, norm: _BatchNorm) -> str | None:
    """Fuse them, in each context with its own statistics; return why not, where that is refused."""
    with np.errstate(all="ignore"):  # what is not finite is refused below
        fused = {context: _fused(conv, norm, context) for context in conv.weight.list_ctx()}
    if not all(np.isfinite(array).all() for pair in fused.values() for array in pair):
        return NOT_FINITE
    old, bias = conv.weight, conv.bias
    weight = Parameter(old.name, shape=old.shape, **options_of(old))
    if bias is None:
        name, options = f"{conv.params.prefix}bias", {**options_of(old), "init": "zeros"}
    else:
        name, options = bias.name, options_of(bias)
    bias = Parameter(name, shape=(conv._channels,), **options)
    put(weight, {context: kernel for context, (kernel, _) in fused.items()})
    put(bias, {context: offset for context, (_, offset) in fused.items()})
    set_parameter(conv, "weight", weight)
    set_parameter(conv, "bias", bias)
    conv._kwargs = {**conv._kwargs, "no_bias": False}
    _pass_on(norm)
    return None


def _fused(conv: _Conv, norm: _BatchNorm, context: mx.Context) -> tuple[Array, Array]:
    def values(parameter: Parameter | None) -> Array | None:
        return None if parameter is None else parameter.data(context).asnumpy()

    return fuse_batchnorm(
        values(conv.weight), values(conv.bias),
        mean=values(norm.running_mean), variance=values(norm.running_var),
        epsilon=norm._kwargs["eps"],
        scale=None if norm._kwargs["fix_gamma"] else values(norm.gamma),
        offset=values(norm.beta),
    )  # fmt: skip


def _pass_on(norm: _BatchNorm) -> None:
    for name in list(norm._reg_params):
        remove_parameter(norm, name)
    for name in ("_kwargs", "fuse_relu", "in_channels"):
        vars(norm).pop(name, None)
    vars(norm).update(_rate=0, _axes=())
    norm.__class__ = nn.Dropout
