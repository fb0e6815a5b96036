"""Folding one BSConv layer to ordinary ones: what its parts are, and what they become."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from doconv_core.kinds.bsconv import FORMS, as_choice
from doconv_core.kinds.bsconv_fold import (
    Folded,
    Normalization,
    Pointwise,
    Step,
    fold_dense,
    fold_pointwise,
)
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.geometry import Geometry, same, symmetric
from doconv_core.models.report import REPLACED
from doconv_torch.batchnorm import norm_obstacle
from doconv_torch.composed import ComposedConv
from doconv_torch.ordinary import HOOKS, is_replaced, kind_of, obstacle


def folded(layer: Any, form: str) -> nn.Module:
    """Return the new layers that a BSConv layer folds to, as its `fold` says."""
    as_choice("form", form, FORMS)
    _check_forward(layer)
    with torch.inference_mode(False), torch.no_grad():
        if form == "keep":
            parts = [(name, _ordinary(part)) for name, part in layer.named_children()]
            return nn.Sequential(OrderedDict(parts)).train(layer.training)
        _check_names(layer)
        pointwise = fold_pointwise(_steps(layer))
        depthwise = _ordinary(_depthwise(layer))
        if form == "merge":
            like = layer[0]
            merged = _convolution(layer, pointwise, like.weight, like.stride)
            parts = [("pointwise", merged), ("depthwise", depthwise)]
            return nn.Sequential(OrderedDict(parts)).train(layer.training)
        return _dense(layer, pointwise, depthwise).train(layer.training)


def _check_forward(layer: Any) -> None:
    """Raise NotFoldable where a BSConv layer may compute something else than its type does."""
    cls = type(layer)
    if cls.forward is not nn.Sequential.forward or "forward" in vars(layer):
        raise NotFoldable(
            f"{cls.__module__}.{cls.__qualname__} has a forward of its own, so the convolution it "
            "would be folded to might compute something else; form='keep' leaves it in a model."
        )


def _check_names(layer: Any) -> None:
    """Raise NotFoldable where a BSConv layer has not its own parts."""
    found = tuple(name for name, _ in layer.named_children())
    if found != layer.spec.names:
        raise NotFoldable(
            f"its parts are {', '.join(found) or 'none'}; expected {', '.join(layer.spec.names)}."
        )


def is_changed(layer: Any) -> bool:
    """Return whether merging a BSConv layer makes anything else of it than keeping it."""
    return len([part for part in layer.children() if type(part) is not nn.Identity]) > 2


def _ordinary(part: nn.Module) -> nn.Module:
    return part.fold() if isinstance(part, ComposedConv) else copy.deepcopy(part)


def _steps(layer: Any) -> list[Step]:
    """Return what comes before the depthwise convolution; NotFoldable names what is unknown."""
    steps: list[Step] = []
    for name, part in layer.named_children():
        if name == "depthwise" or type(part) is nn.Identity:  # of a batch norm that was fused
            continue
        _check_hooks(name, part)
        if isinstance(part, _BatchNorm):
            steps.append(_normalization(name, part))
        else:
            _check_convolution(name, part, layer)
            _check_pointwise(name, part)
            weight = as_array(part.weight).reshape(part.out_channels, -1)
            steps.append(Pointwise(weight, _bias(part)))
    return steps


def _normalization(name: str, norm: Any) -> Normalization:
    reason = norm_obstacle(norm)
    if reason is not None:
        advice = "; call model.eval() first" if norm.training else ""
        raise NotFoldable(f"its {name} cannot be folded: {reason}{advice}.")
    affine = norm.weight, norm.bias
    scale, offset = (None if value is None else as_array(value) for value in affine)
    mean, variance = as_array(norm.running_mean), as_array(norm.running_var)
    return Normalization(mean, variance, norm.eps, scale, offset)


def _depthwise(layer: Any) -> nn.Module:
    part: Any = layer.depthwise
    if not isinstance(part, ComposedConv):  # which its own fold checks
        _check_convolution("depthwise", part, layer)
    if not part.groups == part.in_channels == part.out_channels:
        raise NotFoldable(f"its depthwise is no depthwise convolution: {part}.")
    found: nn.Module = part
    return found


def _check_convolution(name: str, part: nn.Module, layer: Any) -> None:
    reason = obstacle(part) if type(part) is layer.ordinary else f"it is a {kind_of(part)}"
    if reason is not None or "bias" in vars(part):
        raise NotFoldable(
            f"its {name} cannot be folded: {reason or 'its bias is computed before each call'}; "
            f"expected a torch.nn.{layer.ordinary.__name__}."
        )


def _check_pointwise(name: str, part: Any) -> None:
    padded = not isinstance(part.padding, str) and any(part.padding)
    if part.weight[0].numel() != part.in_channels or set(part.stride) != {1} or padded:
        raise NotFoldable(f"its {name} is no pointwise convolution of stride 1: {part}.")


def _check_hooks(name: str, part: nn.Module) -> None:
    if any(getattr(part, hooks) for hooks in HOOKS):
        raise NotFoldable(f"its {name} has hooks, which would see other values; remove them first.")
    if is_replaced(part):
        raise NotFoldable(f"its {name} cannot be folded: {REPLACED}.")


def _dense(layer: Any, pointwise: Folded, depthwise: Any) -> nn.Module:
    _check_hooks("depthwise", layer.depthwise)
    kernel = as_array(depthwise.weight).reshape(layer.out_channels, -1)
    dense = fold_dense(pointwise, kernel, _bias(depthwise), _geometry(depthwise))
    return _convolution(
        layer, dense, depthwise.weight, depthwise.stride, depthwise.padding, depthwise.dilation,
        depthwise.padding_mode,
    )  # fmt: skip


def _geometry(conv: Any) -> Geometry:
    """Return where the convolution's taps meet its input."""
    stride, dilation = conv.stride, conv.dilation
    if conv.padding == "same":
        pads = same(conv.kernel_size, stride, dilation)
    else:
        pads = symmetric([0] * len(stride) if conv.padding == "valid" else conv.padding)
    return Geometry(stride, dilation, pads, conv.padding_mode)


def _convolution(
    layer: Any,
    values: Folded,
    like: Tensor,
    stride: Any,
    padding: Any = 0,
    dilation: Any = 1,
    padding_mode: str = "zeros",
) -> nn.Module:
    """Return an ordinary convolution with these values. like: a weight of its dtype and device."""
    taps = like.shape[2:]
    conv = layer.ordinary(
        values.kernel.shape[1], len(values.kernel), tuple(taps), stride, padding, dilation, 1,
        values.bias is not None, padding_mode, "meta", like.dtype,
    )  # fmt: skip
    trainable = any(parameter.requires_grad for parameter in layer.parameters())
    for name, value in (("weight", values.kernel), ("bias", values.bias)):
        if value is not None:
            tensor = as_tensor(value, like).reshape(getattr(conv, name).shape)
            setattr(conv, name, nn.Parameter(tensor, requires_grad=trainable))
    made: nn.Module = conv
    return made


def _bias(conv: Any) -> Any:
    return None if conv.bias is None else as_array(conv.bias)


def as_array(tensor: Tensor) -> Any:
    """Return a tensor's values in float64; zeros for one that has none, on the meta device."""
    if tensor.is_meta:
        return np.zeros(tuple(tensor.shape))
    return tensor.detach().cpu().double().numpy()


def as_tensor(values: Any, like: Tensor) -> Tensor:
    """Return an array as a tensor of the dtype and on the device of `like`, rounded once."""
    return torch.from_numpy(np.array(values)).to(like.dtype).to(like.device)
