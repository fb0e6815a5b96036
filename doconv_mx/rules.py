"""The layers of Gluon whose kernel is a formula of the core: one line for each such kind."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from mxnet.gluon import nn

from doconv_core.kinds.branches import BRANCHED
from doconv_core.kinds.expand import EXPAND
from doconv_core.kinds.rule import KERNEL, Rule, broadcast, evaluated
from doconv_core.models.view import Leave, ModelView
from doconv_mx.composed import ComposedConv, ComposedLayers, Ordinary
from doconv_mx.ordinary import channels_per_group, is_channels_last
from doconv_mx.parameter import native


class RuleConv(ComposedConv[Ordinary]):
    """What the layers of every such kind and rank share. Parameters: the kind's entries; `bias`.

    in_channels is to be given: which entries there are, and the formula, ask for it.
    """

    kind: Rule

    def _make(self, given: SimpleNamespace, own: dict[str, Any]) -> None:
        """Create the layer's parameters; ValueError where the input channels are not given."""
        if not given.in_channels:
            raise ValueError(
                f"in_channels of a {type(self).__name__} must be given; received in_channels=0."
            )
        super()._make(given, own)

    def compose(self, F: Any, entries: Mapping[str, Any]) -> Any:
        """Return the kernel; float16 is composed in float32 and rounded once."""
        spec, dtype = self.spec, np.dtype(self.weight.dtype).name
        if len(entries) == 1:
            return entries["weight"]
        computed, last = "float32" if dtype == "float16" else dtype, is_channels_last(self)
        values = {}
        for name, letters in self.kind.axes(spec).items():
            value = F.cast(entries[name].as_nd_ndarray(), dtype=computed)
            if name == "weight" and last:
                value = F.reshape(value, shape=(0, -1, spec.sizes["i"]))
                value = F.transpose(value, axes=(0, 2, 1))
            values[name] = F.reshape(value, shape=[spec.sizes[axis] for axis in letters])
        operators = _Operators(F, values["weight"])
        made = operators.add_product, operators.identity, operators.array
        found = evaluated(self.kind, values, spec, *made)
        kernel, shape = found[KERNEL], self.kind.conv(spec).kernel_shape
        if last:
            kernel = F.reshape(kernel, shape=(shape[0], shape[1], -1))
            kernel = F.transpose(kernel, axes=(0, 2, 1))
            shape = (shape[0], *shape[2:], shape[1])
        return native(F.cast(F.reshape(kernel, shape=shape), dtype=dtype))


class _Operators:
    """The operators that a formula asks for, of arrays or symbols. like: a value, for constants."""

    def __init__(self, F: Any, like: Any) -> None:
        self._f = F
        first = F.slice_axis(F.reshape(like, shape=(-1,)), axis=0, begin=0, end=1)
        self._one = F.ones_like(first)  # of like's dtype, and where that is

    def identity(self, size: int) -> Any:
        """Return a unit matrix."""
        return self._f.linalg_makediag(self._f.broadcast_axis(self._one, axis=0, size=size))

    def array(self, values: Any) -> Any:
        """Return a small array, number by number: a symbol has no other constants."""
        array = np.array(values)
        numbers = [self._one * float(value) for value in array.reshape(-1)]
        return self._f.reshape(self._f.concat(*numbers, dim=0), shape=array.shape)

    def add_product(
        self, total: Any, subscripts: str, sizes: Mapping[str, int], *factors: Any
    ) -> Any:
        """Return the sum and a product."""
        product = self._product(subscripts, sizes, *factors)
        return product if total is None else self._f.broadcast_add(total, product)

    def _product(self, subscripts: str, sizes: Mapping[str, int], *factors: Any) -> Any:
        """Return a product, as a batch of matrices where letters are summed over."""
        shapes = broadcast(subscripts, sizes)
        if shapes is not None:
            parts = [self._f.reshape(f, shape=s) for f, s in zip(factors, shapes, strict=True)]
            return self._f.broadcast_mul(*parts) if len(parts) == 2 else parts[0]
        inputs, result = subscripts.split("->")
        left, right = inputs.split(",")
        batch = [x for x in result if x in left and x in right]
        summed = [x for x in left if x in right and x not in result]
        rows = [x for x in left if x not in right]
        columns = [x for x in right if x not in left]
        first = self._matrices(factors[0], left, (batch, rows, summed), sizes)
        second = self._matrices(factors[1], right, (batch, summed, columns), sizes)
        found = [*batch, *rows, *columns]
        product = self._f.batch_dot(first, second)
        product = self._f.reshape(product, shape=[sizes[x] for x in found])
        return self._f.transpose(product, axes=[found.index(x) for x in result])

    def _matrices(
        self, factor: Any, letters: str, axes: tuple[list[str], ...], sizes: Mapping[str, int]
    ) -> Any:
        order = [letters.index(x) for part in axes for x in part]
        shape = [prod(sizes[x] for x in part) for part in axes]
        return self._f.reshape(self._f.transpose(factor, axes=order), shape=shape)


