"""Kernel composition in PyTorch: the kernel of W and D, and the W that a kernel becomes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.spec import ConvSpec


def compose(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
    """Return `W·(E + D)ᵀ`: one matrix product for each input channel, added to W as it is.

    weight: W, `(O, I/g, S)`, or in the kernel's shape where `S == M`. depthwise: D, `(I, M, S)`.
    Returns `(O, I/g, *kernel_size)`, with W's memory format. It is computed in the weights' dtype,
    under autocast too.
    """
    with without_autocast(weight.device):
        return _compose(weight, depthwise, spec)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a block in which operations on the device keep their dtypes."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _compose(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
    taps, multiplier = spec.taps, spec.depth_multiplier
    product = torch.bmm(as_matrices(weight, spec), depthwise.transpose(1, 2))
    product = from_matrices(product, spec).unflatten(-1, spec.kernel_size)
    if multiplier != taps:
        w = weight.unflatten(0, _split(spec)[:2])
        tiles = multiplier // taps
        w = w[..., : tiles * taps].unflatten(-1, (tiles, *spec.kernel_size)).sum(-spec.rank - 1)
        kernel = (w + product).reshape(spec.kernel_shape)
        return _channels_last(kernel, spec) if weight.stride(1) == 1 else kernel.contiguous()
    if spec.groups == 1:
        return _with_strides_of(weight, weight + product.squeeze(0), spec)
    w = weight.unflatten(0, _split(spec)[:2])
    return _with_strides_of(weight, (w + product).flatten(0, 1), spec)


def as_matrices(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return `(O, I/g, …)` as one `(O/g, …)` matrix for each of the I input channels."""
    split = weight.reshape(*_split(spec), -1)  # (g, o, i, …) -> (g, i, o, …)
    return split.transpose(1, 2).reshape(spec.in_channels, spec.out_channels_per_group, -1)


def from_matrices(matrices: Tensor, spec: ConvSpec) -> Tensor:
    """Return what `as_matrices` was given, as `(g, O/g, I/g, …)`."""
    g, o, i = _split(spec)
    return matrices.reshape(g, i, o, -1).transpose(1, 2)


def _split(spec: ConvSpec) -> tuple[int, int, int]:
    return spec.groups, spec.out_channels_per_group, spec.in_channels_per_group


def _with_strides_of(weight: Tensor, kernel: Tensor, spec: ConvSpec) -> Tensor:
    """Return the kernel with W's strides, where it is one input channel deep.

    Channels first and channels last are the same memory there, and the strides alone say which is
    meant: by them PyTorch chooses the convolution's algorithm and its output's format.
    """
    if spec.in_channels_per_group > 1 or kernel.stride() == weight.stride():
        return kernel
    return _channels_last(kernel, spec)


def _channels_last(array: Tensor, spec: ConvSpec) -> Tensor:
    """Return `(O, I/g, …)` with the input channels last in memory."""
    if spec.in_channels_per_group == 1:
        return array.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return array.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def as_weight(kernel: Tensor, spec: ConvSpec) -> Tensor:
    """Return the W that a kernel becomes, in the shape in which a layer keeps it.

    Where that is `(O, I/g, S)`, the input channels are last in memory if they were in the kernel.
    """
    if kernel.shape == spec.parameter_shape:
        return kernel
    weight = nn.functional.pad(kernel.flatten(2), (0, spec.depth_multiplier - spec.taps))
    return _channels_last(weight, spec) if kernel.stride(1) == 1 else weight
