"""Layers that become others where they stand: ordinary convolutions DO-Conv ones, and back.

A block may be known by more than its parent: by a list, a hook, a closure, under a second name. Who
exchanged it could not find them all, and the model would go on computing with the old one, which
nobody trains. So the block stays, and changes its class and parameters.
"""

from __future__ import annotations

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import HybridBlock, Parameter, nn
from mxnet.gluon.nn.conv_layers import _Conv

from doconv_core.maths.spec import ConvSpec
from doconv_mx.compose import as_w
from doconv_mx.do_conv import DOConv1D, DOConv2D, DOConv3D, _DOConv
from doconv_mx.ordinary import channels_per_group, has_values, is_channels_last
from doconv_mx.parameter import Weight, fill, options_of

DO_CONV = {nn.Conv1D: DOConv1D, nn.Conv2D: DOConv2D, nn.Conv3D: DOConv3D}

# What the layers of Gluon and of this package make, and layers of another type may lack.
_MADE = (
    "_channels", "_in_channels", "_op_name", "_kwargs", "act", "weight", "bias", "_outline",
    "depthwise_weight", "_in_batches", "_layout", "_deferred", "explained",
)  # fmt: skip
# What a block is besides a layer of its type.
_KEPT = (
    "_empty_prefix", "_prefix", "_name", "_scope", "_forward_hooks", "_forward_pre_hooks",
    "_active", "_flags", "_callback", "_monitor_all", "_backend", "_backend_opts",
)  # fmt: skip


def outline(layer: _Conv, depth_multiplier: int | None = None) -> ConvSpec:
    """Return an ordinary layer's sizes; where it infers its input channels, as many as groups.

    Raises ValueError for a depth multiplier below the number of taps.
    """
    options, per_group = layer._kwargs, channels_per_group(layer) or 1
    groups = options["num_group"]
    return ConvSpec(
        per_group * groups, options["num_filter"], tuple(options["kernel"]), groups,
        depth_multiplier,
    )  # fmt: skip


def over_parameterize_layers(layers: list[_Conv], spec: ConvSpec) -> None:
    """Turn ordinary layers that share one weight into DO-Conv layers that share W and D.

    layers: of Gluon's own, alike, of more than one tap. spec: their `outline`. Where `S == M` W is
    the very parameter that the weight was, so that a trainer keeps it; else a new one. Layers that
    have no values yet have none afterwards.
    """
    first = layers[0]
    old, in_channels = first.weight, channels_per_group(first) * spec.groups
    for layer in layers:
        layer.__class__ = DO_CONV[type(layer)]
        layer._outline = spec
    weight_shape, depthwise_shape = first._shapes(in_channels)
    if spec.depth_multiplier == spec.taps:
        weight = old
        weight.__class__, weight._layer = Weight, first
        _unblock(weight)
    else:
        weight = Weight(old.name, first, **options_of(old), shape=weight_shape)
        last = is_channels_last(first)
        fill(weight, old, lambda kernel: as_w(kernel, spec, last, in_channels))
    options = {**options_of(old), "init": "zeros", "allow_deferred_init": True}
    name = f"{first.params.prefix}depthwise_weight"
    depthwise = Parameter(name, shape=depthwise_shape, **options)
    if has_values(old) or old._deferred_init:
        depthwise.initialize(default_init=mx.init.Zero(), ctx=old.list_ctx())
    for layer in layers:
        set_parameter(layer, "weight", weight)
        set_parameter(layer, "depthwise_weight", depthwise)


def _unblock(weight: Parameter) -> None:
    """Put a weight's arrays back in the usual memory layout.

    In inference MXNet's CPU convolution rearranges its weight in blocks, in the array itself, and
    operators that take a grouped one apart cannot read it afterwards.
    """
    with autograd.pause():
        for array in weight._data or ():
            plain = array.as_nd_ndarray()
            mx.nd.identity(plain.copy(), out=plain)


def fold_layers(layers: list[_DOConv]) -> None:
    """Turn DO-Conv layers that share W and D into ordinary ones that share the kernel.

    The kernel is a new parameter, as W and D may be in use elsewhere. Layers that have no values
    yet have none afterwards.
    """
    first = layers[0]
    old, spec, per_group = first.weight, first._outline, channels_per_group(first)
    if first.depthwise_weight is None:
        weight = old
        if isinstance(weight, Weight):
            weight.__class__ = Parameter
            del weight._layer
    elif has_values(old):
        weight = first.fold().weight
    else:
        last, size = is_channels_last(first), spec.kernel_size
        shape = (spec.out_channels, *((*size, per_group) if last else (per_group, *size)))
        weight = Parameter(old.name, shape=shape, **options_of(old))
        weight._deferred_init = old._deferred_init
    for layer in layers:
        set_parameter(layer, "weight", weight)
        remove_parameter(layer, "depthwise_weight")
        for name in ("_outline", "_in_batches"):
            vars(layer).pop(name, None)
        layer.__class__ = layer.ordinary


def set_parameter(block: HybridBlock, name: str, parameter: Parameter) -> None:
    """Give a block a parameter as its attribute `name`, in the place of the one it has there."""
    old, named = block._reg_params.get(name), block.params._params
    key = next((key for key, value in named.items() if value is old), parameter.name)
    named[key] = block._reg_params[name] = vars(block)[name] = parameter


def remove_parameter(block: HybridBlock, name: str) -> None:
    """Take a block's parameter from it, and the attribute."""
    old, named = block._reg_params.pop(name, None), block.params._params
    for key in [key for key, value in named.items() if value is old]:
        del named[key]
    vars(block).pop(name)


def become(block: HybridBlock, other: HybridBlock) -> None:
    """Make a block what another one is, parts and all, and keep its hooks, names and identity.

    Attributes that are not of its type's making stay.
    """
    kept = {name: vars(block)[name] for name in _KEPT}
    for name in (*_MADE, *block._children):
        vars(block).pop(name, None)
    vars(block).update({**vars(other), **kept})
    block.__class__ = type(other)