class RuleLayers(ComposedLayers):
    """The layers of such a kind. Their input channels must be known."""

    operators = frozenset({"Reshape"})  # behind the cast, which is looked through

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the sizes that the layer will have; `Leave` where they are not known."""
        if not channels_per_group(layer):
            raise Leave("its input channels are not known yet; run the model once, then it can be")
        return super().prepare(view, layer, options)


def rule_layers(kind: Rule, word: str, module: str = __name__) -> tuple[type[Any], ...]:
    """Return a kind's layers of each rank, whose names begin with this word.

    module: in which they will have these names.
    """
    base, told = (
        kind.base(RuleConv, word, module),
        ("mxnet.gluon.nn", "4, 4, 3", "layer.initialize()"),
    )
    ordinary = enumerate((nn.Conv1D, nn.Conv2D, nn.Conv3D), 1)
    return tuple(kind.layer(base, cls, *told, rank=rank) for rank, cls in ordinary)


_BRANCHES = rule_layers(BRANCHED, "Branches")
BranchesConv1D = _BRANCHES[0]
"""As `BranchesConv2D`, in one dimension."""
BranchesConv2D = _BRANCHES[1]
"""Layers of `mxnet.gluon.nn` whose kernel is a sum of scaled smaller ones, to be folded.

They take the ordinary layer's arguments, and by keyword only `branches`: one of repvgg, acnet, dbb,
ecb, orepa, or names of branches, kxk among them, as the guide to kinds of layers lists them.
Source: OREPA, arXiv 2204.00826.

>>> layer = BranchesConv2D(4, 4, 3, branches="dbb")
>>> layer.initialize()
>>> layer(mx.nd.ones((1, 4, 8, 8))).shape
(1, 4, 6, 6)
"""
BranchesConv3D = _BRANCHES[2]
"""As `BranchesConv2D`, in three dimensions."""

_EXPAND = rule_layers(EXPAND, "Expand")
ExpandConv1D = _EXPAND[0]
"""As `ExpandConv2D`, in one dimension."""
ExpandConv2D = _EXPAND[1]
"""Layers of `mxnet.gluon.nn` whose kernel is that of a chain of wider ones, to be folded.

They take the ordinary layer's arguments, and by keyword only `ratio`: how many times the channels
the chain has inside, at least 2; `expand_inputs`: whether the inputs are expanded too.
Source: ExpandNets, arXiv 1811.10495; SESR, arXiv 2103.09404.

>>> layer = ExpandConv2D(4, 4, 3, ratio=3)
>>> layer.initialize()
>>> layer(mx.nd.ones((1, 4, 8, 8))).shape
(1, 4, 6, 6)
"""
ExpandConv3D = _EXPAND[2]
"""As `ExpandConv2D`, in three dimensions."""


BRANCHES, EXPANSIONS = (RuleLayers(*layers) for layers in (_BRANCHES, _EXPAND))
