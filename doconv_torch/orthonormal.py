"""The loss that keeps the rows of pointwise weights orthonormal, as BSConv-S is trained with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from doconv_core.kinds.bsconv import as_number
from doconv_core.kinds.orthonormal import ALPHA
from doconv_torch.kinds import LAYER_KINDS

Conv = TypeVar("Conv", bound=_ConvNd)


def orthonormality_loss(model: nn.Module, alpha: float = ALPHA) -> Tensor:
    """Return how far the model's pointwise weights are from orthonormal rows, to add to the loss.

    `alpha` times the sum of the Frobenius norms of `W·Wᵀ - I`, over the first pointwise weight of
    every BSConv-S layer, and the weight of every convolution given to `mark_orthonormal`; of each
    layer once. A scalar, computed in float32 or wider, under autocast too; on the device of the
    first weight. Where the rows are orthonormal its gradient is zero.

    model: the network, or what it is wrapped in (`DataParallel`, `DistributedDataParallel`,
    `torch.compile`): what counts is that the parameters are those that are trained. Call it outside
    the forward pass, once a step, beside the loss of the outputs.
    Raises ValueError for a model that has no such weight, as a sum of nothing would hide it;
    TypeError for what is not a module and for an alpha that is no number.
    Source: BSConv, arXiv 2003.13549, orthonormal regularization of subspace BSConv.

    >>> conv = torch.nn.Conv2d(2, 1, 1)
    >>> conv.weight = torch.nn.Parameter(torch.ones(1, 2, 1, 1))
    >>> orthonormality_loss(mark_orthonormal(conv), alpha=0.5).item()  # |1·1 + 1·1 - 1| / 2
    0.5
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; received {type(model).__qualname__}.")
    alpha = as_number("alpha", alpha)
    weights = list(_weights(model))
    if not weights:
        raise ValueError(
            f"the {type(model).__name__} has no weight to make orthonormal: neither a BSConvS1d, "
            "BSConvS2d or BSConvS3d, nor a convolution that was given to mark_orthonormal."
        )
    total = _norm(weights[0])
    for weight in weights[1:]:
        total = total + _norm(weight).to(total.device)
    return alpha * total


def mark_orthonormal(conv: Conv) -> Conv:
    """Let `orthonormality_loss` count this convolution's weight; return the convolution.

    For the linear pointwise convolutions of MobileNetV2 and V3 blocks. The mark is the attribute
    `orthonormal`; copies and files of the module have it too.
    Raises TypeError for what is no convolution, ValueError for one that is not pointwise.
    Source: BSConv, arXiv 2003.13549, on MobileNetV2 and V3.

    >>> mark_orthonormal(torch.nn.Conv2d(8, 4, 1)).orthonormal
    True
    """
    if not isinstance(conv, _ConvNd) or isinstance(conv, _ConvTransposeNd):
        raise TypeError(
            f"mark_orthonormal takes a convolution; received {type(conv).__qualname__}."
        )
    if set(conv.kernel_size) != {1} or conv.groups != 1:
        raise ValueError(
            "mark_orthonormal takes a pointwise convolution, of kernel_size 1 and groups=1; "
            f"received kernel_size={conv.kernel_size}, groups={conv.groups}."
        )
    conv.orthonormal = True  # type: ignore[assignment]  # modules are said to have tensors only
    return conv


def _weights(model: nn.Module) -> Iterator[Tensor]:
    seen: list[Any] = []
    for module in model.modules():
        found = [layers.orthonormal(module) for layers in LAYER_KINDS.values()]
        if isinstance(module, _ConvNd) and getattr(module, "orthonormal", False) is True:
            found.append(module)
        for layer in found:
            if layer is not None and not any(layer is other for other in seen):
                seen.append(layer)
                yield layer.weight


def _norm(weight: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.flatten(1)
        w = w.float() if w.dtype.itemsize < 4 else w
        excess = w @ w.T - torch.eye(len(w), dtype=w.dtype, device=w.device)
        norm: Tensor = torch.linalg.vector_norm(excess)
        return norm
