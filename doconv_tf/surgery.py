"""Replacing layers of a Keras model, where they stand or in a copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras

from doconv_core.models.report import Change, place
from doconv_tf.become import become, keep_parts
from doconv_tf.bsconv_layer import _BSConv
from doconv_tf.compiled import check_functions, uncompile
from doconv_tf.copying import copied
from doconv_tf.over_parameterized import OverParameterized
from doconv_tf.view import first_occurrences


def replaced(
    model: keras.Layer, new: Mapping[int, keras.Layer | None], inplace: bool
) -> tuple[keras.Layer, list[Change]]:
    """Return the model, or a copy, with layers replaced; and what was, in the model's order.

    new: what a layer becomes, by the layer's id; None for a BSConv that becomes the sequence of the
    same parts. A model in which anything was replaced is not compiled any more: `finish` it.
    """
    check_functions(model, inplace)
    target = model if inplace else copied(model)
    changed = []
    pairs = zip(first_occurrences(model), first_occurrences(target), strict=True)
    for (path, old), (_, layer) in list(pairs):
        if id(old) not in new:
            continue
        replacement, kind = new[id(old)], type(old).__name__
        forgotten = frozenset().union(*map(_own_names, (layer, replacement)))
        if replacement is None:
            keep_parts(layer, forgotten)
        else:
            become(layer, replacement, forgotten)
            _forget_arguments(layer)
        changed.append(Change(path, kind, type(layer).__name__))
    there = {path for path, _ in first_occurrences(target)}  # parts of what is dense now are not
    return target, [change for change in changed if change.path in there]


def _forget_arguments(layer: keras.Layer) -> None:
    """Let graphs pass the layer only what it takes: a sequence was given a mask as well."""
    for node in layer._inbound_nodes:
        given, known = node.arguments, layer.call_signature_parameters
        kept = {name: value for name, value in given.kwargs.items() if name in known}
        node.arguments = type(given)(*given.args, **kept)


def _own_names(layer: keras.Layer | None) -> frozenset[str]:
    """Return the names of the attributes that a layer has, and one in its place has not."""
    return layer.own_names() if isinstance(layer, (OverParameterized, _BSConv)) else frozenset()


def finish(target: keras.Layer) -> None:
    """Make a model in which layers were replaced one that was never compiled."""
    uncompile(target)
    for _, layer in reversed(first_occurrences(target)):
        if layer.built:
            layer._post_build()  # where Keras runs on PyTorch, it lists the parameters


def require_built(path: str, layer: keras.Layer) -> None:
    """Raise TypeError for what is not a layer, ValueError for one that is not built."""
    if not isinstance(layer, keras.Layer):
        raise TypeError(f"model must be a keras.Layer; received {type(layer).__qualname__}.")
    if not layer.built:
        raise ValueError(
            f"{place(path)} ({type(layer).__name__} {layer.name!r}) is not built, so that its "
            "layers or their weights are not there yet; call the model on data, or its build(), "
            "first."
        )


def count_parameters(model: keras.Layer) -> int:
    """Return the number of the model's parameters, moving statistics included."""
    return sum(math.prod(variable.shape) for variable in model.weights)
