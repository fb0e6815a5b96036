"""Folding batch norms of evaluation mode into the layers beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.models.report import (
    AXIS,
    HOOKED,
    NOT_DIRECT,
    NOT_FINITE,
    PADDED,
    REPLACED,
    SHARED,
    SUBCLASS,
    behind,
    read_elsewhere,
)
from doconv_torch.affine import BATCHNORMS, read
from doconv_torch.graph import Flow
from doconv_torch.ordinary import (
    HOOKS,
    TRANSPOSED_TYPES,
    Owners,
    is_replaced,
    memory,
    norm_source_obstacle,
    obstacle,
)

# What batch norm's own constructor sets, and an identity lacks.
ATTRIBUTES = ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group")

LINEAR_AXIS = "it may normalize another axis than the linear layer's features"


def norm_obstacle(norm: nn.Module) -> str | None:
    """Return why one of PyTorch's own batch norms cannot be fused; None where it can."""
    return SUBCLASS if type(norm) not in BATCHNORMS else _obstacle(norm)


def any_norm_obstacle(norm: nn.Module) -> str | None:
    """Return why a batch norm of whatever class cannot be fused; None where it can.

    One of a class of its own can where its code says that it is one, with layers behind it.
    """
    own = getattr(type(norm), "forward", None) not in [cls.forward for cls in BATCHNORMS]
    if not own:
        return norm_obstacle(norm)
    reason = _obstacle(norm)
    return SUBCLASS if reason is None and not any(read(norm, n) for n in (4, 3, 5, 2)) else reason


def _obstacle(norm: Any) -> str | None:
    if norm.training and isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return "in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if is_replaced(norm):
        return REPLACED
    if {"weight", "bias", "running_mean", "running_var"} & vars(norm).keys():
        return "its parameters are computed before each call"
    return None


def pair_obstacle(
    conv: Any, norm: Any, flow: Flow, held: Owners, *, ahead: bool = False
) -> str | None:
    """Return why this layer and the batch norm beside it cannot be fused.

    flow: what is seen of the model. ahead: whether the batch norm stands before the layer.
    """
    reason = norm_source_obstacle(conv)
    if reason is not None:
        return behind(reason)
    if "bias" in vars(conv):
        return "the bias of the convolution before it is computed before each call"
    hooks = (*HOOKS, "_state_dict_hooks", "_load_state_dict_pre_hooks")
    if any(getattr(module, name) for module in (conv, norm) for name in hooks):
        return HOOKED
    channels, expected = norm.running_mean.numel(), _channels(conv, ahead)
    if channels != expected:
        return f"it has {channels} channels after a convolution of {expected}"
    if any(
        (module, name) in flow.touched for module in (conv, norm) for name in module._parameters
    ):
        return SHARED
    if any(
        len(held.get(memory(p), ())) > 1  # none hold a bias that a fused norm has made
        for module in (conv, norm)
        for p in module._parameters.values()
        if p is not None
    ):
        return SHARED
    found = read(norm, conv.weight.dim())
    missed = flow.read.get(norm, set()) - set(found.after if found is not None else ())
    return read_elsewhere(missed) if missed else None


def _channels(layer: Any, ahead: bool) -> int:
    """Return how many channels a layer takes, or makes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if ahead else layer.out_features
    return int(layer.in_channels if ahead else layer.out_channels)


def fuse(conv: Any, norm: Any) -> str | None:
    """Fold a batch norm into the layer before it, in place; or return why that cannot be."""
    found = read(norm, conv.weight.dim())
    if found is None:
        return SUBCLASS if type(norm) not in BATCHNORMS else AXIS
    weight, scale = _wide(conv.weight), found.scale
    if isinstance(conv, TRANSPOSED_TYPES):
        groups, taps = conv.groups, weight.shape[2:]
        parts = weight.reshape(groups, -1, weight.shape[1], *taps)
        factors = scale.reshape(groups, 1, -1, *(1,) * len(taps))
        kernel = (parts * factors).reshape(weight.shape)
    else:
        kernel = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    bias = 0 if conv.bias is None else _wide(conv.bias)
    return _become(conv, norm, kernel, bias * scale + found.offset, found.after)


def fuse_ahead(norm: Any, conv: Any) -> str | None:
    """Fold a batch norm into the convolution behind it, in place; or return why that cannot be.

    Zeros around a convolution's input are not what the batch norm makes of zeros; all other padding
    repeats values.
    """
    padding = conv.padding
    if padding == "same":
        padding = [size - 1 for size in conv.kernel_size]
    zeros = padding != "valid" and any([padding] if isinstance(padding, int) else padding)
    if zeros and conv.padding_mode == "zeros":
        return PADDED
    found = read(norm, conv.weight.dim())
    if found is None or found.after or obstacle(conv) is not None:
        return NOT_DIRECT
    weight, groups, taps = _wide(conv.weight), conv.groups, conv.weight.shape[2:]
    parts = weight.reshape(groups, -1, weight.shape[1], *taps)
    by_input = (groups, 1, -1, *(1,) * len(taps))
    kernel = (parts * found.scale.reshape(by_input)).reshape(weight.shape)
    bias = (parts * found.offset.reshape(by_input)).flatten(2).sum(2).flatten()
    bias = bias if conv.bias is None else bias + _wide(conv.bias)
    return _become(conv, norm, kernel, bias, ())


def _become(
    conv: Any, norm: Any, weight: Tensor, bias: Tensor, after: tuple[str, ...]
) -> str | None:
    """Give a layer these parameters, and leave of the batch norm what stands behind it."""
    weight, bias = weight.to(conv.weight), bias.to(conv.weight)
    if not (weight.is_meta or (weight.isfinite().all() and bias.isfinite().all())):
        return NOT_FINITE
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(bias)
    conv.weight.grad = conv.bias.grad = None  # they were of other parameters
    for name in [*norm._parameters, *norm._buffers]:
        delattr(norm, name)
    norm._modules = {name: norm._modules[name] for name in after}
    for name in ATTRIBUTES:
        vars(norm).pop(name, None)
    norm.__class__ = nn.Sequential if after else nn.Identity
    return None


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where its device has that: it is rounded once, at the end."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
