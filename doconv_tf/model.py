"""Whole Keras models: over-parameterize every convolution, fold all of them again, compare.

A layer is converted where it stands, so that it stays the same object: wherever it is used, in a
functional model's graph, in lists and attributes, in wrappers or by several models, that holds on.
"""

from __future__ import annotations

import math
from collections import Counter

import keras

from doconv_core.fold import NotFoldable
from doconv_core.model import (
    NOT_SELECTED,
    REPLACED,
    TIED,
    Change,
    Converted,
    Left,
    Report,
    Selection,
    Where,
    place,
)
from doconv_tf.batchnorm import fuse_batchnorms
from doconv_tf.candidates import CONVOLUTIONS, REPLACEMENTS, is_replaced, obstacle
from doconv_tf.compiled import check_functions, uncompile
from doconv_tf.convert import become
from doconv_tf.copying import copied
from doconv_tf.over_parameterized import OverParameterized
from doconv_tf.walk import first_occurrences


def over_parameterize(
    model: keras.Layer,
    *,
    where: Where = None,
    depth_multiplier: int | None = None,
    inplace: bool = False,
) -> Converted:
    """Return the model with DO layers for its convolutions, and a report of what was done.

    model: functional, sequential, subclassed, or any layer; built. Its layers that are exactly
    Keras' `Conv1D` to `Conv3D`, `DepthwiseConv1D` and `2D`, `SeparableConv1D` and `2D`, at any
    depth, become the DO layers of the same function, where their (depthwise) kernel has more than
    one tap: outputs are the same, in float32 where `S == M` bit for bit. Layers that are left are
    in the report, with the reason.

    where: which of them; a glob pattern on the path or several, a type, or a predicate on (path,
    layer), as `doconv_core.Selection` takes it. A path is made of the layers' names, which need not
    be unique in a subclassed model; a pattern then means all of its path.
    depth_multiplier: S, for all of them; None for each one's number of taps M.
    inplace: change the model itself, whose layers stay the objects they were; otherwise a copy is
    made, and `model` stays as it was.

    The model that is returned is to be compiled anew: what the former optimizer and compiled
    functions hold is the former variables. With `inplace` that goes for any other model with the
    same layers. Name, dtype policy, trainable flags, paths and order are kept.
    Raises TypeError for what is not a Keras layer, cannot be copied, or has a compiled function
    that would go on with the former layers; ValueError for what is not built, and, with the layer's
    path, for a `depth_multiplier` below its taps; before anything is changed. Warns where `where`
    matches nothing.
    """
    _require_built("", model)
    selection = Selection(where)
    chosen, left = _choose(model, selection)
    selection.warn()
    new = {id(layer): _over_parameterized(path, layer, depth_multiplier) for path, layer in chosen}
    return _converted("over-parameterized", model, new, left, inplace)


def fold(model: keras.Layer, *, fuse_batchnorm: bool = False, inplace: bool = False) -> Converted:
    """Return the model with ordinary layers for its DO layers, and a report of what was done.

    Every DO layer becomes exactly the Keras layer that it stands in for, with the composed kernel;
    nothing of this package is left in the model, in its configuration or in its files. A model
    without DO layers is returned as it is.

    fuse_batchnorm: also make each batch norm that directly follows an ordinary convolution a part
    of it, for inference; a `keras.layers.Identity` of the same name takes its place. What follows
    what is known in functional and sequential models, and in those inside one another, but not
    inside subclassed ones. Batch norms that are left are in the report, with the reason.
    inplace, and what is kept: as in `over_parameterize`.
    Keras has no training mode, so that there is none to be warned of: compare with
    `training=False`, which is what calling, `predict` and `verify` do.

    Raises NotFoldable, with the layer's path, for a DO layer that no ordinary one computes exactly,
    and TypeError and ValueError as `over_parameterize` does; before anything is changed.
    """
    _require_built("", model)
    new = {
        id(layer): _folded(path, layer)
        for path, layer in first_occurrences(model)
        if isinstance(layer, OverParameterized)
    }
    return _converted("folded", model, new, [], inplace, fuse=fuse_batchnorm)


def _choose(
    model: keras.Layer, selection: Selection
) -> tuple[list[tuple[str, keras.Layer]], list[Left]]:
    """Return the layers to replace and those to leave, with their paths, in the model's order."""
    layers = first_occurrences(model)
    owners = Counter(
        id(variable)
        for _, layer in layers
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables)
    )
    chosen, left = [], []
    for path, layer in layers:
        if not isinstance(layer, CONVOLUTIONS):
            continue
        reason = obstacle(layer)
        if reason is None and any(owners[id(variable)] > 1 for variable in layer.variables):
            reason = TIED
        if reason is None and not selection(path, layer):
            reason = NOT_SELECTED
        if reason is None:
            chosen.append((path, layer))
        else:
            left.append(Left(path, type(layer).__name__, reason))
    return chosen, left


def _over_parameterized(path: str, layer: keras.Layer, depth_multiplier: int | None) -> keras.Layer:
    _require_built(path, layer)
    cls = REPLACEMENTS[type(layer)]
    try:
        return cls.from_conv(layer, **{cls.multiplier_name: depth_multiplier})
    except (TypeError, ValueError) as error:
        message = str(error).replace("d_multiplier", "depth_multiplier")
        raise type(error)(f"{place(path)}: {message}") from None


def _folded(path: str, layer: OverParameterized) -> keras.Layer:
    _require_built(path, layer)
    try:
        if is_replaced(layer):
            raise NotFoldable(f"{REPLACED}.")
        return layer.fold()
    except NotFoldable as error:
        raise NotFoldable(f"{place(path)}: {error}") from None


def _converted(
    action: str,
    model: keras.Layer,
    new: dict[int, keras.Layer],
    left: list[Left],
    inplace: bool,
    *,
    fuse: bool = False,
) -> Converted:
    """Return the model with the layers in `new`, by the former's id, and what was done to it."""
    before = _count(model)
    check_functions(model, inplace)
    target = model if inplace else copied(model)
    layers = first_occurrences(model)
    order = {path: n for n, (path, _) in reversed(list(enumerate(layers)))}
    changed = []
    for (path, old), (_, layer) in zip(layers, first_occurrences(target), strict=True):
        replacement = new.get(id(old))
        if replacement is not None:
            changed.append(Change(path, type(old).__name__, type(replacement).__name__))
            do_conv = layer if isinstance(layer, OverParameterized) else replacement
            become(layer, replacement, do_conv.own_names())
    if fuse:
        fused, left = fuse_batchnorms(target)
        changed = sorted([*changed, *fused], key=lambda change: order[change.path])
    if changed:
        uncompile(target)
        for _, layer in reversed(first_occurrences(target)):
            if layer.built:
                layer._post_build()  # where Keras runs on PyTorch, it lists the parameters
    return Converted(target, Report(action, tuple(changed), tuple(left), before, _count(target)))


def _require_built(path: str, layer: keras.Layer) -> None:
    if not isinstance(layer, keras.Layer):
        raise TypeError(f"model must be a keras.Layer; received {type(layer).__qualname__}.")
    if not layer.built:
        raise ValueError(
            f"{place(path)} ({type(layer).__name__} {layer.name!r}) is not built, so that its "
            "layers or their weights are not there yet; call the model on data, or its build(), "
            "first."
        )


def _count(model: keras.Layer) -> int:
    return sum(math.prod(variable.shape) for variable in model.weights)
