"""The layers of PyTorch whose kernel is a formula of the core: one line for each such kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doconv_core.kinds.branches import BRANCHED
from doconv_core.kinds.expand import EXPAND
from doconv_core.kinds.rule import KERNEL, AddProduct, Rule, broadcast, evaluated, gradients
from doconv_core.maths.spec import ConvSpec
from doconv_torch.composed import ComposedConv, ComposedLayers, Ordinary
from doconv_torch.convolve import Form, is_cheap, may_convolve
from doconv_torch.matrix_products import is_tracing


class RuleConv(ComposedConv[Ordinary]):
    """What the layers of every such kind and rank share. Parameters: the kind's entries; `bias`."""

    kind: Rule

    def form(self, input: Tensor) -> Form | None:
        """Return the form for `convolve`; None where that is not what the layer does."""
        if not torch.is_grad_enabled() or is_tracing() or torch._C._len_torch_dispatch_stack():
            return None
        names = tuple(self.entries())
        if len(names) == 1 or not may_convolve(self, input):
            return None
        form = RuleForm(self.kind, self.spec, names)
        return form if is_cheap(form, input, self.stride) else None

    def composed_kernel(self) -> Tensor:
        """Return the kernel that the layer convolves with, `(O, I/g, *kernel_size)`.

        It is composed in the parameters' dtype, and differentiable. A kernel of one tap is `weight`
        itself.
        """
        entries = self.entries()
        if len(entries) == 1:
            return self.weight
        return RuleForm(self.kind, self.spec, tuple(entries)).recorded(*entries.values())

    def extra_repr(self) -> str:
        """Return the ordinary layer's description, with the options."""
        told = [f"{name}={getattr(self.spec, name)!r}" for name in self.kind.options]
        return ", ".join([super().extra_repr(), *told])  # type: ignore[no-untyped-call]


class RuleForm(NamedTuple):
    """How a kernel comes of its entries, as its kind says. names: theirs, in order."""

    kind: Rule
    spec: Any
    names: tuple[str, ...]

    @property
    def conv(self) -> ConvSpec:
        """The sizes of the kernel."""
        return self.kind.conv(self.spec)

    @property
    def cost(self) -> float:
        """The positions at which a convolution has as many multiply-accumulates."""
        return self.kind.composition_macs(self.spec) / prod(self.conv.kernel_shape)

    def kernel(self, *entries: Tensor) -> Tensor:
        """Return the kernel where nothing is recorded."""
        return self._kernel(entries, _add_product_inplace)

    def recorded(self, *entries: Tensor) -> Tensor:
        """Return the kernel by operations that are differentiable."""
        return self._kernel(entries, _add_product)

    def _kernel(self, entries: Sequence[Tensor], add_product: AddProduct) -> Tensor:
        kernel: Tensor = self._evaluated(entries, add_product)[KERNEL]
        return kernel.reshape(self.conv.kernel_shape)

    def gradients(
        self, by_kernel: Tensor, entries: Sequence[Tensor], needed: Sequence[bool], recorded: bool
    ) -> Sequence[Tensor | None]:
        """Return the entries' gradients from the kernel's; None for what is not needed."""
        known, sizes = self._evaluated(entries, _add_product, kernel=False), self.spec.sizes
        letters = self.kind.axes(self.spec)["weight"]
        toward = by_kernel.reshape([sizes[letter] for letter in letters])
        without = [name for name, need in zip(self.names, needed, strict=True) if not need]
        found = gradients(self.kind, known, toward, self.spec, torch.einsum, without)
        return [
            found[name].reshape(entry.shape) if need else None
            for name, entry, need in zip(self.names, entries, needed, strict=True)
        ]

    def _evaluated(
        self, entries: Sequence[Tensor], add_product: AddProduct, kernel: bool = True
    ) -> dict[str, Any]:
        axes, sizes = self.kind.axes(self.spec), self.spec.sizes
        values = {
            name: entry.reshape([sizes[axis] for axis in axes[name]])
            for name, entry in zip(self.names, entries, strict=True)
        }
        like: dict[str, Any] = {"dtype": entries[0].dtype, "device": entries[0].device}
        made = partial(torch.eye, **like), partial(torch.tensor, **like)
        return evaluated(self.kind, values, self.spec, add_product, *made, kernel=kernel)


