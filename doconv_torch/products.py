"""Composition without transposed copies: a few input channels in each matrix product.

For one input channel the product is `(O, S)·(S, M)`, too narrow for a processor to be fast at. For
`n` of them, with their D as the blocks of a diagonal, it is `(O, n·S)·(n·S, n·M)`: `n` times the
arithmetic, and several times as fast. What is read and written are strided views of W, of the
kernel and of their gradients, as they lie in memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from doconv_core.spec import ConvSpec

# What benchmarks/training_step.py finds fastest: about so many columns in a product of few rows.
COLUMNS = 18


def channels(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> int:
    """Return how many input channels to multiply at once; 0 where the plain formula is better.

    That is so on other devices than the CPU, in types of half precision, with groups, where
    `S > M`, for a W whose input channels are last in memory, and where the operations are recorded:
    compilers find their own way.
    """
    plain = (
        spec.groups > 1
        or spec.depth_multiplier != spec.taps
        or weight.device.type != "cpu"
        or weight.dtype not in (torch.float32, torch.float64)
        or type(weight) not in (Tensor, nn.Parameter)
        or type(depthwise) not in (Tensor, nn.Parameter)
        or not weight.is_contiguous()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )
    return 0 if plain else _channels(spec.in_channels, spec.taps)


@lru_cache
def _channels(in_channels: int, taps: int) -> int:
    most = max(1, COLUMNS // taps)
    return max(n for n in range(1, most + 1) if in_channels % n == 0)


def times_transposed(weight: Tensor, depthwise: Tensor, n: int) -> Tensor:
    """Return `W + W·Dᵀ`, in W's shape. depthwise: D, `(I, M, M)`."""
    return _plus_product(weight, _diagonal(depthwise, n).transpose(1, 2), n)


def times(gradient: Tensor, depthwise: Tensor, n: int) -> Tensor:
    """Return `G + G·D`, W's gradient where the kernel's is G; in G's shape."""
    return _plus_product(gradient.contiguous(), _diagonal(depthwise, n), n)


def transposed_times(gradient: Tensor, weight: Tensor, n: int) -> Tensor:
    """Return `Gᵀ·W`, D's gradient where the kernel's is G, `(I, M, M)`."""
    rows = _matrices(gradient.contiguous(), n).transpose(1, 2)
    blocks = torch.bmm(rows, _matrices(weight, n))  # of which the diagonal is meant
    taps = blocks.shape[-1] // n
    blocks = blocks.view(-1, n, taps, n, taps).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2).reshape(-1, taps, taps)


def _plus_product(array: Tensor, diagonal: Tensor, n: int) -> Tensor:
    matrices = _matrices(array, n)
    product = torch.bmm(matrices, diagonal)
    result = torch.empty_like(array)
    torch.add(matrices, product, out=_matrices(result, n))
    return result


def _matrices(array: Tensor, n: int) -> Tensor:
    """Return `(O, I, …)` as `I/n` matrices `(O, n·M)`, a view."""
    return array.view(array.shape[0], array.shape[1] // n, -1).transpose(0, 1)


def _diagonal(depthwise: Tensor, n: int) -> Tensor:
    """Return D, `(I, M, M)`, with each `n` channels as the blocks of a diagonal."""
    if n == 1:
        return depthwise
    taps = depthwise.shape[-1]
    blocks = depthwise.new_zeros(depthwise.shape[0] // n, n, taps, n, taps)
    blocks.diagonal(dim1=1, dim2=3).copy_(depthwise.view(-1, n, taps, taps).permute(0, 2, 3, 1))
    return blocks.view(-1, n * taps, n * taps)
