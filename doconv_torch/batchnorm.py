"""Folding batch norms of evaluation mode into the convolutions before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from doconv_core.models.report import (
    HOOKED,
    NOT_DIRECT,
    NOT_FINITE,
    ONE_TAP,
    OUTPUT,
    REPLACED,
    SEVERAL,
    SHARED,
    SUBCLASS,
    Change,
    Left,
    behind,
    fused_into,
    place,
)
from doconv_torch.graph import Flow, flow
from doconv_torch.view import (
    HOOKS,
    Owners,
    is_convolution,
    is_replaced,
    kind_of,
    memory,
    obstacle,
    owners,
)

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What batch norm's own constructor sets, and an identity lacks.
ATTRIBUTES = ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group")


def fuse_batchnorms(model: nn.Module) -> tuple[list[Change], list[Left]]:
    """Fold the model's batch norms into its convolutions, in place; return which, and which not.

    A fused batch norm becomes a `torch.nn.Identity`, in its place.
    """
    changed, left = [], []
    candidates = {m: path for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    found = flow(model) if any(norm_obstacle(m) is None for m in candidates) else Flow()
    held = owners(model)
    paths = {module: path for path, module in model.named_modules()}
    for norm, path in candidates.items():
        kind = kind_of(norm)
        reason = norm_obstacle(norm) or _obstacle_in(found, norm, paths)
        if reason is None:
            conv = next(iter(found.sources[norm]))
            reason = _pair_obstacle(conv, norm, found, held) or _fuse(conv, norm)
        if reason is None:
            changed.append(Change(path, kind, fused_into(kind_of(conv))))
        else:
            left.append(Left(path, kind, reason))
    return changed, left


def norm_obstacle(norm: nn.Module) -> str | None:
    """Return why a batch norm cannot be fused, wherever it stands; None where it can."""
    if type(norm) not in BATCHNORMS:
        return SUBCLASS
    if norm.training:
        return "in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if is_replaced(norm):
        return REPLACED
    if {"weight", "bias", "running_mean", "running_var"} & vars(norm).keys():
        return "its parameters are computed before each call"
    return None


def _obstacle_in(found: Flow, norm: nn.Module, paths: dict[nn.Module, str]) -> str | None:
    """Return why a batch norm cannot be fused where it stands in the model."""
    sources = found.sources.get(norm, set())
    if not sources:
        return _why_unseen(found, norm, paths)
    if None in sources or not all(is_convolution(source) for source in sources):
        return NOT_DIRECT
    if len(sources) > 1:
        return SEVERAL
    (conv,) = sources
    if found.users[conv] != {norm}:
        return OUTPUT
    return None


def _why_unseen(found: Flow, norm: nn.Module, paths: dict[nn.Module, str]) -> str:
    path = paths[norm]
    above = [
        (paths[module], reason)
        for module, reason in found.untraced.items()
        if path.startswith(f"{paths[module]}.") or not paths[module]
    ]
    if not above:
        return "the model's forward pass does not call it"
    nearest, reason = max(above, key=lambda entry: len(entry[0]))
    return f"{place(nearest)} cannot be traced ({reason})"


def _pair_obstacle(conv: nn.Module, norm: nn.Module, found: Flow, held: Owners) -> str | None:
    """Return why this convolution and this batch norm cannot be fused."""
    reason = obstacle(conv)
    if reason not in (None, ONE_TAP):
        return behind(reason)
    if "bias" in vars(conv):
        return "the bias of the convolution before it is computed before each call"
    hooks = (*HOOKS, "_state_dict_hooks", "_load_state_dict_pre_hooks")
    if any(getattr(module, name) for module in (conv, norm) for name in hooks):
        return HOOKED
    if norm.num_features != conv.out_channels:
        return f"it has {norm.num_features} channels after a convolution of {conv.out_channels}"
    if conv in found.touched or norm in found.touched:
        return SHARED
    if any(
        len(held[memory(p)]) > 1
        for module in (conv, norm)
        for p in module._parameters.values()
        if p is not None
    ):
        return SHARED
    return None


def _fuse(conv: _ConvNd, norm: nn.Module) -> str | None:
    """Fold a batch norm into a convolution, in place; or return why that cannot be."""
    weight, bias = _fused(conv, norm)
    if not (weight.is_meta or (weight.isfinite().all() and bias.isfinite().all())):
        return NOT_FINITE
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(bias)
    conv.weight.grad = conv.bias.grad = None  # they were of other parameters
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        delattr(norm, name)
    for name in ATTRIBUTES:
        vars(norm).pop(name, None)
    norm.__class__ = nn.Identity
    return None


def _fused(conv: _ConvNd, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the kernel and bias, computed in float64 and rounded once."""
    wide = torch.float32 if conv.weight.device.type == "mps" else torch.float64
    values = (
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    weight, bias = fuse_conv_bn_weights(
        *(value.to(wide) if isinstance(value, Tensor) else value for value in values)
    )
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
