"""Whole Keras models: over-parameterize every convolution, fold all of them again, compare.

A layer is converted where it stands, so that it stays the same object: wherever it is used, in a
functional model's graph, in lists and attributes, in wrappers or by several models, that holds on.
"""

from __future__ import annotations

from collections import Counter

import keras
from doconv_core.kinds.bsconv_model import FoldReport, as_form

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import (
    NOT_SELECTED,
    REPLACED,
    TIED,
    Converted,
    Left,
    Report,
    Selection,
    Where,
    place,
)
from doconv_tf.batchnorm import fuse_batchnorms
from doconv_tf.bsconv_convert import plan_bsconvs
from doconv_tf.convolutions import CONVOLUTIONS, REPLACEMENTS, is_replaced, obstacle
from doconv_tf.orthonormal import is_marked, unmark
from doconv_tf.over_parameterized import OverParameterized
from doconv_tf.surgery import count_parameters, finish, replaced, require_built
from doconv_tf.view import first_occurrences


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
    require_built("", model)
    selection = Selection(where)
    chosen, left = _choose(model, selection)
    selection.warn()
    new = {id(layer): _over_parameterized(path, layer, depth_multiplier) for path, layer in chosen}
    before = count_parameters(model)
    target, changed = replaced(model, new, inplace)
    if changed:
        finish(target)
    parts = tuple(changed), tuple(left), before, count_parameters(target)
    return Converted(target, Report("over-parameterized", *parts))


def fold(
    model: keras.Layer, *, fuse_batchnorm: bool = False, bsconv: str = "keep", inplace: bool = False
) -> Converted:
    """Return the model with ordinary layers for its DO and BSConv layers, and a report.

    Every DO layer becomes exactly the Keras layer that it stands in for, with the composed kernel;
    nothing of this package is left in the model, in its configuration or in its files, no
    orthonormality loss either. A model without such layers is returned as it is.

    bsconv: what BSConv layers become. "keep": a `keras.Sequential` of the same parts. "merge": one
    of a pointwise and a depthwise convolution, with batch norms in the former. "dense": one
    convolution; where it has zeros `around`, a `keras.Sequential` of zero padding and that. Each is
    exact, but none is always fastest: the report, a `FoldReport`, has the cost of all three.
    Merging makes two pointwise convolutions one with more operations where the channels between are
    few; dense has about as many times more as the kernel has taps.

    fuse_batchnorm: also make each batch norm that directly follows an ordinary convolution a part
    of it, for inference; a `keras.layers.Identity` of the same name takes its place. What follows
    what is known in functional and sequential models, and in those inside one another, but not
    inside subclassed ones. Batch norms that are left are in the report, with the reason.
    inplace, and what is kept: as in `over_parameterize`.
    Keras has no training mode, so that there is none to be warned of: compare with
    `training=False`, which is what calling, `predict` and `verify` do.

    Raises NotFoldable, with the layer's path, for a DO or BSConv layer that no ordinary one
    computes exactly, ValueError for another form of BSConv, and TypeError and ValueError as
    `over_parameterize` does; before anything is changed.
    """
    require_built("", model)
    form = as_form(bsconv)
    new: dict[int, keras.Layer | None] = {
        id(layer): _folded(path, layer)
        for path, layer in first_occurrences(model)
        if isinstance(layer, OverParameterized)
    }
    plan = plan_bsconvs(model, form)
    before = count_parameters(model)
    order = {path: n for n, (path, _) in reversed(list(enumerate(first_occurrences(model))))}
    target, changed = replaced(model, new | plan.layers, inplace)
    left = list(plan.left)
    marked = [layer for _, layer in first_occurrences(target) if is_marked(layer)]
    for layer in marked:
        unmark(layer)
    if fuse_batchnorm:
        fused, kept = fuse_batchnorms(target)
        changed, left = [*changed, *fused], [*left, *kept]
        changed = sorted(changed, key=lambda change: order.get(change.path, len(order)))
    if changed or marked:
        finish(target)
    parts = tuple(changed), tuple(left), before, count_parameters(target)
    if plan.choices:
        return Converted(target, FoldReport("folded", *parts, form, plan.choices))
    return Converted(target, Report("folded", *parts))


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
    require_built(path, layer)
    cls = REPLACEMENTS[type(layer)]
    try:
        return cls.from_conv(layer, **{cls.multiplier_name: depth_multiplier})
    except (TypeError, ValueError) as error:
        message = str(error).replace("d_multiplier", "depth_multiplier")
        raise type(error)(f"{place(path)}: {message}") from None


def _folded(path: str, layer: OverParameterized) -> keras.Layer:
    require_built(path, layer)
    try:
        if is_replaced(layer):
            raise NotFoldable(f"{REPLACED}.")
        return layer.fold()
    except NotFoldable as error:
        raise NotFoldable(f"{place(path)}: {error}") from None
