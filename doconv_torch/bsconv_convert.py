"""Folding the BSConv layers of a model where they stand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.kinds.bsconv_model import Choice, choice
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import REPLACED, SUBCLASS, Change, Left, place
from doconv_torch.bsconv import LAYERS, is_own
from doconv_torch.bsconv_fold import folded, is_changed
from doconv_torch.bsconv_layer import _BSConv
from doconv_torch.surgery import become
from doconv_torch.view import kind_of

_KINDS = {cls.__name__ for cls in LAYERS.values()}


class Plan(NamedTuple):
    """What the BSConv layers of a model fold to, by path; None for the same parts.

    choices: what each form of each would cost. left: those that are left, which may compute
    something else.
    """

    layers: dict[str, nn.Module | None]
    choices: tuple[Choice, ...]
    left: tuple[Left, ...]


def plan_bsconvs(model: nn.Module, form: str) -> Plan:
    """Return what the model's BSConv layers fold to, and change nothing.

    Raises NotFoldable, with the layer's path, where `form` would not be exact.
    """
    layers: dict[str, nn.Module | None] = {}
    choices, left = [], []
    for path, layer in model.named_modules():
        if not isinstance(layer, _BSConv):
            _check_script(path, layer, form)
            continue
        if form == "keep" and not is_own(layer):
            reason = REPLACED if "forward" in vars(layer) else SUBCLASS
            left.append(Left(path, kind_of(layer), reason))
            continue
        layers[path] = _folded(path, layer, form)
        # Parts may have been exchanged, for quantized ones perhaps; keeping them is exact.
        if isinstance(layer._modules.get("depthwise"), _ConvNd):
            choices.append(_choice(path, layer))
    return Plan(layers, tuple(choices), tuple(left))


def fold_bsconvs(layers: Mapping[str, nn.Module], plan: Plan) -> list[Change]:
    """Fold the BSConv layers as planned, in place, after their DO layers; return what was done.

    A depthwise convolution that stays is the one that was there.
    """
    changed = []
    for path, new in plan.layers.items():
        layer, kind = layers[path], kind_of(layers[path])
        if new is None:
            new = nn.Sequential(OrderedDict(layer.named_children()))
        elif isinstance(new, nn.Sequential):
            new.depthwise = layer.depthwise
        become(layer, new)
        changed.append(Change(path, kind, kind_of(new)))
    return changed


def _check_script(path: str, layer: nn.Module, form: str) -> None:
    if isinstance(layer, torch.jit.ScriptModule) and form != "keep" and kind_of(layer) in _KINDS:
        raise NotFoldable(
            f"{place(path)} is a {kind_of(layer)} that was compiled to TorchScript; fold the model "
            "first, and compile it afterwards."
        )


def _folded(path: str, layer: _BSConv, form: str) -> nn.Module | None:
    if form == "keep" or (form == "merge" and is_own(layer) and not is_changed(layer)):
        return None
    try:
        return folded(layer, form)
    except NotFoldable as error:
        raise NotFoldable(f"{place(path)}: {error}") from None


def _choice(path: str, layer: Any) -> Choice:
    normed = any(isinstance(part, _BatchNorm) for part in layer.children())
    spec = replace(layer.spec, with_bn=normed)
    return choice(path, kind_of(layer), spec, layer.stride, bias=layer.bias is not None)
