"""Folding batch norms of evaluation mode into the convolutions before them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from doconv_core.models.report import HOOKED, NOT_FINITE, REPLACED, SHARED, SUBCLASS, behind
from doconv_torch.ordinary import HOOKS, Owners, is_replaced, memory, obstacle

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What batch norm's own constructor sets, and an identity lacks.
ATTRIBUTES = ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group")


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


def pair_obstacle(conv: Any, norm: Any, touched: Set[nn.Module], held: Owners) -> str | None:
    """Return why this convolution and this batch norm cannot be fused.

    touched: the modules whose parameters are used other than by calling them.
    """
    reason = obstacle(conv)
    if reason is not None:
        return behind(reason)
    if "bias" in vars(conv):
        return "the bias of the convolution before it is computed before each call"
    hooks = (*HOOKS, "_state_dict_hooks", "_load_state_dict_pre_hooks")
    if any(getattr(module, name) for module in (conv, norm) for name in hooks):
        return HOOKED
    if norm.num_features != conv.out_channels:
        return f"it has {norm.num_features} channels after a convolution of {conv.out_channels}"
    if conv in touched or norm in touched:
        return SHARED
    if any(
        len(held[memory(p)]) > 1
        for module in (conv, norm)
        for p in module._parameters.values()
        if p is not None
    ):
        return SHARED
    return None


def fuse(conv: Any, norm: Any) -> str | None:
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


def _fused(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the kernel and bias, computed in float64 and rounded once."""
    wide = torch.float32 if conv.weight.device.type == "mps" else torch.float64
    values: tuple[Any, ...] = (
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    widened: list[Any] = [v.to(wide) if isinstance(v, Tensor) else v for v in values]
    weight, bias = fuse_conv_bn_weights(*widened)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