def _add_product(
    total: Tensor | None, subscripts: str, sizes: Mapping[str, int], *factors: Tensor
) -> Tensor:
    """Return the sum and a product of tensors, or a single one that is broadcast."""
    if total is None:
        return _product(subscripts, sizes, factors)
    by_taps = _by_taps(subscripts, sizes, factors)
    if by_taps is None:
        return total + _product(subscripts, sizes, factors)
    return torch.addmm(total.flatten(0, -2), *by_taps).reshape(total.shape)


def _add_product_inplace(
    total: Tensor | None, subscripts: str, sizes: Mapping[str, int], *factors: Tensor
) -> Tensor:
    """As `_add_product`, into the sum's own memory, which is nobody else's."""
    if total is None:
        product = _product(subscripts, sizes, factors)
        return product.contiguous() if factors[1:] else product.clone()
    by_taps = _by_taps(subscripts, sizes, factors)
    if by_taps is None:
        return total.add_(_product(subscripts, sizes, factors))
    total.view(-1, total.shape[-1]).addmm_(*by_taps)
    return total


def _by_taps(
    subscripts: str, sizes: Mapping[str, int], factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return the matrices whose product smaller kernels by their taps are; None for others.

    That is one pass over the kernel, and in backward a product.
    """
    # Ranks and sizes are read of the letters: what traces symbolically knows no others.
    left, *right = subscripts.split("->")[0].split(",")
    if not right or not len(right[0]) < 3 <= len(left):
        return None
    *rows, columns = (sizes[letter] for letter in right[0])
    return factors[0].reshape(-1, prod(rows)), factors[1].reshape(prod(rows), columns)


def _product(subscripts: str, sizes: Mapping[str, int], factors: Sequence[Tensor]) -> Tensor:
    """Return a product of tensors, or a single one that is broadcast."""
    shapes = broadcast(subscripts, sizes)
    if shapes is None:
        return torch.einsum(subscripts, *factors)
    first, *rest = (each.reshape(shape) for each, shape in zip(factors, shapes, strict=True))
    return first * rest[0] if rest else first


def rule_layers(kind: Rule, word: str, module: str = __name__) -> tuple[type[Any], ...]:
    """Return a kind's layers of each rank, whose names begin with this word.

    module: in which they will have these names.
    """
    base, told = kind.base(RuleConv, word, module), ("torch.nn", "4, 4, 3")
    ordinary = enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)
    return tuple(kind.layer(base, cls, *told, rank=rank) for rank, cls in ordinary)


_BRANCHES = rule_layers(BRANCHED, "Branches")
BranchesConv1d = _BRANCHES[0]
"""As `BranchesConv2d`, in one dimension."""
BranchesConv2d = _BRANCHES[1]
"""Layers of `torch.nn` whose kernel is a sum of scaled smaller ones, to be folded.

They take the ordinary layer's arguments, and by keyword only `branches`: one of repvgg, acnet, dbb,
ecb, orepa, or names of branches, kxk among them, as the guide to kinds of layers lists them.
Source: OREPA, arXiv 2204.00826.

>>> BranchesConv2d(4, 4, 3, branches="dbb").fold()
Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))
"""
BranchesConv3d = _BRANCHES[2]
"""As `BranchesConv2d`, in three dimensions."""

_EXPAND = rule_layers(EXPAND, "Expand")
ExpandConv1d = _EXPAND[0]
"""As `ExpandConv2d`, in one dimension."""
ExpandConv2d = _EXPAND[1]
"""Layers of `torch.nn` whose kernel is that of a chain of wider ones, to be folded.

They take the ordinary layer's arguments, and by keyword only `ratio`: how many times the channels
the chain has inside, at least 2; `expand_inputs`: whether the inputs are expanded too.
Source: ExpandNets, arXiv 1811.10495; SESR, arXiv 2103.09404.

>>> ExpandConv2d(4, 4, 3, ratio=3).fold()
Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))
"""
ExpandConv3d = _EXPAND[2]
"""As `ExpandConv2d`, in three dimensions."""


BRANCHES, EXPANSIONS = (ComposedLayers(*layers) for layers in (_BRANCHES, _EXPAND))
