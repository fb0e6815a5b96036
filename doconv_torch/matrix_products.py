"""Fast forms of the composition on the CPU, and the rule which of them a layer takes.

Two forms compute `W + W·Dᵀ` and its gradients, the same up to rounding, and write nothing between.
One is compiled, where the package was installed with a C compiler. The other uses PyTorch's matrix
products: for one input channel they are `(O, S)·(S, M)`, too narrow for a processor to be fast at,
but `n` channels with their D as the blocks of a diagonal, `(O, n·S)·(n·S, n·M)`, take less time for
`n` times the arithmetic, on strided views of W as it lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from doconv_core.maths.spec import ConvSpec

try:
    from doconv_torch import _composition
except ImportError:  # installed without a compiler
    _composition = None  # type: ignore[assignment]

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

# Beyond so many taps, D of 32 channels no longer fits in a core's second cache, for W to stream by.
# A product of PyTorch's is to have about so many columns.
COMPILED_TAPS = 27
COLUMNS = 18


class Form(Protocol):
    """A way to compute the composition of contiguous float arrays on the CPU."""

    def kernel(self, weight: Tensor, depthwise: Tensor) -> Tensor:
        """Return `W + W·Dᵀ`, in W's shape."""

    def gradients(
        self,
        gradient: Tensor,
        weight: Tensor,
        depthwise: Tensor,
        needed: Sequence[bool],
        owned: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return W's and D's gradients from the kernel's; None for what is not needed.

        owned: whether W's gradient may take the memory of the kernel's.
        """


def form(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Form | None:
    """Return the form to take; None where PyTorch's differentiable operations are better.

    That is so on other devices than the CPU, in half precision, where `S > M`, for a W whose input
    channels are last in memory, for W and D of two dtypes or of other shapes than `spec` says, and
    where operations are recorded: compilers find their own way.
    """
    other = (
        spec.depth_multiplier != spec.taps
        # Before they are asked anything: symbolic tracing gives proxies.
        or type(weight) not in (Tensor, nn.Parameter)
        or type(depthwise) not in (Tensor, nn.Parameter)
        or weight.device.type != "cpu"
        or weight.dtype not in (torch.float32, torch.float64)
        or not weight.is_contiguous()
        or not depthwise.is_contiguous()
        or torch.compiler.is_compiling()
        or is_tracing()
        # There is no public way to ask whether operations are counted, faked or traced.
        or torch._C._len_torch_dispatch_stack()
    )
    if other or weight.dtype != depthwise.dtype or weight.device != depthwise.device:
        return None
    as_told = (weight.shape, depthwise.shape) == shapes(spec)
    return _form(spec, weight.dtype) if as_told else None


@lru_cache(maxsize=1024)
def shapes(spec: ConvSpec) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the shapes that W and D have in a layer of these sizes."""
    return spec.parameter_shape, spec.depthwise_shape


@lru_cache(maxsize=1024)
def _form(spec: ConvSpec, dtype: torch.dtype) -> Form | None:
    if _composition is not None and dtype == torch.float32 and spec.taps <= COMPILED_TAPS:
        return Compiled(spec)
    if spec.groups > 1:
        return None
    most = max(1, COLUMNS // spec.taps)
    return Blocks(max(n for n in range(1, most + 1) if spec.in_channels % n == 0))


class Compiled(NamedTuple):
    """The compiled form; see `_composition.c`."""

    spec: ConvSpec

    def kernel(self, weight: Tensor, depthwise: Tensor) -> Tensor:
        """Return `W + W·Dᵀ`, in W's shape."""
        kernel = torch.empty_like(weight)
        self._call(None, weight, depthwise, kernel, None)
        return kernel

    def gradients(
        self,
        gradient: Tensor,
        weight: Tensor,
        depthwise: Tensor,
        needed: Sequence[bool],
        owned: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return W's and D's gradients from the kernel's; None for what is not needed."""
        gradient = gradient.contiguous()
        by_weight = by_depthwise = None
        if needed[0]:
            by_weight = gradient if owned else torch.empty_like(weight)
        if needed[1]:
            by_depthwise = torch.empty_like(depthwise)
        self._call(gradient, weight, depthwise, by_weight, by_depthwise)
        return by_weight, by_depthwise

    def _call(
        self,
        gradient: Tensor | None,
        weight: Tensor,
        depthwise: Tensor,
        result: Tensor | None,
        by_depthwise: Tensor | None,
    ) -> None:
        spec = self.spec
        sizes = spec.out_channels_per_group, spec.in_channels_per_group, spec.taps, spec.groups
        if spec.in_channels_per_group == spec.out_channels_per_group == 1:
            # In memory the same as one group of one row, whose channels are treated side by side.
            sizes = 1, spec.in_channels, spec.taps, 1
        kernel = spec.out_channels * spec.in_channels_per_group * spec.taps
        square = spec.in_channels * spec.taps**2
        _composition.compose(
            _address(gradient, kernel), _address(weight, kernel), _address(depthwise, square),
            _address(result, kernel), _address(by_depthwise, square), *sizes,
            torch.get_num_threads(),
        )  # fmt: skip


def _address(array: Tensor | None, entries: int) -> int:
    """Return where an array is; RuntimeError where not so many entries lie there in a row.

    So it is where someone has assigned to `.data`, or freed its memory, since the form was chosen.
    """
    if array is None:
        return 0
    there = array.untyped_storage().nbytes() // 4 - array.storage_offset()
    if (
        array.numel() != entries
        or there < entries
        or array.dtype != torch.float32
        or array.device.type != "cpu"
        or not array.is_contiguous()
    ):
        raise RuntimeError(
            f"W, D or the kernel's gradient must have {entries} entries of torch.float32, in a row "
            f"in the processor's memory; received {tuple(array.shape)} of {array.dtype} on "
            f"{array.device}, with {max(there, 0)} in memory. Was it changed after the forward "
            "pass, or its memory freed?"
        )
    return array.data_ptr()


class Blocks(NamedTuple):
    """PyTorch's matrix products of `channels` input channels each, without groups."""

    channels: int

    def kernel(self, weight: Tensor, depthwise: Tensor) -> Tensor:
        """Return `W + W·Dᵀ`, in W's shape."""
        return self._plus_product(weight, self._diagonal(depthwise).transpose(1, 2))

    def gradients(
        self,
        gradient: Tensor,
        weight: Tensor,
        depthwise: Tensor,
        needed: Sequence[bool],
        owned: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return W's and D's gradients from the kernel's; None for what is not needed."""
        by_weight = by_depthwise = None
        gradient = gradient.contiguous()
        if needed[0]:
            by_weight = self._plus_product(gradient, self._diagonal(depthwise))
        if needed[1]:
            rows = self._matrices(gradient).transpose(1, 2)
            blocks = torch.bmm(rows, self._matrices(weight))  # of which the diagonal is meant
            blocks = blocks.unflatten(2, (self.channels, -1)).unflatten(1, (self.channels, -1))
            diagonal = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            by_depthwise = diagonal.reshape(depthwise.shape)
        return by_weight, by_depthwise

    def _plus_product(self, array: Tensor, diagonal: Tensor) -> Tensor:
        matrices, result = self._matrices(array), torch.empty_like(array)
        torch.add(matrices, torch.bmm(matrices, diagonal), out=self._matrices(result))
        return result

    def _matrices(self, array: Tensor) -> Tensor:
        """Return `(O, I, …)` as `I/n` matrices `(O, n·M)`, a view."""
        return array.view(len(array), array.shape[1] // self.channels, -1).transpose(0, 1)

    def _diagonal(self, depthwise: Tensor) -> Tensor:
        """Return D, `(I, M, M)`, with each `n` channels as the blocks of a diagonal."""
        n, taps = self.channels, depthwise.shape[1]
        if n == 1:
            return depthwise
        blocks = depthwise.new_zeros(len(depthwise) // n, n, taps, n, taps)
        each: Any = depthwise.view(-1, n, taps, taps)
        blocks.diagonal(dim1=1, dim2=3).copy_(each.permute(0, 2, 3, 1))
        return blocks.view(-1, n * taps, n * taps)
