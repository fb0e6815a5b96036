"""Layers of branches with batch norms, as this package has them, in files; and what they become.

A layer has its parts' entries, by the names that its rule gives them; which rule, which branches
and which sizes it has is told by these names and the shapes. It becomes the ordinary convolution
that `fold` makes of the layer, at the layer's own path.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from doconv_core.files.blocks import (
    BRANCHES,
    NORM,
    Block,
    KernelOf,
    Read,
    below,
    problems,
)
from doconv_core.files.entries import Array, Entry
from doconv_core.files.layers import BATCH_NORM, CONVOLUTION, Layer
from doconv_core.kinds.normed import SMALL, BranchedSpec, Conv, Kernel
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.separable import Normalization
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.layers import LayerForm

# Which rule a layer is of that has a part so called, beside the first branch; the first counts.
TOLD_BY = {
    "dense0_conv": "mobileone", "axis0_conv": "acnet", "sequence_conv": "dbb",
    "average_conv": "dbb", "small0_conv": "unireplknet", "small_conv": "replknet",
    "pointwise_norm": "repvgg", "identity_norm": "repvgg", "pointwise_conv": "qarepvgg",
}  # fmt: skip
FIRST = (("dense_conv", "dense_norm"), ("dense0_conv", "dense0_norm"))
PASSED_ON, INNER, SMALLER = "identity_norm", "sequence_conv", "small_conv"
PART = re.compile(
    r"(?:(?P<block>.+)\.)?(?P<own>(?:dense[0-9]*|pointwise|identity|axis[0-9]+|sequence|average|"
    r"small[0-9]*)_(?:conv|norm)2?|norm)",
    re.DOTALL,
)
NO_FORMS: Mapping[str, LayerForm] = MappingProxyType({})  # of a file that is no state
UNTOLD = (
    "nothing in the file tells whether its input is one of the branches, as it is where stride and "
    "padding keep the size: fold the model itself, before it is saved"
)


@dataclass(frozen=True)
class NormedBlock(Block):
    """A layer of branches. own: its parts, by name. sizes: of all of them."""

    own: Mapping[str, Layer] = field(default_factory=dict, kw_only=True)
    sizes: BranchedSpec | None = field(default=None, kw_only=True)

    def added_up(self, read: Read, kernel_of: KernelOf) -> tuple[Array, Array]:
        """Return the kernel and the bias of the convolution that it adds up to, in float64."""

        def values(layer: Layer) -> Kernel | Normalization:
            if layer.kind == CONVOLUTION:
                bias = layer.entries.get("bias")
                return Kernel(kernel_of(layer), None if bias is None else read(bias))
            arrays = {key: read(layer.entries[role]) for key, role in NORM.items()}
            return Normalization(epsilon=self.epsilon_of(layer), **arrays)

        assert self.sizes is not None  # as of one that can be folded
        return self.sizes.added_up({name: values(layer) for name, layer in self.own.items()})


def find_normed(
    layers: Sequence[Layer], entries: Mapping[str, Entry], forms: Mapping[str, LayerForm] = NO_FORMS
) -> list[Block]:
    """Return this package's layers of branches; with a note those whose parts make none.

    forms: what a state tells of its layers.
    """
    found: dict[tuple[str, str], dict[str, Layer]] = {}
    for layer in layers:
        match = PART.fullmatch(layer.path)
        if match is not None:
            found.setdefault((layer.part, match["block"] or ""), {})[match["own"]] = layer
    return [
        _block(part, path, own, entries, forms)
        for (part, path), own in found.items()
        if any({*first} <= {*own} for first in FIRST) and not {*TOLD_BY}.isdisjoint(own)
    ]


def _block(
    part: str, path: str, own: Mapping[str, Layer], entries: Mapping[str, Entry],
    forms: Mapping[str, LayerForm],
) -> NormedBlock:  # fmt: skip
    """Return the layer of these parts; with a note where they make none."""
    rule = next(rule for name, rule in TOLD_BY.items() if name in own)
    block = NormedBlock(
        path, BRANCHES, below(own), part=part, family=rule, layers=(*own.values(),), own=own
    )
    conv, norm = next(first for first in FIRST if {*first} <= {*own})
    try:
        sizes = _sizes(rule, own, own[conv], forms.get(own[conv].path))
        problem = next(_problems(sizes, own, entries), None)
    except ValueError as error:
        problem = str(error).rstrip(".")
    if problem is not None:
        return dataclasses.replace(block, note=f"named like a {rule} layer, but {problem}")
    sources = own[conv].entries["weight"], own[norm].entries["bias"]
    before, _, behind = sources[0].rpartition(conv)
    names = ("vars/0", "vars/1") if behind.startswith("/vars/") else ("weight", "bias")
    return dataclasses.replace(
        block, sizes=sizes, count=len(sizes.pieces), sources=sources, layout=own[conv].layout,
        spec=own[conv].spec, kernel_shape=sizes.conv.kernel_shape,
        folded=tuple(f"{before}{name}" for name in names),
    )  # fmt: skip


def _sizes(
    rule: str, own: Mapping[str, Layer], first: Layer, form: LayerForm | None
) -> BranchedSpec:
    """Return the sizes of a layer. first: its first convolution. ValueError where there are none.

    form: what a state tells of that; it alone tells of a `qarepvgg` whether its input is added.
    What the file does not tell makes no difference to the sum: padding, as all have one centre;
    dilation, which is of all alike; stride, but for whether the input is one of the branches; and
    groups, where no part tells the inputs.
    """
    shape = first.kernel_shape
    if shape is None or len(shape) < 3 or 0 in shape:
        raise ValueError(first.note or "its first branch has no convolution")
    outputs, channels, *size = shape
    inner, small = (getattr(own.get(n), "kernel_shape", None) for n in (INNER, SMALLER))
    passes_on = PASSED_ON in own
    inputs = outputs if passes_on else inner[0] if inner else channels
    where = None if form is None else form.geometry
    if rule == "qarepvgg" and outputs % channels == 0 and where is None:
        raise ValueError(UNTOLD)
    conv = ConvSpec(inputs, outputs, tuple(size), max(inputs // channels, 1))
    if form is not None and form.kind == "convolution":
        conv = form.spec if form.composed is None else form.composed.conv(form.spec)
    ones, stride = (1,) * conv.rank, (1 if passes_on else 2,) * conv.rank
    geometry = Geometry(stride, ones, tuple((k // 2, k // 2) for k in size))
    if rule == "qarepvgg" and where is not None:
        geometry = where
    branches = sum(name.startswith("dense") for name in own) // len(FIRST[0])
    return BranchedSpec(conv, geometry, rule, branches, small[-1] if small else SMALL)


def _problems(
    sizes: BranchedSpec, own: Mapping[str, Layer], entries: Mapping[str, Entry]
) -> Iterator[str]:
    """Yield why parts are not those of a layer of these sizes."""
    parts: Mapping[str, Any] = sizes.parts
    kinds = {n: CONVOLUTION if isinstance(p, Conv) else BATCH_NORM for n, p in parts.items()}

    def channels(name: str) -> int:
        part = parts[name]
        given: int = part.out_channels if isinstance(part, Conv) else part.channels
        return given

    def misfits(name: str, layer: Layer) -> Iterator[str]:
        fitting = parts[name].spec.kernel_shape
        if layer.kernel_shape != fitting:
            yield f"the kernel {layer.kernel_shape} of {name} is not {fitting}"

    return problems(kinds, own, channels, misfits, entries)
