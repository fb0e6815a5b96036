"""What the BSConv layers of a model fold to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import keras
from doconv_core.kinds.bsconv_model import Choice, choice

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import REPLACED, SUBCLASS, Left, place
from doconv_tf.bsconv import is_own
from doconv_tf.bsconv_fold import folded, is_changed
from doconv_tf.bsconv_layer import _BSConv
from doconv_tf.convolutions import is_replaced
from doconv_tf.surgery import require_built
from doconv_tf.view import first_occurrences


class Plan(NamedTuple):
    """What the BSConv layers of a model fold to, by the layer's id; None for the same parts.

    choices: what each form of each would cost. left: those that are left, which may compute
    something else.
    """

    layers: dict[int, keras.Layer | None]
    choices: tuple[Choice, ...]
    left: tuple[Left, ...]


def plan_bsconvs(model: keras.Layer, form: str) -> Plan:
    """Return what the model's BSConv layers fold to, and change nothing.

    Raises NotFoldable, with the layer's path, where `form` would not be exact.
    """
    layers: dict[int, keras.Layer | None] = {}
    choices, left = [], []
    for path, layer in first_occurrences(model):
        if not isinstance(layer, _BSConv):
            continue
        require_built(path, layer)
        if form == "keep" and not is_own(layer):
            reason = REPLACED if is_replaced(layer) else SUBCLASS
            left.append(Left(path, type(layer).__name__, reason))
            continue
        layers[id(layer)] = _folded(path, layer, form)
        choices.append(_choice(path, layer))
    return Plan(layers, tuple(choices), tuple(left))


def _folded(path: str, layer: _BSConv, form: str) -> keras.Layer | None:
    if form == "keep" or (form == "merge" and is_own(layer) and not is_changed(layer)):
        return None
    try:
        return folded(layer, form)
    except NotFoldable as error:
        raise NotFoldable(f"{place(path)}: {error}") from None


def _choice(path: str, layer: Any) -> Choice:
    normed = any(isinstance(part, keras.layers.BatchNormalization) for part in layer.layers)
    spec = replace(layer.spec, with_bn=normed)
    return choice(path, type(layer).__name__, spec, layer.strides, bias=layer.bias is not None)
