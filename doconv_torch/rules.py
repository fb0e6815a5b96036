"""The layers of PyTorch whose kernel is a formula of the core: one line for each such kind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.kinds.branches import BRANCHED
from doconv_core.kinds.expand import EXPAND
from doconv_core.kinds.rule import KERNEL, Rule, broadcast, evaluated
from doconv_torch.composed import ComposedConv, ComposedLayers, Ordinary


class RuleConv(ComposedConv[Ordinary]):
    """What the layers of every such kind and rank share. Parameters: the kind's entries; `bias`."""

    kind: Rule

    def composed_kernel(self) -> Tensor:
        """Return the kernel that the layer convolves with, `(O, I/g, *kernel_size)`.

        It is composed in the parameters' dtype, and differentiable. A kernel of one tap is `weight`
        itself.
        """
        weight, sizes = self.weight, self.spec.sizes
        values = {
            name: entry.reshape([sizes[axis] for axis in self.kind.axes(self.spec)[name]])
            for name, entry in self.entries().items()
        }
        if len(values) == 1:
            return weight
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        made = partial(torch.eye, **like), partial(torch.tensor, **like)
        found = evaluated(self.kind, values, self.spec, _add_product, *made)
        kernel: Tensor = found[KERNEL].reshape(self.kind.conv(self.spec).kernel_shape)
        return kernel

    def extra_repr(self) -> str:
        """Return the ordinary layer's description, with the options."""
        told = [f"{name}={getattr(self.spec, name)!r}" for name in self.kind.options]
        return ", ".join([super().extra_repr(), *told])  # type: ignore[no-untyped-call]


def _add_product(
    total: Tensor | None, subscripts: str, sizes: Mapping[str, int], *factors: Tensor
) -> Tensor:
    """Return the sum and a product of tensors, or a single one that is broadcast."""
    # Ranks and sizes are read of the letters: what traces symbolically knows no others.
    left, *right = subscripts.split("->")[0].split(",")
    if total is not None and right and len(right[0]) < 3 <= len(left):
        # Smaller kernels by their taps: one pass over the kernel, and in backward a product.
        *rows, columns = (sizes[letter] for letter in right[0])
        taps = factors[1].reshape(prod(rows), columns)
        product = torch.addmm(total.flatten(0, -2), factors[0].reshape(-1, prod(rows)), taps)
        return product.reshape(total.shape)
    shapes = broadcast(subscripts, sizes)
    if shapes is None:
        product = torch.einsum(subscripts, *factors)
    else:
        first, *rest = (each.reshape(shape) for each, shape in zip(factors, shapes, strict=True))
        product = first * rest[0] if rest else first
    return product if total is None else total + product


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
