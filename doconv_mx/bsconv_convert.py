"""Folding the BSConv layers of a model where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from doconv_core.kinds.bsconv_model import Choice, choice
from mxnet.gluon import Block, HybridBlock, nn
from mxnet.gluon.nn.basic_layers import _BatchNorm
from mxnet.gluon.nn.conv_layers import _Conv

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import REPLACED, SUBCLASS, Change, Left, place
from doconv_mx.bsconv import is_own
from doconv_mx.bsconv_fold import as_sequence, is_changed
from doconv_mx.bsconv_layer import _BSConv
from doconv_mx.surgery import become
from doconv_mx.view import overridden, walk


class Plan(NamedTuple):
    """What the BSConv layers of a model fold to, by path; None for the same parts.

    choices: what each form of each would cost. left: those that are left, which may compute
    something else.
    """

    layers: dict[str, HybridBlock | None]
    choices: tuple[Choice, ...]
    left: tuple[Left, ...]


def plan_bsconvs(model: Block, form: str) -> Plan:
    """Return what the model's BSConv layers fold to, and change nothing.

    Raises NotFoldable, with the layer's path, where `form` would not be exact; ValueError, with the
    path, where it is to be computed of parameters that have no values yet.
    """
    layers: dict[str, HybridBlock | None] = {}
    choices, left = [], []
    for path, layer in walk(model):
        if not isinstance(layer, _BSConv):
            continue
        if form == "keep" and not is_own(layer):
            reason = REPLACED if overridden(layer) else SUBCLASS
            left.append(Left(path, type(layer).__name__, reason))
            continue
        layers[path] = _folded(path, layer, form)
        # Parts may have been exchanged; keeping them is exact. Sizes may not be known yet.
        if isinstance(layer._children.get("depthwise"), _Conv) and layer._inferred_in_channels():
            choices.append(_choice(path, layer))
    return Plan(layers, tuple(choices), tuple(left))


def fold_bsconvs(blocks: Mapping[str, Block], plan: Plan) -> list[Change]:
    """Fold the BSConv layers as planned, in place, after their DO-Conv layers; return what was
    done.

    A depthwise convolution that stays is the one that was there.
    """
    changed = []
    for path, new in plan.layers.items():
        layer: Any = blocks[path]
        kind = type(layer).__name__
        if new is None:
            as_sequence(layer)
        else:
            if isinstance(new, nn.HybridSequential):
                new.depthwise = layer.depthwise
            become(layer, new)
        changed.append(Change(path, kind, type(layer).__name__))
    return changed


def _folded(path: str, layer: _BSConv, form: str) -> HybridBlock | None:
    if form == "keep" or (form == "merge" and is_own(layer) and not is_changed(layer)):
        return None
    try:
        return layer.fold(bsconv=form)
    except (NotFoldable, ValueError) as error:
        raise type(error)(f"{place(path)}: {error}") from None


def _choice(path: str, layer: Any) -> Choice:
    normed = any(isinstance(part, _BatchNorm) for part in layer._children.values())
    spec = replace(layer.spec, with_bn=normed)
    stride = layer.depthwise._kwargs["stride"]
    return choice(path, type(layer).__name__, spec, stride, bias=layer.bias is not None)
