"""The loss that keeps the rows of pointwise weights orthonormal, as BSConv-S is trained with."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from doconv_core.maths.orthonormal import ALPHA, as_weight, check_rows
from doconv_core.models.orthonormal import check_convolution, check_pointwise, counted, marked
from doconv_core.models.received import no_model
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
        raise no_model("torch.nn.Module", model)
    alpha = as_weight("alpha", alpha)
    types = "BSConvS1d, BSConvS2d or BSConvS3d"
    first, *others = counted(model, model.modules(), LAYER_KINDS, _ConvNd, types)
    total = _norm(first.weight)
    for layer in others:
        total = total + _norm(layer.weight).to(total.device)
    return alpha * total


def has_orthonormal(model: nn.Module) -> bool:
    """Return whether a model has a weight that `orthonormality_loss` counts."""
    return bool(marked(model.modules(), LAYER_KINDS, _ConvNd))


def mark_orthonormal(conv: Conv) -> Conv:
    """Let `orthonormality_loss` count this convolution's weight; return the convolution.

    For the linear pointwise convolutions of MobileNetV2 and V3 blocks. The mark is the attribute
    `orthonormal`; copies and files of the module have it too.
    Raises TypeError for what is no convolution, ValueError for one that is not pointwise, and for
    one with more output channels than input channels, whose rows cannot be orthonormal; where those
    are not known yet, `orthonormality_loss` does.
    Source: BSConv, arXiv 2003.13549, on MobileNetV2 and V3.

    >>> mark_orthonormal(torch.nn.Conv2d(8, 4, 1)).orthonormal
    True
    """
    transposed = isinstance(conv, _ConvTransposeNd)
    check_convolution(conv, isinstance(conv, _ConvNd) and not transposed)
    channels = (conv.out_channels, conv.in_channels)  # of a lazy one, 0 until it is called
    check_pointwise(conv.kernel_size, conv.groups, channels if all(channels) else None)
    conv.orthonormal = True  # type: ignore[assignment]  # modules are said to have tensors only
    return conv


def _norm(weight: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        given: Any = weight  # where fully_shard has divided it, each process needs the whole
        w: Tensor = (given.full_tensor() if hasattr(weight, "full_tensor") else weight).flatten(1)
        check_rows(*w.shape)
        w = w.float() if w.dtype.itemsize < 4 else w
        excess = w @ w.T - torch.eye(len(w), dtype=w.dtype, device=w.device)
        norm: Tensor = torch.linalg.vector_norm(excess)
        return norm
