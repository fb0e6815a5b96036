"""Making a block another one where it stands, and copying a model.

A block may be known by more than its parent: by a list, a hook, a closure, under a second name. Who
exchanged it could not find them all, and the model would go on computing with the old one, which
nobody trains. So the block stays, and changes its class and parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter

from doconv_mx import private
from doconv_mx.ordinary import channels_per_group, is_channels_last
from doconv_mx.parameter import Entry, fill, initializer
from doconv_mx.tree import parameters, walk


def compose_layers(layers: Sequence[Any], types: Mapping[Any, type[Any]], spec: Any) -> None:
    """Turn ordinary layers that share one weight into layers of a kind that share their entries.

    layers: of Gluon's own, alike. types: the kind's, by the ordinary ones. spec: their sizes to be.
    Where the shape stays, `weight` is the very parameter that it was, so that a trainer keeps it;
    else a new one. Layers that have no values yet have none afterwards.
    """
    first, old = layers[0], layers[0].weight
    in_channels = channels_per_group(first) * private.settings(first)["num_group"]
    for layer in layers:
        layer.__class__, layer._outline = types[type(layer)], spec
    kind, shapes = first.kind, first.shapes(in_channels)
    if kind.parameter_shape(spec) == kind.conv(spec).kernel_shape:
        old.__class__, old._layer = Entry, first
        trainer = private.trainer_of(old)
        if trainer is not None:
            old._former = trainer
        _unblock(old)
        made = {"weight": old}
    else:
        made = {"weight": Entry(old.name, first, shape=shapes["weight"], **private.options_of(old))}
        fill(made["weight"], old, first.as_weight)
    for name in kind.names[1:]:
        if name in shapes:
            start = {"init": initializer(kind.constants[name]), "allow_deferred_init": True}
            options = {**private.options_of(old), **start, "shape": shapes[name]}
            made[name] = Entry(f"{first.params.prefix}{name}", first, **options)
            if private.has_values(old) or private.waiting(old):
                made[name].initialize(ctx=old.list_ctx())
    for layer in layers:
        vars(layer).update(dict.fromkeys(kind.names[1:]))
        for name, parameter in made.items():
            set_parameter(layer, name, parameter)


def fold_layers(layers: Sequence[Any]) -> None:
    """Turn layers of a kind that share their entries into ordinary ones that share the kernel.

    The kernel is a new parameter, as the entries may be in use elsewhere. Layers that have no
    values yet have none afterwards.
    """
    first = layers[0]
    old = weight = first.weight
    if not first.composes():
        if isinstance(weight, Entry):
            if weight._former is not None:
                del weight._former
            weight.__class__ = Parameter
            del weight._layer
    elif private.has_values(old):
        weight = first.fold().weight
    else:
        per_group, size = channels_per_group(first), private.settings(first)["kernel"]
        body = (*size, per_group) if is_channels_last(first) else (per_group, *size)
        weight = Parameter(old.name, shape=(old.shape[0], *body), **private.options_of(old))
        private.wait_as(weight, private.waiting(old))
    for layer in layers:
        set_parameter(layer, "weight", weight)
        for name in layer.kind.names[1:]:
            remove_parameter(layer, name)
        for name in layer.made:
            vars(layer).pop(name, None)
        layer.__class__ = layer.ordinary


def _unblock(weight: Parameter) -> None:
    """Put a weight's arrays back in the usual memory layout.

    In inference MXNet's CPU convolution rearranges its weight in blocks, in the array itself, and
    operators that take a grouped one apart cannot read it afterwards.
    """
    with autograd.pause():
        for array in private.arrays(weight):
            plain = array.as_nd_ndarray()
            mx.nd.identity(plain.copy(), out=plain)


def set_parameter(block: HybridBlock, name: str, parameter: Parameter) -> None:
    """Give a block a parameter as its attribute `name`, in the place of the one it has there."""
    old, named = private.registered(block).get(name), private.by_name(block)
    key = next((key for key, value in named.items() if value is old), parameter.name)
    named[key] = private.registered(block)[name] = vars(block)[name] = parameter


def remove_parameter(block: HybridBlock, name: str) -> None:
    """Take a block's parameter from it, and the attribute."""
    old, named = private.registered(block).pop(name, None), private.by_name(block)
    for key in [key for key, value in named.items() if value is old]:
        del named[key]
    vars(block).pop(name)


def become(block: HybridBlock, other: HybridBlock) -> None:
    """Make a block what another one is, parts and all, and keep its hooks, names and identity.

    Attributes that are not of its type's making stay.
    """
    kept = {name: vars(block)[name] for name in private.KEPT}
    for name in (*private.MADE, *private.children(block)):
        vars(block).pop(name, None)
    vars(block).update({**vars(other), **kept})
    block.__class__ = type(other)


def exchange(model: Block, old: Block, new: Block) -> None:
    """Put a block in all places of another one in a model."""
    for _, block in list(walk(model)):
        for place in (private.children(block), vars(block)):
            place.update({name: new for name, value in place.items() if value is old})


def copied(model: Block) -> Block:
    """Return a copy of the model that shares no array with it and can be trained on its own.

    Gluon's blocks cannot all be deep-copied as they are: a hybridized one that has run holds a
    compiled graph, and a parameter holds its trainer, with the optimizer. The copy has neither. Its
    gradients are its own, which a copied array would not have.
    Raises TypeError where the model holds something else that Python cannot copy.
    """
    blocks = [block for _, block in walk(model)]
    with autograd.pause():
        memo = private.apart(blocks, parameters(model))
        try:
            new: Block = copy.deepcopy(model, memo)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{type(model).__name__} holds something that cannot be copied ({error}); with "
                "inplace=True the model itself is changed."
            ) from error
    private.attach_gradients(parameters(new))
    forget_graphs(new)
    return new


def forget_graphs(model: Block) -> None:
    """Let every hybridized block build its graph anew when it is called next."""
    for _, block in walk(model):
        private.forget_graph(block)
