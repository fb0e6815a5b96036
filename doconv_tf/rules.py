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
    base = type(f"_{word}", (RuleConv,), {"kind": kind, "__module__": module})
    depthwise = {"layout": "*CN", "prefixes": {"weight": "depthwise"}}
    made = []
    for name, rank in (("Conv1D", 1), ("Conv2D", 2), ("Conv3D", 3),
                       ("DepthwiseConv1D", 1), ("DepthwiseConv2D", 2)):  # fmt: skip
        ordinary = getattr(keras.layers, name)
        example = "3" if name.startswith("Depthwise") else "4, 3"
        text = kind.told(f"{word}{name}", f"keras.layers.{name}", example)
        text = text.replace(">>> type", f">>> layer.build({(1, *(8,) * rank, 4)})\n    >>> type")
        about = {"ordinary": ordinary, "rank": rank, "__module__": module, "__doc__": text}
        about |= depthwise if name.startswith("Depthwise") else {}
        cls = type(f"{word}{name}", (base, ordinary), about)
        made.append(keras.saving.register_keras_serializable("doconv")(cls))
    return tuple(made)


_branches, _expand = rule_layers(BRANCHED, "Branches"), rule_layers(EXPAND, "Expand")
(BranchesConv1D, BranchesConv2D, BranchesConv3D,
 BranchesDepthwiseConv1D, BranchesDepthwiseConv2D) = _branches  # fmt: skip
(ExpandConv1D, ExpandConv2D, ExpandConv3D,
 ExpandDepthwiseConv1D, ExpandDepthwiseConv2D) = _expand  # fmt: skip

BRANCHES, EXPANSIONS = ComposedLayers(*_branches), ComposedLayers(*_expand)
