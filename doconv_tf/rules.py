"""The layers of Keras whose kernel is a formula of the core: one line for each such kind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import keras
from keras import ops

from doconv_core.kinds.branches import BRANCHED
from doconv_core.kinds.expand import EXPAND
from doconv_core.kinds.rule import KERAS_ORDER, KERNEL, Rule, broadcast, evaluated
from doconv_tf.composed import ComposedConv, ComposedLayers, Ordinary

HALF = ("float16", "bfloat16")


class RuleConv(ComposedConv[Ordinary]):
    """What the layers of every such kind and rank share. Variables: the kind's entries; `bias`."""

    kind: Rule

    def compose(self, entries: Mapping[str, Any]) -> Any:
        """Return the kernel; of half types it is composed in float32 and rounded once."""
        spec, dtype = self.spec, keras.backend.standardize_dtype(entries["weight"].dtype)
        values, computed = {}, "float32" if dtype in HALF else dtype
        for name, letters in self.kind.axes(spec).items():
            value = ops.cast(ops.convert_to_tensor(entries[name]), computed)
            if name == "weight":
                letters = "".join(sorted(letters, key=KERAS_ORDER.index))
            value = ops.reshape(value, [spec.sizes[axis] for axis in letters])
            axes = sorted(range(len(letters)), key=lambda n: KERAS_ORDER.index(letters[n]))
            in_order = axes == list(range(len(letters)))
            values[name] = value if in_order else ops.transpose(value, axes)
        made = partial(ops.eye, dtype=computed), partial(ops.convert_to_tensor, dtype=computed)
        found = evaluated(self.kind, values, spec, _add_product, *made, order=KERAS_ORDER)
        return ops.cast(found[KERNEL], dtype)


def _add_product(total: Any, subscripts: str, sizes: Mapping[str, int], *factors: Any) -> Any:
    """Return the sum and a product of tensors, or a single one that is broadcast."""
    shapes = broadcast(subscripts, sizes)
    if shapes is None:
        product = ops.einsum(subscripts, *factors)
    else:
        first, *rest = (ops.reshape(f, shape) for f, shape in zip(factors, shapes, strict=True))
        product = first * rest[0] if rest else first
    return product if total is None else total + product


def rule_layers(kind: Rule, word: str, module: str = __name__) -> tuple[type[Any], ...]:
    """Return a kind's layers of each ordinary type, whose names begin with this word.

    module: in which they will have these names.
    """
    base, made = kind.base(RuleConv, word, module), []
    for name, rank in (("Conv1D", 1), ("Conv2D", 2), ("Conv3D", 3),
                       ("DepthwiseConv1D", 1), ("DepthwiseConv2D", 2)):  # fmt: skip
        own: dict[str, Any] = {"rank": rank}
        arguments = "4, 3"
        if name.startswith("Depthwise"):
            own |= {"layout": "*CN", "prefixes": {"weight": "depthwise"}}
            arguments = "3"
        told = "keras.layers", arguments, f"layer.build({(1, *(8,) * rank, 4)})"
        cls = kind.layer(base, getattr(keras.layers, name), *told, **own)
        made.append(keras.saving.register_keras_serializable("doconv")(cls))
    return tuple(made)


_BRANCHES = rule_layers(BRANCHED, "Branches")
BranchesConv1D = _BRANCHES[0]
"""As `BranchesConv2D`, in one dimension."""
BranchesConv2D = _BRANCHES[1]
"""Layers of `keras.layers` whose kernel is a sum of scaled smaller ones, to be folded.

They take the ordinary layer's arguments, and by keyword only `branches`: one of repvgg, acnet, dbb,
ecb, orepa, or names of branches, kxk among them, as the guide to kinds of layers lists them.
Source: OREPA, arXiv 2204.00826.

>>> layer = BranchesConv2D(4, 3, branches="dbb")
>>> tuple(layer(keras.ops.ones((1, 8, 8, 4))).shape)
(1, 6, 6, 4)
"""
BranchesConv3D = _BRANCHES[2]
"""As `BranchesConv2D`, in three dimensions."""
BranchesDepthwiseConv1D = _BRANCHES[3]
"""As `BranchesConv2D`, in one dimension, depthwise."""
BranchesDepthwiseConv2D = _BRANCHES[4]
"""As `BranchesConv2D`, in two dimensions, depthwise."""

_EXPAND = rule_layers(EXPAND, "Expand")
ExpandConv1D = _EXPAND[0]
"""As `ExpandConv2D`, in one dimension."""
ExpandConv2D = _EXPAND[1]
"""Layers of `keras.layers` whose kernel is that of a chain of wider ones, to be folded.

They take the ordinary layer's arguments, and by keyword only `ratio`: how many times the channels
the chain has inside, at least 2; `expand_inputs`: whether the inputs are expanded too.
Source: ExpandNets, arXiv 1811.10495; SESR, arXiv 2103.09404.

>>> layer = ExpandConv2D(4, 3, ratio=3)
>>> tuple(layer(keras.ops.ones((1, 8, 8, 4))).shape)
(1, 6, 6, 4)
"""
ExpandConv3D = _EXPAND[2]
"""As `ExpandConv2D`, in three dimensions."""
ExpandDepthwiseConv1D = _EXPAND[3]
"""As `ExpandConv2D`, in one dimension, depthwise."""
ExpandDepthwiseConv2D = _EXPAND[4]
"""As `ExpandConv2D`, in two dimensions, depthwise."""


BRANCHES, EXPANSIONS = (ComposedLayers(*layers) for layers in (_BRANCHES, _EXPAND))
