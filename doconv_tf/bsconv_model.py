"""Whole models and BSConv in Keras: convolutions become BSConvs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import keras
from doconv_core.kinds.bsconv_model import (
    GROUPED,
    KERNEL_SIZES,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    BSConvReport,
    Explained,
    other_size,
    replacement,
)

from doconv_core.kinds.bsconv import MIN_MID_CHANNELS, P
from doconv_core.models.report import (
    ALREADY,
    NOT_SELECTED,
    ONE_TAP,
    Converted,
    Left,
    Selection,
    Where,
    place,
)
from doconv_tf.bsconv import LAYERS
from doconv_tf.bsconv_layer import BN_OPTIONS, _BSConv
from doconv_tf.convolutions import CONVOLUTIONS, obstacle
from doconv_tf.surgery import count_parameters, finish, replaced, require_built
from doconv_tf.view import first_occurrences

# What Keras has as a layer of its own.
SEPARABLE = "it is separable already; a BSConv takes the place of an ordinary convolution"


def to_bsconv(
    model: keras.Layer,
    variant: str = "u",
    *,
    kernel_sizes: Any = KERNEL_SIZES,
    p: float = P,
    min_mid_channels: int = MIN_MID_CHANNELS,
    with_bn: bool = False,
    bn_options: Mapping[str, Any] | None = None,
    where: Where = None,
    start: str = "weights",
    inplace: bool = False,
) -> Converted:
    """Return the model with BSConvs for its convolutions, and a report of what was done.

    Every `keras.layers.Conv1D`, `Conv2D` and `Conv3D`, exactly, with groups=1 and one of the kernel
    sizes, becomes the BSConv with its arguments. The function changes: train the model on. What is
    left as it is, is in the report with its reason.

    variant: "u" or "s". kernel_sizes: which; an entry that is an integer stands for that size in
    each number of dimensions. p, min_mid_channels, with_bn, bn_options: as the layers take them.
    where, inplace, and what is kept: as in `over_parameterize`, which comes after this one.
    start: "weights" begins with the BSConv that is nearest to each trained kernel, and the report
    says how much of its variance that explains; "random" throws the kernels away.

    Raises TypeError and ValueError for arguments that give no layer, for a model that is not built,
    and for a kernel that is not finite, with its path; before anything is changed. Warns where
    `where` matches nothing.
    Source: BSConv, arXiv 2003.13549; the start from trained weights is this package's own.
    """
    require_built("", model)
    sizes, options = replacement(
        variant,
        kernel_sizes,
        p=p,
        min_mid_channels=min_mid_channels,
        with_bn=with_bn,
        bn_options=bn_options,
        allowed=BN_OPTIONS,
        start=start,
    )
    selection = Selection(where)
    chosen, left = _choose(model, selection, sizes)
    selection.warn()
    before = count_parameters(model)
    made = [(path, layer, _made(path, layer, variant, options)) for path, layer in chosen]
    found = [(path, new.explained) for path, _, new in made]
    target, changed = replaced(model, {id(layer): new for _, layer, new in made}, inplace)
    if changed:
        finish(target)
    explained = tuple(Explained(path, share) for path, share in found if share is not None)
    parts = tuple(changed), tuple(left), before, count_parameters(target)
    return Converted(target, BSConvReport("replaced", *parts, explained))


def _choose(
    model: keras.Layer, selection: Selection, sizes: frozenset[tuple[int, ...]]
) -> tuple[list[tuple[str, Any]], list[Left]]:
    """Return the layers to replace, with their paths, and those to leave, in the model's order."""
    layers = first_occurrences(model)
    owners = Counter(
        id(variable)
        for _, layer in layers
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables)
    )
    parts = {id(part) for _, layer in layers if isinstance(layer, _BSConv) for part in layer.layers}
    chosen, left = [], []
    for path, layer in layers:
        if not isinstance(layer, CONVOLUTIONS):
            continue
        reason = PART if id(layer) in parts else _obstacle(layer, sizes)
        if reason is None and not selection(path, layer):
            reason = NOT_SELECTED
        if reason is None and any(owners[id(variable)] > 1 for variable in layer.variables):
            reason = SHARES
        if reason is None:
            chosen.append((path, layer))
        else:
            left.append(Left(path, type(layer).__name__, reason))
    return chosen, left


def _obstacle(layer: Any, sizes: frozenset[tuple[int, ...]]) -> str | None:
    """Return why a convolution cannot become a BSConv; None where it can."""
    reason = obstacle(layer)
    if reason == ALREADY:
        return OVER_PARAMETERIZED
    if reason not in (None, ONE_TAP):
        return reason
    if layer.kernel_size not in sizes:
        return other_size(layer.kernel_size)
    if isinstance(layer, (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)):
        return SEPARABLE
    ordinary = ("u", type(layer)) in LAYERS  # or else depthwise
    return None if ordinary and layer.groups == 1 else GROUPED


def _made(path: str, layer: Any, variant: str, options: dict[str, Any]) -> Any:
    require_built(path, layer)
    try:
        return LAYERS[variant, type(layer)].from_conv(layer, **options)
    except ValueError as error:
        raise ValueError(f"{place(path)}: {error}") from None
